"""``gatekeeper run``: serve in the foreground."""

from __future__ import annotations

import re
import signal

import click

from gatekeeper.cli.terminal import FILE, Command

UNITS_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(_ctx: click.Context, _param: click.Parameter, text: str) -> float:
    """Return seconds of a time such as ``90``, ``90s``, ``5m`` or ``1h``.

    Raises:
        click.BadParameter: it is none.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)(ms|[smhd]|)", text, re.ASCII)
    if match is None:
        raise click.BadParameter(f'"{text}" is not a duration; write 90s, 5m or 1h')
    return float(match[1]) * UNITS_S[match[2]]


@click.command(
    "run",
    cls=Command,
    examples=(
        "gatekeeper run rules.yaml",
        "gatekeeper run --workers 4 --drain-timeout 30s /etc/gatekeeper/rules.yaml",
        "kill -HUP $(pgrep -of 'gatekeeper run')      read the rules again",
    ),
)
@click.argument("file", type=FILE)
@click.option("--workers", type=click.IntRange(1, 128), help="Number of workers; overrides `workers` in the file.")
@click.option(
    "--drain-timeout", callback=parse_duration, metavar="DURATION", default="300s", show_default=True,
    help="How long sessions may go on after SIGTERM.",
)  # fmt: skip
@click.option(
    "--control", envvar="GATEKEEPER_CONTROL", metavar="PATH",
    help="Where commands reach the daemon, or off; overrides `control` in the file. Also GATEKEEPER_CONTROL.",
)  # fmt: skip
@click.option(
    "--state", envvar="GATEKEEPER_STATE", metavar="DIR",
    help="The state directory; overrides `state` in the file, and is known when the file is broken. Also GATEKEEPER_STATE.",
)  # fmt: skip
@click.option("--watch", is_flag=True, help="Reload when FILE changes, or a file that it includes or reads addresses from.")
def command(file: str, workers: int | None, drain_timeout: float, control: str | None, state: str | None, watch: bool) -> int:
    """Serve the rules in FILE in the foreground until SIGTERM or SIGINT.

    SIGHUP reads the file again: if it is good, every worker changes over and no session ends; if not, the old policy
    stays in force. SIGTERM stops listening and lets sessions end; a second one ends them at once.
    """
    if file == "-":
        raise click.UsageError("run needs a file: a reload reads it again")
    from gatekeeper.supervisor.log import Log  # noqa: PLC0415 - for this command alone
    from gatekeeper.supervisor.supervisor import Options, Supervisor  # noqa: PLC0415

    code = Supervisor(Options(file, workers, drain_timeout, control or None, state or None, watch), Log()).run()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # all is done: another one must not change how it ended
    return code
