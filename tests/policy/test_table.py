from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from gatekeeper.policy.compile import compile_policy
from gatekeeper.policy.decide import Verdict, decide
from gatekeeper.policy.model import (
    Action,
    Backend,
    Config,
    Endpoint,
    Listener,
    Policy,
    Protocol,
    Reason,
    Rule,
    Settings,
    Sources,
    Target,
)
from gatekeeper.policy.ranges import LOW64, AddressSet, normalize
from gatekeeper.snapshot.encode import encode
from gatekeeper.snapshot.layout import ACTION_MASK, DETAIL_SHIFT, LOCAL_CLASS
from gatekeeper.snapshot.reader import Snapshot
from tests.policy.generated import NOWHERE, UNIVERSE, WrittenRule, policies

PROMISED = 100_000  # decisions compared in one run

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def first_match(
    policy: Policy, rules: list[WrittenRule], listener: Listener, endpoint: Endpoint, peer: Address | None
) -> tuple[Action, Rule | None]:
    """Walk the rules with the standard library's addresses: the slow and plain answer."""
    if isinstance(peer, ipaddress.IPv6Address) and peer.ipv4_mapped is not None:
        peer = peer.ipv4_mapped
    for written in rules:
        rule = written.rule
        if rule.targets is not None and not any(target.matches(listener, endpoint) for target in rule.targets):
            continue
        if rule.sources.anyone or (
            peer is not None and written.included.holds(peer) and not written.excluded.holds(peer)
        ):
            return rule.action, rule
    return policy.default, None


def peers(endpoint: Endpoint) -> Iterator[Address | None]:
    """Who can arrive at an endpoint: every address near a bound; IPv4 also as it looks on a dual-stack socket."""
    if endpoint.family == 0:
        yield None
    elif endpoint.family == 4:
        for number in UNIVERSE[4]:
            yield ipaddress.IPv4Address(number)
            yield ipaddress.IPv6Address(0xFFFF << 32 | number)
    else:
        yield from map(ipaddress.IPv6Address, UNIVERSE[6])


def looked_up(snapshot: Snapshot, index: int, peer: Address | None) -> tuple[Action, str | None, str, int]:
    """Return action, rule, reason and listener as a worker finds them."""
    if peer is None:
        found = LOCAL_CLASS
    else:
        family, address = normalize(peer.version, int(peer))
        found = snapshot.lookup_v4(address) if family == 4 else snapshot.lookup_v6(address >> 64, address & LOW64)
    word = snapshot.verdict(snapshot.meta["endpoints"][index]["row"], found)
    listener, rule, action, reason = snapshot.meta["details"][word >> DETAIL_SHIFT]
    assert Action(word & ACTION_MASK).label == action
    return Action(word & ACTION_MASK), None if rule is None else snapshot.meta["rules"][rule]["name"], reason, listener


@pytest.mark.timeout(300)
def test_the_table_agrees_with_a_plain_first_match_scan() -> None:
    """Snapshot, `decide` and a scan with the standard library's addresses give one verdict, for every kind of peer.

    IPv4, IPv4-mapped, IPv6 and local peers, at and around every bound, on listeners that share a port at different addresses.
    """
    compared = 0

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(policies())
    def compare(case: tuple[Policy, list[WrittenRule]]) -> None:
        nonlocal compared
        policy, rules = case
        snapshot = Snapshot(b"".join(encode(Config(policy, Settings(), "0" * 64))))
        snapshot.validate()
        places = [(number, listener, endpoint) for number, listener in enumerate(policy.listeners)
                  for endpoint in listener.endpoints]  # fmt: skip
        for index, (number, listener, endpoint) in enumerate(places):
            for peer in peers(endpoint):
                action, rule = first_match(policy, rules, listener, endpoint, peer)
                reason = Reason.RULE if rule else Reason.DEFAULT
                family, address = (0, 0) if peer is None else normalize(peer.version, int(peer))
                assert decide(policy, listener, endpoint, family, address) == Verdict(action, reason, rule)
                name = rule.name if rule else None
                assert looked_up(snapshot, index, peer) == (action, name, reason, number)
                compared += 1

    while compared < PROMISED:  # each turn draws other policies
        compare()


