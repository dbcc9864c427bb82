"""Tables for people at a terminal, with rich: a little colour there, plain text everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gatekeeper.cli.terminal import Terminal, count

PLAIN_WIDTH = 1000  # columns of output that no person reads at a terminal: `grep` and `awk` want whole lines
UNITS = ("", "k", "M", "G", "T", "P", "E")
COLOURS = {"serving": "green", "draining": "yellow", "starting": "yellow"}


def console(terminal: Terminal) -> Console:
    """Return a console that writes results to the terminal."""
    return Console(
        file=terminal.stdout,
        width=None if terminal.stdout.isatty() else PLAIN_WIDTH,
        no_color=not terminal.colour,
        force_terminal=terminal.stdout.isatty(),
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table without lines; the columns named in ``right`` hold numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", no_wrap=True, overflow="ellipsis")
    return made


def show_status(terminal: Terminal, status: dict[str, Any]) -> None:
    """Print what `status` answered."""
    out = console(terminal)
    for line in status_lines(status):
        out.print(line)
    out.print()
    out.print(listeners_table(status))


def status_lines(status: dict[str, Any]) -> list[Text]:
    """Return how the daemon is, in a few lines."""
    state, reload = status["state"], status["last_reload"]
    serving = sum(worker["serving"] for worker in status["workers"])
    restarts = sum(worker["restarts"] for worker in status["workers"])
    workers = f"{count(len(status['workers']), 'worker')}"
    if serving < len(status["workers"]):
        workers += f", {len(status['workers']) - serving} of them not serving"
    if restarts:
        workers += f", {count(restarts, 'restart')}"
    lines = [
        Text.assemble(
            (state, f"bold {COLOURS.get(state, 'red')}"),
            f" for {duration(status['uptime_s'])}, pid {status['pid']}, gatekeeper {status['version']}, {workers}"
            f"{', the kernel refuses' if status['kernel'] else ''}"
            f"{', ' + count(status['bans'], 'ban') if status.get('bans') else ''}",
        ),
        Text(f"policy {str(status['policy'])[:12]} from {status['rules']}, in force since {moment(reload['at'])}"),
    ]
    if status["unconfirmed"]:
        trial = status["unconfirmed"]
        lines.append(Text(f"not confirmed: {trial['before'][:12]} comes back at {moment(trial['until'])}", "bold yellow"))
    if status["last_good"]:
        lines.append(Text(f"the rule file is of no use, the last good policy is in force: {reload['error']}", "bold red"))
    elif not reload["successful"]:
        lines.append(Text(f"the last reload failed: {reload['error']}", "bold red"))
    if status["save_error"]:
        lines.append(Text(f"the policy could not be saved in the state directory: {status['save_error']}", "bold red"))
    return lines


def listeners_table(status: dict[str, Any]) -> Table:
    """Return the listeners and what was counted there."""
    numbers = ("SESSIONS", "ALLOWED", "REFUSED", "IN", "OUT", "QUEUE")
    made = table("LISTENER", "ADDRESS", "BACKEND", *numbers, right=numbers)
    for listener in status["listeners"]:
        refused = listener["refused"] + listener["kernel_refused"]
        made.add_row(
            listener["name"], several(listener["addresses"]), several(listener["backends"]) if listener["path"] == "relay" else "guarded",
            str(listener["sessions"]), str(listener["allowed"]), str(refused),
            size(listener["bytes_in"]), size(listener["bytes_out"]), str(listener["accept_queue"]),
        )  # fmt: skip
    return made


def several(items: Sequence[str]) -> str:
    """Return the first of several, and how many more there are."""
    return "" if not items else items[0] if len(items) == 1 else f"{items[0]} and {len(items) - 1} more"


def size(number: float) -> str:
    """Return a number of bytes in at most six characters: 312, 1.2k, 48M."""
    power = 0
    while number >= 999.5 and power < len(UNITS) - 1:
        number /= 1000
        power += 1
    return f"{number:.1f}{UNITS[power]}" if power and number < 9.95 else f"{number:.0f}{UNITS[power]}"


def duration(seconds: float) -> str:
    """Return a duration in two units at most: 0.4s, 12s, 3m05s, 2h10m, 4d03h."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f}s"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    for unit, size_s, smaller, small_s in (("m", 60, "s", 1), ("h", 3600, "m", 60), ("d", 86400, "h", 3600)):
        if whole < size_s * {"m": 60, "h": 24, "d": 1 << 40}[unit]:
            return f"{whole // size_s}{unit}{whole % size_s // small_s:02}{smaller}"
    raise AssertionError


def moment(at: float) -> str:
    """Return a Unix time in the reader's time zone."""
    return datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
