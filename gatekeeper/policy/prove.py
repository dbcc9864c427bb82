"""The tests in a rule file, proved for every address instead of tried on some.

Few tests are proved by algebra: for each endpoint that a test speaks of, start with all its sources that can arrive
there, walk the rules in order, and take away what each rule matches. A part whose action contradicts the test is a
counterexample, and so is what is left over when the default contradicts it.

Many tests are proved by the compiled table, which is worth making then: the classes that the sources of a test lie in
are found once, and each row says which of them it judges otherwise than expected. Both ways find the same
counterexample: the lowest address that the first such rule decides about.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol as Interface

from gatekeeper.policy.compile import compile_policy, effective
from gatekeeper.policy.decide import Verdict, applies
from gatekeeper.policy.model import Action, Endpoint, Listener, Place, Policy, PolicyTest, Reason, Rule, Sources, Target
from gatekeeper.policy.ranges import MAPPED, AddressSet, Ranges, bounds_from, format_source
from gatekeeper.policy.walk import Line, line_v4, line_v6, where

_MANY = 16  # tests
_LONG = 1000  # ranges of a test's sources, that are walked with the table instead of looked up in it
_FEW_CLASSES = 16
_DETAIL_SHIFT = 2  # as in `gatekeeper.policy.compile`
_LOCAL_CLASS = 0


@dataclass(frozen=True, slots=True)
class TestFailure:
    """One test that does not hold, shown by one source that gets another verdict than expected.

    ``counterexample`` is the source as text (``unix`` for the peer of a unix socket); ``place`` is the test's.
    """

    __test__ = False  # not a test class, whatever its name suggests to pytest

    test: PolicyTest
    listener: Listener
    endpoint: Endpoint
    counterexample: str
    verdict: Verdict
    message: str

    @property
    def place(self) -> Place:
        return self.test.place


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of all tests of a policy, in file order.

    ``failures`` has the first failure of each test that does not hold; ``empty`` are tests that prove nothing: no source
    of them can reach any endpoint they speak of, so they hold whatever the rules say.
    """

    failures: list[TestFailure]
    empty: list[PolicyTest]


def prove(policy: Policy) -> Proof:
    """Prove every test of a policy.

    A test says nothing about endpoints that none of its sources can reach: an IPv4 source never arrives at an IPv6
    endpoint, and only "any" speaks of the peers of unix sockets.
    """
    prover: _Prover = _ByTable(policy) if len(policy.tests) > _MANY else _ByAlgebra(policy)
    places = _Places(policy)
    proof = Proof([], [])
    for test in policy.tests:
        sources = _sources(test)
        reachable = [place for place in places.of(test) if _can_reach(test, sources, place[2])]
        if not reachable:
            proof.empty.append(test)
        elif (found := prover.refute(test, sources, reachable)) is not None:
            (_, listener, endpoint), source, verdict = found
            message = _message(policy, test, endpoint, source, verdict)
            proof.failures.append(TestFailure(test, listener, endpoint, source, verdict, message))
    return proof


def run_tests(policy: Policy) -> list[TestFailure]:
    """Return the first failure of every test of the policy that does not hold, in file order."""
    return prove(policy).failures


def satisfies(action: Action, expect: Action) -> bool:
    """Say whether a verdict is what a test expects: deny holds for deny and drop."""
    return action == expect or (expect is Action.DENY and action is Action.DROP)


_Where = tuple[int, Listener, Endpoint]  # the number of an endpoint in the policy, and the endpoint
_Refutation = tuple[_Where, str, Verdict]


class _Places:
    """The endpoints of a policy, found by what targets say."""

    def __init__(self, policy: Policy) -> None:
        self._all: list[_Where] = []
        self._of_listener: dict[str, list[int]] = {}
        for listener in policy.listeners:
            for endpoint in listener.endpoints:
                self._of_listener.setdefault(listener.name, []).append(len(self._all))
                self._all.append((len(self._all), listener, endpoint))
        self._by_port = sorted((one for one in self._all if one[2].family), key=lambda one: one[2].port)
        self._ports = [endpoint.port for _, _, endpoint in self._by_port]

    def of(self, test: PolicyTest) -> Iterable[_Where]:
        """Return what a test speaks of, in file order: its targets mean what a rule's do."""
        if test.targets is None:
            return self._all
        return map(self._all.__getitem__, sorted({number for target in test.targets for number in self._meant(target)}))

    def _meant(self, target: Target) -> Iterable[int]:
        if target.listener is not None:
            return self._of_listener.get(target.listener, ())
        low, high = bisect_left(self._ports, target.first_port), bisect_right(self._ports, target.last_port)
        return (number for number, _, endpoint in self._by_port[low:high] if target.protocol in {None, endpoint.protocol})


