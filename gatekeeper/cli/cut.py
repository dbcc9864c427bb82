"""``gatekeeper cut``: end live sessions."""

from __future__ import annotations

from typing import Any

import click

from gatekeeper.cli.daemon import connect, control_option
from gatekeeper.cli.filters import as_arguments, filter_options
from gatekeeper.cli.sessions import ROW_KEYS, tell_missing
from gatekeeper.cli.terminal import FINE, NO, Command, Terminal, count


@click.command(
    "cut",
    cls=Command,
    examples=(
        "gatekeeper cut 7529361408                       the id is in `gatekeeper sessions` and in the audit log",
        "gatekeeper cut --source 198.51.100.7            whatever comes from there",
        "gatekeeper cut --listener ssh --idle 1h",
        "gatekeeper cut --stuck --dry-run                only say which",
    ),
    json_keys=(
        ("ended", "how many sessions were ended; with --dry-run, how many would be"),
        ("sessions", "[...], the first thousand of them:"),
        *ROW_KEYS,
        ("missing_workers", "workers that did not answer"),
    ),
)
@click.argument("flows", metavar="FLOW...", nargs=-1, type=click.IntRange(0, (1 << 64) - 1))
@filter_options
@click.option("--all", "everything", is_flag=True, help="Every session there is.")
@click.option("--dry-run", is_flag=True, help="End none; say which would be ended.")
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(
    terminal: Terminal, /, flows: tuple[int, ...], everything: bool, dry_run: bool, control: str | None, as_json: bool,
    **filters: Any,
) -> int:  # fmt: skip
    """End live sessions: those with these flow ids, or all that fit the options. TCP clients and backends get a reset.

    New connections are as welcome as before; `gatekeeper ban` keeps a source out. The exit code is 1 when no session
    matches.
    """
    wanted = as_arguments(**filters) | ({"flow": list(flows)} if flows else {})
    if not wanted and not everything:
        raise click.UsageError("say which sessions: flow ids, options such as --source, or --all")
    if wanted and everything:
        raise click.UsageError("--all stands alone: it is every session there is")
    rows: list[dict[str, Any]] = []
    with connect(control) as daemon:
        if dry_run:
            result = daemon.ask("sessions", rows=rows.extend, **wanted).result
            ended = result["matched"]
        else:
            result = daemon.ask("cut", rows=rows.extend, all=everything or None, **wanted).result
            ended = result["ended"]
    if as_json:
        terminal.print_json({"ended": ended, "sessions": rows, "missing_workers": result["missing_workers"]})
    else:
        _tell(terminal, rows, ended, dry_run=dry_run)
        for flow in sorted(set(flows) - {row["flow_id"] for row in rows}):
            terminal.note(f"there is no session {flow}, or not of this kind")
    tell_missing(terminal, result)
    return FINE if ended else NO


def _tell(terminal: Terminal, rows: list[dict[str, Any]], ended: int, *, dry_run: bool) -> None:
    from gatekeeper.cli.session_table import show_sessions  # noqa: PLC0415 - rich is slow to import

    if ended:
        show_sessions(terminal, rows, details=False)
        if len(rows) < ended:
            terminal.note(f"{len(rows)} of them are listed")
    terminal.note(f"{'would cut' if dry_run else 'cut'} {count(ended, 'session')}")