def listener(name: str, *addresses: str, port: int = 22) -> Listener:
    """A TCP listener with one endpoint at each address."""
    endpoints = tuple(Endpoint(Protocol.TCP, ipaddress.ip_address(host).version, host, port) for host in addresses)
    return Listener(name, Protocol.TCP, endpoints, Backend(4, "127.0.0.1", 9), 5.0, 60.0, 30.0, None, None, NOWHERE)


def rule(name: str, action: Action, addresses: AddressSet, *targets: Target, excluded: AddressSet | None = None) -> Rule:
    """A rule for these addresses at these targets, or at all."""
    meant = Sources(addresses, excluded or AddressSet.EMPTY, addresses is AddressSet.EVERYTHING and not excluded, "", "")
    return Rule(name, action, meant, targets or None, NOWHERE)


def network(text: str) -> AddressSet:
    """The addresses of one network."""
    parsed = ipaddress.ip_network(text)
    pair = (int(parsed[0]), int(parsed[-1]))
    return AddressSet.of(v4=[pair]) if parsed.version == 4 else AddressSet.of(v6=[pair])


def test_two_listeners_on_one_port_are_told_apart() -> None:
    """A rule for one listener says nothing at another that has the same port at a different address."""
    inside, outside = listener("inside", "127.0.0.1"), listener("outside", "127.0.0.2")
    policy = Policy(
        (inside, outside),
        (rule("in", Action.ALLOW, AddressSet.EVERYTHING, Target("inside")),),
        Action.DROP,
        NOWHERE,
    )
    assert decide(policy, inside, inside.endpoints[0], 4, 7).action is Action.ALLOW
    assert decide(policy, outside, outside.endpoints[0], 4, 7).action is Action.DROP
    table = compile_policy(policy)
    assert table.rows[0] != table.rows[1]


def test_ranges_judged_alike_everywhere_are_one() -> None:
    """Neighbouring networks of one class merge, and classes that no endpoint tells apart are one class."""
    gate = listener("gate", "0.0.0.0")
    halves = (network("10.0.0.0/25"), network("10.0.0.128/25"))
    shadowed = rule("shadowed", Action.DENY, network("10.0.0.0/26"))  # behind a rule that covers it
    elsewhere = rule("elsewhere", Action.DENY, network("10.0.0.64/26"), Target("nowhere"))
    policy = Policy((gate,), (rule("ten", Action.ALLOW, halves[0] | halves[1]), shadowed, elsewhere), Action.DENY, NOWHERE)
    table = compile_policy(policy)
    assert [word >> 32 for word in table.v4] == [0, 10 << 24, (10 << 24) + 256]
    assert table.classes == 3  # local peers, the network, everything else
    assert len(table.v6_class) == 1


def test_endpoints_judged_alike_share_a_row() -> None:
    """A thousand ports of one listener are one row, unless a rule names some of them."""
    ports = tuple(Endpoint(Protocol.TCP, 4, "0.0.0.0", port) for port in range(8000, 9000))
    gate = Listener("gate", Protocol.TCP, ports, Backend(4, "127.0.0.1", 0), 5.0, 60.0, 30.0, None, None, NOWHERE)
    alike = Policy((gate,), (rule("all", Action.ALLOW, network("10.0.0.0/8")),), Action.DENY, NOWHERE)
    assert set(compile_policy(alike).rows) == {0}
    some = Policy((gate,), (rule("some", Action.ALLOW, network("10.0.0.0/8"), Target(None, 8010, 8019)),), Action.DENY, NOWHERE)
    table = compile_policy(some)
    assert [index for index, row in enumerate(table.rows) if row == table.rows[10]] == list(range(10, 20))
    assert len(table.matrix) == 2 * table.classes


