"""One worker as the supervisor sees it: started, watched, replaced.

    DOWN ──start──► STARTING ──ready──► READY ──prepare──► PREPARING ──prepared, commit──► COMMITTING ──committed──► SERVING
      ▲                                                                     ▲                                         │
      └──────────────────── it ended: back-off, then start ─────────────────┴──────── a newer policy is in force ─────┘

A worker's counters live in a memfd that a successor continues from a copy; they are given to others only once nobody
but the worker itself can write them.
"""

from __future__ import annotations

import enum
import mmap
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from gatekeeper.kernel import memfd
from gatekeeper.snapshot.counters import (
    CAPACITY_BYTES,
    End,
    ListenerSlot,
    WorkerSlot,
)
from gatekeeper.supervisor.child import Child
from gatekeeper.supervisor.handover import Fd, OldWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gatekeeper.kernel.privileges import Identity
    from gatekeeper.snapshot.bindings import Bindings
    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.listening import Opened
    from gatekeeper.supervisor.loop import Loop

START_PATIENCE_S = 30.0  # for a process to load and turn for the first time
_SLOT_BYTES = 8
_SETTLED_S = 10.0  # a process that lived this long did not die of its start
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0
_MOST_COUNTED = 1 << 62  # more than anybody counts in a lifetime, and room to go on counting


class State(enum.Enum):
    """How far a worker is on its way to serving."""

    DOWN = enum.auto()
    STARTING = enum.auto()
    READY = enum.auto()
    PREPARING = enum.auto()
    COMMITTING = enum.auto()
    SERVING = enum.auto()
    LEAVING = enum.auto()  # of before an upgrade: it has no successor


class Backoff:
    """How long to wait before a process is started again: not at all, then 0.1 s, doubling up to 5 s."""

    def __init__(self) -> None:
        self._failures = 0

    @property
    def failures(self) -> int:
        """How many processes in a row ended soon after their start."""
        return self._failures

    def next_delay_s(self, lived_s: float) -> float:
        """Return the delay after a process that lived ``lived_s``."""
        if lived_s >= _SETTLED_S:
            self._failures = 0
        self._failures += 1
        if self._failures == 1:
            return 0.0
        return min(_FIRST_DELAY_S * 2.0 ** (self._failures - 2), _LONGEST_DELAY_S)


