"""What a stranger can do who has taken over a worker or the observer: tried from inside, with everything that process was ever sent."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.backends import TcpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import PYTHON_PATH, ROOT
from tests.support.plain_user import plain_user
from tests.support.ports import free_port
from tests.support.process import Process
from tests.support.wait import until

GUARDED_BY_LANDLOCK = {"write the rules", "replace the rules", "make a file", "execute"}  # and signals, since version 6
NAMESPACE = "as root of a namespace: "


def attacked(
    folder: Path, role: str, python: str = sys.executable, prefix: tuple[str, ...] = (), env: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Run a service with this process taken over, see that it works all the same, and return what became of the attacks."""
    port, report, rules = free_port(), folder / f"report.{role}", folder / "rules.yaml"
    scripts = [Path(shutil.copy(ROOT / path, folder)) for path in ("tests/supervisor/serve.py", "tests/endurance/hostile/taken_over.py")]
    options = {"workers": 2, role: [python, str(scripts[1]), role, str(folder / "report")]}
    with TcpBackend() as backend:
        listener = f'{{name: web, listen: ["127.0.0.1:{port}", "unix:door"], backend: "{backend.address}"}}'
        rules.write_text(f"version: 1\naudit: off\nlisteners:\n  - {listener}\ndefault: allow\n")
        rules.chmod(0o600)
        shutil.chown(rules, folder.owner())
        command = [python, str(scripts[0]), str(rules), json.dumps(options)]
        with Process(command, folder, "service", env=env or {"PYTHONPATH": PYTHON_PATH}, prefix=prefix) as service:

            def over() -> bool:
                service.assert_alive()
                return report.exists() and report.stat().st_size > 0

            until(over, "the attacks are over", within_s=30)
            for number in range(1, 9):
                with Sources().connect(f"127.0.0.{number}", "127.0.0.1", port) as client:
                    assert ask(client) == b"are you there?"
        assert "Traceback" not in service.output(), service.output()
    said: dict[str, str] = json.loads(report.read_text())
    return said


def judge(said: dict[str, str], *, reads_own_files: bool) -> None:
    """Nothing may have worked that is promised not to."""
    version = int(said.pop("landlock"))
    assert said.pop("capabilities") == ""
    worked = {attack.removeprefix(NAMESPACE) for attack, answer in said.items() if not answer}
    if reads_own_files:  # the service is nobody special, and the rules are its own
        worked -= {"read the rules"}
    if version < 1:
        worked -= GUARDED_BY_LANDLOCK
    if version < 6:
        worked = {attack for attack in worked if not attack.startswith("signal ")}
    assert worked == set()
    assert {"map snapshot", "map bindings", "map counters0"} <= said.keys()
    assert sum(attack.startswith("attach to ") for attack in said) >= 3, "the supervisor and two other children"


@pytest.mark.needs_root
@pytest.mark.parametrize("role", ["worker", "observer"])
def test_whoever_takes_over_a_process_reaches_no_other(folder: Path, role: str) -> None:
    """No capability, nobody's memory, descriptors, signals or files, and not a byte of a snapshot or of others' counters."""
    judge(attacked(folder, role), reads_own_files=False)


@pytest.mark.needs_root
@pytest.mark.parametrize("role", ["worker", "observer"])
def test_it_reaches_no_other_either_when_nobody_is_root(folder: Path, role: str) -> None:
    """A service that an ordinary user runs keeps the same promises among processes of one user, who owns the rules as well."""
    user = plain_user(folder)
    user.own(folder)
    judge(attacked(folder, role, user.python, user.prefix, user.env), reads_own_files=True)
