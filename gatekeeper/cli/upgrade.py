"""``gatekeeper upgrade``: let the new code take over from the running daemon, and watch until the old workers are gone."""

from __future__ import annotations

import time
from typing import Any

import click

from gatekeeper.cli.daemon import Unreachable, connect, control_option
from gatekeeper.cli.run import parse_duration
from gatekeeper.cli.terminal import FINE, NO, CannotDo, Command, Terminal, count

PATIENCE_S = 120.0  # the new code has a minute to prove itself, and what is under way half a minute to end
TAKEOVER_S = 120.0
ASK_EVERY_S = 0.2
TELL_EVERY_S = 10.0


def parse_optional(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """Return seconds, ``None`` when the option is missing."""
    return None if text is None else parse_duration(ctx, param, text)


@click.command(
    "upgrade",
    cls=Command,
    examples=(
        "pip install --upgrade gatekeeper-firewall && gatekeeper upgrade",
        "gatekeeper upgrade --drain-timeout 1h --no-wait",
    ),
    json_keys=(
        ("before, version", "the versions before and after"),
        ("pid", "the daemon's process id, the same as before"),
        ("leaving", "[{pid, row, sessions, leaves_within_s}]: old workers that are still there"),
    ),
)
@click.option(
    "--drain-timeout", callback=parse_optional, metavar="DURATION",
    help="How long sessions of old workers may go on.  [default: as `run` was told]",
)  # fmt: skip
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until the old workers are gone.")
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(terminal: Terminal, drain_timeout: float | None, wait: bool, control: str | None, as_json: bool) -> int:
    """Let the code that is installed now take over from the running daemon.

    The daemon starts the new code as a child, which proves that it can take over; if it cannot, nothing changes and the
    exit code is 1. Otherwise the daemon executes it in its own place: the same process id, the same sockets, nobody is
    refused. Old workers finish their TCP sessions within the drain timeout; UDP clients go on with new ones.
    """
    say = terminal.note
    with connect(control, PATIENCE_S) as daemon:
        asked = daemon.ask("upgrade", progress=say, drain_s=drain_timeout).result
    status = _wait_until_taken_over(control, asked)
    if status["upgrades"]["failed"] > asked["upgrades_failed"]:
        raise click.ClickException(f"{status['upgrades']['error']}")
    say(f"gatekeeper {status['version']} serves (it was {asked['before']}), pid {status['pid']}")
    told_s = 0.0
    while wait and status["leaving"]:
        if time.monotonic() - told_s >= TELL_EVERY_S:
            told_s = time.monotonic()
            say(_progress(status["leaving"]))
        time.sleep(ASK_EVERY_S)
        status = _status(control)
    if wait:
        say("all old workers have left")
    if as_json:
        terminal.print_json(
            {"before": asked["before"], "version": status["version"], "pid": status["pid"], "leaving": status["leaving"]}
        )
    return FINE if status["state"] == "serving" else NO


def _wait_until_taken_over(control: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the first status of a daemon that has been upgraded, or that has failed to."""
    deadline = time.monotonic() + TAKEOVER_S
    while True:
        try:
            status = _status(control)
        except Unreachable:
            if time.monotonic() > deadline:
                raise
        else:
            counts = status["upgrades"]
            if counts["failed"] > asked["upgrades_failed"]:
                return status
            if counts["done"] > asked["upgrades"] and not counts["taking_over"]:
                return status
            if time.monotonic() > deadline:
                raise CannotDo("the new workers do not serve yet, so the old ones go on; the daemon's log says why")
        time.sleep(ASK_EVERY_S)


def _status(control: str | None) -> dict[str, Any]:
    with connect(control, PATIENCE_S) as daemon:
        return daemon.ask("status").result


def _progress(leaving: list[dict[str, Any]]) -> str:
    sessions = sum(worker["sessions"] for worker in leaving)
    most_s = max((worker["leaves_within_s"] or 0.0 for worker in leaving), default=0.0)
    return f"draining: {count(len(leaving), 'old worker')} with {count(sessions, 'session')}, for at most {most_s:.0f} s"
