"""The tests in a rule file, proved for every address by algebra instead of tried on some.

For each endpoint that a test speaks of, start with all sources of the test that can arrive there, walk the rules in
order, and take away what each rule matches. A part whose action contradicts the test is a counterexample, and so is
what is left over when the default contradicts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gatekeeper.policy.compile import effective
from gatekeeper.policy.decide import Verdict, applies
from gatekeeper.policy.model import Action, Endpoint, Listener, Place, Policy, PolicyTest, Reason, Rule
from gatekeeper.policy.ranges import MAPPED, AddressSet, Ranges, format_source


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


def run_tests(policy: Policy) -> list[TestFailure]:
    """Return the first failure of every test of the policy that does not hold, in file order.

    A test says nothing about endpoints that none of its sources can reach: an IPv4 source never arrives at an IPv6
    endpoint, and only "any" speaks of the peers of unix sockets.
    """
    prover = _Prover(policy)
    return [failure for test in policy.tests if (failure := prover.refute(test)) is not None]


def proves_nothing(policy: Policy, test: PolicyTest) -> bool:
    """Say whether no source of a test can reach any endpoint it speaks of, so that it holds whatever the rules say."""
    sources = _sources(test)
    return not any(_can_reach(test, sources, endpoint) for _, endpoint in _endpoints(policy, test))


def satisfies(action: Action, expect: Action) -> bool:
    """Say whether a verdict is what a test expects: deny holds for deny and drop."""
    return action == expect or (expect is Action.DENY and action is Action.DROP)


class _Prover:
    """Proves tests of one policy. Endpoints that the same rules speak of share one walk for each test."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._effective: dict[int, AddressSet] = {}
        self._rules_at: dict[Endpoint, tuple[int, ...]] = {}

    def refute(self, test: PolicyTest) -> TestFailure | None:
        sources = _sources(test)
        proved: set[tuple[int, tuple[int, ...]]] = set()
        for listener, endpoint in _endpoints(self._policy, test):
            rules = self._rules(listener, endpoint)
            if (endpoint.family, rules) in proved or not _can_reach(test, sources, endpoint):
                continue
            proved.add((endpoint.family, rules))
            found = (
                self._local(test.expect, rules)
                if endpoint.family == 0
                else self._walk(test.expect, endpoint.family, sources[endpoint.family], rules)
            )
            if found is not None:
                source, verdict = found
                return TestFailure(
                    test, listener, endpoint, source, verdict, _message(self._policy, test, endpoint, source, verdict)
                )
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


def _endpoints(policy: Policy, test: PolicyTest) -> Iterator[tuple[Listener, Endpoint]]:
    """Yield what a test speaks of: a test's targets mean what a rule's do."""
    for listener in policy.listeners:
        for endpoint in listener.endpoints:
            if test.targets is None or any(target.matches(listener, endpoint) for target in test.targets):
                yield listener, endpoint


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
