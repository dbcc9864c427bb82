"""Starting: what cannot be opened or read is named, and nothing is left behind."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.backends import TcpBackend
from tests.support.clients import Sources, ask, nobody_listens
from tests.support.gate import ROOT, Gate
from tests.support.ports import free_port
from tests.support.wait import until


def open_policy(port: int, backend: str) -> str:
    """Return a policy that lets everybody in at one listener."""
    return f"listeners:\n  - {{name: web, listen: '127.0.0.1:{port}', backend: '{backend}'}}\ndefault: allow\n"


def start(rules: Path) -> subprocess.CompletedProcess[str]:
    """Start a gate that is expected to end at once."""
    return subprocess.run(
        [sys.executable, "-m", "gatekeeper", "run", str(rules)], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )


def test_a_second_gate_on_the_same_address_is_an_error_that_names_the_owner(run_gate: Callable[..., Gate], folder: Path) -> None:
    """Two gates never share a port: the second exits with 3 and says who has it, and the first does not notice."""
    port = free_port()
    with TcpBackend() as backend:
        gate = run_gate(open_policy(port, backend.address), workers=2)
        second = folder / "second.yaml"
        second.write_text(f"version: 1\nworkers: 2\nmetrics: off\naudit: off\n{open_policy(port, backend.address)}")
        done = start(second)
        assert done.returncode == 3, done
        assert f"127.0.0.1:{port}" in done.stderr
        # Workers may not be looked into by their own user either; without root the owner is known by the user's name.
        assert (str(gate.pid) if os.geteuid() == 0 else getpass.getuser()) in done.stderr
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
            assert ask(client) == b"are you there?"


@pytest.mark.parametrize("what", ["tcp", "udp", "metrics", "address", "folder", "audit"])
def test_what_cannot_be_opened_is_named(folder: Path, what: str) -> None:
    """A taken port, an address that is not ours, a missing folder: exit code 3 and a message that names it."""
    with ExitStack() as ends:
        kind = socket.SOCK_DGRAM if what == "udp" else socket.SOCK_STREAM
        taken = ends.enter_context(socket.socket(socket.AF_INET, kind))
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        taken_port, free = taken.getsockname()[1], free_port()
        listen = {
            "tcp": f"127.0.0.1:{taken_port}",
            "udp": f"127.0.0.1:{taken_port}",
            "address": f"192.0.2.77:{free}",
            "folder": f"unix:{folder}/missing/door.sock",
        }.get(what, f"127.0.0.1:{free}")
        metrics = f"{{listen: 127.0.0.1:{taken_port}}}" if what == "metrics" else "off"
        audit = f"{folder}/missing/audit.log" if what == "audit" else "off"
        rules = folder / "rules.yaml"
        rules.write_text(
            f"version: 1\nworkers: 1\nmetrics: {metrics}\naudit: {audit}\ndefault: deny\nlisteners:\n"
            f"  - {{name: web, protocol: {'udp' if what == 'udp' else 'tcp'}, listen: '{listen}', backend: '127.0.0.1:9'}}\n"
        )
        done = start(rules)
    assert done.returncode == 3, done
    named = {"metrics": f"127.0.0.1:{taken_port}", "audit": audit}.get(what, listen)
    assert named in done.stderr
    if what in {"tcp", "udp", "metrics"}:
        assert str(os.getpid()) in done.stderr  # whose it is
    assert "Traceback" not in done.stderr


def test_a_gate_that_cannot_start_says_so_and_leaves_nothing(folder: Path) -> None:
    """A broken rule file at start is exit code 1 with its position; a missing one is exit code 3."""
    broken = folder / "broken.yaml"
    broken.write_text("version: 1\nlisteners: []\ndefault: perhaps\n")
    for path, code, told in ((broken, 1, f"{broken}:3:10"), (folder / "missing.yaml", 3, "missing.yaml")):
        done = start(path)
        assert done.returncode == code, done
        assert told in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_a_stop_before_it_serves(folder: Path) -> None:
    """SIGTERM while it is still starting ends it in order, with nothing left running."""
    with TcpBackend() as backend:
        port = free_port()
        for number in range(3):
            home = folder / str(number)
            home.mkdir()
            gate = Gate(home, open_policy(port, backend.address), workers=2)
            try:
                until(lambda gate=gate: installs_handlers(gate.pid), "it handles signals")  # type: ignore[misc]
                gate.signal(signal.SIGTERM)
                assert gate.wait() == 0, gate.output()
            finally:
                gate.stop()
            assert nobody_listens(port)


def installs_handlers(pid: int) -> bool:
    """Whether a process catches SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGTERM - 1))
