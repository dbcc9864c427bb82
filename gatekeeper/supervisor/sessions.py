"""Live sessions as operators see them: which ones are meant, in the daemon's words, and what each of them is.

Operators speak of listeners, rules and networks; workers of the numbers that `Bindings` gave these. Rows come from
workers, which talk to strangers: what is not of the right shape is left out and counted.
"""

from __future__ import annotations

import ipaddress
import math
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatekeeper.supervisor.control import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gatekeeper.snapshot.bindings import Bindings, EndpointKey, VerdictKey

STATES = ("dialing", "open", "client_closed", "backend_closed", "resetting", "flow")
FILTERS = frozenset({"listener", "rule", "source", "flow", "state", "older_s", "younger_s", "idle_s", "stuck"})
DEFAULT_RULE = "default"  # what operators call the default, which has no name of its own in counters and logs
MOST_VALUES = 1000  # in one filter
MOST_COUNTED = 1 << 62
LATEST_S = 253402300800.0  # the year 10000
_TCP = ("rtt_us", "retransmits", "unsent", "unacked")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which sessions are meant. ``None`` is all; an empty tuple is none.

    ``sources`` are (family, first, last). Sessions outside the workers (those of guarded listeners) are chosen by the
    same words.
    """

    listeners: tuple[str, ...] | None = None
    rules: tuple[str, ...] | None = None
    sources: tuple[tuple[int, int, int], ...] | None = None
    flows: tuple[int, ...] | None = None
    states: tuple[str, ...] | None = None
    older_s: float | None = None
    younger_s: float | None = None
    idle_s: float | None = None
    stuck: bool = False
    details: bool = False

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> Wanted:
        """Return what the arguments of a request say.

        Raises:
            BadRequest: they make no sense.
        """
        rules, sources, states = _texts(args, "rule"), _texts(args, "source"), _texts(args, "state")
        for state in states or ():
            if state not in STATES:
                raise BadRequest(f'there is no state "{state[:50]}"; there are: {", ".join(STATES)}')
        return cls(
            listeners=_texts(args, "listener"),
            rules=None if rules is None else tuple("" if rule == DEFAULT_RULE else rule for rule in rules),
            sources=None if sources is None else tuple(map(parse_source, sources)),
            flows=_list(args, "flow", lambda value: type(value) is int and 0 <= value < 1 << 64, "a number"),
            states=states,
            older_s=_seconds(args, "older_s"),
            younger_s=_seconds(args, "younger_s"),
            idle_s=_seconds(args, "idle_s"),
            stuck=_flag(args, "stuck"),
            details=_flag(args, "details"),
        )

    def to_filter(self, bindings: Bindings) -> dict[str, Any]:
        """Return the filter as workers understand it.

        Raises:
            BadRequest: there is no such listener or rule.
        """
        wanted: dict[str, Any] = {}
        if self.listeners is not None:
            _check_names("listener", self.listeners, set(bindings.listeners))
        if self.rules is not None:
            _check_names("rule", self.rules, {key.rule for key in bindings.verdicts})
        if self.listeners is not None or self.rules is not None:
            # By verdicts, not by endpoints: a listener may have 65,536 of these.
            wanted["slots"] = [
                slot
                for key, slot in bindings.verdicts.items()
                if key.action == "allow"
                and (self.listeners is None or key.listener in self.listeners)
                and (self.rules is None or key.rule in self.rules)
            ]
        for name, value in {"sources": self.sources, "flows": self.flows, "states": self.states}.items():
            if value is not None:
                wanted[name] = list(value)
        limits = {"older_s": self.older_s, "younger_s": self.younger_s, "idle_s": self.idle_s}
        flags = {"stuck": self.stuck, "details": self.details}
        return wanted | {name: value for name, value in (limits | flags).items() if value is not None and value is not False}


class Names:
    """What the numbers in rows mean."""

    def __init__(self, generation: int, bindings: Bindings | None) -> None:
        self.generation = generation
        self._endpoints: dict[int, EndpointKey] = {}
        self._verdicts: dict[int, VerdictKey] = {}
        if bindings is not None:
            self._endpoints = {number: key for key, number in bindings.endpoints.items()}
            self._verdicts = {slot: key for key, slot in bindings.verdicts.items()}

    def translate(self, row: Any, now: float) -> dict[str, Any] | None:
        """Return one row of a worker in words, ``None`` when it is none. ``now`` is Unix time."""
        if not isinstance(row, dict):
            return None
        endpoint, verdict = self._named(row)
        if endpoint is None or verdict is None or row.get("state") not in STATES:
            return None
        began, idle_s = row.get("began"), row.get("idle_s")
        if began is None or not (_is_time(began) and _is_time(idle_s)) or not all(_is_count(row.get(name)) for name in ("flow", "bytes_in", "bytes_out")):
            return None
        try:
            source, destination = (_place(row, "source"), _place(row, "destination")) if row.get("family") else (None, None)
        except (ValueError, OSError):
            return None
        return {
            "flow_id": row["flow"],
            "path": "relay",
            "listener": endpoint.listener,
            "rule": verdict.rule,
            "reason": verdict.reason,
            "proto": endpoint.protocol.upper(),
            "src_ip": source and source[0], "src_port": source and source[1],
            "dest_ip": destination and destination[0], "dest_port": destination and destination[1],
            "endpoint": endpoint.address,
            "backend": endpoint.backend,
            "state": row["state"],
            "began": round(began, 6), "age_s": round(max(now - began, 0.0), 3), "idle_s": idle_s,
            "bytes_in": row["bytes_in"], "bytes_out": row["bytes_out"],
            "client_tcp": _tcp(row.get("client")), "backend_tcp": _tcp(row.get("backend")),
        }  # fmt: skip

    def _named(self, row: dict[str, Any]) -> tuple[EndpointKey | None, VerdictKey | None]:
        endpoint, slot = row.get("endpoint"), row.get("slot")
        if type(endpoint) is not int or type(slot) is not int:
            return None, None
        return self._endpoints.get(endpoint), self._verdicts.get(slot)


def parse_source(text: str) -> tuple[int, int, int]:
    """Return family, first and last address of an address, a network or a range. IPv4-mapped IPv6 is IPv4.

    Raises:
        BadRequest: it is none.
    """
    first, dash, last = text.partition("-")
    try:
        if dash:
            low, high = ipaddress.ip_address(first.strip()), ipaddress.ip_address(last.strip())
        else:
            network = ipaddress.ip_network(text)
            low, high = network[0], network[-1]
    except ValueError as err:
        raise BadRequest(f'"{text[:100]}" is not an address, a network or a range{_suggestion(text)}') from err
    if low.version == high.version == 6 and low.ipv4_mapped is not None and high.ipv4_mapped is not None:
        low, high = low.ipv4_mapped, high.ipv4_mapped
    if low.version != high.version or int(low) > int(high):
        raise BadRequest(f'"{text[:100]}" is no range: it has no first and last address')
    return low.version, int(low), int(high)


def _suggestion(text: str) -> str:
    try:
        return f': it has host bits set, did you mean "{ipaddress.ip_network(text, strict=False)}"?'
    except ValueError:
        return ""


def _texts(args: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    return _list(args, name, lambda value: isinstance(value, str), "a text")


def _list(args: Mapping[str, Any], name: str, fits: Callable[[Any], bool], what: str) -> tuple[Any, ...] | None:
    values = args.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) > MOST_VALUES or not all(map(fits, values)):
        raise BadRequest(f'"{name}" is a list of at most {MOST_VALUES}, each {what}')
    return tuple(values)


def _seconds(args: Mapping[str, Any], name: str) -> float | None:
    value = args.get(name)
    if value is None:
        return None
    if type(value) not in {int, float} or not 0 <= value < LATEST_S:
        raise BadRequest(f'"{name}" is a number of seconds')
    return float(value)


def _flag(args: Mapping[str, Any], name: str) -> bool:
    value = args.get(name, False)
    if type(value) is not bool:
        raise BadRequest(f'"{name}" is true or false')
    return value


def _check_names(kind: str, wanted: tuple[str, ...], known: set[str]) -> None:
    for name in wanted:
        if name not in known:
            there_are = ", ".join(sorted(each or DEFAULT_RULE for each in known)[:20])
            raise BadRequest(f'there is no {kind} "{name[:63]}"; there are: {there_are}')


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_COUNTED


def _is_time(value: Any) -> bool:
    return type(value) in {int, float} and math.isfinite(value) and 0 <= value < LATEST_S


def _place(row: dict[str, Any], name: str) -> tuple[str, int]:
    """Return address and port.

    Raises:
        ValueError, OSError: they are none.
    """
    text, port = row.get(name), row.get(f"{name}_port")
    if not isinstance(text, str) or type(port) is not int or not 0 <= port < 1 << 16:
        raise ValueError(name)
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return socket.inet_ntop(family, socket.inet_pton(family, text)), port


def _tcp(value: Any) -> dict[str, int] | None:
    if not isinstance(value, dict) or not all(_is_count(value.get(name)) for name in _TCP):
        return None
    return {name: value[name] for name in _TCP}
