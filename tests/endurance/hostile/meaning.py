"""What a rule file means, read twice: by gatekeeper, and by plain code over another YAML reader and `ipaddress`.

Both readings are dicts of plain values, so that they can be compared; `written` turns one back into a rule file.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    collapse_addresses,
    ip_address,
    ip_network,
    summarize_address_range,
)
from typing import Any

import yaml

from gatekeeper.policy.model import Config, Sources, Target
from gatekeeper.policy.ranges import AddressSet

Network = IPv4Network | IPv6Network
EVERYTHING = (["0.0.0.0/0"], ["::/0"])
UNITS = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600), "d": Fraction(86400)}


# ---------------------------------------------------------------------- as gatekeeper reads it


def of_config(config: Config) -> dict[str, Any]:
    """Return what gatekeeper made of a file."""
    policy, settings = config.policy, config.settings
    return {
        "default": policy.default.label,
        "listeners": [
            {
                "name": one.name,
                "protocol": str(one.protocol),
                "endpoints": [(each.family, each.host, each.port) for each in one.endpoints],
                "backend": (one.backend.family, one.backend.host, one.backend.port),
                "timeouts": [round(seconds, 6) for seconds in (one.connect_timeout_s, one.idle_timeout_s, one.half_close_timeout_s)],
                "most": [one.max_responses, one.max_sessions],
            }
            for one in policy.listeners
        ],
        "rules": [
            {"name": rule.name, "action": rule.action.label, **_of_sources(rule.sources), "to": _of_targets(rule.targets)} for rule in policy.rules
        ],
        "tests": [{"expect": test.expect.label, **_of_sources(test.sources), "to": _of_targets(test.targets)} for test in policy.tests],
        "settings": [
            settings.workers,
            settings.metrics and (settings.metrics.family, settings.metrics.host, settings.metrics.port),
            settings.audit,
            settings.state,
        ],
    }


def _of_sources(sources: Sources) -> dict[str, Any]:
    return {"anyone": sources.anyone, "from": _of_set(sources.included), "except": _of_set(sources.excluded)}


def _of_set(addresses: AddressSet) -> tuple[list[str], list[str]]:
    networks = [str(ip_network(text)) for text in addresses.networks()]
    return [text for text in networks if ":" not in text], [text for text in networks if ":" in text]


def _of_targets(targets: tuple[Target, ...] | None) -> list[tuple[Any, ...]] | None:
    if targets is None:
        return None
    return [(target.listener, target.first_port, target.last_port, target.protocol and str(target.protocol)) for target in targets]


# ---------------------------------------------------------------------- as plain code reads it


def of_text(text: bytes, folder: str) -> dict[str, Any]:
    """Return what a file that is correct means; anything may be raised for one that is not."""
    decoded = text.decode("utf-8-sig")
    try:
        raw = yaml.load(decoded, Loader=yaml.BaseLoader)  # pure Python, every scalar as it was written
    except yaml.YAMLError:  # it takes tabs between words for an error, which YAML does not
        raw = yaml.load(decoded.replace("\t", " "), Loader=yaml.BaseLoader)
    sets = raw.get("sets", {})
    rules = list(_rules(raw.get("rules", []), folder))
    return {
        "default": raw["default"],
        "listeners": [_listener(item, folder) for item in raw["listeners"]],
        "rules": [
            {"name": rule["name"], "action": rule["action"], **_sources(rule, sets, folder), "to": _targets(rule, raw["listeners"])} for rule in rules
        ],
        "tests": [
            {"expect": test["expect"], **_sources(test, sets, folder), "to": _targets(test, raw["listeners"])} for test in raw.get("tests", [])
        ],
        "settings": [
            None if raw.get("workers", "auto") == "auto" else _number(raw["workers"]),
            None if raw.get("metrics", "off") == "off" else _places(raw["metrics"]["listen"], folder)[0],
            os.path.abspath(os.path.join(folder, raw["audit"])) if "/" in raw.get("audit", "") else raw.get("audit", "stdout"),
            os.path.abspath(os.path.join(folder, raw["state"])) if "state" in raw else None,
        ],
    }


def _number(text: str) -> int:
    return int(text, 0)


def _rules(items: list[dict[str, Any]], folder: str) -> Iterator[dict[str, Any]]:
    for item in items:
        if "include" not in item:
            yield item
            continue
        pattern = os.path.join(folder, item["include"])
        for path in sorted(glob.glob(pattern), key=os.fsencode) if glob.has_magic(item["include"]) else [pattern]:
            with open(path, encoding="utf-8-sig") as file:
                included = yaml.load(file, Loader=yaml.BaseLoader)
            yield from _rules(included or [], os.path.dirname(path))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _listener(item: dict[str, Any], folder: str) -> dict[str, Any]:
    protocol = item.get("protocol", "tcp")
    defaults = {"connect_timeout": 5, "idle_timeout": 86400 if protocol == "tcp" else 60, "half_close_timeout": 30}
    backend = item["backend"]
    if not backend.startswith("unix:") and (_is_address(backend.strip("[]"))):
        one = ip_address(backend.strip("[]"))
        place: tuple[int, str, int] = (one.version, str(one), 0)
    else:
        place = _places(backend, folder)[0]
    return {
        "name": item["name"],
        "protocol": protocol,
        "endpoints": [place for each in _listed(item["listen"]) for place in _places(each, folder)],
        "backend": place,
        "timeouts": [round(_seconds(item[key]) if key in item else float(default), 6) for key, default in defaults.items()],
        "most": [
            _number(item["max_responses"]) if "max_responses" in item else None,
            _number(item["max_sessions"]) if "max_sessions" in item else None if protocol == "tcp" else 10_000,
        ],
    }


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _seconds(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([a-z]+)", text).groups()  # type: ignore[union-attr]
    return float(Fraction(number) * UNITS[unit])


def _places(text: str, folder: str) -> list[tuple[int, str, int]]:
    if text.startswith("unix:"):
        return [(0, os.path.abspath(os.path.join(folder, text.removeprefix("unix:"))), 0)]
    host, _, ports = text.rpartition(":")
    first, _, last = ports.partition("-")
    hosts = ["0.0.0.0", "::"] if host == "*" else [host.strip("[]")]
    return [
        (ip_address(each).version, str(ip_address(each)), port) for each in hosts for port in range(int(first), int(last or first) + 1)
    ]


def _targets(rule: dict[str, Any], listeners: list[dict[str, Any]]) -> list[tuple[Any, ...]] | None:
    to = _listed(rule.get("to", "any"))
    if to == ["any"]:
        return None
    names = {item["name"] for item in listeners}
    found: list[tuple[Any, ...]] = []
    for text in to:
        if text in names:
            found.append((text, 0, 0, None))
            continue
        ports, _, protocol = text.partition("/")
        first, _, last = ports.partition("-")
        found.append((None, int(first, 0), int(last or first, 0), protocol or None))
    return found


def _sources(rule: dict[str, Any], sets: dict[str, Any], folder: str) -> dict[str, Any]:
    included, excluded = _listed(rule.get("from", "any")), _listed(rule.get("except", []))
    return {
        "anyone": included == ["any"] and not excluded,
        "from": EVERYTHING if included == ["any"] else _collapsed(_networks(included, sets, folder)),
        "except": _collapsed(_networks(excluded, sets, folder)),
    }


def _networks(items: Iterable[str], sets: dict[str, Any], folder: str) -> Iterator[Network]:
    for text in items:
        if text == "any":
            yield from (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
        elif text in sets and isinstance(sets[text], dict):
            with open(os.path.join(folder, sets[text]["file"]), encoding="utf-8-sig") as file:
                lines = [line.partition("#")[0].strip() for line in file]
            yield from _networks(filter(None, lines), {}, folder)
        elif text in sets:
            yield from _networks(_listed(sets[text]), sets, folder)
        elif "-" in text:
            first, last = map(_unmapped, text.split("-"))
            yield from summarize_address_range(first, last)
        else:
            yield _network(text)


def _unmapped(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _network(text: str) -> Network:
    network = ip_network(text)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return IPv4Network((mapped, network.prefixlen - 96)) if mapped and network.prefixlen >= 96 else network


def _collapsed(networks: Iterable[Network]) -> tuple[list[str], list[str]]:
    every = list(networks)
    v4 = collapse_addresses(one for one in every if isinstance(one, IPv4Network))
    v6 = collapse_addresses(one for one in every if isinstance(one, IPv6Network))
    return list(map(str, v4)), list(map(str, v6))


# ---------------------------------------------------------------------- back to a file


def written(meaning: dict[str, Any]) -> bytes:
    """Return a rule file that says the same."""
    sets: dict[str, list[str]] = {}

    def sources(rule: dict[str, Any]) -> dict[str, Any]:
        if rule["anyone"]:
            return {}
        names = []
        for key in ("from", "except"):
            names.append(f"set{len(sets)}")
            sets[names[-1]] = [*rule[key][0], *rule[key][1]]
        return {"from": names[0], "except": names[1]}

    def targets(rule: dict[str, Any]) -> dict[str, Any]:
        if rule["to"] is None:
            return {}
        return {"to": [name or f"{first}-{last}" + (f"/{protocol}" if protocol else "") for name, first, last, protocol in rule["to"]]}

    workers, metrics, audit, state = meaning["settings"]
    listeners = []
    for one in meaning["listeners"]:
        tcp = one["protocol"] == "tcp"
        connect, idle, half_close = map(_duration, one["timeouts"])
        timeouts = {"connect_timeout": connect, "half_close_timeout": half_close} if tcp else {}
        responses, sessions = one["most"]
        listeners.append({
            "name": one["name"], "protocol": one["protocol"], "listen": [_place(*each) for each in one["endpoints"]],
            "backend": _place(*one["backend"]), "idle_timeout": idle, **timeouts,
            **({} if responses is None else {"max_responses": responses}), **({} if sessions is None else {"max_sessions": sessions}),
        })  # fmt: skip
    document = {
        "version": 1,
        "workers": workers or "auto",
        "metrics": {"listen": _place(*metrics)} if metrics else "off",
        "audit": audit,
        **({"state": state} if state else {}),
        "listeners": listeners,
        "default": meaning["default"],
        "rules": [{"name": rule["name"], "action": rule["action"], **sources(rule), **targets(rule)} for rule in meaning["rules"]],
        "tests": [{"expect": test["expect"], **({"from": "any"} if test["anyone"] else sources(test)), **targets(test)} for test in meaning["tests"]],
        "sets": sets,
    }
    return json.dumps(document, ensure_ascii=False).encode()


def _duration(seconds: float) -> str:
    return f"{seconds:.3f}s" if seconds >= 1000 else f"{seconds * 1000:.3f}ms"


def _place(family: int, host: str, port: int) -> str:
    if family == 0:
        return f"unix:{host}"
    host = f"[{host}]" if family == 6 else host
    return f"{host}:{port}" if port else host