class _Prover(Interface):
    """A way to prove tests. ``reachable`` are the endpoints that a test speaks of and that some source of it can reach."""

    def refute(self, test: PolicyTest, sources: dict[int, Ranges], reachable: Iterable[_Where]) -> _Refutation | None: ...


class _ByTable:
    """Proves tests by the compiled policy."""

    def __init__(self, policy: Policy) -> None:
        table = compile_policy(policy)
        self._policy = policy
        self._table = table
        self._lines = {4: line_v4(table.v4), 6: line_v6(table.v6_high, table.v6_low, table.v6_class)}
        self._reached: dict[tuple[int, int, int], dict[int, int]] = {}
        words = [number << _DETAIL_SHIFT | action for number, (_, _, action, _) in enumerate(table.details)]
        self._contradicting = {
            expect: frozenset(word for word, detail in zip(words, table.details, strict=True) if not satisfies(detail[2], expect))
            for expect in Action
        }

    def refute(self, test: PolicyTest, sources: dict[int, Ranges], reachable: Iterable[_Where]) -> _Refutation | None:
        """Return a source of the test that gets another verdict, the endpoint, and the verdict."""
        table, wrong = self._table, self._contradicting[test.expect]
        proved = set()
        for place in reachable:
            family, row = place[2].family, table.rows[place[0]]
            if (family, row) in proved:
                continue
            proved.add((family, row))
            reached = self._reach(family, test.sources, sources)
            words = list(map(table.matrix[row * table.classes : (row + 1) * table.classes].__getitem__, reached))
            if not wrong.isdisjoint(words):
                hits = [hit for hit in zip(words, reached.values(), strict=True) if hit[0] in wrong]
                return place, *self._first(family, hits)
        return None

    def _first(self, family: int, hits: Iterable[tuple[int, int]]) -> tuple[str, Verdict]:
        """Return, of (word, address), the lowest address that the first of these rules decides about, and the verdict."""
        details, rules = self._table.details, self._policy.rules

        def order(hit: tuple[int, int]) -> tuple[int, int]:
            rule = details[hit[0] >> _DETAIL_SHIFT][1]
            return len(rules) if rule is None else rule, hit[1]

        word, address = min(hits, key=order)
        _, rule, action, reason = details[word >> _DETAIL_SHIFT]
        return format_source(family, address), Verdict(action, reason, None if rule is None else rules[rule])

    def _reach(self, family: int, named: Sources, sources: dict[int, Ranges]) -> dict[int, int]:
        """Return the classes that some sources lie in, each with the lowest of these addresses."""
        if family == 0:
            return {_LOCAL_CLASS: 0}
        key = (family, id(named.included), id(named.excluded))
        known = self._reached.get(key)
        if known is None:
            known = self._reached[key] = _reach(self._lines[family], sources[family])
        return known


def _reach(line: Line, ranges: Ranges) -> dict[int, int]:
    if len(ranges) > _LONG:
        starts = bounds_from(ranges.family, (0,))
        starts.extend(ranges.bounds)
        # Outside and inside by turns; a bound at 0 makes the first of them empty.
        skip = int(len(ranges.bounds) > 0 and ranges.bounds[0] == 0)
        inside = Line(ranges.family, starts[skip:], array("I", (at & 1 for at in range(skip, len(starts)))))
        return {number: spans.firsts[0] for (_, number), spans in where(inside, line, lambda own, _: own == 1).items()}
    found: dict[int, int] = {}
    for first, last in ranges:
        low, high = bisect_right(line.starts, first) - 1, bisect_right(line.starts, last)
        part = line.classes[low:high]
        distinct = set(part)
        if len(distinct) > _FEW_CLASSES:
            lowest = dict(zip(reversed(part), range(high - 1, low - 1, -1), strict=True))
        else:
            lowest = {number: low + part.index(number) for number in distinct}
        for number in lowest.keys() - found.keys():
            found[number] = max(line.starts[lowest[number]], first)
    return found


