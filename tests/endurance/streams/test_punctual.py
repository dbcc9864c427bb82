"""Time-outs come when they were asked for, within a tenth; whoever cannot be served learns it at once.

These are promises and not figures of speed, so they are asserted; but as the machine may be busy with other work, what
holds for most of a few tries is enough. Nothing ever comes early.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.backends import Silent, TcpBackend, UdpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.ports import free_port
from tests.support.wait import until

SETTING_S = 2.0
LATE = 0.1  # of the setting
EARLY_S = 0.005  # the clocks of two processes, and a record that is rounded
TRIES = 9
APART_S = 0.11  # so that the tries meet the worker's clock at different moments
REFUSED_S, BACK_S = 0.05, 0.1


def policy(port: int, backend: str, keys: str) -> str:
    """Return a policy that lets everybody in at one listener."""
    return f"listeners:\n  - {{name: door, listen: '127.0.0.1:{port}', backend: '{backend}', {keys}}}\ndefault: allow\n"


def punctual(waited_s: list[float], setting_s: float = SETTING_S) -> None:
    """Nothing came early, and most of it not late."""
    print("waited", *(f"{each:.3f}" for each in sorted(waited_s)))
    assert len(waited_s) == TRIES
    assert min(waited_s) >= setting_s - EARLY_S
    assert statistics.median(waited_s) <= setting_s * (1 + LATE)


def all_at_once(tries: Callable[[int], float]) -> list[float]:
    """Return what each try returned, all begun `APART_S` after one another."""
    waited_s: list[float] = []

    def run(number: int) -> None:
        began = time.monotonic()
        until(lambda: time.monotonic() - began >= number * APART_S, "it is this one's turn")
        waited_s.append(tries(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(TRIES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return waited_s


def until_reset(client: socket.socket, since_s: float) -> float:
    """Return how long it took from ``since_s`` on, in seconds, until the client was reset."""
    with client, pytest.raises(ConnectionResetError):
        client.recv(1)
    return time.monotonic() - since_s


def test_a_dial_takes_as_long_as_it_may(run_gate: Callable[..., Gate]) -> None:
    """A backend that does not answer costs `connect_timeout`."""
    port = free_port()
    with Silent() as hole:
        run_gate(policy(port, hole.address, f"connect_timeout: {SETTING_S:g}s"))

        def dial(number: int) -> float:
            began = time.monotonic()
            client = Sources().connect(f"127.0.0.{number + 1}", "127.0.0.1", port)
            return until_reset(client, began)

        punctual(all_at_once(dial))


def test_an_idle_session_lasts_as_long_as_it_may(run_gate: Callable[..., Gate]) -> None:
    """A session without traffic ends `idle_timeout` after its last byte, even when it has lived for longer than that."""
    port = free_port()
    with TcpBackend() as backend:
        run_gate(policy(port, backend.address, f"idle_timeout: {SETTING_S:g}s"))

        def idle(number: int) -> float:
            client = Sources().connect(f"127.0.0.{number + 1}", "127.0.0.1", port)
            began = time.monotonic()
            while time.monotonic() - began < SETTING_S:
                since_s = time.monotonic()
                assert ask(client)
                until(lambda since_s=since_s: time.monotonic() - since_s > 0.2, "it is time to speak")  # type: ignore[misc]
            last = time.monotonic()
            assert ask(client)
            return until_reset(client, last)

        punctual(all_at_once(idle))


def test_a_half_closed_session_lasts_as_long_as_it_may(run_gate: Callable[..., Gate]) -> None:
    """When one side has ended and the other says nothing, the session ends after `half_close_timeout`."""
    port = free_port()
    leave = threading.Event()

    def say_nothing(connection: socket.socket) -> None:
        assert connection.recv(1) == b""
        leave.wait(30)

    with TcpBackend(say_nothing) as backend:
        run_gate(policy(port, backend.address, f"half_close_timeout: {SETTING_S:g}s, idle_timeout: 1h"))

        def end(number: int) -> float:
            client = Sources().connect(f"127.0.0.{number + 1}", "127.0.0.1", port)
            began = time.monotonic()
            client.shutdown(socket.SHUT_WR)
            return until_reset(client, began)

        try:
            punctual(all_at_once(end))
        finally:
            leave.set()


def test_a_flow_lasts_as_long_as_it_may(run_gate: Callable[..., Gate]) -> None:
    """A UDP session ends `idle_timeout` after its last datagram."""
    port = free_port()
    with UdpBackend() as backend:
        gate = run_gate(policy(port, backend.address, f"protocol: udp, idle_timeout: {SETTING_S:g}s"))

        def talk(number: int) -> float:
            with Sources().make(f"127.0.0.{number + 1}", socket.SOCK_DGRAM) as client:
                client.connect(("127.0.0.1", port))
                client.send(b"?")
                assert client.recv(9) == b"?"
                return 0.0

        assert len(all_at_once(talk)) == TRIES
        punctual([event["gatekeeper"]["duration_s"] for event in gate.wait_for_audit(TRIES, "connection")])


@pytest.fixture
def place(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, Callable[[], socket.socket]]]:
    """A backend's address where nobody listens yet, and how to listen there."""
    if request.param == "unix":
        path = folder / "backend.sock"

        def listen() -> socket.socket:
            path.unlink(missing_ok=True)
            made = socket.socket(socket.AF_UNIX)
            made.bind(str(path))
            path.chmod(0o777)
            made.listen(1000)
            return made

        yield f"unix:{path}", listen
    else:
        port = free_port()
        yield f"127.0.0.1:{port}", lambda: socket.create_server(("127.0.0.1", port), backlog=1000)


@pytest.mark.parametrize("place", ["tcp", "unix"], indirect=True)
def test_an_absent_backend_is_reported_at_once_and_found_at_once(
    run_gate: Callable[..., Gate], place: tuple[str, Callable[[], socket.socket]]
) -> None:
    """Whoever comes meanwhile is reset within 50 ms; the first is served within 100 ms of the backend's return."""
    address, listen = place
    port = free_port()
    run_gate(policy(port, address, "connect_timeout: 5s"))
    refused_s, back_s = [], []
    for number in range(TRIES):
        for _ in range(5):
            began = time.monotonic()
            assert Sources().is_refused(f"127.0.0.{number + 1}", "127.0.0.1", port)
            refused_s.append(time.monotonic() - began)
        with contextlib.ExitStack() as ends:
            knocking = threading.Event()
            served: list[float] = []

            def knock(knocking: threading.Event = knocking, served: list[float] = served) -> None:
                while not served:
                    with contextlib.suppress(OSError), Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
                        knocking.set()
                        client.sendall(b"?")
                        if client.recv(1) == b"!":
                            served.append(time.monotonic())

            thread = threading.Thread(target=knock)
            thread.start()
            ends.callback(thread.join, 30)
            assert knocking.wait(30)
            began = time.monotonic()
            backend = ends.enter_context(listen())
            backend.settimeout(30)
            client, _peer = backend.accept()
            with client:
                client.sendall(b"!")
                until(lambda served=served: served, "somebody is served")  # type: ignore[misc]
            back_s.append(served[0] - began)
    print(f"refused after {statistics.median(refused_s) * 1e3:.2f} ms (at most {max(refused_s) * 1e3:.1f}), "
          f"served {statistics.median(back_s) * 1e3:.1f} ms after it listens (at most {max(back_s) * 1e3:.1f})")  # fmt: skip
    assert statistics.median(refused_s) < REFUSED_S
    assert statistics.median(back_s) < BACK_S
