"""Audit events as lines for people."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from gatekeeper.cli.session_table import place
from gatekeeper.cli.tables import duration, size
from gatekeeper.cli.terminal import Terminal

COLOURS = {"refusal": "red", "refusals_suppressed": "red", "connection": "green", "events_lost": "yellow"}


def describe(terminal: Terminal, event: dict[str, Any]) -> str:
    """Return an event on one line: when, what, where, who, and the rest."""
    kind, about = event["event_type"], event["gatekeeper"]
    at = datetime.fromisoformat(event["timestamp"]).astimezone()
    head = f"{at:%H:%M:%S}.{at.microsecond // 1000:03} {terminal.paint(f'{kind:<10}', COLOURS.get(kind, 'cyan'))}"
    if kind == "connection":
        return (
            f"{head} {_where(event)} {about['end']} after {duration(about['duration_s'])},"
            f" {size(about['bytes_in'])} in, {size(about['bytes_out'])} out, by {about['rule'] or 'default'}"
        )
    if kind == "refusal":
        return f"{head} {_where(event)} {about['action']} by {about['rule'] or about['reason']}"
    if kind == "refusals_suppressed":
        return f"{head} {about['listener']} {about['count']} more, {about['action']} by {about['rule'] or about['reason']}"
    return f"{head} {' '.join(f'{key}={value}' for key, value in about.items())}"


def _where(event: dict[str, Any]) -> str:
    about = event["gatekeeper"]
    source = place(event["src_ip"], event["src_port"]) or "unix"
    destination = place(event["dest_ip"], event["dest_port"]) or str(about.get("endpoint"))
    return f"{about['listener']} {source} -> {destination}"
