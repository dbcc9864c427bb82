"""What the observer knows of the service: names, counters, and what the supervisor says about processes.

All of it comes from outside and can arrive anew at any time, so an observer that was just started soon knows as much
as its predecessor did.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import add
from typing import Any

from gatekeeper.errors import SnapshotError
from gatekeeper.snapshot.bindings import Bindings
from gatekeeper.snapshot.counters import CAPACITY_BYTES, WORKER_SLOTS, End, ListenerSlot, WorkerSlot
from gatekeeper.snapshot.reader import Snapshot

ENDED_BY_US = (End.REVOKED, End.CUT, End.BANNED)
STALE_S = 5.0  # a worker's loop turns at least once a second


class NotCounters(Exception):
    """A descriptor that is no counters memfd, or one that could shrink under our eyes (reading it would kill us)."""


@dataclass(frozen=True, slots=True)
class PolicyView:
    """What people and Prometheus are told about the policy in force: the snapshot's ``meta`` and when it came."""

    generation: int
    meta: dict[str, Any]


@dataclass(slots=True)
class Totals:
    """Slots summed over all workers at one moment; ``slots`` is as long as the bindings need."""

    slots: list[int]
    stall_us: int  # the longest of all workers
    kernel: list[int]  # the same slots as the kernel counts them: attempts, allowed and refused, by verdict

    def worker(self, slot: WorkerSlot) -> int:
        """Return a worker's own counter, summed."""
        return self.slots[slot]

    def live(self, block: int) -> int:
        """Return the live sessions of the listener whose slots start at ``block``."""
        opened, closed = self.slots[block + ListenerSlot.SESSIONS_OPENED], self.slots[block + ListenerSlot.SESSIONS_CLOSED]
        return max(0, opened - closed)


@dataclass(slots=True)
class Service:
    """Everything pages and metrics are made of. ``state`` is the supervisor's latest word, empty before the first."""

    workers: int
    bindings: Bindings = field(default_factory=Bindings)
    policy: PolicyView | None = None
    state: dict[str, Any] = field(default_factory=dict)
    counters: dict[int, memoryview] = field(default_factory=dict)  # worker -> slots
    kernel: memoryview | None = None  # the same for what the kernel refused; ``None``: it does not

    def frozen(self) -> Service:
        """Return what is known now: pages and metrics are made in threads, while news may arrive."""
        return replace(self)

    def map_counters(self, worker: int, fd: int) -> None:
        """Read this worker's counters from ``fd`` from now on; ``fd`` stays the caller's.

        Raises:
            NotCounters: it is not safe to read.
        """
        # The mapping of a predecessor goes with the last view of it.
        self.counters[worker] = _map(fd)

    def map_retired(self, workers: Sequence[int], fd: int) -> None:
        """Read from ``fd`` what these workers and those retired before them have counted; ``fd`` stays the caller's.

        Raises:
            NotCounters: it is not safe to read.
        """
        block = _map(fd)
        # One assignment: whoever adds up now sees them in one place, never in two or in none.
        self.counters = {row: view for row, view in self.counters.items() if row not in workers} | {self.workers: block}

    def map_kernel(self, fd: int) -> None:
        """Read from ``fd`` what the kernel refuses; ``fd`` stays the caller's.

        Raises:
            NotCounters: it is not safe to read.
        """
        self.kernel = _map(fd)

    def adopt(self, generation: int, snapshot_fd: int, bindings_fd: int) -> None:
        """Use the names of a policy; the descriptors stay the caller's. Nothing changes when either is broken.

        Raises:
            SnapshotError: one of them is not what it claims to be.
        """
        try:
            # Mapped, because a table may be large and only its last section is wanted.
            meta = Snapshot(memoryview(mmap.mmap(snapshot_fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ))).meta
            bindings = Bindings.from_json(_contents(bindings_fd))
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise SnapshotError(f"not a policy: {err!r}") from err
        self.bindings, self.policy = bindings, PolicyView(generation, meta)

    def totals(self) -> Totals:
        """Return all counters, summed over the workers."""
        length = max(self.bindings.next_slot, WORKER_SLOTS)
        views = list(self.counters.values())
        slots = [0] * length
        for view in views:
            slots = list(map(add, slots, view[:length].tolist()))
        refused = [0] * length if self.kernel is None else self.kernel[:length].tolist()
        stall_us = max((view[WorkerSlot.LOOP_STALL_MAX_US] for view in views), default=0)
        for slot in (WorkerSlot.EVENTS_LOST_REFUSAL, WorkerSlot.REFUSALS_SUPPRESSED):
            slots[slot] += refused[slot]
        for block in self.bindings.listeners.values():
            for end in ENDED_BY_US:  # guarded sessions, of which workers know nothing
                slots[block + ListenerSlot.ENDS + end] += refused[block + ListenerSlot.ENDS + end]
        return Totals(slots, stall_us, refused)

    def heartbeat_age_s(self, worker: int) -> float | None:
        """Return how long ago a worker's loop last turned, ``None`` when it never did as far as we know."""
        view = self.counters.get(worker)
        beat_ms = 0 if view is None else view[WorkerSlot.HEARTBEAT_MS]
        return max(0.0, time.monotonic() - beat_ms / 1000) if beat_ms else None

    def alive(self) -> int:
        """Return how many workers are alive, as far as the supervisor knows."""
        return sum(1 for worker in self.processes() if worker.get("alive"))

    def processes(self) -> Sequence[dict[str, Any]]:
        """Return what the supervisor says about each worker."""
        found: Sequence[dict[str, Any]] = self.state.get("workers", ())
        return found

    def not_ready(self) -> str:
        """Return why no new connection should be sent here, in words; empty when the service is ready."""
        if not self.state:
            return "starting: the supervisor has not reported yet"
        if self.state.get("draining"):
            return "draining: no new connections are accepted"
        if self.state.get("taking_over"):
            return ""  # the workers of before the upgrade serve until the new ones do
        if not self.state.get("ready"):
            return "starting: no policy is in force in every worker yet"
        if self.alive() < self.workers:
            return f"degraded: {self.alive()} of {self.workers} workers alive"
        for index in range(self.workers):
            age_s = self.heartbeat_age_s(index)
            if age_s is None:
                return f"degraded: worker {index} has not begun to work"
            if age_s > STALE_S:
                return f"degraded: worker {index} has not answered for {age_s:.0f} s"
        return ""


def _map(fd: int) -> memoryview:
    """Return the slots of a counters memfd."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
        if size < CAPACITY_BYTES or not seals & fcntl.F_SEAL_SHRINK:
            raise NotCounters(f"{size} bytes, seals {seals:#x}")
        return memoryview(mmap.mmap(fd, CAPACITY_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)).cast("Q")
    except OSError as err:
        raise NotCounters(str(err)) from err


def _contents(fd: int) -> bytes:
    """Return all of a memfd, wherever its shared file position stands."""
    return os.pread(fd, os.fstat(fd).st_size, 0)
