"""``gatekeeper schema``: the JSON schema of rule files, for editors."""

from __future__ import annotations

import click

from gatekeeper.cli.terminal import FINE, Command, Terminal


@click.command(
    "schema",
    cls=Command,
    examples=(
        "gatekeeper schema > gatekeeper.schema.json",
        "# yaml-language-server: $schema=gatekeeper.schema.json      first line of a rule file, for editors",
    ),
)
@click.option("--json", "as_json", is_flag=True, hidden=True, help="The schema is JSON in any case.")
@click.pass_obj
def command(terminal: Terminal, as_json: bool) -> int:  # noqa: ARG001 - accepted, so that every command takes --json
    """Print the JSON schema of rule files, for editors that complete and check while typing.

    It knows keys, shapes and words; `gatekeeper check` knows everything.
    """
    from gatekeeper.config.schema import json_schema  # noqa: PLC0415 - pydantic is slow to import

    terminal.print_json(json_schema())
    return FINE
