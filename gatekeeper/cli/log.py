"""``gatekeeper log tail``: follow the audit log, wherever it is written to."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import click

from gatekeeper.cli.daemon import Refused, Unreachable, connect, control_option
from gatekeeper.cli.terminal import EXIT_CODES, FINE, Command, Terminal, write_examples

RECEIVE_BYTES = 1 << 20  # more than a message ever has
BUFFER_BYTES = 4 << 20  # asked for; the kernel gives what it allows
AGAIN_S = 0.2
PATIENCE_S = 30.0  # with a daemon or an observer that is being restarted

EXAMPLES = (
    "gatekeeper log tail                                     what happens from now on, for people",
    "gatekeeper log tail --type refusal --listener ssh",
    "gatekeeper log tail --json | jq 'select(.src_ip == \"198.51.100.7\")'",
    "gatekeeper log tail --count 1 --type reload             wait for one event",
)


class LogGroup(click.Group):
    """The group `log`, whose help is laid out like that of every command."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, EXAMPLES[:2])
        super().format_help(ctx, formatter)


@click.group("log", cls=LogGroup, epilog=EXIT_CODES)
def command() -> None:
    """Read the audit log."""


@command.command(
    "tail",
    cls=Command,
    examples=EXAMPLES,
    json_keys=(("(one JSON object a line)", "the audit log's own lines, as docs/audit.md describes them"),),
)
@click.option("--type", "types", metavar="TYPE", multiple=True, help="Events of this type: connection, refusal, reload, ban, ...")
@click.option("--listener", metavar="NAME", multiple=True, help="Of this listener.")
@click.option("--rule", metavar="NAME", multiple=True, help='Decided by this rule; "default" is the default.')
@click.option("--count", "most", type=click.IntRange(1), metavar="N", help="End after so many events.")
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print the lines as they are.")
@click.pass_obj
def tail(
    terminal: Terminal, types: tuple[str, ...], listener: tuple[str, ...], rule: tuple[str, ...], most: int | None,
    control: str | None, as_json: bool,
) -> int:  # fmt: skip
    """Print audit events as they happen, until Ctrl-C. With `audit: off` in the rule file, too.

    When lines come faster than they are read some are left out, and an events_lost event says how many. When the daemon
    is restarted it is followed again.
    """
    rules = {"" if name == "default" else name for name in rule}
    shown = 0
    for line in follow(terminal, control):
        event = json.loads(line)
        about = event["gatekeeper"]
        if types and event["event_type"] not in types:
            continue
        if (listener and about.get("listener") not in listener) or (rules and about.get("rule") not in rules):
            continue
        if as_json:
            terminal.print(line)
        else:
            from gatekeeper.cli.log_lines import describe  # noqa: PLC0415 - for people only

            terminal.print(describe(terminal, event))
        terminal.stdout.flush()
        shown += 1
        if shown == most:
            break
    return FINE


def follow(terminal: Terminal, control: str | None) -> Iterator[str]:
    """Return audit lines as they come, for ever. A daemon or observer that goes away is waited for.

    Raises:
        Unreachable: there is no daemon, or none again for too long.
    """
    yield from _follow_once(control)
    while True:
        terminal.note("the log was interrupted: events may be missing here")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            time.sleep(AGAIN_S)
            try:
                yield from _follow_once(control)
                break
            except (Unreachable, Refused):
                if time.monotonic() > deadline:
                    raise


def _follow_once(control: str | None) -> Iterator[str]:
    """Return the lines of one observer, until it goes away."""
    with connect(control, patience_s=None) as daemon, contextlib.ExitStack() as ends:
        ours, theirs = map(ends.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            daemon.begin("tail", [theirs.fileno()])
        while True:
            data = ours.recv(RECEIVE_BYTES)
            if not data:
                return
            yield from data.decode().splitlines()
