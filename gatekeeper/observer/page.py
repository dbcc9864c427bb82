"""The status page: what is in force and what it does, as JSON and as plain HTML that loads nothing from anywhere."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import html
import time
from collections.abc import Iterable, Sequence
from typing import Any

from gatekeeper import __version__
from gatekeeper.observer.state import Service, Totals
from gatekeeper.snapshot.bindings import VerdictKey
from gatekeeper.snapshot.counters import ListenerSlot, WorkerSlot

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.good { color: #17692d } .bad { color: #a40e26; font-weight: 600 } pre { overflow-x: auto; background: #f4f4f4; padding: .75rem }
code { overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #161616 } th, td { border-color: #444 } pre { background: #222 }
  a { color: #8ab4f8 } .good { color: #6fcf7f } .bad { color: #ff7b7b }
}
"""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; style-src 'sha256-"
        + base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
        + "'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def status(service: Service, lost: Sequence[tuple[str, int]], now_s: float | None = None) -> dict[str, Any]:
    """Return the status as JSON types; ``lost`` are the observer's own losses, ``now_s`` is Unix time.

    Counters are since the start of the service; ``policy`` is ``None`` before there is one.
    """
    service = service.frozen()
    now_s = time.time() if now_s is None else now_s
    totals = service.totals()
    state = service.state
    started = state.get("started")
    why_not = service.not_ready()
    return {
        "version": __version__,
        "ready": not why_not,
        "not_ready_because": why_not or None,
        "draining": bool(state.get("draining")),
        "started": started,
        "uptime_s": None if started is None else round(max(0.0, now_s - started), 1),
        "policy": _policy(service),
        "reload": {
            "successful": bool(state.get("last_reload_successful")),
            "timestamp": state.get("last_reload_timestamp"),
            "error": state.get("last_reload_error"),
            "last_good": bool(state.get("last_good")),
            "unconfirmed": state.get("unconfirmed"),
            "save_error": state.get("save_error"),
        },
        "bans": state.get("bans") or 0,
        "workers": [
            {**worker, "heartbeat_age_s": _rounded(service.heartbeat_age_s(worker.get("index", -1)))}
            for worker in service.processes()
        ],
        "listeners": _listeners(service, totals),
        "verdicts": _verdicts(service, totals),
        "events_lost": {
            "refusal": totals.worker(WorkerSlot.EVENTS_LOST_REFUSAL),
            "connection": totals.worker(WorkerSlot.EVENTS_LOST_CONNECTION),
            **dict(lost),
        },
        "refusals_suppressed": totals.worker(WorkerSlot.REFUSALS_SUPPRESSED),
    }


