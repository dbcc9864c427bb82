"""A worker that cannot be started: its sources are served by a sibling until it can."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.supervisor.service import Service
from tests.support import metrics
from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask
from tests.support.ports import free_port
from tests.support.process import children, command_line, is_running
from tests.support.wait import until

SOURCES = [f"127.0.5.{number}" for number in range(1, 25)]  # with two workers, all of them at one: 1 in 16 million
WORKER = str(Path(__file__).parent / "worker_or_not.py")


class Broken(NamedTuple):
    """A service one of whose two workers is dead and cannot be started while ``obstacle`` exists."""

    service: Service
    port: int
    obstacle: Path
    metrics_port: int
    text: str


@pytest.fixture
def backend() -> Iterator[TcpBackend]:
    """An echo service."""
    with TcpBackend() as made:
        yield made


@pytest.fixture
def datagrams() -> Iterator[UdpBackend]:
    """An echo service for datagrams."""
    with UdpBackend() as made:
        yield made


@pytest.fixture
def broken(folder: Path, backend: TcpBackend, datagrams: UdpBackend) -> Iterator[Broken]:
    """Start two workers, let one die, and keep its successors from starting."""
    port, metrics_port, obstacle = free_port(), free_port(), folder / "obstacle"
    text = (
        f'listeners:\n  - {{name: web, listen: "127.0.0.1:{port}", backend: "{backend.address}"}}\n'
        f'  - {{name: dns, protocol: udp, listen: "127.0.0.1:{port}", backend: "{datagrams.address}"}}\n'
    )
    command = [sys.executable, WORKER, str(obstacle)]
    service = Service(folder, text + "default: allow\n", workers=2, worker=command, metrics=f"{{listen: 127.0.0.1:{metrics_port}}}")
    try:
        service.ready()
        obstacle.touch()
        os.kill(workers(service)[0], signal.SIGKILL)
        service.says(r"worker 0 \(pid \d+\) exited with 7; starting another in 0.2 s")
        yield Broken(service, port, obstacle, metrics_port, text)
    finally:
        service.stop()


def workers(service: Service) -> list[int]:
    """Return the pids of the living workers, in the order they were started."""
    return [pid for pid in children(service.pid) if is_running(pid) and WORKER in command_line(pid)]


def everybody_is_served(port: int, within_s: float) -> None:
    """Connect from every source, over TCP and UDP, and get an echo."""
    for source in SOURCES:
        with Sources().make(source) as client:
            client.settimeout(within_s)
            client.connect(("127.0.0.1", port))
            assert ask(client) == b"are you there?", source
        with Sources().make(source, socket.SOCK_DGRAM) as client:
            client.settimeout(within_s)
            client.sendto(b"hello", ("127.0.0.1", port))
            assert client.recv(100) == b"hello", source


def test_a_sibling_serves_until_the_worker_is_back(broken: Broken) -> None:
    """Nobody is refused while a worker cannot be started, also at listeners that a reload adds; then it has its own again."""
    service = broken.service
    everybody_is_served(broken.port, 10)
    service.says("worker 1 serves the sources of worker 0 meanwhile")

    added = free_port()
    service.reload(broken.text + f'  - {{name: more, listen: "127.0.0.1:{added}", backend: "127.0.0.1:1"}}\ndefault: allow\n')
    service.says("reloaded: serving web, dns, more")
    for source in SOURCES:
        assert Sources().is_refused(source, "127.0.0.1", added)  # its backend is down: a worker answered
    everybody_is_served(broken.port, 10)
    service.reload(broken.text + "default: allow\n")
    service.says("reloaded: serving web, dns with")
    with Sources().make(SOURCES[0]) as client, pytest.raises(ConnectionRefusedError):
        client.connect(("127.0.0.1", added))

    broken.obstacle.unlink()
    service.says("worker 0 serves its sources again")
    assert len(workers(service)) == 2
    everybody_is_served(broken.port, 10)
    # Now each serves its own, or the loss of one would still be felt at once by the sources of both.
    counted = metrics.scrape(broken.metrics_port)
    assert counted.value("gatekeeper_connections_total", listener="web", action="allow") == 3 * len(SOURCES)
    assert counted.value("gatekeeper_worker_restarts_total") >= 3


def test_the_sibling_dies_too(broken: Broken) -> None:
    """When the one that stands in dies and comes back, it stands in again."""
    service = broken.service
    service.says("worker 1 serves the sources of worker 0 meanwhile")
    living = workers(service)[0]
    broken.obstacle.unlink()
    os.kill(living, signal.SIGKILL)
    everybody_is_served(broken.port, 20)
    until(lambda: len(workers(service)) == 2, "both are back")


def test_a_session_outlives_the_return_of_the_worker(broken: Broken) -> None:
    """Whoever was let in by the stand-in stays with it when the worker is back."""
    service = broken.service
    service.says("worker 1 serves the sources of worker 0 meanwhile")
    sessions = [Sources().connect(source, "127.0.0.1", broken.port) for source in SOURCES]
    for session in sessions:
        assert ask(session) == b"are you there?"
    broken.obstacle.unlink()
    service.says("worker 0 serves its sources again")
    for session in sessions:
        assert ask(session, b"and now?") == b"and now?"
        session.close()
