"""``gatekeeper check``: what is wrong with a rule file, and where."""

from __future__ import annotations

import click

from gatekeeper.cli.terminal import FILE, FINE, NO, Command, Terminal, count


@click.command(
    "check",
    cls=Command,
    examples=(
        "gatekeeper check rules.yaml",
        "gatekeeper check --json rules.yaml | jq -r '.[].message'",
        "generate-rules | gatekeeper check -",
    ),
    json_keys=(
        ("[...]", "a list, one object for each problem, empty when there is none:"),
        ("  file, line, column", "where, counted from 1"),
        ("  severity", "error or warning"),
        ("  code", "a stable name for the field or the check"),
        ("  message", "what is wrong and what would be right"),
    ),
)
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(terminal: Terminal, file: str, as_json: bool) -> int:
    """Check a rule file and everything it names, and prove its tests. Opens no socket.

    Problems are printed as "file:line:column: message [code]" with the line and a caret. Warnings do not change the
    exit code. FILE "-" is standard input, named <stdin> in messages.
    """
    from gatekeeper import config  # noqa: PLC0415 - yaml and pydantic are slow to import
    from gatekeeper.cli.files import STDIN, load  # noqa: PLC0415

    loaded = load(terminal, file, config.check)
    if as_json:
        terminal.print_json([config.as_json(problem) for problem in loaded.problems])
    else:
        for problem in loaded.problems:
            terminal.print(config.render(problem, loaded.texts))
    if loaded.config is None:
        if not as_json:
            errors = sum(problem.severity == "error" for problem in loaded.problems)
            terminal.note(count(errors, "error"))
        return NO
    if not as_json:
        policy = loaded.config.policy
        terminal.print(
            f"{file if file != '-' else STDIN}: ok: {count(len(policy.listeners), 'listener')}, "
            f"{count(len(policy.rules), 'rule')}, {count(len(policy.tests), 'test')} proved"
        )
    return FINE
