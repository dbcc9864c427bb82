"""The tables of a snapshot as maps of the kernel: the same bytes, and above them the nodes of the search."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from gatekeeper.kernel import bpf
from gatekeeper.kernel.search import V6_CLASS, V6_LOW, Level
from gatekeeper.policy.ranges import LOW64
from gatekeeper.snapshot.layout import LOW32
from gatekeeper.snapshot.reader import Snapshot


def tables(snapshot: Snapshot, v4: Sequence[Level], v6: Sequence[Level]) -> Iterator[tuple[str, int]]:
    """Yield the name and descriptor of each map, filled and frozen. The caller owns the descriptors.

    Raises:
        OSError: no memory or no right.
    """
    yield v4[-1].name, _lines(v4[-1], 8, snapshot.v4)
    starts = snapshot.v4.cast("B").cast("I")[1::2]
    for level in v4[:-1]:
        yield level.name, bpf.table(4 * level.keys, level.nodes, _padded(array("I", starts[:: level.every]), level, LOW32))
    yield v6[-1].name, _lines(v6[-1], 8, snapshot.v6_high)
    yield V6_LOW, _lines(v6[-1], 8, snapshot.v6_low)
    yield V6_CLASS, _lines(v6[-1], 4, snapshot.v6_class)
    for level in v6[:-1]:
        yield level.name, bpf.table(16 * level.keys, level.nodes, _halves(snapshot, level))


def _lines(level: Level, item_bytes: int, ranges: memoryview) -> int:
    """Return the ranges, or one array of them; the last is repeated up to the end of its line."""
    missing = level.nodes * level.keys - level.below
    return bpf.table(item_bytes * level.keys, level.nodes, ranges, *[ranges[-1:]] * missing)


def _padded(keys: array[int], level: Level, last: int) -> memoryview:
    keys.extend([last] * (level.nodes * level.keys - level.below))
    return memoryview(keys)


def _halves(snapshot: Snapshot, level: Level) -> memoryview:
    """Return nodes of IPv6: the upper halves of all keys of a node, then the lower ones."""
    parts = [_padded(array("Q", half[:: level.every]), level, LOW64) for half in (snapshot.v6_high, snapshot.v6_low)]
    table = memoryview(bytearray(16 * level.keys * level.nodes))
    words = table.cast("Q")
    for half, part in enumerate(parts):
        for key in range(level.keys):
            words[half * level.keys + key :: 2 * level.keys] = part[key :: level.keys]
    return table