def render(facts: dict[str, Any]) -> str:
    """Return the page for what `status` returned."""
    policy, reload = facts["policy"], facts["reload"]
    overview: list[tuple[str, str]] = [
        ("State", _good("ready") if facts["ready"] else _bad(facts["not_ready_because"])),
        ("Version", _text(facts["version"])),
        ("Running for", _duration(facts["uptime_s"])),
    ]
    if policy is not None:
        ranges = f"{policy['ranges']['ipv4']} IPv4 and {policy['ranges']['ipv6']} IPv6 ranges"
        overview += [
            ("Policy", f"<code>{_text(policy['hash'])}</code>"),
            ("", _text(f"{policy['rules']} rules, {ranges}, default {policy['default']}")),
        ]
        if policy["rules_without_effect"]:
            overview.append(("Rules that decide nothing", _text(_shortened(policy["rules_without_effect"]))))
    overview.append(("Last reload", _reload(reload)))
    overview.append(("Bans", _text(facts["bans"])))
    body = [
        "<h1>gatekeeper</h1>",
        "<table>" + "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in overview) + "</table>",
    ]
    if reload["error"]:
        body.append(f"<pre>{_text(reload['error'])}</pre>")
    body += [
        "<h2>Listeners</h2>",
        _table(
            ("Name", "Protocol", "Addresses", "Backend", "#Live", "#In", "#Out", "#Queue"),
            (
                (
                    item["name"] if item["in_policy"] else f"{item['name']} (removed)", item["protocol"],
                    _shortened(item["addresses"]), _shortened(item["backends"]),
                    item["sessions"], _bytes(item["bytes_in"]), _bytes(item["bytes_out"]), item["accept_queue"],
                )
                for item in facts["listeners"]
            ),
        ),
        "<h2>Verdicts</h2>",
        _table(
            ("Rule", "Action", "Reason", "Listener", "#Connections"),
            (
                (
                    (item["rule"] or "(default)") if item["in_policy"] else f"{item['rule'] or '(default)'} (removed)",
                    item["action"], item["reason"], item["listener"], item["count"],
                )
                for item in facts["verdicts"]
            ),
        ),
        "<h2>Workers</h2>",
        _table(
            ("#Worker", "#Process", "State", "Running for", "#Replaced"),
            (
                (
                    worker.get("index"), worker.get("pid"), "alive" if worker.get("alive") else "gone",
                    _duration(worker.get("uptime_s")), worker.get("restarts"),
                )
                for worker in facts["workers"]
            ),
        ),
        "<h2>Missing from the audit log</h2>",
        _table(
            ("Class", "#Events"),
            [*facts["events_lost"].items(), ("refusals over their budget (counted there)", facts["refusals_suppressed"])],
        ),
        '<p><a href="/metrics">metrics</a> · <a href="/status.json">this page as JSON</a> · <a href="/readyz">readiness</a></p>',
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>gatekeeper</title>'
        '<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="10">'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _policy(service: Service) -> dict[str, Any] | None:
    if service.policy is None:
        return None
    meta = service.policy.meta
    deciding = {rule for _listener, rule, _action, _reason in meta["details"]}
    return {
        "generation": service.policy.generation,
        "hash": meta["digest"],
        "rules": meta["counts"]["rules"],
        "ranges": {"ipv4": meta["counts"]["v4_ranges"], "ipv6": meta["counts"]["v6_ranges"]},
        "default": meta["default"]["action"],
        "files": meta["files"],
        # Earlier rules always decide first, or nothing they speak of is listened on: no counter, no effect.
        "rules_without_effect": [rule["name"] for index, rule in enumerate(meta["rules"]) if index not in deciding],
    }


def _listeners(service: Service, totals: Totals) -> list[dict[str, Any]]:
    """Return those of the policy in file order, then those that left it."""
    meta = service.policy.meta if service.policy is not None else {"listeners": [], "endpoints": []}
    protocols = {key.listener: key.protocol for key in service.bindings.endpoints}
    current: dict[str, list[dict[str, Any]]] = {listener["name"]: [] for listener in meta["listeners"]}
    for endpoint in meta["endpoints"]:
        current[meta["listeners"][endpoint["listener"]]["name"]].append(endpoint)
    gone = [name for name in service.bindings.listeners if name not in current]
    found = []
    for name in (*current, *gone):
        block = service.bindings.listeners.get(name)
        if block is None:
            continue
        endpoints = current.get(name, [])
        found.append({
            "name": name,
            "in_policy": name in current,
            "protocol": protocols.get(name, ""),
            "addresses": [endpoint["address"] for endpoint in endpoints],
            "backends": list(dict.fromkeys(endpoint["backend"]["text"] for endpoint in endpoints)),
            "sessions": totals.live(block),
            "bytes_in": totals.slots[block + ListenerSlot.BYTES_IN],
            "bytes_out": totals.slots[block + ListenerSlot.BYTES_OUT],
            "accept_queue": totals.slots[block + ListenerSlot.ACCEPT_QUEUE],
        })  # fmt: skip
    return found


def _verdicts(service: Service, totals: Totals) -> list[dict[str, Any]]:
    """Return one item for each counter: rules in file order, then the default, then what left the policy."""
    rules = service.policy.meta["rules"] if service.policy is not None else []
    order = {rule["name"]: index for index, rule in enumerate(rules)} | {"": len(rules)}
    in_force = set(service.bindings.details)

    def position(item: tuple[VerdictKey, int]) -> tuple[bool, int]:
        key, slot = item
        return slot not in in_force, order.get(key.rule, len(rules) + 1)

    return [
        {
            "listener": key.listener, "action": key.action, "rule": key.rule, "reason": key.reason,
            "count": totals.slots[slot], "in_policy": slot in in_force,
        }
        for key, slot in sorted(service.bindings.verdicts.items(), key=position)
    ]  # fmt: skip


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; a head that begins with ``#`` is a column of numbers. Every value is escaped."""
    classes = [' class="number"' if head.startswith("#") else "" for head in heads]
    lines = ["<table><tr>" + "".join(f"<th{c}>{_text(h.lstrip('#'))}</th>" for c, h in zip(classes, heads, strict=True)) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td{c}>{_text(v)}</td>" for c, v in zip(classes, row, strict=True)) + "</tr>" for row in rows]
    return "\n".join(lines) + "</table>"


def _reload(reload: dict[str, Any]) -> str:
    if reload["timestamp"] is None:
        return "none yet"
    when = _moment(reload["timestamp"])
    if reload["unconfirmed"]:
        return _bad(f"applied {when}, not confirmed: the policy before comes back at {_moment(reload['unconfirmed']['until'])}")
    if reload["last_good"]:
        return _bad("the rule file is of no use: the last good policy is in force")
    if reload["save_error"]:
        return _bad(f"applied {when}, but not saved in the state directory: {reload['save_error']}")
    if reload["successful"]:
        return _good(f"applied {when}")
    return _bad(f"failed; the policy of {when} stays in force")


def _moment(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _text(value: Any) -> str:
    return html.escape("" if value is None else str(value))


def _good(text: str) -> str:
    return f'<span class="good">{_text(text)}</span>'


def _bad(text: str) -> str:
    return f'<span class="bad">{_text(text)}</span>'


def _shortened(items: Sequence[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join([f"{count} {unit}" for count, unit in parts if count][:2]) or "0 s"


def _rounded(age_s: float | None) -> float | None:
    return None if age_s is None else round(age_s, 3)
