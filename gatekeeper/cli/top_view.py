"""A frame of `gatekeeper top` at a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gatekeeper.cli.session_table import sessions_table
from gatekeeper.cli.tables import console, size, status_lines, table
from gatekeeper.cli.terminal import Terminal


def show_once(terminal: Terminal, frame: dict[str, Any]) -> None:
    """Print one frame."""
    console(terminal).print(view(frame))


def show_live(terminal: Terminal, following: Callable[[], dict[str, Any] | str], interval_s: float) -> None:
    """Show frame after frame until Ctrl-C. A text says why there is none, above the last one there was."""
    shown: RenderableType = Text("")
    with contextlib.suppress(KeyboardInterrupt), Live(console=console(terminal), screen=True, auto_refresh=False) as live:
        while True:
            latest = following()
            if isinstance(latest, str):
                live.update(Group(Text(latest, "bold red"), shown), refresh=True)
            else:
                shown = view(latest)
                live.update(shown, refresh=True)
            time.sleep(interval_s)


def view(frame: dict[str, Any]) -> Group:
    """Return a frame as text and tables."""
    parts: list[RenderableType] = [*status_lines(frame["status"]), Text(""), _listeners(frame)]
    for title, rows, made in (
        ("REFUSED", frame["refusals"], _refusals),
        ("BUSIEST SESSIONS", frame["busiest"], _busiest),
        ("NEWEST SESSIONS", frame["newest"], sessions_table),
    ):
        if rows:
            parts += [Text(""), Text(title, "bold underline"), made(rows)]
    return Group(*parts)


def _listeners(frame: dict[str, Any]) -> Table:
    numbers = ("SESSIONS", "NEW/S", "REFUSED/S", "IN/S", "OUT/S", "QUEUE")
    made = table("LISTENER", *numbers, right=numbers)
    for item in frame["listeners"]:
        made.add_row(
            item["name"], str(item["sessions"]), per_second(item["new_per_s"]), per_second(item["refused_per_s"]),
            size(item["in_per_s"]), size(item["out_per_s"]), str(item["accept_queue"]),
        )  # fmt: skip
    return made


def _refusals(rows: list[dict[str, Any]]) -> Table:
    made = table("LISTENER", "RULE", "ACTION", "REASON", "PER S", "TOTAL", right=("PER S", "TOTAL"))
    for item in rows:
        made.add_row(
            item["listener"], item["rule"] or "default", item["action"], item["reason"], per_second(item["per_s"]), str(item["count"])
        )
    return made


def _busiest(rows: list[dict[str, Any]]) -> Table:
    return sessions_table(rows, more=("PER S", [size(row["per_s"]) for row in rows]))


def per_second(rate: float) -> str:
    """Return a rate in a few characters."""
    return "0" if not rate else f"{rate:.1f}" if rate < 99.95 else f"{rate:.0f}"
