"""``gatekeeper plan``: what a reload would do to the running daemon."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Any

import click

from gatekeeper.cli.daemon import connect, control_option
from gatekeeper.cli.diff import JSON_KEYS
from gatekeeper.cli.terminal import FILE, FINE, NO, CannotDo, Command, Terminal, count, format_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gatekeeper.cli.fates import Fate
    from gatekeeper.config import Loaded
    from gatekeeper.snapshot.reader import Snapshot

SHOWN = 20  # networks of each change, and sessions


@click.command(
    "plan",
    cls=Command,
    examples=(
        "gatekeeper plan                        the daemon's own rule file, as it is now",
        "gatekeeper plan new.yaml               what another file would change",
        "gatekeeper plan --json | jq '.sessions[].flow_id'",
    ),
    json_keys=(
        ("valid", "false: the file has errors or fails its tests, a reload would be refused; nothing below it then"),
        ("file, policy, before", "what was read, its digest, and the digest of the policy in force"),
        ("tests", "how many tests of the file were proved"),
        ("problems", "[...], as `check --json` lists them; warnings when it is valid"),
        ("sessions", "[...], live sessions that would end, as `sessions --json` lists them, and:"),
        ("  end", "revoked: refused now; removed: a UDP flow whose listener is closed"),
        ("  after", "{action, rule}, what the file says of its source; rule null: the default"),
        ("missing_workers", "workers that did not answer; their sessions are missing"),
        *JSON_KEYS,
    ),
)
@click.argument("file", type=FILE, required=False)
@click.option("--rules", is_flag=True, help="Also where another rule decides, with the same action.")
@click.option(
    "--limit", type=click.IntRange(0), default=SHOWN, show_default=True, metavar="N",
    help="Show so many networks of each change, and sessions; 0 is all.",
)  # fmt: skip
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(
    terminal: Terminal, file: str | None, rules: bool, limit: int, control: str | None, as_json: bool
) -> int:
    """Say what a reload would do: verdicts that change, listeners, live sessions that would end. Changes nothing.

    FILE, or else the daemon's own rule file, is read here, with your rights, and its tests are run. Exit code 0 when
    nothing would change, 1 when something would, or when the file would be refused (the output says which).
    """
    from gatekeeper import config  # noqa: PLC0415 - yaml and pydantic are slow to import
    from gatekeeper.cli import differences  # noqa: PLC0415
    from gatekeeper.cli.fates import Candidate  # noqa: PLC0415
    from gatekeeper.snapshot.encode import encode  # noqa: PLC0415
    from gatekeeper.snapshot.reader import Snapshot  # noqa: PLC0415

    path = file or _in_force(control)[0]
    loaded = _check(terminal, file, path)
    # Asked only now: compiling takes its time, and the daemon may have reloaded meanwhile.
    running = _in_force(control)[1]
    document: dict[str, Any] = {
        "valid": loaded.config is not None, "file": path,
        "policy": loaded.config.digest if loaded.config is not None else None, "before": running.meta["digest"],
        "tests": len(loaded.config.policy.tests) if loaded.config is not None else 0,
        "problems": [config.as_json(problem) for problem in loaded.problems],
    }  # fmt: skip
    if loaded.config is None:
        if as_json:
            empty = differences.Differences([], [], [], hidden=False)
            differences.write_document(terminal, empty, document | {"sessions": [], "missing_workers": []})
        else:
            for problem in loaded.problems:
                terminal.print(config.render(problem, loaded.texts))
            terminal.note(f"{path} is not valid: a reload would be refused, and nothing would change")
        return NO
    snapshot = Snapshot(b"".join(encode(loaded.config)))
    found = differences.find(running, snapshot, rules=rules)
    fates, missing = _ask_for_sessions(control, Candidate(snapshot))
    if as_json:
        document |= {"sessions": [fate.as_document() for fate in fates], "missing_workers": missing}
        differences.write_document(terminal, found, document)
    else:
        for problem in loaded.problems:
            terminal.note(config.render(problem, loaded.texts))
        terminal.print(f"policy {running.meta['digest'][:12]} is in force, {path} is {loaded.config.digest[:12]}: "
                       f"{count(document['tests'], 'test')} proved")  # fmt: skip
        differences.show(terminal, found, limit)
        _show_sessions(terminal, fates, limit)
        if not found and not fates:
            terminal.print("nothing changes")
    for worker in missing:
        terminal.note(f"worker {worker} did not answer: its sessions are missing here")
    return NO if found or fates else FINE


def _in_force(control: str | None) -> tuple[str, Snapshot]:
    """Return the daemon's rule file, and the policy that is in force there."""
    with connect(control) as daemon:
        answer = daemon.ask("policy")
    return answer.result["path"], _map(answer.fds)


def _map(fds: Sequence[int]) -> Snapshot:
    """Return the snapshot that came from the daemon. Takes over the descriptors.

    Raises:
        CannotDo: it is none that we understand.
    """
    from gatekeeper.errors import SnapshotError  # noqa: PLC0415
    from gatekeeper.snapshot.reader import Snapshot  # noqa: PLC0415

    try:
        (fd,) = fds
        snapshot = Snapshot(memoryview(mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)))
        snapshot.validate()
    except (SnapshotError, ValueError) as err:
        raise CannotDo(f"cannot read the daemon's policy; is it another version of gatekeeper? ({err})") from err
    finally:
        for fd in fds:
            os.close(fd)
    return snapshot


def _check(terminal: Terminal, file: str | None, path: str) -> Loaded:
    """Return the candidate, its tests run. The daemon's own file is judged as the daemon would, rights included.

    Raises:
        CannotDo: it cannot be read.
    """
    from gatekeeper import config  # noqa: PLC0415
    from gatekeeper.cli.files import load  # noqa: PLC0415

    if file is not None:
        return load(terminal, file, config.check)
    return load(terminal, path, lambda name, _text, tell: config.check(name, None, tell))


def _ask_for_sessions(control: str | None, candidate: Any) -> tuple[list[Fate], list[int]]:
    """Return the live sessions that would end, the oldest first, and the workers that did not answer."""
    fates: list[Fate] = []

    def judge(rows: list[dict[str, Any]]) -> None:
        fates.extend(fate for row in rows if (fate := candidate.fate(row)) is not None)

    # A connection of its own: compiling may take longer than the daemon waits for the next request.
    with connect(control) as daemon:
        result = daemon.ask("sessions", rows=judge).result
    fates.sort(key=lambda fate: fate.session["began"])
    return fates, result["missing_workers"]


def _show_sessions(terminal: Terminal, fates: Sequence[Fate], most: int) -> None:
    """Print the sessions that would end; at most ``most`` (0: all)."""
    if not fates:
        return
    from gatekeeper.cli.session_table import place  # noqa: PLC0415 - rich is slow to import
    from gatekeeper.cli.tables import duration  # noqa: PLC0415

    terminal.print(f"{count(len(fates), 'live session')} would end:")
    rows = [("  FLOW", "LISTENER", "SOURCE", "AGE", "RULE", "END")]
    for fate in fates[: most or None]:
        session = fate.session
        end = f"{fate.end}: {fate.action} by {fate.rule or 'default'}" if fate.action else f"{fate.end}: the listener is closed"
        rows.append((
            f"  {session['flow_id']}", session["listener"], place(session["src_ip"], session["src_port"]) or "unix",
            duration(session["age_s"]), session["rule"] or "default", end,
        ))  # fmt: skip
    for line in format_table(rows):
        terminal.print(line)
    if len(rows) <= len(fates):
        terminal.print(f"  and {len(fates) + 1 - len(rows)} more")
