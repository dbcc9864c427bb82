"""``gatekeeper bans``: who is banned, until when, why and by whom."""

from __future__ import annotations

import functools
import pwd
import time
from typing import Any

import click

from gatekeeper.cli.daemon import Daemon, connect, control_option
from gatekeeper.cli.terminal import FINE, NO, Command, Terminal, format_table

SHOWN = 100
NONE = 1 << 31  # more bans than there can be: to ask for their number only


@click.command(
    "bans",
    cls=Command,
    examples=(
        "gatekeeper bans",
        "gatekeeper bans 198.51.100.7          is it banned, by which bans, and why",
        "gatekeeper bans --json | jq -r '.bans[].source' > bans.txt",
    ),
    json_keys=(
        ("matched", "how many bans there are, or touch SOURCE"),
        ("bans", "a list, the oldest first:"),
        ("  source", "an address, a network or a range"),
        ("  since, until", "Unix times; until is null for a ban without end"),
        ("  reason", 'what --reason said; "" when nothing'),
        ("  by", "the uid of whoever made it"),
        ("kept", "true when the bans survive a restart of the service"),
    ),
)
@click.argument("source", required=False)
@click.option(
    "--limit", type=click.IntRange(min=0), metavar="N",
    help="Show so many, the latest; 0 is all.  [default: 100, with --json all]",
)  # fmt: skip
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(terminal: Terminal, source: str | None, limit: int | None, control: str | None, as_json: bool) -> int:
    """List the bans: all of them, or those that touch SOURCE (an address, a network or a range).

    With SOURCE the exit code is 0 when a part of it is banned, 1 when nothing of it is.
    """
    if limit is None and not as_json:
        limit = SHOWN
    with connect(control) as daemon:
        matched, bans, kept = fetch(daemon, source, limit or 0)
    if as_json:
        terminal.print_json({"matched": matched, "bans": bans, "kept": kept})
    elif bans:
        show(terminal, bans)
        if len(bans) < matched:
            terminal.note(f"the latest {len(bans)} of {matched} bans; --limit 0 shows all")
    else:
        terminal.print("nobody is banned" if source is None else f"{source} is not banned")
    return FINE if bans or source is None else NO


def fetch(daemon: Daemon, source: str | None, limit: int) -> tuple[int, list[dict[str, Any]], bool]:
    """Return how many bans there are, the latest ``limit`` of them (0: all), and whether they survive a restart.

    A ban that is lifted meanwhile may hide another.
    """
    bans: list[dict[str, Any]] = []
    result = daemon.ask("bans", rows=None, source=source, skip=NONE).result
    skip: int | None = max(result["bans"] - limit, 0) if limit else 0
    while skip is not None:
        result = daemon.ask("bans", rows=bans.extend, source=source, skip=skip).result
        skip = result["next"]
    return result["bans"], bans, result["kept"]


def show(terminal: Terminal, bans: list[dict[str, Any]]) -> None:
    """Print bans for people."""
    from gatekeeper.cli.tables import duration, moment  # noqa: PLC0415 - rich is slow to import

    rows = [("SOURCE", "SINCE", "ENDS IN", "BY", "REASON")]
    now = time.time()
    for ban in bans:
        ends = "never" if ban["until"] is None else duration(max(ban["until"] - now, 0.0))
        rows.append((ban["source"], moment(ban["since"]), ends, _user(ban["by"]), ban["reason"]))
    for line in format_table(rows):
        terminal.print(line)


@functools.cache
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
