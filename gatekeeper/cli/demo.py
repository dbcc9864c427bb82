"""``gatekeeper demo``: the real thing on loopback, in front of a backend of its own, with every claim checked.

Nothing here is simulated: it writes a rule file, runs ``gatekeeper run`` on it, connects from three addresses, reads
the audit log and the metrics, changes a rule, reloads, and stops. All ports are free ones; nothing is left behind.
"""

from __future__ import annotations

import contextlib
import io
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gatekeeper.cli.terminal import CANNOT, FINE, NO, Command, Terminal

if TYPE_CHECKING:
    from gatekeeper.cli.demo_parts import Backend, Gate

FRIEND, STRANGER, NUISANCE = "127.0.0.1", "127.0.0.2", "127.0.0.3"

RULES = """\
version: 1

listeners:
  - name: hello
    listen: 127.0.0.1:{port}
    backend: 127.0.0.1:{backend}

metrics: {{listen: "127.0.0.1:{metrics}"}}
audit: stdout
workers: 2

default: deny

rules:
  - name: nuisance
    action: drop
    from: 127.0.0.3
  - name: friends
    action: allow
    from: {friends}
    to: hello

tests:
  - {{from: 127.0.0.1, to: hello, expect: allow}}
  - {{from: any, except: 127.0.0.0/8, to: hello, expect: deny}}
"""


