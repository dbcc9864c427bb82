from __future__ import annotations

import ipaddress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatekeeper.policy import prove as proving
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
from gatekeeper.policy.prove import Proof, TestFailure, prove, run_tests, satisfies
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


def in_the_other_ways(policy: Policy) -> list[TestFailure]:
    """The failures that the compiled table shows: by looking sources up, and, as for long lists, by a walk with it."""
    found = []
    for long, few_classes in ((1000, 16), (1000, 0), (0, 16)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proving, "_MANY", 0)
            patch.setattr(proving, "_LONG", long)
            patch.setattr(proving, "_FEW_CLASSES", few_classes)
            found.append(run_tests(policy))
    assert found[0] == found[1] == found[2]
    return found[0]


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
    proof = prove(policy)
    failures = proof.failures
    assert bool(failures) == bool(wrong)
    assert not (proof.empty and everybody)
    assert failures == in_the_other_ways(policy)
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


def messages(listener: Listener, rules: list[Rule], default: Action, meant: Sources, expect: Action) -> list[str]:
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
    assert messages(gate(V4), [rule(Action.ALLOW, OFFICE)], Action.DENY, EVERYONE, Action.DENY) == [
        'expected deny, but 198.51.100.0 is allowed at 0.0.0.0:22/tcp by rule "office-ssh" (rules.d/office.yaml:14)'
    ]


def test_the_default_is_named_when_it_decided() -> None:
    """A source that no rule matches is shown with the default and its place."""
    assert messages(gate(V6), [rule(Action.ALLOW, OFFICE)], Action.DROP, EVERYONE, Action.ALLOW) == [
        "expected allow, but :: is dropped at [::]:22/tcp by the default (rules.yaml:9)"
    ]


@pytest.mark.parametrize("action", [Action.DENY, Action.DROP])
def test_deny_holds_for_drop_too(action: Action) -> None:
    """A test that expects deny is content with silence."""
    assert messages(gate(V4, V6, LOCAL), [], action, EVERYONE, Action.DENY) == []
    assert len(messages(gate(V4), [], action, EVERYONE, Action.ALLOW)) == 1


def test_any_speaks_of_local_peers_too() -> None:
    """A test for anybody is a test of unix sockets; one for some addresses is not."""
    assert messages(gate(LOCAL), [], Action.DENY, EVERYONE, Action.ALLOW) == [
        "expected allow, but a local peer is denied at unix:/run/app.sock by the default (rules.yaml:9)"
    ]
    assert messages(gate(LOCAL), [], Action.DENY, OFFICE, Action.ALLOW) == []
    assert messages(gate(LOCAL), [rule(Action.ALLOW, OFFICE)], Action.DENY, EVERYONE, Action.DENY) == []


def test_mapped_addresses_are_no_counterexample() -> None:
    """No peer has an IPv4-mapped address, so what a rule says about those alone breaks no test."""
    mapped = AddressSet.of(v6=[(0xFFFF00000000, 0xFFFFFFFFFFFF)])
    allow_mapped = rule(Action.ALLOW, Sources(mapped, AddressSet.EMPTY, False, "", ""))
    assert messages(gate(V6), [allow_mapped], Action.DENY, EVERYONE, Action.DENY) == []


def test_a_test_that_nobody_can_reach_proves_nothing() -> None:
    """IPv4 sources never arrive at an IPv6 endpoint; such a test holds, and is said to prove nothing."""
    test = PolicyTest(OFFICE, None, Action.ALLOW, TEST_PLACE)
    policy = Policy((gate(V6, LOCAL),), (), Action.DENY, NOWHERE, (test,))
    assert prove(policy) == Proof(failures=[], empty=[test])
    reachable = Policy((gate(V6, V4),), (), Action.DENY, NOWHERE, (test,))
    assert prove(reachable).empty == []


def test_every_test_that_fails_is_reported_once() -> None:
    """One failure for each test that does not hold, in file order, however many endpoints break it."""
    wrong, right = PolicyTest(EVERYONE, None, Action.ALLOW, TEST_PLACE), PolicyTest(EVERYONE, None, Action.DENY, NOWHERE)
    policy = Policy((gate(V4, V6),), (), Action.DENY, NOWHERE, (wrong, right, wrong))
    assert [failure.test for failure in run_tests(policy)] == [wrong, wrong]


def test_thousands_of_tests_and_rules() -> None:
    """2,000 tests against 2,000 rules: those that do not hold are found, with the address and the rule."""
    networks = [AddressSet.of(v4=[(0x0A000000 + (at << 8), 0x0A0000FF + (at << 8))]) for at in range(2000)]
    meant = [Sources(network, AddressSet.EMPTY, False, "", "") for network in networks]
    rules = [Rule(f"r{at}", Action.DENY if at in {77, 1999} else Action.ALLOW, one, None, NOWHERE) for at, one in enumerate(meant)]
    tests = tuple(PolicyTest(one, None, Action.ALLOW, TEST_PLACE) for one in meant)
    failures = run_tests(Policy((gate(V4, V6),), tuple(rules), Action.DROP, NOWHERE, tests))
    assert [(one.counterexample, one.verdict.rule and one.verdict.rule.name) for one in failures] == [
        ("10.0.77.0", "r77"), ("10.7.207.0", "r1999")
    ]  # fmt: skip
