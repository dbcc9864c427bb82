"""Why a verdict is what it is: every rule that was tried, in order, and on which field it failed."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from gatekeeper.policy.decide import Verdict, applies, decide
from gatekeeper.policy.model import Action, Endpoint, Listener, Place, Policy, Protocol, Rule


class Field(enum.StrEnum):
    """The part of a rule that did not match."""

    SOURCE = "source"  # `from` does not name the source
    EXCEPT = "except"  # `from` does, and so does `except`
    TO = "to"


@dataclass(frozen=True, slots=True)
class Step:
    """One rule that was tried. ``failed`` is empty when it matched."""

    rule: Rule
    failed: tuple[Field, ...]

    @property
    def matched(self) -> bool:
        return not self.failed

    @property
    def nearly(self) -> bool:
        """Whether exactly one field stood between this rule and the connection."""
        return len(self.failed) == 1


@dataclass(frozen=True, slots=True)
class Explanation:
    """The verdict at one endpoint. ``trace`` are the rules before the one that decided (all, when the default did).

    ``place`` is where the deciding rule, or the default, was written; ``default`` what would hold without any rule.
    """

    listener: Listener
    endpoint: Endpoint
    verdict: Verdict
    trace: tuple[Step, ...]
    default: Action
    place: Place

    @property
    def rule(self) -> Rule | None:
        return self.verdict.rule


def explain(
    policy: Policy, family: int, address: int, port: int, protocol: Protocol, listener_name: str | None = None
) -> list[Explanation]:
    """Return one explanation for each endpoint that a source could reach at this port, in file order.

    ``address`` is normalized. ``family`` 0 is a local peer: it reaches unix sockets only, and ``port`` is not looked at.
    ``listener_name`` leaves out all other listeners. Empty when nothing listens there for this family.
    """
    return [
        _explain(policy, listener, endpoint, family, address)
        for listener in policy.listeners
        if listener_name is None or listener.name == listener_name
        for endpoint in listener.endpoints
        if endpoint.family == family and endpoint.protocol == protocol and (family == 0 or endpoint.port == port)
    ]


def _explain(policy: Policy, listener: Listener, endpoint: Endpoint, family: int, address: int) -> Explanation:
    verdict = decide(policy, listener, endpoint, family, address)
    trace = []
    for rule in policy.rules:
        if rule is verdict.rule:
            break
        trace.append(Step(rule, _failed(rule, listener, endpoint, family, address)))
    place = policy.default_place if verdict.rule is None else verdict.rule.place
    return Explanation(listener, endpoint, verdict, tuple(trace), policy.default, place)


def _failed(rule: Rule, listener: Listener, endpoint: Endpoint, family: int, address: int) -> tuple[Field, ...]:
    failed = []
    sources = rule.sources
    if family == 0:
        if not sources.anyone:
            failed.append(Field.SOURCE)
    elif not sources.included.contains(family, address):
        failed.append(Field.SOURCE)
    elif sources.excluded.contains(family, address):
        failed.append(Field.EXCEPT)
    if not applies(rule, listener, endpoint):
        failed.append(Field.TO)
    return tuple(failed)
