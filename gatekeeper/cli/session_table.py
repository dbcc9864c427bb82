"""Sessions as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from gatekeeper.cli.tables import console, duration, size, table
from gatekeeper.cli.terminal import Terminal, format_table

MOST_RICH = 500  # a table that fits itself to the terminal costs half a millisecond a row
NUMBERS = ("AGE", "IDLE", "IN", "OUT", "RTT", "RETRANS", "UNSENT", "UNACKED")
COLUMNS = ("FLOW", "LISTENER", "RULE", "SOURCE", "BACKEND", "STATE", "AGE", "IDLE", "IN", "OUT")
DETAILS = ("RTT", "RETRANS", "UNSENT", "UNACKED")  # client/backend


def show_sessions(terminal: Terminal, rows: Sequence[dict[str, Any]], *, details: bool) -> None:
    """Print sessions in this order; nothing when there are none."""
    if not rows:
        terminal.note("no sessions")
    elif len(rows) <= MOST_RICH:
        console(terminal).print(sessions_table(rows, details=details))
    else:
        for line in format_table([columns(details=details), *(cells(row, details=details) for row in rows)]):
            terminal.print(line)


def sessions_table(
    rows: Sequence[dict[str, Any]], *, details: bool = False, more: tuple[str, Sequence[str]] | None = None
) -> Table:
    """Return sessions as a table; ``more`` is the name of a further column of numbers, and its cells."""
    name, extra = more or ("", [""] * len(rows))
    made = table(*columns(details=details), *([name] if more else []), right=(*NUMBERS, name))
    made.columns[0].min_width = max((len(str(row["flow_id"])) for row in rows), default=4)  # whole: `cut` wants it
    for row, cell in zip(rows, extra, strict=True):
        made.add_row(*cells(row, details=details), *([cell] if more else []))
    return made


def columns(*, details: bool) -> tuple[str, ...]:
    """Return the names of the columns."""
    return COLUMNS + DETAILS if details else COLUMNS


def cells(row: dict[str, Any], *, details: bool) -> tuple[str, ...]:
    """Return one session as text."""
    text = (
        str(row["flow_id"]), row["listener"], row["rule"] or "default",
        place(row["src_ip"], row["src_port"]) or "unix", row["backend"] if row["path"] == "relay" else "guarded", row["state"],
        duration(row["age_s"]), duration(row["idle_s"]), size(row["bytes_in"]), size(row["bytes_out"]),
    )  # fmt: skip
    return (*text, *(_both(row, name) for name in ("rtt_us", "retransmits", "unsent", "unacked"))) if details else text


def place(ip: str | None, port: int | None) -> str:
    """Return an address and a port, "" when there is none."""
    if ip is None:
        return ""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _both(row: dict[str, Any], name: str) -> str:
    """Return what TCP says of the client's side and of the backend's."""
    values = [side and side[name] for side in (row["client_tcp"], row["backend_tcp"])]
    write = _round_trip if name == "rtt_us" else size
    return "/".join("-" if value is None else write(value) for value in values)


def _round_trip(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.0f}us"
    return f"{microseconds / 1000:.1f}ms" if microseconds < 99_950 else f"{microseconds / 1000:.0f}ms"
