"""What changes between two policies is exactly what asking both about everybody shows."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from gatekeeper.policy import walk
from gatekeeper.policy.decide import decide
from gatekeeper.policy.diff import Change, Difference, Outcome, compare, compiled, spans_of
from gatekeeper.policy.model import Action, Backend, Endpoint, Listener, Policy, Protocol, Rule, Sources, Target
from gatekeeper.policy.ranges import AddressSet
from tests.policy.generated import NOWHERE, UNIVERSE, WrittenRule, policies

PROMISED = 1000  # pairs of policies compared in one run

Who = tuple[Endpoint, int]  # where they connect to, and their address
What = tuple[Outcome | None, Outcome | None]


def served_by(policy: Policy, wanted: Endpoint) -> tuple[Listener, Endpoint] | None:
    """The endpoint that gets connections to an address, as the kernel chooses: the address itself, else a wildcard."""
    for host in (wanted.host, "0.0.0.0" if wanted.family == 4 else "::"):
        for listener in policy.listeners:
            for endpoint in listener.endpoints:
                if endpoint == replace(wanted, host=host):
                    return listener, endpoint
    return None


def asked(policy: Policy, wanted: Endpoint, address: int) -> Outcome | None:
    """What the plain scan says."""
    found = served_by(policy, wanted)
    if found is None:
        return None
    verdict = decide(policy, *found, wanted.family, address)
    return Outcome(verdict.action, verdict.rule.name if verdict.rule else None)


def by_asking(old: Policy, new: Policy) -> dict[Who, What]:
    """Everybody near a bound whose outcome differs."""
    endpoints = {endpoint for policy in (old, new) for listener in policy.listeners for endpoint in listener.endpoints}
    found = {}
    for endpoint in endpoints:
        for address in UNIVERSE[endpoint.family] if endpoint.family else [0]:
            what = asked(old, endpoint, address), asked(new, endpoint, address)
            if what[0] != what[1]:
                found[endpoint, address] = what
    return found


def as_told(difference: Difference) -> dict[Who, What]:
    """The same, read from what `compare` says; nobody is told twice."""
    found: dict[Who, What] = {}
    for change in difference.changes:
        sources = change.sources()
        assert bool(sources) is not change.is_local
        for endpoint in places(change):
            for address in UNIVERSE[endpoint.family] if endpoint.family else [0]:
                if endpoint.family == 0 or sources.contains(endpoint.family, address):
                    assert (endpoint, address) not in found
                    found[endpoint, address] = change.before, change.after
    return found


def places(change: Change) -> list[Endpoint]:
    """The endpoints of a change."""
    if change.is_local:
        return [Endpoint(change.protocol, 0, host, 0) for host in change.hosts]
    return [
        Endpoint(change.protocol, ipaddress.ip_address(host).version, host, port)
        for host in change.hosts
        for first, last in change.ports
        for port in range(first, last + 1)
    ]


def edits(old: Policy, other: Policy) -> list[Policy]:
    """What could come after a policy: another one, and the same with some of its rules, listeners or its default changed."""
    fewer, turned = old.rules[1:], tuple(reversed(old.rules))
    return [
        other,
        replace(other, rules=old.rules),
        replace(old, rules=fewer),
        replace(old, rules=turned),
        replace(old, rules=(*other.rules[:1], *old.rules)),
        replace(old, default=other.default, listeners=old.listeners[1:] or other.listeners),
    ]


@pytest.mark.timeout(300)
def test_exactly_what_asking_everybody_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare` tells whom a plain scan of both policies judges differently, with both verdicts, and nobody else.

    At every endpoint of either policy, for every address near a bound, and for peers without an address. The segments
    of the walk are two ranges long here, so that their borders lie everywhere.
    """
    monkeypatch.setattr(walk, "_SEGMENT", 2)
    compared = 0

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(policies(), policies())
    def some(one: tuple[Policy, list[WrittenRule]], other: tuple[Policy, list[WrittenRule]]) -> None:
        nonlocal compared
        old = one[0]
        for new in edits(old, other[0]):
            assert as_told(compare(compiled(old), compiled(new))) == by_asking(old, new)
            compared += 1

    while compared < PROMISED:
        some()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(policies())