class Narrator:
    """Prints what happens and remembers whether everything was as promised."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.kept = True
        self._step = 0

    def step(self, title: str) -> None:
        """Begin a new part."""
        self._step += 1
        self.terminal.print()
        self.terminal.print(self.terminal.paint(f"{self._step}. {title}", "cyan", bold=True))

    def show(self, text: str) -> None:
        """Print text as it is, indented."""
        for line in text.splitlines():
            self.terminal.print(f"   {line}".rstrip())
        self.terminal.stdout.flush()

    def promise(self, text: str, *, kept: bool) -> None:
        """Print a claim and whether it held."""
        self.kept &= kept
        mark = self.terminal.paint("ok  ", "green") if kept else self.terminal.paint("NOT AS PROMISED  ", "red", bold=True)
        self.show(mark + text)


@click.command(
    "demo", cls=Command, examples=("gatekeeper demo", "gatekeeper demo --keep          then try it yourself")
)
@click.option("--keep", is_flag=True, help="Keep it running afterwards, until Ctrl-C.")
@click.pass_obj
def command(terminal: Terminal, keep: bool) -> int:
    """See gatekeeper work on this machine: allow, deny, drop, the audit log, metrics, a reload.

    Everything stays on loopback and on free ports, needs no privilege and is gone afterwards. Exit code 0 only when
    all was observed as promised.
    """
    from gatekeeper.cli.demo_parts import Backend, DemoFailed, Gate, free_ports  # noqa: PLC0415 - for this command alone

    narrator = Narrator(terminal)
    try:
        with stopped_by_sigterm(), tempfile.TemporaryDirectory(prefix="gatekeeper-demo-") as folder, Backend() as backend:
            port, metrics = free_ports(2)
            rules = Path(folder) / "rules.yaml"
            rules.touch(mode=0o600)  # whatever the umask: what others may write is not served

            def write(friends: str) -> str:
                text = RULES.format(port=port, backend=backend.port, metrics=metrics, friends=friends)
                rules.write_text(text, encoding="utf-8")
                return text

            narrator.step("The rules")
            narrator.show(write(FRIEND))
            narrator.step(f"gatekeeper run {rules}")
            with Gate(rules, port, metrics) as gate:
                gate.wait_until_ready()
                narrator.promise("it runs: every address is open and the policy is in force", kept=True)
                connect(narrator, gate, backend)
                explain(narrator, rules, port)
                audit(narrator, gate)
                count(narrator, gate)
                reload(narrator, gate, backend, lambda: write(f"[{FRIEND}, {STRANGER}]"))
                if keep:
                    stay(narrator, gate, rules)
                narrator.step("Stop: SIGTERM lets sessions end, then everything is closed")
                code = gate.stop()
                narrator.promise(f"it stopped by itself, exit code {code}", kept=code == 0)
    except DemoFailed as err:
        terminal.note(f"gatekeeper demo: {err}")
        return CANNOT
    terminal.print()
    terminal.print("All as promised." if narrator.kept else "Something was not as promised: see above.")
    return FINE if narrator.kept else NO


def connect(narrator: Narrator, gate: Gate, backend: Backend) -> None:
    """Show the three verdicts from the outside, and that refusals cost the backend nothing."""
    narrator.step(f"Three connections to 127.0.0.1:{gate.port}")
    answer = gate.talk(FRIEND)
    narrator.promise(f'from {FRIEND}, allowed by rule "friends": {answer}', kept=answer.startswith("the backend"))
    for source, why in ((STRANGER, "denied by the default"), (NUISANCE, 'dropped by rule "nuisance"')):
        answer = gate.talk(source)
        narrator.promise(f"from {source}, {why}: {answer}", kept=answer in ("reset", "silence"))
    narrator.show("(past the first router a drop is silence: its reset is sent so that it dies there)")
    narrator.promise(f"the backend saw {backend.connections} of the 3", kept=backend.connections == 1)


def explain(narrator: Narrator, rules: Path, port: int) -> None:
    """Ask why, as a person would."""
    from gatekeeper.cli.explain import command as explain_command  # noqa: PLC0415 - only here

    narrator.step(f"Why? gatekeeper explain rules.yaml {STRANGER} {port}")
    answer = io.StringIO()
    terminal = Terminal(narrator.terminal.stdin, answer, narrator.terminal.stderr)
    code = explain_command.main([str(rules), STRANGER, str(port)], standalone_mode=False, obj=terminal)
    narrator.show(answer.getvalue().replace(f"{rules.parent}/", ""))
    narrator.promise(f"it says so with exit code {code} (0 would be: allowed)", kept=code == NO)


def audit(narrator: Narrator, gate: Gate) -> None:
    """Show the line of the audit log that each connection left."""
    from gatekeeper.cli.demo_parts import wait_until  # noqa: PLC0415

    narrator.step("The audit log, one JSON object a line")
    for kind, source in (("connection", FRIEND), ("refusal", STRANGER), ("refusal", NUISANCE)):
        wait_until(lambda: bool(gate.events(kind, src_ip=source)), f"the audit event of {source}")  # noqa: B023 - at once
        found = gate.events(kind, src_ip=source)
        narrator.show(found[0].line)
        narrator.promise(f"{len(found)} {kind} of {source}", kept=len(found) == 1)


def count(narrator: Narrator, gate: Gate) -> None:
    """Show the verdict counters and the status page."""
    narrator.step(f"Metrics for Prometheus: {gate.url}/metrics")
    values = [line.rsplit(" ", 1) for line in gate.get("/metrics").splitlines() if line.startswith("gatekeeper_connections_")]
    counted = sum(float(value) for _name, value in values)
    narrator.show("\n".join(f"{name} {value}" for name, value in values if float(value)))
    narrator.promise(f"{counted:g} connections counted, each under its rule", kept=counted == 3)
    page = gate.get("/")
    narrator.promise(f"and a status page for people: {gate.url}/ ({len(page)} bytes)", kept="hello" in page)


def reload(narrator: Narrator, gate: Gate, backend: Backend, change: Callable[[], object]) -> None:
    """Change a rule under the running gate."""
    from gatekeeper.cli.demo_parts import wait_until  # noqa: PLC0415

    narrator.step(f"Change a rule: {STRANGER} becomes a friend. kill -HUP")
    change()
    gate.hang_up()
    wait_until(lambda: bool(gate.events("reload")), "the reload")
    narrator.show(gate.events("reload")[0].line)
    before = backend.connections
    answer = gate.talk(STRANGER)
    narrator.promise(f"from {STRANGER}: {answer}", kept=answer.startswith("the backend") and backend.connections > before)


def stay(narrator: Narrator, gate: Gate, rules: Path) -> None:
    """Leave it running until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        narrator.step("Now you (Ctrl-C ends it)")
        narrator.show(
            f"nc 127.0.0.1 {gate.port}                     allowed\n"
            f"nc -s {NUISANCE} 127.0.0.1 {gate.port}        dropped\n"
            f"{gate.url}/              the status page\n"
            f"$EDITOR {rules}"
        )
        gate.wait()


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that nothing is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
