"""Sets of addresses as exact algebra: union, intersection, difference and complement over both families.

A set of one family is its **bounds**: the sorted addresses at which membership changes, starting outside. So
``[10, 20)`` is ``10, 20``, and a set that reaches the last address simply has no closing bound. Complement is then a
bound at 0, put in or taken out; "is it inside" is the parity of one binary search; and everything else is complement
plus one of two primitives, both made of C loops over compact arrays:

- `_clip`, when one side is small: its time depends on the large side only by what is copied from it;
- `_join`, a union of all that begins and all that ends, each sorted by itself.

IPv4-mapped IPv6 addresses (``::ffff:0:0/96``) are IPv4. Whoever parses an address normalizes it (`normalize`), so the
IPv6 side is never asked about them. The algebra does not cut them out: complement is over all 2**128 addresses, ``any``
covers them, and ``::/0`` says nothing about IPv4.
"""

from __future__ import annotations

import ipaddress
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, compress, islice, pairwise, repeat
from operator import add, and_, le, lshift, lt, or_, rshift, sub
from sys import byteorder
from typing import ClassVar, Self, TypeAlias, overload

LOW64 = (1 << 64) - 1
BITS = {4: 32, 6: 128}

_MAPPED_PREFIX = 0xFFFF
_SMALL = 16  # bounds: below that a loop in Python is as fast as anything
_MUCH_SMALLER = 8  # times
_SEGMENT = 1 << 15  # bounds
_LOW_WORD = 0 if byteorder == "little" else 1
# Where the bytes of 64 and 32 bits lie in memory, the lowest first.
_BYTE_OF_64 = tuple(range(8) if byteorder == "little" else range(7, -1, -1))
_BYTE_OF_32 = tuple(range(4) if byteorder == "little" else range(3, -1, -1))
_SIZES_BY_BYTE = 256


def normalize(family: int, address: int) -> tuple[int, int]:
    """Return the address as policy judges it: an IPv4-mapped IPv6 address as IPv4, anything else unchanged."""
    if family == 6 and address >> 32 == _MAPPED_PREFIX:
        return 4, address & 0xFFFFFFFF
    return family, address


def format_source(family: int, address: int) -> str:
    """Return an address as canonical text; family 0 is the peer of a unix socket."""
    if family == 0:
        return "unix"
    if family == 4:  # a quarter of the time that `ipaddress` takes, and there may be millions
        return f"{address >> 24}.{address >> 16 & 255}.{address >> 8 & 255}.{address & 255}"
    return str(ipaddress.IPv6Address(address))


class Wide(Sequence[int]):
    """A compact sequence of unsigned 128-bit integers, as two arrays of halves."""

    __slots__ = ("high", "low")

    def __init__(self, values: Sequence[int] = ()) -> None:
        self.high = array("Q", map(rshift, values, repeat(64)))
        self.low = array("Q", map(and_, values, repeat(LOW64)))

    def __len__(self) -> int:
        return len(self.high)

    def __iter__(self) -> Iterator[int]:
        return map(or_, map(lshift, self.high, repeat(64)), self.low)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Wide: ...
    def __getitem__(self, index: int | slice) -> int | Wide:
        if isinstance(index, slice):
            part = Wide()
            part.high, part.low = self.high[index], self.low[index]
            return part
        return int(self.high[index]) << 64 | int(self.low[index])

    def __setitem__(self, index: slice, values: Wide) -> None:
        self.high[index] = values.high
        self.low[index] = values.low

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Wide) and self.high == other.high and self.low == other.low

    __hash__ = None  # type: ignore[assignment]  # a mutable sequence, like array

    def append(self, value: int) -> None:
        self.high.append(value >> 64)
        self.low.append(value & LOW64)

    def pop(self) -> int:
        return int(self.high.pop()) << 64 | int(self.low.pop())

    def extend(self, values: Iterable[int]) -> None:
        if not isinstance(values, Wide):
            values = Wide(list(values))
        self.high.extend(values.high)
        self.low.extend(values.low)


Bounds: TypeAlias = "array[int] | Wide"  # IPv4: array("I"); IPv6: Wide, which has the same methods


def cuts(bounds: Bounds) -> Sequence[int]:
    """Return where to cut the work on large sets, so that few bounds at a time stand as Python integers."""
    return bounds[_SEGMENT::_SEGMENT]


