"""Rules that a valid file has for nothing: warnings, because they may be there on purpose (files shared by hosts)."""

from __future__ import annotations

from collections.abc import Iterator

from gatekeeper.config.problems import Problem, Severity
from gatekeeper.config.words import quote
from gatekeeper.policy.model import Endpoint, Listener, Policy, Rule, Target


def lint(policy: Policy) -> Iterator[Problem]:
    """Yield a warning for each rule that can never decide anything, at the rule."""
    map_ = _Map(policy)
    closed = 0  # the endpoints at which a rule for anyone stands above; bit i is the i-th endpoint
    closers: list[tuple[int, Rule]] = []
    for rule in policy.rules:
        reach = map_.reach(rule.targets)
        if not reach:
            targets = ", ".join(map(str, rule.targets or ()))
            yield _warn(rule, "unreachable", f'no listener is at {targets}, so the rule {quote(rule.name)} never matches: check its "to"')
        elif reach & ~closed == 0:
            above = next(
                (closer for mask, closer in closers if reach & ~mask == 0),
                next(closer for mask, closer in closers if mask & reach),
            )
            message = f"the rule {quote(rule.name)} never decides: everybody is matched before it, by {quote(above.name)} ({_where(above, rule)})"
            yield _warn(rule, "unreachable", f"{message}: move this rule up or remove it")
        elif not rule.sources.included:
            yield _warn(rule, "empty", f"the rule {quote(rule.name)} never matches: there is no address in {rule.sources.from_text}")
        elif rule.sources.excluded and not rule.sources.included - rule.sources.excluded:
            yield _warn(rule, "empty", f'the rule {quote(rule.name)} never matches: its "except" leaves nobody of {rule.sources.from_text}')
        if rule.sources.anyone and reach & ~closed:
            closed |= reach
            closers.append((reach, rule))


class _Map:
    """Which endpoints a target means, as bits. Neighbouring ports of one address are one run, so ranges cost nothing."""

    def __init__(self, policy: Policy) -> None:
        self._runs: list[tuple[Listener, Endpoint, int, int]] = []  # listener, first endpoint, ports, first bit
        bit = 0
        for listener in policy.listeners:
            for endpoint in listener.endpoints:
                if self._runs and _follows(self._runs[-1], listener, endpoint):
                    last = self._runs.pop()
                    self._runs.append((listener, last[1], last[2] + 1, last[3]))
                else:
                    self._runs.append((listener, endpoint, 1, bit))
                bit += 1
        self._everything = (1 << bit) - 1
        self._known: dict[Target, int] = {}

    def reach(self, targets: tuple[Target, ...] | None) -> int:
        """Return the endpoints of these targets."""
        if targets is None:
            return self._everything
        mask = 0
        for target in targets:
            if target not in self._known:
                self._known[target] = self._mask(target)
            mask |= self._known[target]
        return mask

    def _mask(self, target: Target) -> int:
        mask = 0
        for listener, endpoint, ports, bit in self._runs:
            first, last = endpoint.port, endpoint.port + ports - 1
            if target.listener is None:
                if endpoint.family == 0 or target.protocol not in {None, endpoint.protocol}:
                    continue
                first, last = max(first, target.first_port), min(last, target.last_port)
            elif target.listener != listener.name:
                continue
            if first <= last:
                mask |= ((1 << (last - first + 1)) - 1) << (bit + first - endpoint.port)
        return mask


def _follows(run: tuple[Listener, Endpoint, int, int], listener: Listener, endpoint: Endpoint) -> bool:
    first = run[1]
    return listener is run[0] and endpoint.family != 0 and (endpoint.family, endpoint.host, endpoint.port) == (
        first.family, first.host, first.port + run[2],
    )  # fmt: skip


def _where(rule: Rule, seen_from: Rule) -> str:
    same = rule.place.file == seen_from.place.file
    return f"line {rule.place.line}" if same else f"{rule.place.file}:{rule.place.line}"


def _warn(rule: Rule, code: str, message: str) -> Problem:
    return Problem(rule.place, Severity.WARNING, code, message)
