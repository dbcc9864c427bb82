"""What changes between two policies: exactly which sources get another verdict, and at which ports.

Both compiled tables are walked together (`gatekeeper.policy.walk`), once for each family. Pairs of classes that are
judged alike by both policies at every endpoint are passed over there; the changes of an endpoint are the pairs whose
cells, in its row of either matrix, differ. Endpoints that change in the same way are one change.

What counts is where a connection arrives: an endpoint that one policy does not name may be served by a wildcard of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import rshift

from gatekeeper.policy.compile import compile_policy
from gatekeeper.policy.model import Action, Endpoint, Policy, Protocol
from gatekeeper.policy.ranges import AddressSet
from gatekeeper.policy.walk import Spans, line_v4, line_v6, union, where

_DETAIL_SHIFT = 2  # as in `gatekeeper.policy.compile`
_LOCAL_CLASS = 0
_WILDCARDS = {4: "0.0.0.0", 6: "::"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a source gets; ``rule`` ``None``: the default decides."""

    action: Action
    rule: str | None


@dataclass(frozen=True, slots=True)
class Served:
    """What an endpoint is to one policy: its listener, where connections go, and its row of the matrix."""

    listener: str
    backend: str
    row: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled policy as this module looks at it: `compiled` makes it, or `gatekeeper.snapshot.comparing`.

    The tables are those of `gatekeeper.policy.compile.Table`, as arrays or as views of them. ``outcomes`` are those of
    its details, in order.
    """

    v4: Sequence[int]
    v6_high: Sequence[int]
    v6_low: Sequence[int]
    v6_class: Sequence[int]
    matrix: Sequence[int]
    classes: int
    outcomes: Sequence[Outcome]
    served: Mapping[Endpoint, Served]

    def at(self, endpoint: Endpoint) -> Served | None:
        """Return who serves connections to this address and port; ``None``: nobody."""
        found = self.served.get(endpoint)
        if found is None and endpoint.family:
            host = _WILDCARDS[endpoint.family]
            found = self.served.get(Endpoint(endpoint.protocol, endpoint.family, host, endpoint.port))
        return found


@dataclass(frozen=True, slots=True)
class Place:
    """An endpoint of either policy, and who serves it in both; ``None``: nobody."""

    endpoint: Endpoint
    before: Served | None
    after: Served | None

    @property
    def moves(self) -> bool:
        """Whether it is opened, closed, or belongs to another listener or backend."""
        before, after = self.before, self.after
        if before is None or after is None:
            return before is not after
        return (before.listener, before.backend) != (after.listener, after.backend)


@dataclass(frozen=True, slots=True)
class Change:
    """Sources that have one outcome at all these hosts and ports, and get another. ``None``: nothing listens.

    ``hosts`` are addresses that we listen at; or one path of a unix socket, and ``ports`` is empty then. Sources of a
    family arrive only at hosts of that family. ``ports`` are inclusive ranges.
    """

    protocol: Protocol
    hosts: tuple[str, ...]
    ports: tuple[tuple[int, int], ...]
    listeners: tuple[str, ...]
    before: Outcome | None
    after: Outcome | None
    spans: tuple[Spans, ...]

    @property
    def is_local(self) -> bool:
        """Whether this is about the peers of unix sockets, who have no address."""
        return not self.ports

    @property
    def changes_action(self) -> bool:
        """Whether more changes than the rule that decides."""
        return _action(self.before) is not _action(self.after)

    def sources(self) -> AddressSet:
        """Return whom it concerns. Made at each call, and not kept: there may be millions."""
        v4, v6 = (union(family, [spans for spans in self.spans if spans.family == family]) for family in (4, 6))
        return AddressSet(v4, v6)


@dataclass(frozen=True, slots=True)
class Difference:
    """All that changes. ``places`` that move, in the order of the new policy; ``changes``, openings first."""

    places: list[Place]
    changes: list[Change]


def compiled(policy: Policy) -> Compiled:
    """Return a policy as `compare` takes it."""
    table = compile_policy(policy)
    rows = iter(table.rows)
    served = {
        endpoint: Served(listener.name, str(listener.backend_of(endpoint)), next(rows))
        for listener in policy.listeners
        for endpoint in listener.endpoints
    }
    outcomes = [
        Outcome(action, None if rule is None else policy.rules[rule].name) for _, rule, action, _ in table.details
    ]
    return Compiled(
        table.v4, table.v6_high, table.v6_low, table.v6_class, table.matrix, table.classes, outcomes, served
    )


def compare(old: Compiled, new: Compiled) -> Difference:
    """Return what changes from one policy to the other; changes of the deciding rule alone are among it."""
    endpoints = dict.fromkeys((*new.served, *old.served))
    places = [Place(endpoint, old.at(endpoint), new.at(endpoint)) for endpoint in endpoints]
    judge = _Judge(old, new)
    pieces = [piece for family in (0, 4, 6) for piece in _pieces(family, old, new, judge, places)]
    changes = sorted(_joined(pieces, judge.outcomes), key=_order)
    return Difference([place for place in places if place.moves], changes)


def _action(outcome: Outcome | None) -> Action | None:
    return None if outcome is None else outcome.action


def _order(change: Change) -> tuple[int, str, tuple[tuple[int, int], ...], tuple[str, ...]]:
    before, after = _action(change.before), _action(change.after)
    rank = 3 if before is after else 0 if after is Action.ALLOW else 1 if before is Action.ALLOW else 2
    return rank, change.protocol, change.ports, change.hosts


_Pair = tuple[int, int]  # the classes of some sources, before and after
_Row = tuple[int, ...]  # the number of the outcome of each class; 0: nothing listens


class _Judge:
    """Outcomes as numbers that mean the same in both policies, and rows of the matrices in these numbers."""

    def __init__(self, old: Compiled, new: Compiled) -> None:
        self._sides = (old, new)
        self.outcomes: list[Outcome | None] = list(dict.fromkeys((None, *old.outcomes, *new.outcomes)))
        numbers = {outcome: number for number, outcome in enumerate(self.outcomes)}
        self._of_detail = [[numbers[outcome] for outcome in side.outcomes] for side in self._sides]
        self._rows: dict[tuple[int, int | None], _Row] = {}

    def rows(self, place: Place) -> tuple[_Row, _Row]:
        """Return how the sources of an endpoint are judged before and after."""
        return self._row(0, place.before), self._row(1, place.after)

    def _row(self, which: int, served: Served | None) -> _Row:
        key = (which, None if served is None else served.row)
        known = self._rows.get(key)
        if known is None:
            side = self._sides[which]
            if served is None:
                known = (0,) * side.classes
            else:
                words = side.matrix[served.row * side.classes : (served.row + 1) * side.classes]
                known = tuple(map(self._of_detail[which].__getitem__, map(rshift, words, repeat(_DETAIL_SHIFT))))
            self._rows[key] = known
        return known


@dataclass(frozen=True, slots=True)
class _Piece:
    """Endpoints of one family at which some sources have one outcome before and another one after."""

    family: int
    before: int
    after: int
    spans: tuple[Spans, ...]
    places: list[Place]


def _pieces(family: int, old: Compiled, new: Compiled, judge: _Judge, places: Iterable[Place]) -> Iterator[_Piece]:
    """Yield what changes at the endpoints of one family, each group of endpoints and sources once."""
    alike: dict[tuple[_Row, _Row], list[Place]] = {}  # endpoints that are judged alike share their changes
    for place in places:
        if place.endpoint.family == family:
            alike.setdefault(judge.rows(place), []).append(place)
    if not alike:
        return

    spans = _spans(family, old, new, alike)
    found: dict[tuple[int, int, tuple[_Pair, ...]], list[Place]] = {}
    for (before, after), concerned in alike.items():
        changed: dict[tuple[int, int], list[_Pair]] = {}
        for one, other in spans:
            if before[one] != after[other]:
                changed.setdefault((before[one], after[other]), []).append((one, other))
        for (was, will_be), pairs in changed.items():
            found.setdefault((was, will_be, tuple(pairs)), []).extend(concerned)
    for (was, will_be, all_pairs), concerned in found.items():
        yield _Piece(family, was, will_be, tuple(spans[pair] for pair in all_pairs), concerned)


def _spans(family: int, old: Compiled, new: Compiled, alike: Collection[tuple[_Row, _Row]]) -> dict[_Pair, Spans]:
    """Return where the pairs of classes lie that are judged differently at some endpoint."""
    if family == 0:
        return {(_LOCAL_CLASS, _LOCAL_CLASS): Spans(0)}

    def matters(one: int, other: int) -> bool:
        return any(before[one] != after[other] for before, after in alike)

    if family == 4:
        return where(line_v4(old.v4), line_v4(new.v4), matters)
    one, other = (line_v6(side.v6_high, side.v6_low, side.v6_class) for side in (old, new))
    return where(one, other, matters)


def _joined(pieces: Iterable[_Piece], outcomes: Sequence[Outcome | None]) -> Iterator[Change]:
    """Yield the changes: hosts that have the same ports are told together, and so are both families."""
    groups: dict[tuple[int, int, Protocol, tuple[tuple[int, int], ...]], list[tuple[_Piece, list[Place]]]] = {}
    for piece in pieces:
        by_host: dict[tuple[Protocol, str], list[Place]] = {}
        for place in piece.places:
            by_host.setdefault((place.endpoint.protocol, place.endpoint.host), []).append(place)
        by_ports: dict[tuple[Protocol, tuple[tuple[int, int], ...]], list[Place]] = {}
        for (protocol, _), places in by_host.items():
            ports = () if piece.family == 0 else spans_of(place.endpoint.port for place in places)
            by_ports.setdefault((protocol, ports), []).extend(places)
        for (protocol, ports), places in by_ports.items():
            groups.setdefault((piece.before, piece.after, protocol, ports), []).append((piece, places))
    for (before, after, protocol, ports), members in groups.items():
        # A rule that names addresses of both families is one change; two sets of addresses of one family are two.
        one_each = len({piece.family for piece, _ in members}) == len(members)
        for together in [members] if one_each else [[member] for member in members]:
            everywhere = [place for _, places in together for place in places]
            listeners = (served.listener for place in everywhere if (served := place.after or place.before))
            yield Change(
                protocol,
                tuple(dict.fromkeys(place.endpoint.host for place in everywhere)),
                ports,
                tuple(dict.fromkeys(listeners)),
                outcomes[before],
                outcomes[after],
                tuple(spans for piece, _ in together for spans in piece.spans),
            )


def spans_of(ports: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return numbers as inclusive ranges, in order."""
    found: list[tuple[int, int]] = []
    for port in sorted(set(ports)):
        if found and found[-1][1] == port - 1:
            found[-1] = (found[-1][0], port)
        else:
            found.append((port, port))
    return tuple(found)