class _ByAlgebra:
    """Proves tests by taking away what each rule matches. Endpoints that the same rules speak of share one walk."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._effective: dict[int, AddressSet] = {}
        self._rules_at: dict[Endpoint, tuple[int, ...]] = {}

    def refute(self, test: PolicyTest, sources: dict[int, Ranges], reachable: Iterable[_Where]) -> _Refutation | None:
        """Return a source of the test that gets another verdict, the endpoint, and the verdict."""
        proved: set[tuple[int, tuple[int, ...]]] = set()
        for place in reachable:
            _, listener, endpoint = place
            rules = self._rules(listener, endpoint)
            if (endpoint.family, rules) in proved:
                continue
            proved.add((endpoint.family, rules))
            found = (
                self._local(test.expect, rules)
                if endpoint.family == 0
                else self._walk(test.expect, endpoint.family, sources[endpoint.family], rules)
            )
            if found is not None:
                return place, *found
        return None

    def _rules(self, listener: Listener, endpoint: Endpoint) -> tuple[int, ...]:
        """Return the indices of the rules that speak of an endpoint; no two endpoints are equal."""
        known = self._rules_at.get(endpoint)
        if known is None:
            known = self._rules_at[endpoint] = tuple(
                index for index, rule in enumerate(self._policy.rules) if applies(rule, listener, endpoint)
            )
        return known

    def _walk(
        self, expect: Action, family: int, remaining: Ranges, rules: tuple[int, ...]
    ) -> tuple[str, Verdict] | None:
        """Return one of these sources that gets another verdict than expected, with that verdict."""
        for index in rules:
            if not remaining:
                return None
            rule = self._policy.rules[index]
            matched = self._sources_of(index, rule).of_family(family)
            if satisfies(rule.action, expect):
                remaining -= matched
            elif hit := remaining & matched:
                return format_source(family, hit.bounds[0]), Verdict(rule.action, Reason.RULE, rule)
        if remaining and not satisfies(self._policy.default, expect):
            return format_source(family, remaining.bounds[0]), Verdict(self._policy.default, Reason.DEFAULT, None)
        return None

    def _local(self, expect: Action, rules: tuple[int, ...]) -> tuple[str, Verdict] | None:
        rule = next((rule for rule in map(self._policy.rules.__getitem__, rules) if rule.sources.anyone), None)
        verdict = (
            Verdict(rule.action, Reason.RULE, rule) if rule else Verdict(self._policy.default, Reason.DEFAULT, None)
        )
        return None if satisfies(verdict.action, expect) else (format_source(0, 0), verdict)

    def _sources_of(self, index: int, rule: Rule) -> AddressSet:
        known = self._effective.get(index)
        if known is None:
            known = self._effective[index] = effective(rule)
        return known


def _sources(test: PolicyTest) -> dict[int, Ranges]:
    """Return by family the sources that a test speaks of; IPv4-mapped ones are IPv4."""
    addresses = test.sources.included - test.sources.excluded
    return {4: addresses.v4, 6: addresses.v6 - MAPPED}


def _can_reach(test: PolicyTest, sources: dict[int, Ranges], endpoint: Endpoint) -> bool:
    return test.sources.anyone if endpoint.family == 0 else bool(sources[endpoint.family])


def _message(policy: Policy, test: PolicyTest, endpoint: Endpoint, source: str, verdict: Verdict) -> str:
    words = {Action.ALLOW: "is allowed", Action.DENY: "is denied", Action.DROP: "is dropped"}
    source = "a local peer" if source == "unix" else source
    where = endpoint.address if endpoint.family == 0 else f"{endpoint.address}/{endpoint.protocol}"
    by = (
        f"the default ({policy.default_place.file}:{policy.default_place.line})"
        if verdict.rule is None
        else f'rule "{verdict.rule.name}" ({verdict.rule.place.file}:{verdict.rule.place.line})'
    )
    return f"expected {test.expect.label}, but {source} {words[verdict.action]} at {where} by {by}"
