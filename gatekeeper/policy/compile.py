"""From rules to one table: range start -> class, and row x class -> verdict.

Every rule is a bit. Wherever the effective sources of a rule begin or end, its bit toggles; walking the sorted bounds
of all rules therefore gives, for every range of addresses, the mask of rules whose sources cover it. In the row of an
endpoint, whose own mask holds the rules that speak of it, the verdict is the lowest bit of both masks together. Masks
that give the same rule in every row are one class; neighbouring ranges of one class are one range.

A list of a million networks is the usual case, one that dominates all others. It is then not walked at all: between
two bounds of the other sets, its ranges alternate between two classes, and whole slices are copied (`_interleaved`).
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, compress, islice, repeat, zip_longest
from operator import and_, lshift, ne, neg, or_, rshift, xor

from gatekeeper.policy.model import Action, Endpoint, Policy, Protocol, Reason, Rule
from gatekeeper.policy.ranges import AddressSet, Bounds, Wide, bounds_from, cuts

Detail = tuple[int, int | None, Action, Reason]  # listener index, rule index or None, action, reason

_LOCAL_CLASS = 0  # of peers without an address; `gatekeeper.snapshot.layout` says the same
_DETAIL_SHIFT = 2
_DOMINANT = 4  # times the bounds of all other sets together
_INDEX_BITS = 16  # at most: 256 KiB beside a table of 16 MiB
_PER_PART_BITS = 5  # some 16 to 32 ranges in each part, when they are spread evenly
_HIGH_WORD = 1 if sys.byteorder == "little" else 0


@dataclass(frozen=True, slots=True)
class Table:
    """A compiled policy, as `gatekeeper.snapshot.layout` lays it down.

    ``matrix`` holds ``classes`` words for each distinct row. ``rows`` is the row of every endpoint, in the order of
    listeners and their endpoints. ``over`` and ``ban`` are, for each listener, the detail of a refusal by ``max_sessions``
    and of one by a ban; neither occurs in ``matrix``.
    ``sets_ranges`` counts the ranges over all distinct source sets.
    """

    v4: array[int]
    v4_index: array[int]
    v6_index: array[int]
    v6_high: array[int]
    v6_low: array[int]
    v6_class: array[int]
    matrix: array[int]
    classes: int
    rows: list[int]
    details: list[Detail]
    over: list[int]
    ban: list[int]
    sets_ranges: int


def compile_policy(policy: Policy) -> Table:
    """Return the table that gives for every peer and endpoint the verdict that `decide` gives."""
    sets = _effective_sets(policy.rules)
    rows = _row_masks(policy)
    v4 = _side(4, [(addresses.v4.bounds, bits) for addresses, bits in sets])
    v6 = _side(6, [(addresses.v6.bounds, bits) for addresses, bits in sets])
    seen = list(dict.fromkeys(chain(v4.masks(), v6.masks())))
    classes = _merge_alike(seen, list({mask for _, mask in rows}))
    # A class is judged as any mask in it; class 0 as the peers whom only rules for anyone mean.
    judged_as = {_LOCAL_CLASS: sum(1 << index for index, rule in enumerate(policy.rules) if rule.sources.anyone)}
    for mask in seen:
        judged_as.setdefault(classes[mask], mask)
    matrix, numbers, details = _matrix(policy, rows, list(judged_as.values()))
    listeners = len(policy.listeners)
    over = range(len(details), len(details) + listeners)
    ban = range(over.stop, over.stop + listeners)
    for reason in (Reason.MAX_SESSIONS, Reason.BAN):
        details += [(index, None, Action.DENY, reason) for index in range(listeners)]
    v4_starts, v4_class = v4.table(classes)
    v6_starts, v6_class = v6.table(classes)
    assert isinstance(v4_starts, array)
    assert isinstance(v6_starts, Wide)
    return Table(
        v4=_packed(v4_starts, v4_class),
        v4_index=_index(v4_starts, 0, 32),
        v6_index=_index(v6_starts.high, *span(v6_starts.high)),
        v6_high=v6_starts.high,
        v6_low=v6_starts.low,
        v6_class=v6_class,
        matrix=matrix,
        classes=len(judged_as),
        rows=numbers,
        details=details,
        over=list(over),
        ban=list(ban),
        sets_ranges=sum(addresses.count_ranges() for addresses, _ in sets),
    )


def effective(rule: Rule) -> AddressSet:
    """Return the addresses that a rule matches: ``from`` without ``except``."""
    sources = rule.sources
    return sources.included - sources.excluded if sources.excluded else sources.included


def _effective_sets(rules: Sequence[Rule]) -> list[tuple[AddressSet, int]]:
    """Return each distinct set of sources with the bits of the rules that have it."""
    found: dict[tuple[int, int], tuple[AddressSet, int]] = {}
    for index, rule in enumerate(rules):
        key = (id(rule.sources.included), id(rule.sources.excluded))
        addresses, bits = found.get(key) or (effective(rule), 0)
        found[key] = (addresses, bits | 1 << index)
    return list(found.values())


def _row_masks(policy: Policy) -> list[tuple[int, int]]:
    """Return (listener index, mask of the rules that speak of it) for every endpoint.

    The same as asking every target of every rule about every endpoint, in time that thousands of both can afford.
    """
    always = 0
    by_listener: dict[str, int] = {}
    by_ports: list[tuple[int, int, Protocol | None, int]] = []
    for index, rule in enumerate(policy.rules):
        bit = 1 << index
        if rule.targets is None:
            always |= bit
        for target in rule.targets or ():
            if target.listener is not None:
                by_listener[target.listener] = by_listener.get(target.listener, 0) | bit
            else:
                by_ports.append((target.first_port, target.last_port, target.protocol, bit))
    of_port: dict[tuple[Protocol, int], int] = {}

    def port_mask(endpoint: Endpoint) -> int:
        if endpoint.family == 0:
            return 0
        key = (endpoint.protocol, endpoint.port)
        mask = of_port.get(key)
        if mask is None:
            mask = 0
            for first, last, protocol, bit in by_ports:
                if first <= endpoint.port <= last and (protocol is None or protocol == endpoint.protocol):
                    mask |= bit
            of_port[key] = mask
        return mask

    return [
        (index, always | by_listener.get(listener.name, 0) | port_mask(endpoint))
        for index, listener in enumerate(policy.listeners)
        for endpoint in listener.endpoints
    ]


def _side(family: int, sets: Sequence[tuple[Bounds, int]]) -> _Walked | _Interleaved:
    """Return the masks between the bounds of all sets of one family."""
    if not sets:
        return _Walked(family, ())
    by_size = sorted(sets, key=lambda item: len(item[0]))
    (largest, bits), others = by_size[-1], by_size[:-1]
    if len(largest) > _DOMINANT * sum(len(bounds) for bounds, _ in others):
        return _Interleaved(_Walked(family, others), largest, bits)
    return _Walked(family, sets)


class _Walked:
    """The walk over all bounds of one family. ``starts`` are distinct and begin with 0."""

    def __init__(self, family: int, sets: Sequence[tuple[Bounds, int]]) -> None:
        self.family = family
        self._toggles = [bits for _, bits in sets]
        self._which = array("I")  # the set that each bound belongs to
        positions = bounds_from(family, (0,))
        for keys, width in _sorted_keys(sets):
            self._which.extend(map(and_, keys, repeat((1 << width) - 1)))
            positions.extend(map(rshift, keys, repeat(width)))
        # Several bounds at one address: only the mask after the last of them ever applies.
        self._last = bytes(map(ne, positions, islice(positions, 1, None))) + b"\1"
        self.starts = bounds_from(family, ())
        self.starts.extend(compress(positions, self._last))

    def masks(self) -> Iterator[int]:
        """Yield the mask that applies from each of ``starts`` on."""
        toggles = map(self._toggles.__getitem__, self._which)
        return compress(accumulate(toggles, xor, initial=0), self._last)

    def table(self, classes: dict[int, int]) -> tuple[Bounds, array[int]]:
        """Return where ranges start, and their classes; neighbours differ."""
        found = array("I", map(classes.__getitem__, self.masks()))
        differs = b"\1" + bytes(map(ne, found, islice(found, 1, None)))
        starts = bounds_from(self.family, ())
        starts.extend(compress(self.starts, differs))
        return starts, array("I", compress(found, differs))


def _sorted_keys(sets: Sequence[tuple[Bounds, int]]) -> Iterator[tuple[list[int], int]]:
    """Yield the bounds of all sets in order, a segment at a time: ``address << width | number of the set``, and width."""
    width = len(sets).bit_length()
    largest = max((bounds for bounds, _ in sets), key=len, default=array("I"))
    reached = [0] * len(sets)
    for end in (*cuts(largest), None):
        parts = []
        for index, (bounds, _) in enumerate(sets):
            high = len(bounds) if end is None else bisect_left(bounds, end, reached[index])
            parts.append(map(or_, map(lshift, bounds[reached[index] : high], repeat(width)), repeat(index)))
            reached[index] = high
        yield sorted(chain.from_iterable(parts)), width


class _Interleaved:
    """One large set over a walk of all others."""

    def __init__(self, others: _Walked, bounds: Bounds, bits: int) -> None:
        self._family = others.family
        self._bounds = bounds
        self._bits = bits
        self._others = others

    def _pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (start, mask there, low, high): the bounds ``[low:high]`` then switch between that mask and its twin."""
        low = bisect_right(self._bounds, 0)
        ends = [*self._others.starts][1:]
        for start, end, mask in zip_longest(self._others.starts, ends, self._others.masks()):
            high = len(self._bounds) if end is None else bisect_left(self._bounds, end, low)
            yield start, mask ^ self._bits if low & 1 else mask, low, high
            # A bound at the very start of the next piece has its effect there.
            low = high + (high < len(self._bounds) and self._bounds[high] == end)

    def masks(self) -> Iterator[int]:
        """Yield every mask that applies somewhere."""
        for _, mask, low, high in self._pieces():
            yield mask
            if low < high:
                yield mask ^ self._bits

    def table(self, classes: dict[int, int]) -> tuple[Bounds, array[int]]:
        """Return where ranges start, and their classes; neighbours differ."""
        starts = bounds_from(self._family, ())
        found = array("I")
        latest = None
        for start, mask, low, high in self._pieces():
            here = classes[mask]
            if here != latest:
                starts.append(start)
                found.append(here)
                latest = here
            there = classes[mask ^ self._bits] if low < high else here
            if here != there:
                starts.extend(self._bounds[low:high])
                found.extend((array("I", (there, here)) * ((high - low + 1) // 2))[: high - low])
                latest = found[-1]
        return starts, found


def _merge_alike(masks: Sequence[int], row_masks: Sequence[int]) -> dict[int, int]:
    """Return the class of each mask, from 1: equal for masks that have the same first rule in every row."""
    alike = [list(masks)]  # as far as the rows so far can tell
    apart: list[list[int]] = []  # what no row needs to look at any more
    for row in row_masks:
        groups, alike = alike, []
        for group in groups:
            found: dict[int, list[int]] = {}
            for mask, first in zip(group, _first_rules(group, row), strict=True):
                found.setdefault(first, []).append(mask)
            for part in found.values():
                (alike if len(part) > 1 else apart).append(part)
    first_of = {mask: group[0] for group in chain(alike, apart) for mask in group}
    numbers = {mask: _LOCAL_CLASS + 1 + number for number, mask in enumerate(dict.fromkeys(map(first_of.__getitem__, masks)))}
    return {mask: numbers[first_of[mask]] for mask in masks}


def _first_rules(masks: Sequence[int], row: int) -> Iterator[int]:
    """Yield for each mask the number, from 1, of the first rule that is in the row too; 0 when there is none."""
    both = list(map(and_, masks, repeat(row)))
    return map(int.bit_length, map(and_, both, map(neg, both)))


def _matrix(
    policy: Policy, rows: Sequence[tuple[int, int]], classes: Sequence[int]
) -> tuple[array[int], list[int], list[Detail]]:
    """Return the matrix without repeated rows, the row of each endpoint, and the details that occur in it."""
    matrix = array("I")
    numbers: dict[tuple[int, int], int] = {}
    details: dict[Detail, int] = {}
    for listener, mask in rows:
        if (listener, mask) in numbers:
            continue
        numbers[listener, mask] = len(numbers)
        firsts = list(_first_rules(classes, mask))
        words = {}
        for number in dict.fromkeys(firsts):
            detail = _detail(policy, listener, number)
            words[number] = details.setdefault(detail, len(details)) << _DETAIL_SHIFT | detail[2]
        matrix.extend(map(words.__getitem__, firsts))
    return matrix, [numbers[row] for row in rows], list(details)


def _detail(policy: Policy, listener: int, number: int) -> Detail:
    if number == 0:
        return listener, None, policy.default, Reason.DEFAULT
    return listener, number - 1, policy.rules[number - 1].action, Reason.RULE


def span(highs: Sequence[int]) -> tuple[int, int]:
    """Return where the upper halves of the IPv6 ranges begin after the first, and how many bits their distances need.

    All addresses in use lie in a small part of what there could be; an index of everything would be of no use.
    """
    return (highs[1], (highs[-1] - highs[1]).bit_length()) if len(highs) > 1 else (0, 0)


def _index(starts: array[int], first: int, bits: int) -> array[int]:
    """Return where each of 2**n equal parts of the 2**bits addresses from ``first`` begins in the table, and its length."""
    parts_bits = min(max(len(starts).bit_length() - _PER_PART_BITS, 0), _INDEX_BITS, bits)
    parts = range(first, first + (1 << bits), 1 << (bits - parts_bits))
    return array("I", [*map(bisect_left, repeat(starts), parts), len(starts)])


def _packed(starts: array[int], classes: array[int]) -> array[int]:
    """Return ``start << 32 | class`` for each range, without making an integer of each."""
    packed = array("Q", (0,)) * len(starts)
    words = memoryview(packed).cast("B").cast("I")
    words[_HIGH_WORD::2] = memoryview(starts)
    words[1 - _HIGH_WORD :: 2] = memoryview(classes)
    return packed
