"""Every way to end a session arrives at the other side as what it was, after everything that came before it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.endurance.streams.closing import CASES, Case, Sessions, backend_socket, run_all
from tests.support.gate import Gate
from tests.support.ports import free_port


@pytest.fixture(scope="module", params=["tcp", "unix"])
def played(request: pytest.FixtureRequest) -> Iterator[dict[Case, str | None]]:
    """What became of all cases, played at once through one gate."""
    folder = Path(tempfile.mkdtemp(prefix="gk-"))
    folder.chmod(0o755)
    listening = backend_socket(folder / "backend.sock" if request.param == "unix" else None)
    sessions = Sessions(listening)
    port, name = free_port(), listening.getsockname()
    backend = f"unix:{name}" if request.param == "unix" else f"127.0.0.1:{name[1]}"
    rules = f"listeners:\n  - {{name: door, listen: '127.0.0.1:{port}', backend: '{backend}'}}\ndefault: allow\n"
    with Gate(folder, rules) as gate:
        gate.wait_ready()
        yield run_all(port, sessions)
    sessions.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_end_arrives_as_an_end_and_a_reset_as_a_reset(played: dict[Case, str | None], case: Case) -> None:
    """What had been received is delivered, whoever closed first and however late the other reads; then comes what came."""
    assert played[case] is None
