"""Readers that are slow to take what was sent before the end: they get all of it, or learn that they did not."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.endurance.streams.closing import Reading, read, send
from tests.support.clients import Sources
from tests.support.gate import Gate
from tests.support.namespace import Namespace
from tests.support.ports import free_port
from tests.support.wait import until

SIZE = 1 << 18  # all of it fits into what the kernel keeps for us
SLEEP_S = 8.0
# The kernel's patience with a socket that nobody owns any more is minutes; here it is to be seconds.
IMPATIENT = {"tcp_rto_max_ms": "1000", "tcp_orphan_retries": "1"}


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A network where the kernel soon gives up what nobody owns."""
    made = Namespace()

    def configure() -> None:
        for name, value in IMPATIENT.items():
            path = Path("/proc/sys/net/ipv4", name)
            if path.exists():  # the first one is new; without it the test shows less
                path.write_text(value)

    made.inside(configure)
    yield made
    made.close()


class Reader:
    """A session whose client sends 256 KiB and ends, to a backend that has a small buffer and does not read."""

    def __init__(self, namespace: Namespace, run_gate: Callable[..., Gate], keys: str = "") -> None:
        self.inside = namespace.inside
        port = free_port()
        self.server = self.inside(socket.create_server, ("127.0.0.1", 0))
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        backend = self.server.getsockname()[1]
        self.gate: Gate = self.inside(
            run_gate,
            f"listeners:\n  - {{name: door, listen: '127.0.0.1:{port}', backend: '127.0.0.1:{backend}'{keys}}}\ndefault: allow\n",
        )
        self.client = self.inside(Sources().connect, "127.0.0.1", "127.0.0.1", port)
        self.backend, _peer = self.server.accept()
        self.backend.settimeout(30)
        send(self.client, 1, SIZE)
        self.client.shutdown(socket.SHUT_WR)

    def sleep(self, seconds: float) -> None:
        """Do not read for so long."""
        began = time.monotonic()
        until(lambda: time.monotonic() - began > seconds, "time has passed", within_s=seconds + 30)

    def value(self, name: str, **labels: Any) -> float:
        """Return a metric of the gate."""
        found: float = self.inside(self.gate.scrape).value(name, **labels)
        return found

    def close(self) -> None:
        for sock in (self.client, self.backend, self.server):
            sock.close()


@pytest.mark.needs_root
def test_a_reader_may_sleep_when_both_sides_have_ended(namespace: Namespace, run_gate: Callable[..., Gate]) -> None:
    """The kernel would give up what we have written to it, and tell nobody; so we stay until it has arrived."""
    session = Reader(namespace, run_gate)
    session.backend.shutdown(socket.SHUT_WR)
    assert session.client.recv(1) == b""
    session.sleep(SLEEP_S)
    assert session.value("gatekeeper_sessions") == 1
    assert read(session.backend, 1) == Reading(SIZE, "end")
    until(lambda: session.value("gatekeeper_session_ends_total", end="finished") == 1, "the session has ended")
    session.close()


@pytest.mark.needs_root
def test_a_reader_may_sleep_longer_than_a_half_close_lasts(namespace: Namespace, run_gate: Callable[..., Gate]) -> None:
    """Bytes and an end that wait in the kernel keep the session alive, and so does their reader's answer afterwards."""
    session = Reader(namespace, run_gate, ", half_close_timeout: 1s")
    session.sleep(SLEEP_S / 2)
    assert read(session.backend, 1) == Reading(SIZE, "end")
    session.backend.sendall(b"thank you")
    session.backend.shutdown(socket.SHUT_WR)
    assert session.client.recv(100) == b"thank you"
    until(lambda: session.value("gatekeeper_session_ends_total", end="finished") == 1, "the session has ended")
    session.close()


@pytest.mark.needs_root
@pytest.mark.parametrize("ended", [False, True], ids=["open", "ended"])
def test_a_reader_that_never_wakes_is_given_up_with_a_reset(
    namespace: Namespace, run_gate: Callable[..., Gate], *, ended: bool
) -> None:
    """After ten half-close timeouts in which it took nothing it is reset: what it has is not to look complete."""
    session = Reader(namespace, run_gate, ", half_close_timeout: 500ms")
    if ended:
        session.backend.shutdown(socket.SHUT_WR)
    until(lambda: session.value("gatekeeper_session_ends_total", end="half_close_timeout") == 1, "it is given up")
    assert session.value("gatekeeper_session_duration_seconds_sum") >= 5
    seen = read(session.backend, 1)
    assert seen.end == "reset"
    assert seen.size < SIZE
    session.close()
