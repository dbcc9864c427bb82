"""What a policy says about one connection: the plain scan that everything faster must agree with."""

from __future__ import annotations

from dataclasses import dataclass

from gatekeeper.policy.model import Action, Endpoint, Listener, Policy, Reason, Rule, Sources


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happens, why, and by which rule; ``rule`` ``None``: the default decided."""

    action: Action
    reason: Reason
    rule: Rule | None


def decide(policy: Policy, listener: Listener, endpoint: Endpoint, family: int, address: int) -> Verdict:
    """Return the verdict for one connection: the first rule that matches, else the default.

    ``address`` is normalized (an IPv4-mapped source is family 4); ``family`` 0 is a peer without an address, whom only
    rules for anyone match. Pure: equal arguments give equal verdicts.
    """
    for rule in policy.rules:
        if applies(rule, listener, endpoint) and covers(rule.sources, family, address):
            return Verdict(rule.action, Reason.RULE, rule)
    return Verdict(policy.default, Reason.DEFAULT, None)


def applies(rule: Rule, listener: Listener, endpoint: Endpoint) -> bool:
    """Say whether a rule speaks of connections to this endpoint."""
    return rule.targets is None or any(target.matches(listener, endpoint) for target in rule.targets)


def covers(sources: Sources, family: int, address: int) -> bool:
    """Say whether a source is meant."""
    if family == 0:
        return sources.anyone
    return sources.included.contains(family, address) and not sources.excluded.contains(family, address)
