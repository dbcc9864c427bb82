"""The service works under the units' restrictions: what they forbid, it does not need."""

from __future__ import annotations

import contextlib
import grp
import os
import shutil
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.program import gatekeeper
from tests.support.backends import TcpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.plain_user import plain_user
from tests.support.wait import until

UNITS = Path(__file__).parents[2] / "systemd"
SANDBOX = Path(__file__).parent / "sandbox.py"
NOBODY = 65534
RULES = """\
control: {{group: {group}}}
listeners:
  - {{name: web, listen: "127.0.0.1:{port}", backend: "{backend}"}}
default: deny
rules:
  - {{name: friends, action: allow, from: [{friends}]}}
"""

pytestmark = [pytest.mark.needs_root, pytest.mark.needs("setpriv", "systemd-analyze")]


def free_low_port() -> int:
    """Return a port that only CAP_NET_BIND_SERVICE may open."""
    for port in range(600, 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port below 1024")


@pytest.mark.timeout(120)
def test_serves_reloads_and_stops_under_the_unit(folder: Path, run_gate: Callable[..., Gate]) -> None:
    """As an ordinary user with the unit's one capability and system call filter it does all that it has to do.

    It opens a port below 1024, serves, refuses, replaces a killed worker, reloads, answers operators, and stops.
    """
    home = folder / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    port, backend = free_low_port(), TcpBackend()
    capability = "-all,+net_bind_service"
    for needed in (SANDBOX, UNITS / "gatekeeper.service"):
        shutil.copy(needed, folder)  # the checkout may be root's alone
    user = plain_user(folder)
    prefix = [
        "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", f"--inh-caps={capability}",
        f"--ambient-caps={capability}", f"--bounding-set={capability}",
        user.python, str(folder / SANDBOX.name), str(folder / "gatekeeper.service"),
    ]  # fmt: skip

    def rules(friends: str) -> str:
        return RULES.format(port=port, backend=backend.address, friends=friends, group=grp.getgrgid(NOBODY).gr_name)

    gate = run_gate(rules("127.0.0.1"), workers=2, folder=home, prefix=prefix, python=user.python, env=user.env)
    sources = Sources()

    def is_allowed(source: str) -> bool:
        try:
            with sources.connect(source, "127.0.0.1", port) as client:
                return ask(client) == b"are you there?"
        except ConnectionError:
            return False

    assert is_allowed("127.0.0.1")
    assert not is_allowed("127.0.0.2")
    first, _second = gate.worker_pids()
    os.kill(first, signal.SIGKILL)
    until(lambda: len(gate.worker_pids()) == 2 and first not in gate.worker_pids(), "the worker is replaced")
    assert gate.reload(rules("127.0.0.1, 127.0.0.2"))["success"]
    assert is_allowed("127.0.0.2")
    assert gatekeeper("status", "--control", str(gate.control_path)).code == 0
    assert stat.S_IMODE(gate.control_path.stat().st_mode) == 0o660
    assert gate.stop() == 0
    backend.close()