def test_details_are_those_that_occur() -> None:
    """There is one detail for each verdict that can be given, and for each listener one of its limit of sessions and one of bans."""
    gate, other = listener("gate", "0.0.0.0"), listener("other", "0.0.0.0", port=23)
    policy = Policy(
        (gate, other),
        (
            rule("mine", Action.ALLOW, network("10.0.0.0/8"), Target("gate")),
            rule("never", Action.ALLOW, network("10.1.0.0/16"), Target("gate")),
        ),
        Action.DENY,
        NOWHERE,
    )
    table = compile_policy(policy)
    verdicts = {(0, 0, Action.ALLOW, Reason.RULE), (0, None, Action.DENY, Reason.DEFAULT), (1, None, Action.DENY, Reason.DEFAULT)}
    limits = [(index, None, Action.DENY, Reason.MAX_SESSIONS) for index in (0, 1)]
    bans = [(index, None, Action.DENY, Reason.BAN) for index in (0, 1)]
    assert {table.details[word >> DETAIL_SHIFT] for word in table.matrix} == verdicts
    assert [table.details[index] for index in table.over] == limits
    assert [table.details[index] for index in table.ban] == bans
    assert set(table.details) == verdicts | set(limits) | set(bans)


def test_local_peers_are_matched_by_rules_for_anyone_alone() -> None:
    """A rule for every address with an exception is no rule for peers without an address."""
    app = Listener(
        "app", Protocol.TCP, (Endpoint(Protocol.TCP, 0, "/run/app.sock", 0),), Backend(4, "127.0.0.1", 9),
        5.0, 60.0, 30.0, None, None, NOWHERE,
    )  # fmt: skip
    but_one = rule("but-one", Action.ALLOW, AddressSet.EVERYTHING, excluded=network("10.0.0.1/32"))
    assert decide(Policy((app,), (but_one,), Action.DENY, NOWHERE), app, app.endpoints[0], 0, 0).rule is None
    anyone = rule("anyone", Action.ALLOW, AddressSet.EVERYTHING)
    assert decide(Policy((app,), (but_one, anyone), Action.DENY, NOWHERE), app, app.endpoints[0], 0, 0).rule is anyone


@pytest.mark.parametrize("extra", [0, 3, 3000], ids=["alone", "beside small sets", "beside one of its kind"])
def test_a_dominant_set_compiles_to_the_same_table(extra: int) -> None:
    """However large one set is beside the others, each address gets the class that the scan gives it."""
    gate = listener("gate", "0.0.0.0", "::")
    blocked = [(at, at + at % 3) for at in range(1 << 30, (1 << 30) + 40_000, 13)]
    others = [((1 << 30) + 17 * step - 1, (1 << 30) + 17 * step + 5) for step in range(extra)]
    policy = Policy(
        (gate,),
        (
            rule("friends", Action.ALLOW, AddressSet.of(v4=others, v6=others)),
            rule("blocked", Action.DROP, AddressSet.of(v4=blocked, v6=blocked)),
            rule("edge", Action.ALLOW, AddressSet.of(v4=[blocked[0], (blocked[7][0], blocked[9][1])])),
        ),
        Action.DENY,
        NOWHERE,
    )
    snapshot = Snapshot(b"".join(encode(Config(policy, Settings(), ""))))
    snapshot.validate()
    for index, endpoint in enumerate(gate.endpoints):
        kind = ipaddress.IPv4Address if endpoint.family == 4 else ipaddress.IPv6Address
        for at in range((1 << 30) - 3, (1 << 30) + 41_000, 3):
            want = decide(policy, gate, endpoint, endpoint.family, at)
            assert looked_up(snapshot, index, kind(at))[:2] == (want.action, want.rule.name if want.rule else None)


def test_a_thousand_rules_on_a_thousand_listeners() -> None:
    """A rule for each of a thousand listeners compiles, and each listener follows its own."""
    gates = tuple(listener(f"l{index}", "0.0.0.0", port=1000 + index) for index in range(1000))
    rules = tuple(
        rule(f"r{index}", Action.ALLOW, network(f"10.{index // 256}.{index % 256}.0/24"), Target(f"l{index}"))
        for index in range(1000)
    )
    policy = Policy(gates, rules, Action.DENY, NOWHERE)
    snapshot = Snapshot(b"".join(encode(Config(policy, Settings(), ""))))
    snapshot.validate()
    for index in (0, 1, 500, 999):
        own = ipaddress.ip_address(f"10.{index // 256}.{index % 256}.7")
        assert looked_up(snapshot, index, own) == (Action.ALLOW, f"r{index}", "rule", index)
        assert looked_up(snapshot, (index + 1) % 1000, own)[0] is Action.DENY
