"""`gatekeeper run`: exit codes of a start that fails, and of a service that is told to stop."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.program import gatekeeper
from tests.support.gate import Gate

RULES = """\
listeners:
  - {{name: web, listen: "127.0.0.1:{port}", backend: "127.0.0.1:9"}}
default: deny
rules: []
"""


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run the service; it is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "gatekeeper", "run", *argv], capture_output=True, text=True, timeout=50
    )


def test_errors_in_the_file_are_1(folder: Path) -> None:
    """A file with errors: they are shown with file, line and column, and nothing is opened."""
    (folder / "rules.yaml").write_text("version: 1\ndefault: maybe\n")
    done = run(str(folder / "rules.yaml"))
    assert done.returncode == 1
    assert f"{folder}/rules.yaml:2:10: " in done.stderr


def test_a_file_that_cannot_be_read_is_3(folder: Path) -> None:
    """No such file: exit code 3, and the name is in the message."""
    done = run(str(folder / "missing.yaml"))
    assert done.returncode == 3
    assert "missing.yaml" in done.stderr


def test_a_port_that_is_taken_is_3_and_its_owner_is_named(folder: Path) -> None:
    """A listener's address that somebody else holds: exit code 3, address and owner in the message."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (folder / "rules.yaml").write_text("version: 1\n" + RULES.format(port=port))
        done = run(str(folder / "rules.yaml"))
    assert done.returncode == 3
    assert f"127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize(
    "argv", [("-",), ("x", "--workers", "0"), ("x", "--workers", "many"), ("x", "--drain-timeout", "soon"), ()]
)
def test_bad_usage_is_2(argv: tuple[str, ...]) -> None:
    """Standard input cannot be read again, and options must make sense."""
    assert gatekeeper("run", *argv).code == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_exits_with_0(run_gate: Callable[..., Gate], number: signal.Signals) -> None:
    """SIGTERM and SIGINT both end the service with exit code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gate = run_gate(RULES.format(port=port))
    gate.signal(number)
    assert gate.wait() == 0