def test_a_policy_does_not_differ_from_itself(case: tuple[Policy, list[WrittenRule]]) -> None:
    """Nothing changes between equal policies."""
    difference = compare(compiled(case[0]), compiled(case[0]))
    assert (difference.changes, difference.places) == ([], [])


def listener(name: str, *endpoints: Endpoint, backend: str = "127.0.0.1") -> Listener:
    """A listener at these endpoints."""
    return Listener(name, endpoints[0].protocol, endpoints, Backend(4, backend, 9), 5.0, 60.0, 30.0, None, None, NOWHERE)


def tcp(host: str, port: int) -> Endpoint:
    """An endpoint for TCP."""
    return Endpoint(Protocol.TCP, ipaddress.ip_address(host).version, host, port)


def rule(name: str, action: Action, *networks: str, to: str | None = None) -> Rule:
    """A rule for these networks; none: for anyone."""
    parsed = [ipaddress.ip_network(text) for text in networks]
    pairs = {version: [(int(one[0]), int(one[-1])) for one in parsed if one.version == version] for version in (4, 6)}
    addresses = AddressSet.of(pairs[4], pairs[6]) if networks else AddressSet.EVERYTHING
    meant = Sources(addresses, AddressSet.EMPTY, not networks, "", "")
    return Rule(name, action, meant, None if to is None else (Target(to),), NOWHERE)


def policy(*rules: Rule, listeners: tuple[Listener, ...] = (), default: Action = Action.DENY) -> Policy:
    """A policy over these listeners, or over one at port 22 of both families."""
    return Policy(listeners or (listener("ssh", tcp("0.0.0.0", 22), tcp("::", 22)),), rules, default, NOWHERE)


def test_both_families_of_one_rule_are_one_change() -> None:
    """A rule that names IPv4 and IPv6 networks, at a listener for both, is told once, as the fewest networks."""
    office = rule("office", Action.ALLOW, "198.51.100.0/25", "198.51.100.128/25", "2001:db8::/32")
    (change,) = compare(compiled(policy()), compiled(policy(office))).changes
    assert list(change.sources().networks()) == ["198.51.100.0/24", "2001:db8::/32"]
    assert (change.hosts, change.ports, change.listeners) == (("0.0.0.0", "::"), ((22, 22),), ("ssh",))
    assert (change.before, change.after) == (Outcome(Action.DENY, None), Outcome(Action.ALLOW, "office"))


def test_neighbouring_ports_with_the_same_change_are_one() -> None:
    """A change at a hundred ports of a listener is told once, with the range; a port of its own kind is told apart."""
    wide = listener("wide", *(tcp("0.0.0.0", port) for port in range(8000, 8100)))
    lone = listener("lone", tcp("0.0.0.0", 8050 + 1000))
    before = policy(listeners=(wide, lone))
    after = policy(rule("ten", Action.ALLOW, "10.0.0.0/8"), listeners=(wide, lone))
    (change,) = compare(compiled(before), compiled(after)).changes
    assert change.ports == ((8000, 8099), (9050, 9050))
    assert change.listeners == ("wide", "lone")


def test_only_another_rule_is_no_change_of_the_action() -> None:
    """When another rule gives the same action, the change says so; it stands behind those that change the action."""
    before = policy(rule("ten", Action.ALLOW, "10.0.0.0/8"), rule("eleven", Action.ALLOW, "11.0.0.0/8"))
    after = policy(rule("zehn", Action.ALLOW, "10.0.0.0/8"), rule("eleven", Action.DROP, "11.0.0.0/8"))
    changes = compare(compiled(before), compiled(after)).changes
    assert [(change.changes_action, list(change.sources().networks())) for change in changes] == [
        (True, ["11.0.0.0/8"]),
        (False, ["10.0.0.0/8"]),
    ]


