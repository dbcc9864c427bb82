"""``gatekeeper confirm``: keep the policy that was applied on trial."""

from __future__ import annotations

import click

from gatekeeper.cli.daemon import connect, control_option
from gatekeeper.cli.reload import PATIENCE_S, tell_sessions
from gatekeeper.cli.terminal import FINE, Command, Terminal


@click.command(
    "confirm",
    cls=Command,
    examples=("gatekeeper reload --confirm 60s && gatekeeper status && gatekeeper confirm",),
    json_keys=(
        ("policy, before", "digests of the policy that stays in force, and of the one before it"),
        ("judged, ended", "live sessions that were judged again, and those of them that were ended"),
        ("not_judged_by", "workers that did not answer in time, and were ended with all their sessions"),
        ("saved", "whether it is the last good policy now"),
        ("save_error", "why it could not be saved; else null"),
    ),
)
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(terminal: Terminal, control: str | None, as_json: bool) -> int:
    """Keep the policy that `gatekeeper reload --confirm` applied on trial.

    Live sessions are judged by it now, and those that it refuses end. The exit code is 3 when no policy is on trial.
    """
    with connect(control, PATIENCE_S) as daemon:
        result = daemon.ask("confirm").result
    if as_json:
        terminal.print_json(result)
    else:
        terminal.print(f"policy {result['policy'][:12]} stays in force")
        tell_sessions(terminal, result)
    return FINE
