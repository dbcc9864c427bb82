"""``gatekeeper reload``: let the running daemon read its rule file again."""

from __future__ import annotations

from typing import Any

import click

from gatekeeper.cli.daemon import connect, control_option
from gatekeeper.cli.filters import parse_optional_duration
from gatekeeper.cli.terminal import FINE, Command, Terminal, count

PATIENCE_S = 300.0  # for the slowest step, of which the daemon says nothing: compiling, or workers that do not answer


@click.command(
    "reload",
    cls=Command,
    examples=(
        "gatekeeper reload                   apply the rules, and end the sessions that they refuse",
        "gatekeeper reload --confirm 60s     apply them on trial: `gatekeeper confirm` keeps them",
    ),
    json_keys=(
        ("changed", "false when the file holds the policy that was in force already"),
        ("policy, before", "digests of the policy in force, and of the one before it"),
        ("judged, ended", "live sessions that were judged again, and those of them that were ended"),
        ("not_judged_by", "workers that did not answer in time, and were ended with all their sessions"),
        ("listeners_opened, listeners_closed", "[{listener, protocol, address}]"),
        ("confirm_within_s", "with --confirm: seconds; else null"),
        ("saved", "whether it is the last good policy now, with which the service starts when the file is broken"),
        ("save_error", "what the disk said, when it should be, or a trial should be known there; else null"),
    ),
)
@click.option(
    "--confirm", "confirm_s", callback=parse_optional_duration, metavar="DURATION",
    help="Apply it on trial: no session is ended, and the old policy comes back unless `gatekeeper confirm` follows in time.",
)  # fmt: skip
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(terminal: Terminal, confirm_s: float | None, control: str | None, as_json: bool) -> int:
    """Apply the daemon's rule file: compile it, run its tests, change over everywhere, judge live sessions again.

    Returns when all that is done. When anything fails nothing has changed; the exit code is 1 when the rules were
    refused, 3 when it could not be done.
    """
    with connect(control, PATIENCE_S) as daemon:
        progress = terminal.note if terminal.stderr.isatty() and not as_json else None
        result = daemon.ask("reload", progress=progress, confirm_s=confirm_s).result
    if as_json:
        terminal.print_json(result)
        return FINE
    changed = "in force" if result["changed"] else "in force, as it was"
    terminal.print(f"policy {result['policy'][:12]} is {changed}")
    for key, what in (("listeners_opened", "opened"), ("listeners_closed", "closed")):
        for item in result[key]:
            terminal.print(f"{what} {item['listener']} ({item['protocol']} {item['address']})")
    tell_sessions(terminal, result)
    if result["confirm_within_s"] is not None:
        terminal.print(
            f"on trial: `gatekeeper confirm` within {result['confirm_within_s']:g} s keeps it, "
            f"otherwise {result['before'][:12]} comes back"
        )
        if result["save_error"] is not None:
            terminal.note(f"a service that is restarted before that starts with it: {result['save_error']}")
    return FINE


def tell_sessions(terminal: Terminal, result: dict[str, Any]) -> None:
    """Print what became of live sessions."""
    if result.get("judged"):
        terminal.print(f"{count(result['judged'], 'live session')} judged again, {result['ended']} ended")
    for worker in result.get("not_judged_by", ()):
        terminal.note(f"worker {worker} did not say whether it has ended the sessions that are now refused, and was ended")
    if result.get("saved") is False and result["save_error"] is not None:
        terminal.note(f"it is not the last good policy yet, it could not be saved: {result['save_error']}")
