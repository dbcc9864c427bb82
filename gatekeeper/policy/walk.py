"""Two sorted tables walked together: where each pair of classes lies.

Both are cut into segments at the same addresses, so that little of them at a time stands as Python integers. Where a
segment's ranges begin at the same places in both, as nearly everywhere when few networks of a million have changed,
the pairs are simply laid side by side; elsewhere the starts are sorted into one sequence, and what changes at each of
them toggles the bits of one number that holds both classes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, compress, islice, pairwise, repeat
from operator import and_, lshift, ne, or_, rshift, sub, xor

from gatekeeper.policy.ranges import BITS, MAPPED, Bounds, Ranges, Wide, bounds_from

_SEGMENT = 1 << 10  # ranges
_FEW = 4  # pairs that are picked out of a segment one after the other
_PAIR_SHIFT = 32
_CLASS_MASK = (1 << _PAIR_SHIFT) - 1
_FIRST_MAPPED, _BEHIND_MAPPED = MAPPED.bounds


@dataclass(frozen=True, slots=True)
class Line:
    """One family of one table: where ranges start, the first of them at 0, and the class of each."""

    family: int
    starts: Bounds
    classes: array[int]


def line_v4(packed: Sequence[int]) -> Line:
    """Return the IPv4 side of a table: unsigned 64-bit items, ``start << 32 | class``."""
    halves = array("I")
    halves.frombytes(_bytes(packed))
    class_is_first = array("Q", (1,)).tobytes()[0]
    return Line(4, halves[class_is_first::2], halves[1 - class_is_first :: 2])


def line_v6(highs: Sequence[int], lows: Sequence[int], classes: Sequence[int]) -> Line:
    """Return the IPv6 side of a table: unsigned items of 64, 64 and 32 bits."""
    starts = Wide()
    starts.high.frombytes(_bytes(highs))
    starts.low.frombytes(_bytes(lows))
    own = array("I")
    own.frombytes(_bytes(classes))
    return Line(6, starts, own)


def _bytes(items: Sequence[int]) -> memoryview:
    return memoryview(items).cast("B")  # type: ignore[arg-type]  # an array, or a view of one


class Spans:
    """Addresses of one family, as inclusive spans in order, some of which may touch."""

    __slots__ = ("family", "firsts", "lasts")

    def __init__(self, family: int) -> None:
        self.family = family
        self.firsts = bounds_from(family, ())
        self.lasts = bounds_from(family, ())


def union(family: int, parts: Sequence[Spans]) -> Ranges:
    """Return all addresses of some spans as a set."""
    firsts, lasts = bounds_from(family, ()), bounds_from(family, ())
    for part in parts:
        firsts.extend(part.firsts)
        lasts.extend(part.lasts)
    return Ranges.joined(family, firsts, lasts)


def where(old: Line, new: Line, matters: Callable[[int, int], bool]) -> dict[tuple[int, int], Spans]:
    """Return for each pair (old class, new class) that ``matters`` and occurs where it lies.

    ``matters`` is asked once for each pair. IPv4-mapped IPv6 addresses are no peer's: what lies among them alone is left out.
    """
    asked: dict[int, bool] = {}
    found: dict[int, Spans] = {}
    for starts, pairs, end in _segments(old, new):
        wanted = []
        for pair in set(pairs):
            answer = asked.get(pair)
            if answer is None:
                answer = asked[pair] = matters(pair >> _PAIR_SHIFT, pair & _CLASS_MASK)
            if answer:
                wanted.append(pair)
        if wanted:
            lasts = list(map(sub, chain(islice(starts, 1, None), (end,)), repeat(1)))
            stretch = starts, lasts, pairs
            if old.family == 6 and starts[0] < _BEHIND_MAPPED and end > _FIRST_MAPPED:
                stretch = _without_mapped(*stretch)
            _pick(old.family, *stretch, wanted, found)
    return {(pair >> _PAIR_SHIFT, pair & _CLASS_MASK): spans for pair, spans in found.items() if len(spans.firsts)}


def _segments(old: Line, new: Line) -> Iterator[tuple[list[int], list[int], int]]:
    """Yield stretches of both tables: the starts of ranges, the pair of classes from each on, and the first address behind."""
    longer = old if len(old.starts) >= len(new.starts) else new
    limit = 1 << BITS[old.family]
    at_old = at_new = 0
    for low, high in pairwise((0, *longer.starts[_SEGMENT::_SEGMENT], limit)):
        until_old = len(old.starts) if high == limit else bisect_left(old.starts, high, at_old)
        until_new = len(new.starts) if high == limit else bisect_left(new.starts, high, at_new)
        old_starts, new_starts = old.starts[at_old:until_old], new.starts[at_new:until_new]
        if old_starts == new_starts:
            pairs = map(
                or_, map(lshift, old.classes[at_old:until_old], repeat(_PAIR_SHIFT)), new.classes[at_new:until_new]
            )
            yield list(old_starts), list(pairs), high
        else:
            sides = (old_starts, _classes(old, at_old, until_old)), (new_starts, _classes(new, at_new, until_new))
            yield (*_merged(low, *sides), high)
        at_old, at_new = until_old, until_new


def _classes(line: Line, low: int, high: int) -> list[int]:
    """Return the class in force before the range ``low``, and those of the ranges ``[low:high]``."""
    return [line.classes[max(low - 1, 0)], *line.classes[low:high]]


_Side = tuple[Bounds, list[int]]


def _merged(low: int, old: _Side, new: _Side) -> tuple[list[int], list[int]]:
    """Return starts and pairs of one stretch, from ``low`` on."""
    (old_starts, old_classes), (new_starts, new_classes) = old, new
    ordered = sorted(
        chain(map(lshift, old_starts, repeat(1)), map(or_, map(lshift, new_starts, repeat(1)), repeat(1)))
    )
    toggles = (
        map(lshift, map(xor, old_classes, islice(old_classes, 1, None)), repeat(_PAIR_SHIFT)),
        map(xor, new_classes, islice(new_classes, 1, None)),
    )
    in_order = map(next, map(toggles.__getitem__, map(and_, ordered, repeat(1))))
    pairs = accumulate(in_order, xor, initial=old_classes[0] << _PAIR_SHIFT | new_classes[0])
    starts = [low, *map(rshift, ordered, repeat(1))]
    # Of several at one address only the last ever applies.
    last = [*map(ne, starts, islice(starts, 1, None)), True]
    return list(compress(starts, last)), list(compress(pairs, last))


def _pick(
    family: int, firsts: Sequence[int], lasts: Sequence[int], pairs: Sequence[int], wanted: Sequence[int],
    found: dict[int, Spans],
) -> None:  # fmt: skip
    """Add the spans of the wanted pairs to those found already."""
    for pair in wanted:
        if pair not in found:
            found[pair] = Spans(family)
    if len(wanted) <= _FEW:
        for pair in wanted:
            mask = list(map(pair.__eq__, pairs))
            found[pair].firsts.extend(compress(firsts, mask))
            found[pair].lasts.extend(compress(lasts, mask))
        return
    chosen = set(wanted)
    for first, last, pair in zip(firsts, lasts, pairs, strict=True):
        if pair in chosen:
            found[pair].firsts.append(first)
            found[pair].lasts.append(last)


def _without_mapped(
    firsts: Sequence[int], lasts: Sequence[int], pairs: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Leave out what lies among IPv4-mapped addresses alone."""
    mask = [first < _FIRST_MAPPED or last >= _BEHIND_MAPPED for first, last in zip(firsts, lasts, strict=True)]
    return list(compress(firsts, mask)), list(compress(lasts, mask)), list(compress(pairs, mask))
