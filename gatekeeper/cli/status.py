"""``gatekeeper status``: how the running daemon is."""

from __future__ import annotations

import click

from gatekeeper.cli.daemon import connect, control_option
from gatekeeper.cli.terminal import FINE, NO, Command, Terminal


@click.command(
    "status",
    cls=Command,
    examples=(
        "gatekeeper status",
        "gatekeeper status --json | jq '.listeners[] | {name, sessions}'",
        "gatekeeper status --control /run/gatekeeper/control.sock",
    ),
    json_keys=(
        ("state", "starting, serving or draining"),
        ("version, pid, started, uptime_s, rules", "the daemon and its rule file; started is Unix time"),
        ("policy, generation", "the digest of the policy in force, and how many came before it"),
        ("last_reload", "{successful, at, error}"),
        ("unconfirmed", "the policy on trial: {policy, before, until}; else null"),
        ("last_good", "true when the rule file was of no use at the start, and the last good policy is in force"),
        ("save_error", "why the policy in force could not be saved in the state directory, or null"),
        ("kernel", "true when the kernel refuses, before there is a connection"),
        ("bans", "how many bans are in force"),
        ("workers", "[{index, pid, alive, serving, restarts, uptime_s}]"),
        ("listeners", "[{name, protocol, path, addresses, backends, sessions, opened, bytes_in, bytes_out, ...}]"),
        ("verdicts", "[{listener, action, rule, reason, count, kernel_attempts}]: those that were given"),
    ),
)
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(terminal: Terminal, control: str | None, as_json: bool) -> int:
    """Show how the daemon is: its policy, workers, listeners, and the last reload.

    The exit code is 0 when it serves with all its workers and the last reload worked, 1 when not, and 3 when no daemon
    answers.
    """
    with connect(control) as daemon:
        status = daemon.ask("status").result
    if as_json:
        terminal.print_json(status)
    else:
        from gatekeeper.cli.tables import show_status  # noqa: PLC0415 - rich is slow to import

        show_status(terminal, status)
    well = status["state"] == "serving" and status["last_reload"]["successful"]
    return FINE if well and all(worker["serving"] for worker in status["workers"]) else NO