class Worker:
    """A place among the workers, and the process that fills it. Owns counters and both ends of the events socket."""

    def __init__(
        self,
        index: int,
        loop: Loop,
        command: Sequence[str],
        identity: Identity | None,
        events: tuple[socket.socket, socket.socket] | None = None,
    ) -> None:
        self.index = index
        self.state = State.DOWN
        self.child: Child | None = None
        self.restarts = 0
        self.generation = 0  # of the policy it enforces
        self.offered = 0  # of the policy it was given last
        self.backoff = Backoff()
        self.counters_fd: int | None = None  # of the latest process that was ready; nobody else can write it
        self._fresh_fd: int | None = None  # of a process that is starting
        self._heartbeat: mmap.mmap | None = None
        self.absent_since: float | None = None  # nobody serves here
        self.covers: set[int] = set()  # absent siblings whose shards it serves beside its own
        self.full_until = 0.0  # it found no room for a sibling's shards
        self._has: dict[tuple[str, int], Opened] = {}  # the sockets it serves, by endpoint and shard
        self._given: dict[tuple[str, int], Opened] = {}  # those it got for a policy that is not in force there yet
        self._loop = loop
        self._command = command
        self._identity = identity
        self._events_in, self._events_out = events or socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._events_in, self._events_out):
            end.setblocking(False)

    @classmethod
    def adopt(
        cls, index: int, loop: Loop, old: OldWorker, on_message: Callable[[Worker, dict[str, Any]], None]
    ) -> Worker:
        """Return a worker process of before an upgrade, with what it has; it goes on with its sessions and then leaves."""
        events_in, events_out = (socket.socket(fileno=fd) for fd in old.events)
        worker = cls(index, loop, (), None, (events_in, events_out))
        worker.counters_fd = old.counters
        worker._heartbeat = mmap.mmap(old.counters, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        worker.child = Child.adopt(loop, old.pid, old.channel, old.started, lambda message: on_message(worker, message))
        worker.generation = old.generation
        worker.state = State.LEAVING
        return worker

    def left_behind(self, deadline: float | None = None) -> OldWorker | None:
        """Return what another program in our place needs to adopt the process that is here; ``None``: there is none.

        ``deadline``: it drains already, until then.
        """
        child, counters_fd = self.child, self.counters_fd
        if child is None or child.channel_fd is None or counters_fd is None or self._fresh_fd is not None:
            return None
        return OldWorker(
            child.pid, Fd(child.channel_fd), Fd(counters_fd),
            (Fd(self._events_in.fileno()), Fd(self._events_out.fileno())),
            child.started, self.generation, self.state is State.SERVING, deadline,
        )  # fmt: skip

    @property
    def observer_fd(self) -> int:
        """The observer's end of the events socket."""
        return self._events_out.fileno()

    def start(
        self, workers: int, bindings: Bindings, on_message: Callable[[Worker, dict[str, Any]], None]
    ) -> None:
        """Start a process whose counters continue those of the one before.

        Raises:
            OSError: it could not be executed.
        """
        self._fresh_fd = memfd.create(f"gatekeeper-counters-{self.index}", CAPACITY_BYTES)
        if self.counters_fd is not None:
            os.pwrite(self._fresh_fd, inheritance(self.counters_fd, bindings), 0)
        self._heartbeat = mmap.mmap(self._fresh_fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        self._has = {}
        self._given = {}
        self.covers = set()
        self.offered = 0
        self.child = Child.start(self._loop, self._command, lambda message: on_message(self, message))
        self.state = State.STARTING
        identity = self._identity
        self.child.send(
            {
                "op": "start", "worker": self.index, "workers": workers, "supervisor_pid": os.getpid(),
                "uid": identity and identity.uid, "gid": identity and identity.gid,
                "groups": identity and list(identity.groups),
            },
            [self._fresh_fd, self._events_in.fileno()],
        )  # fmt: skip

    def became_ready(self) -> None:
        """Note that it has mapped its counters and dropped its privileges: from now on only it can write them."""
        if self._fresh_fd is None:
            return
        memfd.seal_against_new_writers(self._fresh_fd)
        if self.counters_fd is not None:
            os.close(self.counters_fd)
        self.counters_fd, self._fresh_fd = self._fresh_fd, None
        self.state = State.READY

    def offer(self, policy: Accepted, *, sockets: bool = True) -> None:
        """Give it the sockets of a policy that it lacks, and the policy; it answers prepared or failed."""
        if self.child is None:
            return
        for shard in (self.index, *sorted(self.covers)) if sockets else ():
            self._hand_over(self.child, policy, shard)
        try:
            with policy.fds() as fds:
                self.child.send({"op": "prepare", "generation": policy.generation}, fds)
        except OSError:
            self.child.kill()  # out of descriptors or memory: by the time of its successor there may be some
        self.offered = policy.generation

    def _hand_over(self, child: Child, policy: Accepted, shard: int) -> None:
        """Give it those sockets of a shard that it lacks. What all workers share it has already."""
        missing = [
            (key, sock, opened)
            for key, opened in policy.opened.items()
            if self._given.get((key, shard), self._has.get((key, shard))) is not opened
            and (sock := opened.for_worker(shard)) is not None
            and (shard == self.index or not opened.shared)
        ]
        self._given.update(((key, shard), opened) for key, _sock, opened in missing)
        child.send_many(
            {"op": "listen", "shard": shard},
            {"keys": [key for key, _, _ in missing], "shared": [opened.shared for _, _, opened in missing]},
            [sock.fileno() for _, sock, _ in missing],
        )

    def relieve(self, shard: int) -> None:
        """Let it leave a sibling's shard to the sibling, who is back."""
        self.covers.discard(shard)
        self._has = {place: opened for place, opened in self._has.items() if place[1] != shard}
        self._given = {place: opened for place, opened in self._given.items() if place[1] != shard}
        self._tell({"op": "relieve", "shard": shard})

    def commit(self, policy: Accepted) -> None:
        """Put the policy it prepared in force there; sockets that it has no endpoint for are closed there."""
        now = self._has | self._given
        self._has = {place: opened for place, opened in now.items() if policy.opened.get(place[0]) is opened}
        self._given = {}
        self._tell({"op": "commit", "generation": policy.generation})

    def abort(self, generation: int) -> None:
        """Take an offer back. What it does not serve yet it will be given anew."""
        self._given = {}
        self._tell({"op": "abort", "generation": generation})

    def siblings(self, counters: list[int]) -> None:
        """Tell it where to read the counters of all workers."""
        if self.child is not None:
            self.child.send({"op": "siblings"}, counters)

    def bans(self, table_fd: int | None) -> None:
        """Give it a table of bans, without asking what came of it; ``None``: nobody is banned."""
        if self.child is not None and table_fd is not None:
            self.child.send({"op": "bans", "query": 0}, [table_fd])

    def drain(self, deadline_s: float, *, handover: bool = False) -> None:
        """Let it accept no more and end when its sessions have, or after ``deadline_s``.

        ``handover``: others serve the same sockets, so it leaves to them whoever waits there.
        """
        self._tell({"op": "drain", "deadline_s": deadline_s, "handover": handover})

    def sessions(self, bindings: Bindings) -> int:
        """Return how many sessions it has, as it counts them."""
        if self.counters_fd is None:
            return 0
        slots = memoryview(os.pread(self.counters_fd, bindings.next_slot * _SLOT_BYTES, 0)).cast("Q")
        return sum(
            max(0, slots[first + ListenerSlot.SESSIONS_OPENED] - slots[first + ListenerSlot.SESSIONS_CLOSED])
            for first in bindings.listeners.values()
        )

    def silent_for_s(self, now: float) -> float:
        """Return how long its loop has not turned; of one that has not begun to turn, how long ago it was started."""
        beat = 0.0
        if self._heartbeat is not None:
            at = WorkerSlot.HEARTBEAT_MS * _SLOT_BYTES
            beat = int.from_bytes(self._heartbeat[at : at + _SLOT_BYTES], "little") / 1000
        started = self.child.started if self.child is not None else now
        # A worker writes this itself: a time to come must not make it immortal.
        return now - (beat if started < beat <= now + 1 else started)

    def check(self, now: float, stuck_after_s: float, error: Callable[[str], None]) -> None:
        """End a process that is stuck. Called once a second."""
        if self.child is None:
            return
        patience_s = stuck_after_s
        if self.state is not State.SERVING:
            patience_s = max(patience_s, START_PATIENCE_S)
        silent_s = self.silent_for_s(now)
        if silent_s > patience_s:
            error(f"worker {self.index} (pid {self.child.pid}) is stuck for {silent_s:.0f} s; killing it")
            self.child.kill()

    def ended(self) -> float:
        """Forget a process that has ended; return how long to wait before the next one is started."""
        lived_s = time.monotonic() - self.child.started if self.child is not None else 0.0
        self.child = None
        self.state = State.DOWN
        self.generation = 0
        self.covers = set()
        if self.absent_since is None:
            self.absent_since = time.monotonic()
        if self._fresh_fd is not None:
            os.close(self._fresh_fd)
            self._fresh_fd = None
        if self._heartbeat is not None:
            self._heartbeat.close()
            self._heartbeat = None
        return self.backoff.next_delay_s(lived_s)

    def close(self) -> None:
        """Close every descriptor that was kept for this place."""
        self.ended()
        self._events_in.close()
        self._events_out.close()
        if self.counters_fd is not None:
            os.close(self.counters_fd)
            self.counters_fd = None

    def _tell(self, message: dict[str, Any]) -> None:
        if self.child is not None:
            self.child.send(message)


def inheritance(counters_fd: int, bindings: Bindings) -> bytes:
    """Return the slots a successor begins with: all that was counted; what was live has ended, and gauges are zero.

    Numbers that were not counted, but written by a worker that somebody had taken over, would end every session of the
    successor with an overflow: there it starts from zero.
    """
    slots = memoryview(bytearray(os.pread(counters_fd, bindings.next_slot * _SLOT_BYTES, 0))).cast("Q")
    if max(slots) > _MOST_COUNTED:
        for slot, value in enumerate(slots):
            slots[slot] = value if value <= _MOST_COUNTED else 0
    for slot in (WorkerSlot.HEARTBEAT_MS, WorkerSlot.GENERATION, WorkerSlot.LOOP_STALL_MAX_US):
        slots[slot] = 0
    for first in bindings.listeners.values():
        died = slots[first + ListenerSlot.SESSIONS_OPENED] - slots[first + ListenerSlot.SESSIONS_CLOSED]
        slots[first + ListenerSlot.SESSIONS_CLOSED] = slots[first + ListenerSlot.SESSIONS_OPENED]
        errors = first + ListenerSlot.ENDS + End.ERROR
        slots[errors] += max(died, 0)
        slots[first + ListenerSlot.ACCEPT_QUEUE] = 0
    return slots.tobytes()
