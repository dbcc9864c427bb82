"""``gatekeeper diff``: who gets another verdict when one rule file takes the place of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gatekeeper.cli.terminal import FILE, FINE, NO, Command, Terminal

if TYPE_CHECKING:
    from gatekeeper.snapshot.reader import Snapshot

SHOWN = 10  # networks of each change
JSON_KEYS = (
    ("changes", "[...], one object for each change of verdicts:"),
    ("  protocol, ports", "tcp or udp; [[first, last], ...], empty for unix sockets"),
    ("  hosts", "the addresses that we listen at, or unix:PATH"),
    ("  listeners", "whose ports these are"),
    ("  sources", 'whom it concerns, as the fewest networks; "unix" for peers of unix sockets'),
    ("  before, after", "{action, rule}; rule null: the default; both null: nothing listens there"),
    ("opened, closed", "[{protocol, address, listener, backend}]"),
    ("moved", "[{protocol, address, before: {listener, backend}, after: {...}}]"),
    ("settings", "[{listener, key, before, after, restart}]; listener null: of the whole file"),
)


@click.command(
    "diff",
    cls=Command,
    examples=(
        "gatekeeper diff old.yaml new.yaml",
        "git show HEAD:rules.yaml | gatekeeper diff - rules.yaml",
        "gatekeeper diff --json old.yaml new.yaml | jq '.changes[] | select(.after.action == \"allow\")'",
    ),
    json_keys=JSON_KEYS,
)
@click.argument("old", type=FILE)
@click.argument("new", type=FILE)
@click.option("--rules", is_flag=True, help="Also where another rule decides, with the same action.")
@click.option("--limit", type=click.IntRange(0), default=SHOWN, show_default=True, metavar="N", help="Show so many networks of each change; 0 is all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(terminal: Terminal, old: str, new: str, rules: bool, limit: int, as_json: bool) -> int:
    """Say exactly who gets another verdict at which ports when NEW takes the place of OLD.

    Computed for every address there is, not sampled. Exit code 0 when no verdict, listener or setting changes, 1 when
    one does, or when a file has errors. One of the files may be "-", standard input. Their own tests are not run; what
    is refused at ports that are opened or closed is in --json only.
    """
    if old == new == "-":
        raise click.UsageError("only one of the two files can be standard input")
    before, after = _compile(terminal, old), _compile(terminal, new)
    if before is None or after is None:
        return NO
    from gatekeeper.cli import differences  # noqa: PLC0415 - for this command alone

    found = differences.find(before, after, rules=rules)
    if as_json:
        differences.write_document(terminal, found)
    else:
        differences.show(terminal, found, limit)
        if not found:
            terminal.print("nothing changes")
    return NO if found else FINE


def _compile(terminal: Terminal, file: str) -> Snapshot | None:
    """Return the policy of a file; ``None`` when it has errors, which are printed."""
    from gatekeeper import config  # noqa: PLC0415 - yaml and pydantic are slow to import
    from gatekeeper.cli.files import load  # noqa: PLC0415
    from gatekeeper.snapshot.encode import encode  # noqa: PLC0415
    from gatekeeper.snapshot.reader import Snapshot  # noqa: PLC0415

    loaded = load(terminal, file, config.load)
    if loaded.config is None:
        for problem in loaded.problems:
            terminal.note(config.render(problem, loaded.texts))
        return None
    return Snapshot(b"".join(encode(loaded.config)))
