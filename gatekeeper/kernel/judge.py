"""A policy in the kernel: the maps of one snapshot, filled and frozen, and the program that reads them.

What lives as long as the service is in `Common`: the ring buffer of reports and the black holes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import sub

from gatekeeper.kernel import bpf, lookup
from gatekeeper.kernel.ring import Ring
from gatekeeper.snapshot.reader import Snapshot

REPORTS_PER_S = 10  # of one verdict, as in workers
REPORTS_BURST = 50
RING_BYTES = 1 << 18
MOST_CPUS = 64  # counters for each verdict; more CPUs share them

_SO_ATTACH_FILTER = 26
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


class Common:
    """The ring buffer, and the sockets that answer nothing. Owns them."""

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
        except BaseException:
            self.close()
            raise

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


class Judge:
    """One loaded program. ``slots`` is the counter slot of each detail. Owns ``program`` and the view of its counts."""

    def __init__(self, snapshot: Snapshot, slots: Sequence[int], numbers: Sequence[int], common: Common) -> None:
        """Fill the maps of ``snapshot`` and load the program.

        ``slots`` and ``numbers`` are ``details`` and ``rows`` of the snapshot's bindings.

        Raises:
            OSError: no memory or no right; `bpf.Refused` when it is the program that the kernel does not take.
        """
        self.slots = list(slots)
        self._cpus = min(os.cpu_count() or 1, MOST_CPUS)
        self._counted = bytes(len(self.slots) * self._cpus * lookup.COUNT.size)
        maps = {"ring": common.ring_map, "holes": common.holes_map}
        own: list[int] = []
        try:
            for name, fd in self._make_maps(snapshot, numbers):
                own.append(fd)
                maps[name] = fd
            index = snapshot.v4_index
            code = lookup.program(lookup.Sizes(
                v4_parts_bits=(len(index) - 1).bit_length() - 1,
                v4_part=max(map(sub, islice(index, 1, None), index)),
                v6_ranges=len(snapshot.v6_class),
                cpus=self._cpus, per_s=REPORTS_PER_S, burst=REPORTS_BURST,
            ))  # fmt: skip
            self.instructions = len(code)
            self._counts = mmap.mmap(maps["counts"], len(self._counted), mmap.MAP_SHARED, mmap.PROT_READ)
            self.program = bpf.load(code.assemble(maps), code.listing())
        finally:
            # The program holds them from now on; a failed one leaves nothing.
            for fd in own:
                os.close(fd)

    def _make_maps(self, snapshot: Snapshot, numbers: Sequence[int]) -> Iterator[tuple[str, int]]:
        yield "v4", bpf.table(8, len(snapshot.v4), snapshot.v4.cast("B"))
        yield "v4_index", bpf.table(8, len(snapshot.v4_index), _spread(snapshot.v4_index))
        yield "v6", bpf.table(24, len(snapshot.v6_class), _woven(snapshot))
        yield "matrix", bpf.table(8, len(snapshot.matrix), _spread(snapshot.matrix))
        yield "details", bpf.table(8, len(self.slots), array("Q", self.slots).tobytes())
        yield "endpoints", _endpoints(snapshot, numbers)
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


def _woven(snapshot: Snapshot) -> memoryview:
    """Return the IPv6 ranges as elements of 24 bytes: high, low, class."""
    table = memoryview(bytearray(24 * len(snapshot.v6_class)))
    table.cast("Q")[0::3] = snapshot.v6_high
    table.cast("Q")[1::3] = snapshot.v6_low
    table.cast("I")[4::6] = snapshot.v6_class
    return table


def _spread(words: memoryview) -> memoryview:
    """Return 32-bit words as elements of 8 bytes."""
    table = memoryview(bytearray(8 * len(words)))
    table.cast("I")[0::2] = words
    return table


def _endpoints(snapshot: Snapshot, numbers: Sequence[int]) -> int:
    """Return the map of the addresses that are ours."""
    keys, values = [], []
    for endpoint, number in zip(snapshot.meta["endpoints"], numbers, strict=True):
        family = _FAMILIES.get(endpoint["family"])
        if family is None:
            continue
        address = socket.inet_pton(family, endpoint["host"])
        keys.append(lookup.ENDPOINT_KEY.pack(endpoint["port"], _PROTOCOLS[endpoint["protocol"]], family, address))
        values.append(lookup.ENDPOINT.pack(endpoint["row"] * snapshot.classes, number, 0, 0))
    fd = bpf.create_map(bpf.HASH, lookup.ENDPOINT_KEY.size, lookup.ENDPOINT.size, max(len(keys), 1))
    try:
        bpf.update_many(fd, b"".join(keys), b"".join(values), len(keys))
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
