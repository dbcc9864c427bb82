"""``gatekeeper bans``: who is banned, until when, why and by whom."""

from __future__ import annotations

import pwd
import time
from typing import Any

import click

from gatekeeper.cli.daemon import Daemon, connect, control_option
from gatekeeper.cli.terminal import FINE, NO, Command, Terminal


@click.command(
    "bans",
    cls=Command,
    examples=(
        "gatekeeper bans",
        "gatekeeper bans 198.51.100.7          is it banned, by which bans, and why",
        "gatekeeper bans --json | jq -r '.bans[].source' > bans.txt",
    ),
    json_keys=(
        ("bans", "a list, oldest first:"),
        ("  source", "an address, a network or a range"),
        ("  since, until", "Unix times; until is null for a ban without end"),
        ("  reason", 'what --reason said; "" when nothing'),
        ("  by", "the uid of whoever made it"),
        ("kept", "true when the bans survive a restart of the service"),
    ),
)
@click.argument("source", required=False)
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(terminal: Terminal, source: str | None, control: str | None, as_json: bool) -> int:
    """List the bans: all of them, or those that touch SOURCE (an address, a network or a range).

    With SOURCE the exit code is 0 when a part of it is banned, 1 when nothing of it is.
    """
    with connect(control) as daemon:
        bans, kept = fetch(daemon, source)
    if as_json:
        terminal.print_json({"bans": bans, "kept": kept})
    elif bans:
        show(terminal, bans)
    else:
        terminal.print("nobody is banned" if source is None else f"{source} is not banned")
    return FINE if bans or source is None else NO


def fetch(daemon: Daemon, source: str | None) -> tuple[list[dict[str, Any]], bool]:
    """Return the bans, and whether they survive a restart. A ban that is lifted meanwhile may hide another."""
    bans: list[dict[str, Any]] = []
    skip: int | None = 0
    kept = True
    while skip is not None:
        result = daemon.ask("bans", rows=bans.extend, source=source, skip=skip).result
        skip, kept = result["next"], result["kept"]
    return bans, kept


def show(terminal: Terminal, bans: list[dict[str, Any]]) -> None:
    """Print bans for people."""
    from gatekeeper.cli.tables import console, duration, moment, table  # noqa: PLC0415 - rich is slow to import

    made = table("SOURCE", "SINCE", "ENDS IN", "BY", "REASON")
    now = time.time()
    for ban in bans:
        ends = "never" if ban["until"] is None else duration(max(ban["until"] - now, 0.0))
        made.add_row(ban["source"], moment(ban["since"]), ends, _user(ban["by"]), ban["reason"])
    console(terminal).print(made)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
