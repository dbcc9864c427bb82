"""``gatekeeper rollback``: go back from the policy that was applied on trial."""

from __future__ import annotations

import click

from gatekeeper.cli.daemon import connect, control_option
from gatekeeper.cli.reload import PATIENCE_S
from gatekeeper.cli.terminal import FINE, Command, Terminal


@click.command(
    "rollback",
    cls=Command,
    examples=("gatekeeper rollback",),
    json_keys=(("policy, before", "digests of the policy in force again, and of the one that was on trial"),),
)
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(terminal: Terminal, control: str | None, as_json: bool) -> int:
    """Put the policy back that was in force before `gatekeeper reload --confirm`, without waiting for its deadline.

    Listeners that the policy on trial had closed are opened again. No session is ended. The rule file stays as it is.
    The exit code is 3 when no policy is on trial.
    """
    with connect(control, PATIENCE_S) as daemon:
        result = daemon.ask("rollback").result
    if as_json:
        terminal.print_json(result)
    else:
        terminal.print(f"policy {result['policy'][:12]} is in force again")
    return FINE
