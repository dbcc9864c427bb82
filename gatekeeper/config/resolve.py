"""A valid rule file as a `Config`: names become addresses, ranges of ports become endpoints, defaults are filled in."""

from __future__ import annotations

from collections.abc import Iterable

from gatekeeper.config.crosscheck import absolute
from gatekeeper.config.fields import ANY, Member
from gatekeeper.config.lists import ListFile
from gatekeeper.config.models import ControlModel, ListenerModel, MetricsModel, RuleFile, RuleModel, SetFile, TestModel
from gatekeeper.config.tree import Value
from gatekeeper.policy.model import (
    Backend,
    Endpoint,
    Listener,
    Place,
    Policy,
    PolicyTest,
    Protocol,
    Rule,
    Settings,
    Sources,
    Target,
)
from gatekeeper.policy.ranges import AddressSet

CONNECT_TIMEOUT_S = 5.0
HALF_CLOSE_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = {Protocol.TCP: 24 * 3600.0, Protocol.UDP: 60.0}
MAX_SESSIONS = {Protocol.TCP: None, Protocol.UDP: 10_000}  # a UDP source can be forged, so its sessions are capped


def resolve(file: RuleFile, root: Value, lists: dict[str, ListFile]) -> tuple[Policy, Settings]:
    """Return the policy and settings of a rule file without errors.

    ``root`` is its tree, with the rules of included files in place; ``lists`` are the list files by set name.
    """
    who = _Who(file, lists)
    rules = [item for item in file.rules if isinstance(item, RuleModel)]
    default = root.get("default")
    assert default is not None
    policy = Policy(
        listeners=tuple(
            _listener(model, value.spot.place) for model, value in zip(file.listeners, _values(root, "listeners"), strict=True)
        ),
        rules=tuple(
            Rule(model.name, model.action, who.sources(model, value), _targets(model.to), value.spot.place)
            for model, value in zip(rules, _values(root, "rules"), strict=True)
        ),
        default=file.default,
        default_place=default.spot.place,
        tests=tuple(
            PolicyTest(who.sources(model, value), _targets(model.to), model.expect, value.spot.place)
            for model, value in zip(file.tests, _values(root, "tests"), strict=True)
        ),
    )
    return policy, _settings(file, root.spot.place.file)


def _values(root: Value, section: str) -> list[Value]:
    value = root.get(section)
    return value.data if value is not None and isinstance(value.data, list) else []


class _Who:
    """Turns members into address sets; equal lists become the same object, so that what follows is computed once."""

    def __init__(self, file: RuleFile, lists: dict[str, ListFile]) -> None:
        self._models = file.sets
        self._sets = {name: found.addresses for name, found in lists.items()}
        self._known: dict[tuple[Member, ...], AddressSet] = {}

    def sources(self, model: RuleModel | TestModel, value: Value) -> Sources:
        """Return the sources of a rule or test; ``value`` has the words of the file."""
        everybody = model.from_ == [ANY]
        included = AddressSet.EVERYTHING if everybody else self._union(model.from_)
        excluded = self._union(model.except_) if model.except_ else AddressSet.EMPTY
        return Sources(
            included, excluded,
            anyone=everybody and not model.except_,
            from_text=_words(value.get("from")) or ANY,
            except_text=_words(value.get("except")),
        )  # fmt: skip

    def _union(self, members: Iterable[Member]) -> AddressSet:
        key = tuple(members)
        if key not in self._known:
            self._known[key] = self._make(key)
        return self._known[key]

    def _make(self, members: tuple[Member, ...]) -> AddressSet:
        sets = [self._set(member) for member in members if isinstance(member, str)]
        ranges = [member for member in members if not isinstance(member, str)]
        if ranges:
            own = AddressSet.of(
                v4=[(first, last) for family, first, last in ranges if family == 4],
                v6=[(first, last) for family, first, last in ranges if family == 6],
            )
            sets.append(own)
        union = sets[0] if sets else AddressSet.EMPTY
        for other in sets[1:]:
            union = union | other
        return union

    def _set(self, name: str) -> AddressSet:
        if name == ANY:
            return AddressSet.EVERYTHING
        waiting = [] if name in self._sets else [name]
        while waiting:  # not by recursion: sets may be nested deeper than Python calls
            model = self._models[waiting[-1]]
            assert not isinstance(model, SetFile)  # those are all there from the start
            missing = [member for member in model if isinstance(member, str) and member not in self._sets]
            if not missing:
                self._sets[waiting.pop()] = self._union(model)
            waiting += missing
        return self._sets[name]


def _words(value: Value | None) -> str:
    return ", ".join(item.text for item in value.items()) if value is not None else ""


def _targets(to: list[Target | str]) -> tuple[Target, ...] | None:
    return None if ANY in to else tuple(target for target in to if isinstance(target, Target))


def _listener(model: ListenerModel, place: Place) -> Listener:
    spans = [span for item in model.listen for span in item]
    backend = model.backend
    return Listener(
        name=model.name,
        protocol=model.protocol,
        endpoints=tuple(
            Endpoint(model.protocol, span.family, span.host if span.family else absolute(span.host, place.file), port)
            for span in spans
            for port in range(span.first_port, span.last_port + 1)
        ),
        backend=backend if backend.family else Backend(0, absolute(backend.host, place.file), 0),
        connect_timeout_s=model.connect_timeout or CONNECT_TIMEOUT_S,
        idle_timeout_s=model.idle_timeout or IDLE_TIMEOUT_S[model.protocol],
        half_close_timeout_s=model.half_close_timeout or HALF_CLOSE_TIMEOUT_S,
        max_responses=model.max_responses,
        max_sessions=model.max_sessions or MAX_SESSIONS[model.protocol],
        place=place,
        on_exit=model.on_exit,
    )


def _settings(file: RuleFile, path: str) -> Settings:
    metrics = None
    if isinstance(file.metrics, MetricsModel):
        span = file.metrics.listen
        metrics = Endpoint(Protocol.TCP, span.family, span.host, span.first_port)
    control = file.control.socket if isinstance(file.control, ControlModel) else file.control
    return Settings(
        workers=file.workers,
        metrics=metrics,
        control=absolute(control, path) if control and control != "off" else control,
        control_group=file.control.group if isinstance(file.control, ControlModel) else None,
        audit=absolute(file.audit, path) if "/" in file.audit else file.audit,
        state=absolute(file.state, path) if file.state else None,
        on_reload=file.on_reload,
        kernel=file.kernel or ("require" if any(one.path == "guard" for one in file.listeners) else "off"),
    )