def test_endpoints_that_are_opened_closed_and_moved() -> None:
    """An endpoint of one policy alone is opened or closed, another backend or listener moves it; others are not told."""
    stays, goes, comes = (listener(name, tcp("127.0.0.1", port)) for name, port in (("a", 1), ("b", 2), ("c", 3)))
    here, there = (listener("d", tcp("127.0.0.1", 4), backend=f"127.0.0.{number}") for number in (1, 2))
    before, after = policy(listeners=(stays, goes, here)), policy(listeners=(there, comes, stays))
    difference = compare(compiled(before), compiled(after))
    told = [(place.endpoint.port, place.before and place.before.backend, place.after and place.after.backend)
            for place in difference.places]  # fmt: skip
    assert told == [(4, "127.0.0.1:9", "127.0.0.2:9"), (3, None, "127.0.0.1:9"), (2, "127.0.0.1:9", None)]
    assert [(change.ports, change.before, change.after) for change in difference.changes] == [
        (((2, 2),), Outcome(Action.DENY, None), None),
        (((3, 3),), None, Outcome(Action.DENY, None)),
    ]
    assert all(list(change.sources().networks()) == ["0.0.0.0/0"] for change in difference.changes)


def test_an_address_taken_out_of_a_wildcard_is_compared_with_the_wildcard() -> None:
    """What a wildcard served so far is not opened by naming it: its verdicts may change, and its listener does."""
    every, one = listener("every", tcp("0.0.0.0", 22)), listener("one", tcp("127.0.0.1", 22))
    office = rule("office", Action.ALLOW, "10.0.0.0/8", to="every")
    difference = compare(compiled(policy(office, listeners=(every,))), compiled(policy(office, listeners=(every, one))))
    assert [(place.endpoint.host, place.before and place.before.listener) for place in difference.places] == [
        ("127.0.0.1", "every")
    ]
    (change,) = difference.changes
    assert (change.hosts, change.before, change.after) == (
        ("127.0.0.1",), Outcome(Action.ALLOW, "office"), Outcome(Action.DENY, None)
    )  # fmt: skip


def test_mapped_addresses_are_nobody() -> None:
    """What changes for IPv4-mapped addresses alone changes for nobody, and does not cut anybody else's network."""
    mapped = rule("mapped", Action.ALLOW, "::ffff:0:0/96")
    assert compare(compiled(policy()), compiled(policy(mapped))).changes == []
    (change,) = compare(compiled(policy()), compiled(policy(default=Action.DROP))).changes
    assert list(change.sources().networks()) == ["0.0.0.0/0", "::/0"]


@pytest.mark.parametrize("family", [4, 6])
def test_few_changes_among_many_networks(family: int) -> None:
    """Two lists of 20,000 networks that differ in three places: these three, whatever the length of the walk's segments."""
    bits, at = (32, 1 << 30) if family == 4 else (128, 0x20010DB8 << 96)
    kind = ipaddress.ip_network

    def listed(numbers: set[int]) -> Policy:
        return policy(rule("block", Action.DROP, *(str(kind((at + (number << 3), bits - 1))) for number in numbers)))

    numbers = set(range(20_000))
    (added, removed) = compare(
        compiled(listed(numbers - {7, 19_999})), compiled(listed(numbers - {1024}))
    ).changes  # fmt: skip
    told = {change.after and change.after.action: list(change.sources().networks()) for change in (added, removed)}
    assert told == {
        Action.DROP: [str(kind((at + (number << 3), bits - 1))) for number in (7, 19_999)],
        Action.DENY: [str(kind((at + (1024 << 3), bits - 1)))],
    }


def test_ports_as_ranges() -> None:
    """Numbers in any order become the fewest inclusive ranges."""
    assert spans_of([5, 1, 2, 9, 3, 3]) == ((1, 3), (5, 5), (9, 9))
    assert spans_of([]) == ()
