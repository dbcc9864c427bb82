"""A policy that passed every check, with all that processes need to enforce it."""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatekeeper.errors import SnapshotError
from gatekeeper.kernel import memfd
from gatekeeper.policy.model import Endpoint, Protocol
from gatekeeper.snapshot.reader import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gatekeeper.snapshot.bindings import Bindings
    from gatekeeper.supervisor.listening import Opened


@dataclass(slots=True)
class Accepted:
    """One generation: what the processes are given, and the sockets of its endpoints by key. Owns ``snapshot_fd``."""

    generation: int
    meta: dict[str, Any]
    bindings: Bindings
    bindings_json: bytes
    snapshot_fd: int
    opened: dict[str, Opened]

    @contextlib.contextmanager
    def fds(self) -> Iterator[tuple[int, int]]:
        """Return the descriptors that go with a message to one process: the snapshot and the bindings.

        The bindings are a memfd of its own for each process: copies of one descriptor share their position, and two
        processes that read at the same time would take bytes from each other.

        Raises:
            OSError: no descriptors or no memory.
        """
        bindings_fd = memfd.from_bytes("gatekeeper-bindings", self.bindings_json)
        try:
            yield self.snapshot_fd, bindings_fd
        finally:
            os.close(bindings_fd)

    @property
    def name(self) -> str:
        """How people tell policies apart: the beginning of the digest."""
        return str(self.meta["digest"])[:12]

    def close(self) -> None:
        """Close the snapshot; sockets live on, they may belong to the next generation too."""
        os.close(self.snapshot_fd)


def accept(snapshot_fd: int, generation: int, before: Bindings) -> Accepted:
    """Seal and check what the compiler wrote, and bind its names to counters. Takes over ``snapshot_fd``.

    ``opened`` is empty: the caller opens the endpoints.

    Raises:
        SnapshotError: the bytes are not a sound snapshot.
        SlotsExhausted: there are no counters left for new names.
        OSError: somebody still writes to it.
    """
    try:
        memfd.seal(snapshot_fd)
        meta = _read(snapshot_fd)
        bindings = before.bind(generation, meta)
    except BaseException:
        os.close(snapshot_fd)
        raise
    return Accepted(generation, meta, bindings, bindings.to_json(), snapshot_fd, {})


def revive(snapshot_fd: int, generation: int, bindings: Bindings) -> Accepted:
    """Return a policy that another program in our place had accepted, with its very numbers of counters.

    ``opened`` is empty. ``snapshot_fd`` is the caller's when this fails.

    Raises:
        SnapshotError: this version cannot read it.
    """
    meta = _read(snapshot_fd)
    if len(bindings.details) != len(meta["details"]) or len(bindings.rows) != len(meta["endpoints"]):
        raise SnapshotError("its names are not bound to counters")
    return Accepted(generation, meta, bindings, bindings.to_json(), snapshot_fd, {})


def digest_of(snapshot_fd: int) -> str | None:
    """Return the digest in a snapshot that was not checked yet, ``None`` when it has none."""
    try:
        snapshot = Snapshot(memoryview(mmap.mmap(snapshot_fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)))
        digest = snapshot.meta["digest"]
    except (SnapshotError, OSError, ValueError, KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) else None


def endpoints(meta: dict[str, Any]) -> list[Endpoint]:
    """Return the endpoints of a snapshot that we listen at, in file order: all but those that are guarded."""
    relayed = [listener["on_exit"] is None for listener in meta["listeners"]]
    return [endpoint(item, item["protocol"]) for item in meta["endpoints"] if relayed[item["listener"]]]


def endpoint(item: dict[str, Any], protocol: str = "tcp") -> Endpoint:
    """Return one address of a snapshot's meta section."""
    return Endpoint(Protocol(protocol), item["family"], item["host"], item["port"])


def how_guarded(policy: Accepted) -> set[str]:
    """Return ``on_exit`` of the guarded listeners; empty when nothing is guarded."""
    return {listener["on_exit"] for listener in policy.meta["listeners"]} - {None}


def _read(fd: int) -> dict[str, Any]:
    if not os.fstat(fd).st_size:
        raise SnapshotError("it is empty")
    # Not closed by hand: the snapshot's views go first, the mapping with the last of them. Private, because before
    # Linux 6.7 what is sealed against writing could not even be read through a shared mapping.
    snapshot = Snapshot(memoryview(mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)))
    snapshot.validate()
    return snapshot.meta
