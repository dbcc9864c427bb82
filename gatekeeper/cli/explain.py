"""``gatekeeper explain``: what would happen to a connection, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gatekeeper.cli.terminal import FILE, FINE, NO, Command, Terminal, format_table

if TYPE_CHECKING:
    from gatekeeper.policy.explain import Explanation
    from gatekeeper.policy.model import Listener, Policy, Protocol

LOCAL = "unix"  # as source and port: somebody on this machine who connects to a unix socket
MOST_SHOWN = 20  # rules that nearly matched; --json has all
COLOURS = {"allow": "green", "deny": "red", "drop": "red"}
WHY = {
    "source": '"from" does not name the source',
    "except": '"except" names the source',
    "to": '"to" does not name this listener or port',
}


@click.command(
    "explain",
    cls=Command,
    examples=(
        "gatekeeper explain rules.yaml 198.51.100.7 22",
        "gatekeeper explain rules.yaml 2001:db8::7 53/udp --to dns",
        "gatekeeper explain rules.yaml unix unix --to app          a peer on a unix socket",
    ),
    json_keys=(
        ("action", "allow, deny or drop; null when nothing listens there"),
        ("rule", "the rule that decides; null for the default"),
        ("reason", "rule, default or no_listener"),
        ("listener, address", "the listener and the address of it that the connection comes to"),
        ("file, line", "where the rule, or the default, is written"),
        ("default", "what would happen without any rule"),
        ("trace", "the rules tried before, a list of objects:"),
        ("  rule, action", "its name, and what it would have done"),
        ("  file, line", "where it is written"),
        ("  failed", "a list: the fields that did not match, of source, except, to"),
        ("others", "the same for other addresses with this port; the one above is the strictest"),
    ),
)
@click.argument("file", type=FILE)
@click.argument("source")
@click.argument("port", metavar="PORT[/PROTO]")
@click.option("--to", "to", metavar="LISTENER", help="Only this listener.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(terminal: Terminal, file: str, source: str, port: str, to: str | None, as_json: bool) -> int:
    """Say what would happen to a connection from SOURCE to PORT, which rule decides, and what nearly matched.

    PORT is TCP unless it says /udp. Exit code 0 when the connection is allowed at every address with this port, 1 when
    not. FILE "-" is standard input. The file's own tests are not run. Bans stand above all rules, and are no part of the
    file: `gatekeeper bans SOURCE` asks the daemon.
    """
    family, address = parse_source(source)
    number, protocol = parse_port(port)
    if (family == 0) != (number == 0):
        raise click.UsageError(f'the source "{LOCAL}" goes with the port "{LOCAL}", and an address with a number')

    from gatekeeper import config  # noqa: PLC0415 - yaml and pydantic are slow to import
    from gatekeeper.cli.files import load  # noqa: PLC0415
    from gatekeeper.policy.explain import explain  # noqa: PLC0415

    loaded = load(terminal, file, config.load)
    if loaded.config is None:
        for problem in loaded.problems:
            terminal.note(config.render(problem, loaded.texts))
        return NO
    policy = loaded.config.policy
    if to is not None and to not in {listener.name for listener in policy.listeners}:
        known = ", ".join(listener.name for listener in policy.listeners)
        raise click.UsageError(f'no listener is called "{to}" (there are: {known})')
    found = explain(policy, family, address, number, protocol, to)
    # The strictest first: it is the answer when several addresses have this port.
    found.sort(key=lambda one: one.verdict.action.label == "allow")
    if as_json:
        terminal.print_json(as_document(found))
    elif not found:
        nobody_listens(terminal, policy, source, port, to)
    else:
        for index, one in enumerate(found):
            if index:
                terminal.print()
            describe(terminal, one, source)
    return FINE if found and found[0].verdict.action.label == "allow" else NO


def parse_source(text: str) -> tuple[int, int]:
    """Return family and address of one source; family 0 for a peer on a unix socket.

    Raises:
        click.BadParameter: it is not one address.
    """
    if text == LOCAL:
        return 0, 0
    from gatekeeper.config.addresses import parse_source as parse  # noqa: PLC0415

    try:
        family, first, last = parse(text)
    except ValueError as err:
        raise click.BadParameter(str(err), param_hint="SOURCE") from err
    if first != last:
        raise click.BadParameter(f'"{text}" is more than one address; name one of them', param_hint="SOURCE")
    return family, first


def parse_port(text: str) -> tuple[int, Protocol]:
    """Return port and protocol of ``22``, ``22/tcp`` or ``53/udp``; port 0 for a unix socket.

    Raises:
        click.BadParameter: it is neither.
    """
    from gatekeeper.policy.model import Protocol  # noqa: PLC0415

    if text == LOCAL:
        return 0, Protocol.TCP
    number, slash, protocol = text.partition("/")
    if slash and protocol not in tuple(Protocol):
        raise click.BadParameter(f'"{text}": the protocol is tcp or udp', param_hint="PORT")
    if not (number.isascii() and number.isdigit() and len(number) <= 5 and 1 <= int(number) <= 65535):
        raise click.BadParameter(f'"{text}" is not a port: 22, 22/tcp or 53/udp', param_hint="PORT")
    return int(number), Protocol(protocol or "tcp")


def as_document(found: list[Explanation]) -> dict[str, Any]:
    """Return the documented JSON object; ``found`` is sorted, the answer first."""
    if not found:
        return {
            "action": None, "rule": None, "reason": "no_listener", "listener": None, "address": None,
            "file": None, "line": None, "default": None, "trace": [], "others": [],
        }  # fmt: skip
    first, *others = [_one(explanation) for explanation in found]
    return first | {"others": others}


def _one(found: Explanation) -> dict[str, Any]:
    return {
        "action": found.verdict.action.label,
        "rule": found.rule.name if found.rule is not None else None,
        "reason": found.verdict.reason,
        "listener": found.listener.name,
        "address": found.endpoint.address,
        "file": found.place.file,
        "line": found.place.line,
        "default": found.default.label,
        "trace": [
            {
                "rule": step.rule.name, "action": step.rule.action.label,
                "file": step.rule.place.file, "line": step.rule.place.line,
                "failed": list(step.failed),
            }
            for step in found.trace
        ],
    }  # fmt: skip


def describe(terminal: Terminal, found: Explanation, source: str) -> None:
    """Print one explanation for people."""
    action, place = found.verdict.action.label, f"{found.place.file}:{found.place.line}"
    who = "a local peer" if source == LOCAL else source
    verdict = terminal.paint(action, COLOURS[action], bold=True)
    terminal.print(f"{verdict}: {who} to {found.listener.name} ({found.endpoint.address}, {found.endpoint.protocol})")
    if found.rule is not None:
        terminal.print(f'decided by the rule "{found.rule.name}", {place}')
        terminal.print(f"without any rule the default would {found.default.label}")
    else:
        terminal.print(f"decided by the default, {place}: no rule matches")
    nearly = [step for step in found.trace if step.nearly]
    if nearly:
        terminal.print("rules before it that nearly matched:")
        rows = [
            (f"  {step.rule.name}", step.rule.action.label, f"{step.rule.place.file}:{step.rule.place.line}", WHY[step.failed[0]])
            for step in nearly[:MOST_SHOWN]
        ]
        for line in format_table(rows):
            terminal.print(line)
        if len(nearly) > MOST_SHOWN:
            terminal.print(f"  and {len(nearly) - MOST_SHOWN} more (--json has all)")


def nobody_listens(terminal: Terminal, policy: Policy, source: str, port: str, to: str | None) -> None:
    """Print that no connection can arrive there, and where one could."""
    terminal.print(f"nothing listens there: {source} cannot reach port {port}{f' of {to}' if to else ''}; there are")
    rows = [(f"  {one.name}", _addresses(one)) for one in policy.listeners if to in (None, one.name)]
    for line in format_table(rows):
        terminal.print(line)


def _addresses(listener: Listener) -> str:
    shown = [f"{endpoint.address}/{endpoint.protocol}" for endpoint in listener.endpoints[:4]]
    more = len(listener.endpoints) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
