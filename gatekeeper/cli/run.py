"""``gatekeeper run``: serve in the foreground."""

from __future__ import annotations

import re
from typing import Any

import click

from gatekeeper.cli.terminal import Command

UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class Duration(click.ParamType):
    """A time such as ``90``, ``90s``, ``5m`` or ``1h``; the value is in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smh]?)", str(value), re.ASCII)
        if match is None:
            self.fail(f'"{value}" is not a duration; write 90s, 5m or 1h', param, ctx)
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
@click.argument("file", type=click.Path())
@click.option("--workers", type=click.IntRange(1, 128), help="Number of workers; overrides `workers` in the file.")
@click.option(
    "--drain-timeout", type=Duration(), default="300s", show_default=True,
    help="How long sessions may go on after SIGTERM.",
)  # fmt: skip
def command(file: str, workers: int | None, drain_timeout: float) -> int:
    """Serve the rules in FILE in the foreground until SIGTERM or SIGINT.

    SIGHUP reads the file again: if it is good, every worker changes over and no session ends; if not, the old policy
    stays in force. SIGTERM stops listening and lets sessions end; a second one ends them at once.
    """
    if file == "-":
        raise click.UsageError("run needs a file: a reload reads it again")
    from gatekeeper.supervisor.log import Log  # noqa: PLC0415 - for this command alone
    from gatekeeper.supervisor.supervisor import Options, Supervisor  # noqa: PLC0415

    return Supervisor(Options(file, workers, drain_timeout), Log()).run()
