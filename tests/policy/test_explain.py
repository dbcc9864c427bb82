from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatekeeper.policy.decide import applies, covers, decide
from gatekeeper.policy.explain import Field, explain
from gatekeeper.policy.model import Action, Backend, Endpoint, Listener, Place, Policy, Protocol, Rule, Sources, Target
from gatekeeper.policy.ranges import AddressSet
from tests.policy.generated import NOWHERE, PORTS, UNIVERSE, WrittenRule, policies

peers = st.one_of(
    st.just((0, 0)),
    *(st.tuples(st.just(family), st.sampled_from(UNIVERSE[family])) for family in (4, 6)),
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(policies(), peers, st.sampled_from(PORTS), st.sampled_from(Protocol), st.sampled_from((None, "l0", "l1")))
def test_an_explanation_is_what_decide_decides(
    case: tuple[Policy, list[WrittenRule]], peer: tuple[int, int], port: int, protocol: Protocol, name: str | None
) -> None:
    """One explanation for each endpoint in reach; its verdict is that of `decide`, its trace every rule before."""
    policy = case[0]
    found = explain(policy, *peer, port, protocol, name)
    want = [
        (listener, endpoint)
        for listener in policy.listeners
        for endpoint in listener.endpoints
        if name in {None, listener.name}
        and (endpoint.family, endpoint.protocol) == (peer[0], protocol)
        and (peer[0] == 0 or endpoint.port == port)
    ]
    assert [(one.listener, one.endpoint) for one in found] == want
    for one in found:
        assert one.verdict == decide(policy, one.listener, one.endpoint, *peer)
        before = policy.rules if one.rule is None else policy.rules[: policy.rules.index(one.rule)]
        assert tuple(step.rule for step in one.trace) == before
        assert one.place == (policy.default_place if one.rule is None else one.rule.place)
        assert one.default == policy.default
        for step in one.trace:
            assert not step.matched
            assert (Field.TO in step.failed) != applies(step.rule, one.listener, one.endpoint)
            assert bool({Field.SOURCE, Field.EXCEPT} & set(step.failed)) != covers(step.rule.sources, *peer)


def test_each_rule_says_on_which_field_it_failed() -> None:
    """A rule that missed by one field nearly matched; `except` is told apart from a source that is not named."""
    endpoint = Endpoint(Protocol.TCP, 4, "0.0.0.0", 22)
    ssh = Listener("ssh", Protocol.TCP, (endpoint,), Backend(4, "127.0.0.1", 9), 5.0, 60.0, 30.0, None, None, NOWHERE)
    low, one = AddressSet.of(v4=[(0, 99)]), AddressSet.of(v4=[(7, 7)])

    def rule(name: str, included: AddressSet, excluded: AddressSet, *to: Target) -> Rule:
        return Rule(name, Action.ALLOW, Sources(included, excluded, False, "", ""), to or None, Place("r.yaml", 3, 5))

    policy = Policy(
        (ssh,),
        (
            rule("other-source", AddressSet.of(v4=[(8, 8)]), AddressSet.EMPTY),
            rule("excepted", low, one),
            rule("other-port", low, AddressSet.EMPTY, Target(None, 80, 80)),
            rule("neither", AddressSet.EMPTY, AddressSet.EMPTY, Target("web")),
            rule("decides", low, AddressSet.EMPTY, Target("ssh")),
            rule("behind", low, AddressSet.EMPTY),
        ),
        Action.DROP,
        NOWHERE,
    )
    (found,) = explain(policy, 4, 7, 22, Protocol.TCP)
    assert found.rule is policy.rules[4]
    assert [(step.rule.name, step.failed, step.nearly) for step in found.trace] == [
        ("other-source", (Field.SOURCE,), True),
        ("excepted", (Field.EXCEPT,), True),
        ("other-port", (Field.TO,), True),
        ("neither", (Field.SOURCE, Field.TO), False),
    ]
    assert explain(policy, 6, 7, 22, Protocol.TCP) == []
    assert explain(policy, 4, 7, 22, Protocol.UDP) == []