def bounds_from(family: int, values: Sequence[int]) -> Bounds:
    """Return sorted addresses as bounds."""
    return array("I", values) if family == 4 else Wide(values)


class Ranges:
    """Sorted, disjoint, non-adjacent inclusive ranges of one family. Immutable: nobody may change ``bounds``."""

    __slots__ = ("bounds", "family")

    def __init__(self, family: int, bounds: Bounds) -> None:
        """Take over bounds that are sorted and distinct; `of` takes anything."""
        self.family = family
        self.bounds = bounds

    @classmethod
    def of(cls, family: int, pairs: Iterable[tuple[int, int]]) -> Self:
        """Return the union of inclusive (first, last) pairs in any order, overlapping or not."""
        listed = sorted(pairs)
        starts, lasts = [first for first, _ in listed], [last for _, last in listed]
        return cls.joined(family, bounds_from(family, starts), bounds_from(family, lasts))

    @classmethod
    def joined(cls, family: int, starts: Bounds, lasts: Bounds) -> Self:
        """Return the union of the inclusive ranges ``starts[i]-lasts[i]`` in any order; a million take half a second."""
        if isinstance(starts, Wide):
            return cls(family, _join(family, sorted(starts), sorted(map(add, lasts, repeat(1)))))
        if not all(map(le, starts, islice(starts, 1, None))):
            return cls(family, _join(family, *_sorted_spans(starts, lasts)))
        ends = array("Q", map(add, lasts, repeat(1)))
        if not all(map(le, ends, islice(ends, 1, None))):
            ends = array("Q", accumulate(ends, max))
        return cls(family, _join(family, starts, ends))

    def __len__(self) -> int:
        """The number of ranges."""
        return (len(self.bounds) + 1) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (first, last), inclusive, in order."""
        for first, end in self._spans():
            yield first, end - 1

    def __contains__(self, address: int) -> bool:
        return bisect_right(self.bounds, address) & 1 == 1

    def __bool__(self) -> bool:
        return len(self.bounds) > 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self.family == other.family and self.bounds == other.bounds

    __hash__ = object.__hash__

    def __invert__(self) -> Ranges:
        if self.bounds and self.bounds[0] == 0:
            return Ranges(self.family, self.bounds[1:])
        out = bounds_from(self.family, ())
        out.append(0)
        out.extend(self.bounds)
        return Ranges(self.family, out)

    def __or__(self, other: Ranges) -> Ranges:
        small, large = (self, other) if len(self) <= len(other) else (other, self)
        if not small:
            return large
        if _is_small(small, large):
            return ~_clip(~small, large, outside=True)
        return _union(small, large)

    def __and__(self, other: Ranges) -> Ranges:
        small, large = (self, other) if len(self) <= len(other) else (other, self)
        if _is_small(small, large):
            return _clip(small, large, outside=False)
        return ~(~small | ~large)

    def __sub__(self, other: Ranges) -> Ranges:
        if _is_small(self, other):
            return _clip(self, other, outside=True)
        return self & ~other

    def __repr__(self) -> str:
        shown = ", ".join(islice(self.networks(), 4))
        return f"<{len(self)} IPv{self.family} ranges: {shown}{', ...' if len(self) > 4 else ''}>"

    def networks(self) -> Iterator[str]:
        """Yield the fewest networks that cover exactly this set, in order, as text (single addresses without ``/n``)."""
        bits = BITS[self.family]
        for first, end in self._spans():
            at = first
            while at < end:
                size = min(at & -at or 1 << bits, 1 << (end - at).bit_length() - 1)
                text = format_source(self.family, at)
                yield text if size == 1 else f"{text}/{bits + 1 - size.bit_length()}"
                at += size

    def count_addresses(self) -> int:
        return sum(self.ends()) - sum(self.bounds[0::2])

    def count_networks(self) -> int:
        """Return how many `networks` there are, without making them."""
        found = 0
        for first, end in self._spans():
            # Networks grow up to the most aligned address of the range, and shrink from there on.
            bit = (first ^ end).bit_length() - 1
            middle = end >> bit << bit
            found += (middle - first).bit_count() + (end - middle).bit_count()
        return found

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Yield (first, end), the end being the first address that is outside."""
        return zip(self.bounds[0::2], self.ends(), strict=True)

    def ends(self) -> Iterator[int]:
        """Yield for each range the first address behind it."""
        last = (1 << BITS[self.family],) if len(self.bounds) & 1 else ()
        return chain(self.bounds[1::2], last)


