"""A policy in the kernel: the maps of one snapshot, filled and frozen, and the program that reads them.

What lives as long as the service is in `Common`: the ring buffer of reports, the black holes and the bans.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from array import array
from collections.abc import Iterator, Sequence

from gatekeeper.kernel import bpf, layout, lookup
from gatekeeper.kernel.bans import Bans
from gatekeeper.kernel.ring import Ring
from gatekeeper.kernel.search import Level, levels_v4, levels_v6
from gatekeeper.policy.model import Action
from gatekeeper.snapshot.layout import DETAIL_SHIFT
from gatekeeper.snapshot.reader import Snapshot

REPORTS_PER_S = 10  # of one verdict, as in workers
REPORTS_BURST = 50
RING_BYTES = 1 << 18
MOST_CPUS = 64  # counters for each verdict; more CPUs share them

_SO_ATTACH_FILTER = 26
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


class Common:
    """The ring buffer, the sockets that answer nothing, and ``bans``, which all programs share. Owns them."""

    def __init__(self) -> None:
        """Make them.

        Raises:
            OSError: the kernel refused; nothing is left behind.
        """
        self.ring_map = -1
        self.holes_map = -1
        self._holes: list[socket.socket] = []
        try:
            self.ring_map = bpf.create_map(bpf.RINGBUF, 0, 0, RING_BYTES)
            self.holes_map = bpf.create_map(bpf.SOCKMAP, 4, 8, 2)
            for key, kind in ((lookup.BLACK_HOLE_TCP, socket.SOCK_STREAM), (lookup.BLACK_HOLE_UDP, socket.SOCK_DGRAM)):
                hole = _black_hole(kind)
                self._holes.append(hole)
                bpf.update(self.holes_map, struct.pack("=I", key), struct.pack("=Q", hole.fileno()))
            self.ring = Ring(self.ring_map, RING_BYTES)
            self.bans = Bans()
        except BaseException:
            self.close()
            raise

    def holes(self) -> list[int]:
        """Return the descriptors of the black holes: while they are open, what is dropped meets silence."""
        return [hole.fileno() for hole in self._holes]

    def close(self) -> None:
        """Close everything; a pinned program refuses at once what it used to drop."""
        for hole in self._holes:
            hole.close()
        self._holes = []
        for fd in (self.ring_map, self.holes_map):
            if fd >= 0:
                os.close(fd)
        self.ring_map = self.holes_map = -1
        if hasattr(self, "ring"):
            self.ring.close()
        if hasattr(self, "bans"):
            self.bans.close()


class Judge:
    """One loaded program, and the snapshot that it judges by. ``slots`` is the counter slot of each detail.

    Owns ``program`` and the view of its counts.
    """

    def __init__(self, snapshot: Snapshot, slots: Sequence[int], numbers: Sequence[int], common: Common) -> None:
        """Fill the maps of ``snapshot`` and load the program.

        ``slots`` and ``numbers`` are ``details`` and ``rows`` of the snapshot's bindings.

        Raises:
            OSError: no memory or no right; `bpf.Refused` when it is the program that the kernel does not take.
        """
        self.snapshot = snapshot
        self.slots = list(slots)
        self._cpus = min(1 << ((os.cpu_count() or 1) - 1).bit_length(), MOST_CPUS)
        self._counted = bytes(len(self.slots) * self._cpus * lookup.COUNT.size)
        maps = {"ring": common.ring_map, "holes": common.holes_map} | common.bans.maps
        own: list[int] = []
        v4, v6 = levels_v4(len(snapshot.v4)), levels_v6(len(snapshot.v6_class))
        exact, anywhere = _endpoints(snapshot, numbers)
        try:
            for name, fd in self._make_maps(snapshot, v4, v6):
                own.append(fd)
                maps[name] = fd
            for name, elements in (("endpoints", exact), ("anywhere", anywhere)):
                own.append(_frozen_hash(elements))
                maps[name] = own[-1]
            code = lookup.program(lookup.Sizes(
                v4, v6, bool(exact), bool(anywhere), self._cpus, REPORTS_PER_S, REPORTS_BURST
            ))  # fmt: skip
            self.instructions = len(code)
            self._counts = mmap.mmap(maps["counts"], len(self._counted), mmap.MAP_SHARED, mmap.PROT_READ)
            self.program = bpf.load(code.assemble(maps), code.listing())
        finally:
            # The program holds them from now on; a failed one leaves nothing.
            for fd in own:
                os.close(fd)

    def _make_maps(
        self, snapshot: Snapshot, v4: Sequence[Level], v6: Sequence[Level]
    ) -> Iterator[tuple[str, int]]:
        yield from layout.tables(snapshot, v4, v6)
        yield "matrix", bpf.table(8, len(snapshot.matrix), _spread(snapshot.matrix))
        yield "details", bpf.table(8, len(self.slots), memoryview(array("Q", self.slots)))
        yield "counts", bpf.create_map(bpf.ARRAY, 4, lookup.COUNT.size, len(self.slots) * self._cpus, bpf.MMAPABLE)
        yield "budgets", bpf.create_map(bpf.ARRAY, 4, lookup.BUDGET.size, len(self.slots))

    def news(self) -> dict[int, tuple[int, int]]:
        """Return what happened since the last call: detail -> (attempts, of those reported)."""
        now = bytes(self._counts)
        if now == self._counted:
            return {}
        before, self._counted = memoryview(self._counted).cast("Q").tolist(), now
        after = memoryview(now).cast("Q").tolist()
        width = 2 * self._cpus
        found = {}
        for detail, first in enumerate(range(0, len(after), width)):
            last = first + width
            if after[first:last] != before[first:last]:
                attempts = sum(after[first:last:2]) - sum(before[first:last:2])
                reported = sum(after[first + 1 : last : 2]) - sum(before[first + 1 : last : 2])
                found[detail] = attempts, reported
        return found

    def close(self) -> None:
        """Let go of the program; a link keeps it in force."""
        os.close(self.program)
        self._counts.close()


def _spread(words: memoryview) -> memoryview:
    """Return 32-bit words as elements of 8 bytes."""
    table = memoryview(bytearray(8 * len(words)))
    table.cast("I")[0::2] = words
    return table


def _endpoints(snapshot: Snapshot, numbers: Sequence[int]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """Return what belongs to the addresses that are ours: particular ones, and wildcards."""
    exact, anywhere = {}, {}
    for endpoint, number in zip(snapshot.meta["endpoints"], numbers, strict=True):
        family = _FAMILIES.get(endpoint["family"])
        if family is None:
            continue
        place = endpoint["port"], _PROTOCOLS[endpoint["protocol"]], family
        address = socket.inet_pton(family, endpoint["host"])
        detail = snapshot.meta["listeners"][endpoint["listener"]]["ban_detail"]
        value = lookup.ENDPOINT.pack(endpoint["row"] * snapshot.classes, number, detail << DETAIL_SHIFT | Action.DENY, 0)
        if any(address):
            exact[lookup.ENDPOINT_KEY.pack(*place, address)] = value
        else:
            anywhere[lookup.ANYWHERE_KEY.pack(*place)] = value
    return exact, anywhere


def _frozen_hash(elements: dict[bytes, bytes]) -> int:
    """Return a map of these elements that nobody can change any more."""
    key_bytes = len(next(iter(elements), bytes(4)))
    fd = bpf.create_map(bpf.HASH, key_bytes, lookup.ENDPOINT.size, max(len(elements), 1))
    try:
        bpf.update_many(fd, b"".join(elements), b"".join(elements.values()), len(elements))
        bpf.freeze(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _black_hole(kind: socket.SocketKind) -> socket.socket:
    """Return a socket of loopback that receives nothing, whatever is sent to it: its filter discards every packet."""
    hole = None
    for family, host in ((socket.AF_INET6, "::ffff:127.0.0.1"), (socket.AF_INET, "127.0.0.1")):
        try:
            hole = socket.socket(family, kind | socket.SOCK_NONBLOCK)
            if family == socket.AF_INET6:
                # With this, and an address that is not IPv6 alone, it may be given packets of both families.
                hole.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            discard = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0), 8)  # return 0
            hole.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(discard)))
            hole.bind((host, 0))
            if kind == socket.SOCK_STREAM:
                hole.listen(1)
        except OSError:  # a host without IPv6 has no IPv6 packets either
            if hole is not None:
                hole.close()
            if family == socket.AF_INET:
                raise
        else:
            return hole
    raise AssertionError
