from __future__ import annotations

import ipaddress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatekeeper.policy.decide import covers, decide
from gatekeeper.policy.model import (
    Action,
    Backend,
    Endpoint,
    Listener,
    Place,
    Policy,
    PolicyTest,
    Protocol,
    Rule,
    Sources,
)
from gatekeeper.policy.prove import proves_nothing, run_tests, satisfies
from gatekeeper.policy.ranges import AddressSet
from tests.policy.generated import NOWHERE, UNIVERSE, Written, WrittenRule, policies, sources, targets

TEST_PLACE = Place("rules.yaml", 40, 3)


def reaching(policy: Policy, test: PolicyTest) -> list[tuple[Listener, Endpoint, int, int]]:
    """Everybody who can reach what a test speaks of, among the addresses near bounds."""
    return [
        (listener, endpoint, endpoint.family, address)
        for listener in policy.listeners
        for endpoint in listener.endpoints
        if test.targets is None or any(target.matches(listener, endpoint) for target in test.targets)
        for address in ([0] if endpoint.family == 0 else UNIVERSE[endpoint.family])
        if covers(test.sources, endpoint.family, address)
    ]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(policies(), sources(), targets, st.sampled_from((Action.ALLOW, Action.DENY)))
def test_a_test_holds_exactly_when_every_source_gets_what_it_expects(
    case: tuple[Policy, list[WrittenRule]], meant: tuple[Written, Written, Sources], to: object, expect: Action
) -> None:
    """The proof agrees with trying everybody, and its counterexample really gets the verdict that it shows.

    Every bound of a generated set lies among the addresses that are tried, so trying them is trying all.
    """
    test = PolicyTest(meant[2], to, expect, TEST_PLACE)  # type: ignore[arg-type]  # generated
    policy = Policy(case[0].listeners, case[0].rules, case[0].default, NOWHERE, (test,))
    everybody = reaching(policy, test)
    wrong = [one for one in everybody if not satisfies(decide(policy, *one).action, expect)]
    failures = run_tests(policy)
    assert bool(failures) == bool(wrong)
    assert not everybody if proves_nothing(policy, test) else True
    for failure in failures:
        source = failure.counterexample
        address = 0 if source == "unix" else int(ipaddress.ip_address(source))
        family = 0 if source == "unix" else ipaddress.ip_address(source).version
        assert family == failure.endpoint.family
        assert covers(test.sources, family, address)
        verdict = decide(policy, failure.listener, failure.endpoint, family, address)
        assert verdict == failure.verdict
        assert not satisfies(verdict.action, expect)


def gate(*endpoints: Endpoint) -> Listener:
    """A listener at these endpoints."""
    return Listener("gate", Protocol.TCP, endpoints, Backend(4, "127.0.0.1", 9), 5.0, 60.0, 30.0, None, None, NOWHERE)


V4 = Endpoint(Protocol.TCP, 4, "0.0.0.0", 22)
V6 = Endpoint(Protocol.TCP, 6, "::", 22)
LOCAL = Endpoint(Protocol.TCP, 0, "/run/app.sock", 0)
EVERYONE = Sources(AddressSet.EVERYTHING, AddressSet.EMPTY, True, "any", "")
OFFICE = Sources(AddressSet.of(v4=[(0xC6336400, 0xC63364FF)]), AddressSet.EMPTY, False, "office", "")


def prove(listener: Listener, rules: list[Rule], default: Action, meant: Sources, expect: Action) -> list[str]:
    """The messages of a policy with one test."""
    test = PolicyTest(meant, None, expect, TEST_PLACE)
    default_place = Place("rules.yaml", 9, 1)
    failures = run_tests(Policy((listener,), tuple(rules), default, default_place, (test,)))
    assert all(failure.place == TEST_PLACE for failure in failures)
    return [failure.message for failure in failures]


def rule(action: Action, meant: Sources) -> Rule:
    """A rule for every listener."""
    return Rule("office-ssh", action, meant, None, Place("rules.d/office.yaml", 14, 5))


def test_a_failure_names_a_source_the_verdict_and_who_decided() -> None:
    """The message has the expectation, one source, where it arrives, what happens, and the rule with its place."""
    assert prove(gate(V4), [rule(Action.ALLOW, OFFICE)], Action.DENY, EVERYONE, Action.DENY) == [
        'expected deny, but 198.51.100.0 is allowed at 0.0.0.0:22/tcp by rule "office-ssh" (rules.d/office.yaml:14)'
    ]


def test_the_default_is_named_when_it_decided() -> None:
    """A source that no rule matches is shown with the default and its place."""
    assert prove(gate(V6), [rule(Action.ALLOW, OFFICE)], Action.DROP, EVERYONE, Action.ALLOW) == [
        "expected allow, but :: is dropped at [::]:22/tcp by the default (rules.yaml:9)"
    ]


@pytest.mark.parametrize("action", [Action.DENY, Action.DROP])
def test_deny_holds_for_drop_too(action: Action) -> None:
    """A test that expects deny is content with silence."""
    assert prove(gate(V4, V6, LOCAL), [], action, EVERYONE, Action.DENY) == []
    assert len(prove(gate(V4), [], action, EVERYONE, Action.ALLOW)) == 1


def test_any_speaks_of_local_peers_too() -> None:
    """A test for anybody is a test of unix sockets; one for some addresses is not."""
    assert prove(gate(LOCAL), [], Action.DENY, EVERYONE, Action.ALLOW) == [
        "expected allow, but a local peer is denied at unix:/run/app.sock by the default (rules.yaml:9)"
    ]
    assert prove(gate(LOCAL), [], Action.DENY, OFFICE, Action.ALLOW) == []
    assert prove(gate(LOCAL), [rule(Action.ALLOW, OFFICE)], Action.DENY, EVERYONE, Action.DENY) == []


def test_mapped_addresses_are_no_counterexample() -> None:
    """No peer has an IPv4-mapped address, so what a rule says about those alone breaks no test."""
    mapped = AddressSet.of(v6=[(0xFFFF00000000, 0xFFFFFFFFFFFF)])
    allow_mapped = rule(Action.ALLOW, Sources(mapped, AddressSet.EMPTY, False, "", ""))
    assert prove(gate(V6), [allow_mapped], Action.DENY, EVERYONE, Action.DENY) == []


def test_a_test_that_nobody_can_reach_proves_nothing() -> None:
    """IPv4 sources never arrive at an IPv6 endpoint; such a test holds, and is said to prove nothing."""
    test = PolicyTest(OFFICE, None, Action.ALLOW, TEST_PLACE)
    policy = Policy((gate(V6, LOCAL),), (), Action.DENY, NOWHERE, (test,))
    assert run_tests(policy) == []
    assert proves_nothing(policy, test)
    reachable = Policy((gate(V6, V4),), (), Action.DENY, NOWHERE, (test,))
    assert not proves_nothing(reachable, test)


def test_every_test_that_fails_is_reported_once() -> None:
    """One failure for each test that does not hold, in file order, however many endpoints break it."""
    wrong, right = PolicyTest(EVERYONE, None, Action.ALLOW, TEST_PLACE), PolicyTest(EVERYONE, None, Action.DENY, NOWHERE)
    policy = Policy((gate(V4, V6),), (), Action.DENY, NOWHERE, (wrong, right, wrong))
    assert [failure.test for failure in run_tests(policy)] == [wrong, wrong]