def _is_small(small: Ranges, large: Ranges) -> bool:
    return len(small.bounds) <= _SMALL or len(small.bounds) * _MUCH_SMALLER <= len(large.bounds)


def _clip(small: Ranges, large: Ranges, *, outside: bool) -> Ranges:
    """Return what of ``small`` lies inside (or ``outside``) of ``large``."""
    limit = 1 << BITS[small.family]
    bounds = large.bounds
    out = bounds_from(small.family, ())
    for first, end in small._spans():  # noqa: SLF001 - this module
        low = bisect_right(bounds, first)
        high = bisect_left(bounds, end, low)
        if (low & 1) != outside:
            out.append(first)
        out.extend(bounds[low:high])
        if (high & 1) != outside and end != limit:
            out.append(end)
    return Ranges(small.family, out)


def _sorted_spans(starts: array[int], lasts: Sequence[int]) -> tuple[array[int], array[int]]:
    """Return the starts in order, and ends in order that leave the same gaps."""
    sizes = list(map(sub, lasts, starts))
    distinct = list(dict.fromkeys(sizes))
    if len(distinct) > _SIZES_BY_BYTE:
        return array("I", sorted(starts)), array("Q", sorted(map(add, lasts, repeat(1))))
    # Networks have few sizes: one sort of starts, each with the number of its size in a byte, carries the ends along.
    numbers = {size: number for number, size in enumerate(distinct)}
    starts, carried = _sorted(starts, bytes(map(numbers.__getitem__, sizes)))
    del sizes
    ends = map(add, starts, map([size + 1 for size in distinct].__getitem__, carried))
    return starts, array("Q", accumulate(ends, max))


def _sorted(values: array[int], carried: bytes) -> tuple[array[int], bytes]:
    """Return the values in order, and the byte that came with each.

    Python sorts floats twice as fast as integers of 32 bits. The bits of value and byte become the low 40 bits of the
    mantissa of a float between 2**52 and 2**53, whose order is theirs, and are read back from there: nothing is computed.
    """
    raw = values.tobytes()
    bits = bytearray(8 * len(values))
    bits[_BYTE_OF_64[0] :: 8] = carried
    for byte in range(4):
        bits[_BYTE_OF_64[1 + byte] :: 8] = raw[_BYTE_OF_32[byte] :: 4]
    bits[_BYTE_OF_64[6] :: 8] = b"\x30" * len(values)
    bits[_BYTE_OF_64[7] :: 8] = b"\x43" * len(values)
    floats = array("d")
    floats.frombytes(bits)
    del bits
    floats = array("d", sorted(floats))
    sorted_bits = floats.tobytes()
    raw_back = bytearray(len(raw))
    for byte in range(4):
        raw_back[_BYTE_OF_32[byte] :: 4] = sorted_bits[_BYTE_OF_64[1 + byte] :: 8]
    return array("I", bytes(raw_back)), sorted_bits[_BYTE_OF_64[0] :: 8]


def _union(small: Ranges, large: Ranges) -> Ranges:
    """Return the union of two large sets, made in segments: no more than one at a time stands as Python integers."""
    out = bounds_from(small.family, ())
    limit = 1 << BITS[small.family]
    for first, end in pairwise((0, *cuts(large.bounds), limit)):
        segment = Ranges(small.family, bounds_from(small.family, (first,) if end == limit else (first, end)))
        one, other = _clip(segment, small, outside=False), _clip(segment, large, outside=False)
        starts = sorted(chain(one.bounds[0::2], other.bounds[0::2]))
        ends = sorted(chain(one.ends(), other.ends()))
        piece = _join(small.family, starts, ends)
        if out and piece and out[-1] == piece[0]:  # a range goes on across the cut
            out.pop()
            piece = piece[1:]
        out.extend(piece)
    return Ranges(small.family, out)


