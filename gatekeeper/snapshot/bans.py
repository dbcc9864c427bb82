"""The bans in force as bytes: whom every listener refuses, whatever the policy says.

    header      magic, number of IPv4 bounds, number of IPv6 bounds (little-endian 64-bit)
    v6_high     unsigned 64-bit: upper half of each IPv6 bound; (high, low) is sorted
    v6_low      unsigned 64-bit: lower half
    v4          unsigned 32-bit, sorted

A bound is the first address of a run of banned ones, or the first behind it, by turns (as in `gatekeeper.policy.ranges`):
an address is banned when an odd number of bounds is not above it. A run that reaches the last address has no second bound.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import lt
from typing import Any

from gatekeeper.errors import SnapshotError
from gatekeeper.policy.ranges import AddressSet, Wide

MAGIC = b"GKBANS01"
HEADER = struct.Struct("<8sQQ")


def encode(ranges: Iterable[tuple[int, int, int]]) -> bytes:
    """Return the table of inclusive ranges (family, first, last), in any order; they may overlap.

    IPv4-mapped addresses must have come as IPv4.
    """
    pairs: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
    for family, first, last in ranges:
        pairs[family].append((first, last))
    return pack(AddressSet.of(pairs[4], pairs[6]))


def pack(addresses: AddressSet) -> bytes:
    """Return the table that bans these addresses."""
    v4, v6 = addresses.v4.bounds, addresses.v6.bounds
    assert isinstance(v4, array)
    assert isinstance(v6, Wide)
    return b"".join((HEADER.pack(MAGIC, len(v4), len(v6)), v6.high.tobytes(), v6.low.tobytes(), v4.tobytes()))


class Bans:
    """A table of bans. Keeps views into ``buffer``, which must outlive it and not change."""

    __slots__ = ("v4", "v6_high", "v6_low")

    def __init__(self, buffer: bytes | memoryview) -> None:
        """Map the table. Only sizes are checked here, so it is quick however long the table is; `validate` checks the rest.

        Raises:
            SnapshotError: this is no table of bans.
        """
        view = memoryview(buffer).cast("B")
        if len(view) < HEADER.size:
            raise SnapshotError(f"too short for a table of bans: {len(view)} bytes")
        magic, v4, v6 = HEADER.unpack_from(view)
        if magic != MAGIC:
            raise SnapshotError("not a table of bans, or one of another version")
        low, narrow = HEADER.size + 8 * v6, HEADER.size + 16 * v6
        # A memfd that was mapped whole may come with the zeros that fill its last page.
        if len(view) < narrow + 4 * v4:
            raise SnapshotError(f"{len(view)} bytes cannot hold {v4} and {v6} bounds")
        self.v6_high = view[HEADER.size : low].cast("Q")
        self.v6_low = view[low:narrow].cast("Q")
        self.v4 = view[narrow : narrow + 4 * v4].cast("I")

    def validate(self) -> None:
        """Check that the bounds ascend. Without that a look-up answers, but not what was meant.

        Raises:
            SnapshotError: they do not.
        """
        if not _ascend(array("I", self.v4)):
            raise SnapshotError("the IPv4 bans are not sorted")
        highs, lows = array("Q", self.v6_high), array("Q", self.v6_low)
        if not _ascend(highs) and not _ascend(list(zip(highs, lows, strict=True))):
            raise SnapshotError("the IPv6 bans are not sorted")

    def __bool__(self) -> bool:
        """Whether anybody is banned."""
        return bool(self.v4) or bool(self.v6_high)

    def bans_v4(self, address: int) -> bool:
        """Say whether an IPv4 address is banned."""
        return bisect_right(self.v4, address) & 1 == 1

    def bans_v6(self, high: int, low: int) -> bool:
        """Say whether an IPv6 address is banned, given as halves; never an IPv4-mapped one."""
        highs = self.v6_high
        at = bisect_right(highs, high)
        if at and highs[at - 1] == high:
            at = bisect_right(self.v6_low, low, bisect_left(highs, high, 0, at), at)
        return at & 1 == 1


def _ascend(values: Sequence[Any]) -> bool:
    return all(map(lt, values, islice(values, 1, None)))
