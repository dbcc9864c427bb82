"""``gatekeeper doctor``: what this host and these privileges allow, and why not."""

from __future__ import annotations

import shutil
import textwrap

import click

from gatekeeper.cli.terminal import FINE, NO, Command, Terminal

INDENT = 17  # where the findings start: after the state and the name of the check
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(
    "doctor",
    cls=Command,
    examples=("gatekeeper doctor", "sudo -u gatekeeper gatekeeper doctor --json"),
    json_keys=(
        ("healthy", "true when nothing failed; warnings do not count"),
        ("findings", "a list, one object for each check:"),
        ("  check", "its name: kernel, user, ports, ipv6, nofile, ..."),
        ("  state", "ok, warn or fail"),
        ("  found", "what was found"),
        ("  why", "what depends on it"),
        ("  fix", 'what to do about it; "" when there is nothing to do'),
    ),
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(terminal: Terminal, as_json: bool) -> int:
    """Say what this host and these privileges allow, and what to do about the rest.

    Run it as the user and in the place (container, unit) that gatekeeper will run in. Nothing is changed.
    """
    from gatekeeper.cli.probes import State, examine  # noqa: PLC0415 - ctypes and more, for this command alone

    findings = examine()
    healthy = all(finding.state is not State.FAIL for finding in findings)
    if as_json:
        terminal.print_json({"healthy": healthy, "findings": [finding.as_json() for finding in findings]})
        return FINE if healthy else NO

    width = max(min(shutil.get_terminal_size().columns, 120) - INDENT, 40)
    for finding in findings:
        state = terminal.paint(f"{finding.state:<6}", COLOURS[finding.state])
        terminal.print(f"{state}{finding.check:<{INDENT - 6}}{finding.found}")
        if finding.state is not State.OK:
            for text in (f"why: {finding.why}", f"fix: {finding.fix}"):
                for line in textwrap.wrap(text, width, subsequent_indent="     ", break_on_hyphens=False):
                    terminal.print(" " * INDENT + line)
    return FINE if healthy else NO
