"""``gatekeeper unban``: let banned sources in again, as far as the rules do."""

from __future__ import annotations

from typing import Any

import click

from gatekeeper.cli.ban import gather, note, send
from gatekeeper.cli.daemon import connect, control_option
from gatekeeper.cli.terminal import FILE, FINE, NO, Command, Terminal

EVERYBODY = ("0.0.0.0/0", "::/0")
LISTED = 20


@click.command(
    "unban",
    cls=Command,
    examples=(
        "gatekeeper unban 198.51.100.7",
        "gatekeeper unban 198.51.100.0/24     every ban inside this network",
        "gatekeeper unban --all",
    ),
    json_keys=(
        ("removed", "[{source, until, reason, by, since}]: the bans that were lifted"),
        ("remaining", "[the same]: those that still ban a part of what was given, and others"),
        ("kept", "true when this survives a restart of the service"),
    ),
)
@click.argument("sources", metavar="SOURCE...", nargs=-1)
@click.option("--list", "path", type=FILE, help='Unban what this file lists; "-" is standard input.')
@click.option("--all", "everybody", is_flag=True, help="Lift all bans.")
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(
    terminal: Terminal, sources: tuple[str, ...], path: str | None, everybody: bool, control: str | None, as_json: bool
) -> int:
    """Lift the bans that lie inside each SOURCE (an address, a network or a range).

    A ban of more than SOURCE stays, and is named: lift it as a whole, and ban again what is to stay banned. The exit code
    is 0 when SOURCE is no longer banned, and 1 when a ban of it remains or there was none.
    """
    listed = gather(terminal, [*sources, *(EVERYBODY if everybody else ())], path)
    if not listed:
        raise click.UsageError("name whom to unban: an address, a network or a range, or --list FILE, or --all")
    rows: list[dict[str, Any]] = []
    with connect(control, patience_s=None) as daemon:
        result = send(daemon, "unban", listed, rows=rows.extend)
    removed = [row for row in rows if not row.get("remains")]
    remaining = list({row["source"]: row for row in rows if row.get("remains")}.values())
    for row in remaining:
        del row["remains"]
    if as_json:
        terminal.print_json({"removed": removed, "remaining": remaining, "kept": result["kept"]})
    else:
        for row in removed[:LISTED]:
            terminal.print(f"unbanned {row['source']}")
        if len(removed) > LISTED:
            terminal.print(f"and {len(removed) - LISTED} more")
        for row in remaining:
            terminal.print(f"still banned by {row['source']}{_why(row)}")
        if not rows:
            terminal.print(f"not banned: {', '.join(listed[:LISTED])}")
        if removed:
            note(terminal, result)
    return FINE if (removed or everybody) and not remaining else NO


def _why(row: dict[str, Any]) -> str:
    return f" ({row['reason']})" if row["reason"] else ""
