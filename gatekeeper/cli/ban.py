"""``gatekeeper ban``: refuse a source everywhere, above all rules, and end its sessions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import click

from gatekeeper.cli.daemon import Daemon, connect, control_option
from gatekeeper.cli.terminal import FILE, FINE, NO, CannotDo, Command, Terminal, count

REQUEST_BYTES = 60_000  # of sources; a whole request is at most 64 KiB
MOST_PROBLEMS = 20
MOST_LIST_BYTES = 1 << 28
LISTED = 3  # sources that the answer repeats


class WrongList(click.ClickException):
    """The list of sources has errors."""

    exit_code = NO


@click.command(
    "ban",
    cls=Command,
    examples=(
        "gatekeeper ban 198.51.100.7                             until `gatekeeper unban 198.51.100.7`",
        'gatekeeper ban 198.51.100.0/24 --for 1h --reason "password guessing"',
        "gatekeeper ban 2001:db8:7::/48 203.0.113.10-203.0.113.20",
        "gatekeeper ban --list attackers.txt --for 24h           one address, network or range a line",
    ),
    json_keys=(
        ("banned", "how many sources"),
        ("replaced", "how many of them were banned before, and are now as said here"),
        ("until", "Unix time; null: until they are unbanned"),
        ("ended", "live sessions that were ended"),
        ("missing", "workers that have not confirmed it (they are being replaced, and their successors know it)"),
        ("kept", "true when the bans survive a restart of the service"),
        ("kernel", "true when the kernel refuses them, before there is a connection"),
    ),
)
@click.argument("sources", metavar="SOURCE...", nargs=-1)
@click.option("--for", "duration", metavar="DURATION", help="How long: 90s, 10m, 1h, 7d.  [default: until unbanned]")
@click.option("--reason", default="", metavar="TEXT", help="Why; shown by `bans` and in the audit log.")
@click.option("--list", "path", type=FILE, help='Ban what this file lists; "-" is standard input.')
@click.option("--force", is_flag=True, help="Even a network that is a large part of everybody, or your own address.")
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(
    terminal: Terminal, sources: tuple[str, ...], duration: str | None, reason: str, path: str | None, force: bool,
    control: str | None, as_json: bool,
) -> int:  # fmt: skip
    """Refuse every new connection of each SOURCE, whatever the rules say, and end its sessions.

    SOURCE is an address, a network or a range. A ban survives restarts of a service that has a state directory. Banning the same source again replaces its ban. IPv4
    networks shorter than /8 and IPv6 networks shorter than /16 take --force.
    """
    listed = gather(terminal, sources, path)
    if not listed:
        raise click.UsageError("name what to ban: an address, a network or a range, or --list FILE")
    for_s = seconds(duration)
    if not force:
        spare_yourself(listed)
    with connect(control, patience_s=None) as daemon:
        result = send(daemon, "ban", listed, for_s=for_s, reason=reason, force=force)
    if as_json:
        terminal.print_json(result)
    else:
        tell(terminal, listed, result)
    return FINE


def tell(terminal: Terminal, listed: Sequence[str], result: dict[str, Any]) -> None:
    """Print for people what came of it."""
    from gatekeeper.cli.tables import moment  # noqa: PLC0415 - rich is slow to import

    what = ", ".join(listed) if len(listed) <= LISTED else count(result["banned"], "source")
    until = "until unbanned" if result["until"] is None else f"until {moment(result['until'])}"
    terminal.print(f"banned {what} {until}; {count(result['ended'], 'session')} ended")
    note(terminal, result)


def note(terminal: Terminal, result: dict[str, Any]) -> None:
    """Print what else people should know about bans that have changed."""
    if not result["kept"]:
        terminal.note("this does not survive a restart: the service has no state directory, or cannot write there (see its log)")
    if result.get("missing"):
        terminal.note(f"{count(result['missing'], 'worker')} did not confirm it in time; see the log of the service")


def send(daemon: Daemon, op: str, sources: Sequence[str], **args: Any) -> dict[str, Any]:
    """Send sources in as many requests as it takes; return one result for all of them."""
    total: dict[str, Any] = {}
    parts = list(_parts(sources))
    for number, part in enumerate(parts, 1):
        result = daemon.ask(op, sources=part, more=number < len(parts) or None, **args).result
        sums = {key: total.get(key, 0) + value for key, value in result.items() if type(value) is int}
        total |= result | sums
    return total


def seconds(duration: str | None) -> float | None:
    """Return a duration as the command line gives it.

    Raises:
        click.BadParameter: it is none.
    """
    from gatekeeper.config.words import parse_duration  # noqa: PLC0415

    try:
        return None if duration is None else parse_duration(duration)
    except ValueError as err:
        raise click.BadParameter(str(err), param_hint="--for") from err


def gather(terminal: Terminal, sources: Sequence[str], path: str | None) -> list[str]:
    """Return the sources that a command line names itself and by ``--list``; all of them make sense.

    Raises:
        click.BadParameter: one of the command line does not.
        WrongList: one of the list does not.
        CannotDo: the list cannot be read.
    """
    from gatekeeper.config.addresses import parse_source  # noqa: PLC0415

    for text in sources:
        try:
            parse_source(text)
        except ValueError as err:
            raise click.BadParameter(str(err), param_hint="SOURCE") from err
    listed, problems = list(sources), []
    for number, line in enumerate(_read(terminal, path).splitlines() if path is not None else (), 1):
        text = line.partition("#")[0].strip()
        if text:
            try:
                parse_source(text)
            except ValueError as err:
                problems.append(f"{path}:{number}: {err}")
            listed.append(text)
    if problems:
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise WrongList("\n".join(problems[:MOST_PROBLEMS] + more))
    return listed


def _read(terminal: Terminal, path: str) -> str:
    try:
        if path == "-":
            return terminal.stdin.read(MOST_LIST_BYTES)
        with open(path, encoding="utf-8") as file:
            return file.read(MOST_LIST_BYTES)
    except OSError as err:
        raise CannotDo(f"cannot read {path}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise CannotDo(f"cannot read {path}: it is not text") from err


def _parts(sources: Sequence[str]) -> Iterator[list[str]]:
    """Yield the sources in parts that fit into a request."""
    part: list[str] = []
    room = REQUEST_BYTES
    for text in sources:
        room -= len(text) + 3  # quotes and a comma
        if room < 0:
            yield part
            part, room = [], REQUEST_BYTES - len(text)
        part.append(text)
    yield part


def spare_yourself(sources: Sequence[str]) -> None:
    """Refuse to ban the address that this very command line is connected from, as far as SSH tells.

    Raises:
        click.UsageError: it is among them.
    """
    from gatekeeper.config.addresses import parse_source  # noqa: PLC0415

    try:
        family, own, _last = parse_source((os.environ.get("SSH_CONNECTION") or "?").split()[0].partition("%")[0])
    except ValueError:
        return
    for text in sources:
        kind, first, last = parse_source(text)
        if kind == family and first <= own <= last:
            raise click.UsageError(f"{text} is where you are connected from; if that is meant, use --force")
