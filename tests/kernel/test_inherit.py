"""Sockets that were opened for us."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

import pytest

from gatekeeper.kernel import inherit
from tests.support.ports import free_port
from tests.support.process import Process
from tests.support.wait import until

ROOT = Path(__file__).parents[2]
REPORT = """
import os
from gatekeeper.kernel import inherit
found = inherit.take(os.environ)
print([item.describe() for item in found], [os.get_inheritable(item.sock.fileno()) for item in found])
print(sorted(name for name in os.environ if name.startswith("LISTEN")))
"""


@pytest.mark.needs("systemd-socket-activate")
@pytest.mark.parametrize("kind", ["web", "dns", "local"])
def test_a_real_manager_passes_sockets(folder: Path, kind: str) -> None:
    """A stream, datagram or unix socket of systemd-socket-activate arrives with its name, and is not passed on."""
    port, path = free_port(), str(folder / "gate.sock")
    cases: dict[str, tuple[list[str], tuple[str, int] | str, str]] = {
        "web": (["-l", f"127.0.0.1:{port}"], ("127.0.0.1", port), f"tcp 127.0.0.1:{port}"),
        "dns": (["-d", "-l", f"[::1]:{port}"], ("::1", port), f"udp [::1]:{port}"),
        "local": (["-l", path], path, f"tcp {path}"),
    }
    flags, address, protocol = cases[kind]
    family = {"web": socket.AF_INET, "dns": socket.AF_INET6, "local": socket.AF_UNIX}[kind]
    command = ["systemd-socket-activate", *flags, f"--fdname={kind}", f"-EPYTHONPATH={ROOT}", sys.executable, "-c", REPORT]
    with (
        Process(command, folder, kind) as manager,
        socket.socket(family, socket.SOCK_DGRAM if kind == "dns" else socket.SOCK_STREAM) as client,
    ):

        def activated() -> bool:
            with contextlib.suppress(OSError):  # not there yet, or connected already
                client.connect(address)
                client.send(b"wake up")
            return manager.exit_code() is not None

        until(activated, "the program is started and ends")
        assert manager.output().endswith(f"['{kind} ({protocol})'] [False]\n[]\n")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "one", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "-1", "LISTEN_PID": str(os.getpid())},
    ],
)
def test_what_is_not_ours_is_left_alone(environment: dict[str, str]) -> None:
    """Nothing is taken unless the variables name this process; they are removed in any case."""
    assert inherit.take(environment) == []
    assert environment == {}