def _join(family: int, starts: Sequence[int], ends: Sequence[int]) -> Bounds:
    """Return the bounds of the union of ranges, given all starts and all ends (first address outside), both sorted.

    A gap lies where the i-th smallest end comes before the next smallest start, whichever belong together.
    """
    if not starts:
        return bounds_from(family, ())
    gaps = bytes(map(lt, ends, islice(starts, 1, None)))
    if not all(gaps):
        starts = _like(starts, chain(starts[:1], compress(islice(starts, 1, None), gaps)))
        ends = _like(ends, chain(compress(ends, gaps), ends[-1:]))
    if ends[-1] == 1 << BITS[family]:  # reaches the last address: no closing bound
        ends = ends[:-1]
    return _alternating(family, starts, ends)


def _alternating(family: int, starts: Sequence[int], ends: Sequence[int]) -> Bounds:
    """Return the starts at even and the ends at odd places."""
    if family == 6:
        bounds = Wide()
        bounds.high, bounds.low = (array("Q", bytes(8 * (len(starts) + len(ends)))) for _ in range(2))
        bounds[0::2] = Wide(starts)
        bounds[1::2] = Wide(ends)
        return bounds
    narrow = array("I", bytes(4 * (len(starts) + len(ends))))
    narrow[0::2] = _narrow(starts)
    narrow[1::2] = _narrow(ends)
    return narrow


def _like(values: Sequence[int], items: Iterable[int]) -> Sequence[int]:
    """Return items as compactly as the values came that they replace."""
    return array(values.typecode, items) if isinstance(values, array) else list(items)


def _narrow(values: Sequence[int]) -> array[int]:
    """Return numbers below 2**32 as the smallest items."""
    if not isinstance(values, array):
        return array("I", values)
    if values.typecode == "I":
        return values
    words = array("I")
    words.frombytes(memoryview(values).cast("B"))
    return words[_LOW_WORD::2]


class AddressSet:
    """A set of addresses of both families. Immutable; equality is by content, the hash by identity."""

    __slots__ = ("v4", "v6")

    EVERYTHING: ClassVar[AddressSet]
    EMPTY: ClassVar[AddressSet]

    def __init__(self, v4: Ranges, v6: Ranges) -> None:
        self.v4 = v4
        self.v6 = v6

    @classmethod
    def of(cls, v4: Iterable[tuple[int, int]] = (), v6: Iterable[tuple[int, int]] = ()) -> AddressSet:
        """Return the set of inclusive (first, last) pairs, in any order, overlapping or not."""
        return cls(Ranges.of(4, v4), Ranges.of(6, v6))

    def __or__(self, other: AddressSet) -> AddressSet:
        return AddressSet(self.v4 | other.v4, self.v6 | other.v6)

    def __and__(self, other: AddressSet) -> AddressSet:
        return AddressSet(self.v4 & other.v4, self.v6 & other.v6)

    def __sub__(self, other: AddressSet) -> AddressSet:
        return AddressSet(self.v4 - other.v4, self.v6 - other.v6)

    def __invert__(self) -> AddressSet:
        return AddressSet(~self.v4, ~self.v6)

    def __bool__(self) -> bool:
        return bool(self.v4) or bool(self.v6)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AddressSet) and self.v4 == other.v4 and self.v6 == other.v6

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<AddressSet {self.v4!r} {self.v6!r}>"

    def of_family(self, family: int) -> Ranges:
        """Return one side, by family 4 or 6."""
        return self.v4 if family == 4 else self.v6

    def contains(self, family: int, address: int) -> bool:
        """Say whether a normalized address is in the set; a peer without an address (family 0) never is."""
        return family != 0 and address in self.of_family(family)

    def count_ranges(self) -> int:
        return len(self.v4) + len(self.v6)

    def first(self) -> tuple[int, int] | None:
        """Return (family, address) of the lowest address, IPv4 first, or ``None`` when the set is empty."""
        if self.v4:
            return 4, self.v4.bounds[0]
        return (6, self.v6.bounds[0]) if self.v6 else None

    def networks(self) -> Iterator[str]:
        """Yield the fewest networks that cover exactly this set, as text, IPv4 first."""
        return chain(self.v4.networks(), self.v6.networks())


MAPPED = Ranges.of(6, [(_MAPPED_PREFIX << 32, (_MAPPED_PREFIX << 32) + 0xFFFFFFFF)])  # no peer is ever one of these

AddressSet.EMPTY = AddressSet.of()
AddressSet.EVERYTHING = ~AddressSet.EMPTY
