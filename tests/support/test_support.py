"""What the tests themselves rely on: promises about skips, ports, started programs, the remote network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.backends import Silent, TcpBackend, UdpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import PYTHON_PATH, ROOT
from tests.support.network import RemoteNetwork
from tests.support.ports import free_port, free_ports
from tests.support.process import Process, ProcessEnded, is_running
from tests.support.wait import until

SKIPPING = """
import pytest

def test_promised():
    pytest.skip("no such program")

@pytest.mark.may_skip
def test_may_skip():
    pytest.skip("rare hardware")

@pytest.mark.needs("no-such-program-at-all")
def test_needs():
    pass

@pytest.mark.xfail(strict=True)
def test_known():
    assert False
"""


@pytest.mark.parametrize(("promised", "code", "outcome"), [("0", 0, "3 skipped, 1 xfailed"), ("1", 1, "1 failed, 1 skipped, 1 xfailed, 1 error")])
def test_a_promised_test_must_not_be_skipped(folder: Path, promised: str, code: int, outcome: str) -> None:
    """With GATEKEEPER_PROMISED=1 a skip is a failure, unless the test may skip; without it a skip is a skip."""
    (folder / "test_skipping.py").write_text(SKIPPING)
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder)],
        env={**os.environ, "GATEKEEPER_PROMISED": promised, "PYTHONPATH": PYTHON_PATH},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert outcome in done.stdout
    assert "no-such-program-at-all is not installed" in done.stdout


def test_ports_are_free_and_differ() -> None:
    """Ports given out can be bound at once, and neighbours really are neighbours."""
    ports = [free_port() for _ in range(20)]
    assert len(set(ports)) == 20
    first = free_ports(5)
    for port in [*ports, *range(first, first + 5)]:
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_a_program_that_ends_is_reported_at_once_with_its_output(folder: Path) -> None:
    """Waiting for a port of a program that has failed shows what it printed, instead of waiting on."""
    with (
        Process([sys.executable, "-c", "print('no luck'); raise SystemExit(5)"], folder, "luckless") as process,
        pytest.raises(ProcessEnded, match=r"(?s)exited with 5.*no luck"),
    ):
        process.wait_for_port(free_port())


def test_stopping_lets_a_program_end_in_order(folder: Path) -> None:
    """Stopping sends SIGTERM, waits, and returns the exit code; the process is gone then."""
    text = "import signal; signal.signal(signal.SIGTERM, lambda *_: exit(7)); print('up', flush=True); signal.pause()"
    process = Process([sys.executable, "-c", text], folder, "orderly")
    until(lambda: "up" in process.output(), "it runs")
    assert process.stop() == 7
    assert not is_running(process.pid)


@pytest.mark.needs("setpriv")
def test_a_program_ends_with_the_test_run_that_started_it(folder: Path) -> None:
    """When the test runner itself is killed, what it had started does not stay behind."""
    text = (
        "import os, signal, sys, pathlib; from tests.support.process import Process; from tests.support.wait import until; "
        "child = Process(['sleep', '60'], pathlib.Path(sys.argv[1]), 'sleeper'); "
        "pathlib.Path(sys.argv[1], 'pid').write_text(str(child.pid)); "
        "until(lambda: pathlib.Path(f'/proc/{child.pid}/comm').read_text() == 'sleep\\n', 'it sleeps'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    runner = [sys.executable, "-c", text, str(folder)]
    done = subprocess.run(runner, env={**os.environ, "PYTHONPATH": PYTHON_PATH}, cwd=ROOT, timeout=30, check=False)
    assert done.returncode == -9
    pid = int((folder / "pid").read_text())
    until(lambda: not is_running(pid), "the sleeper is gone")


@pytest.mark.needs_root
@pytest.mark.needs("ip")
def test_the_remote_network_reaches_us_from_all_its_sources(remote: RemoteNetwork) -> None:
    """IPv4 and IPv6 sources, the first and the last, reach services of this host over TCP and UDP."""
    sources = Sources(remote)
    for host, ours in ((remote.gate_v4, remote.sources_v4), (remote.gate_v6, remote.sources_v6)):
        with TcpBackend(host=host) as tcp, UdpBackend(host=host) as udp:
            for source in (ours[0], ours[-1]):
                with sources.connect(source, host, tcp.port) as stream, sources.make(source, socket.SOCK_DGRAM) as flow:
                    assert stream.getsockname()[0] == source
                    flow.connect((host, udp.port))
                    assert ask(stream) == ask(flow) == b"are you there?"
            assert (tcp.connections, udp.datagrams) == (2, 2)


def test_a_black_hole_answers_no_syn() -> None:
    """Nothing completes a handshake there."""
    with Silent() as hole, socket.socket() as client:
        host, port = hole.address.split(":")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.connect((host, int(port)))
