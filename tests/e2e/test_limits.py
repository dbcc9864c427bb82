"""What happens when something takes too long or runs out."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import need
from tests.support.backends import Silent, TcpBackend, UdpBackend, read_to_end
from tests.support.clients import Sources, ask, close_all, send_and_end
from tests.support.gate import Gate
from tests.support.ports import free_port
from tests.support.wait import until


def open_policy(port: int, backend: str, more: str) -> str:
    """Return a policy that lets everybody in at one listener with further keys."""
    return f"listeners:\n  - {{name: door, listen: '127.0.0.1:{port}', backend: '{backend}', {more}}}\ndefault: allow\n"


def test_an_idle_session_ends_after_the_idle_timeout(run_gate: Callable[..., Gate]) -> None:
    """Both sides of a session in which nothing moves are reset; one that talks stays."""
    port = free_port()
    with TcpBackend() as backend:
        gate = run_gate(open_policy(port, backend.address, "idle_timeout: 1s"))
        sources = Sources()
        with sources.connect("127.0.0.1", "127.0.0.1", port) as idle, sources.connect("127.0.0.2", "127.0.0.1", port) as busy:
            assert ask(idle) == b"are you there?"

            def idle_ended() -> bool:
                assert ask(busy) == b"are you there?"
                return any(event["gatekeeper"]["end"] == "idle_timeout" for event in gate.audit("connection"))

            until(idle_ended, "the idle session is ended")
            with pytest.raises(ConnectionResetError):
                idle.recv(1)
            assert ask(busy) == b"are you there?"
            gate.wait_for_value(1, "gatekeeper_sessions", listener="door")


def test_a_half_closed_session_has_its_own_idle_timeout(run_gate: Callable[..., Gate]) -> None:
    """When one side has ended and the other stays silent, the session ends after half_close_timeout."""
    port, over = free_port(), threading.Event()

    def say_nothing(connection: socket.socket) -> None:
        read_to_end(connection)
        over.wait(20)

    with TcpBackend(say_nothing) as backend:
        gate = run_gate(open_policy(port, backend.address, "half_close_timeout: 1s"))
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
            client.sendall(b"that is all")
            client.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        over.set()
        (event,) = gate.wait_for_audit(1, "connection")
        assert event["gatekeeper"]["end"] == "half_close_timeout"
        assert event["gatekeeper"]["bytes_in"] == len(b"that is all")


@pytest.mark.parametrize("client_first", [False, True], ids=["silent client", "client speaks"])
def test_a_backend_that_does_not_answer_is_given_up(run_gate: Callable[..., Gate], client_first: bool) -> None:
    """A dial into a black hole ends after connect_timeout with a reset, counted as a timeout."""
    port = free_port()
    with Silent() as nowhere:
        gate = run_gate(open_policy(port, nowhere.address, "connect_timeout: 1s"))
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
            if client_first:
                client.sendall(b"hello?")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        gate.wait_for_value(1, "gatekeeper_backend_failures_total", listener="door", cause="timeout")
        (event,) = gate.wait_for_audit(1, "connection")
        assert event["gatekeeper"]["end"] == "backend_failed"
        assert gate.scrape().value("gatekeeper_connections_total", action="allow") == 1


def test_what_was_said_during_a_slow_dial_arrives(run_gate: Callable[..., Gate]) -> None:
    """A client that has sent 2 MB and its end before the backend answered the dial loses nothing."""
    port = free_port()
    data = random.Random(1).randbytes(2_000_000)
    with Silent() as backend:
        run_gate(open_policy(port, backend.address, "connect_timeout: 30s"))
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
            sender = threading.Thread(target=send_and_end, args=(client, data))
            sender.start()
            with backend.wake() as connection:
                assert read_to_end(connection) == data
                connection.sendall(b"got it")
            sender.join()
            assert read_to_end(client) == b"got it"


def test_a_busy_unix_backend_is_waited_for(run_gate: Callable[..., Gate], folder: Path) -> None:
    """A unix backend whose queue is full for a moment is no failure, as it is none over TCP."""
    port, path = free_port(), folder / "busy.sock"
    with socket.socket(socket.AF_UNIX) as backend, ExitStack() as ends:
        backend.bind(str(path))
        path.chmod(0o777)
        backend.listen(1)
        backend.settimeout(10)
        gate = run_gate(open_policy(port, f"unix:{path}", "connect_timeout: 5s"))
        clients = [ends.enter_context(Sources().connect("127.0.0.1", "127.0.0.1", port)) for _ in range(20)]
        gate.wait_for_value(20, "gatekeeper_connections_total", action="allow")
        for _ in clients:
            connection, _peer = backend.accept()
            with connection:
                connection.sendall(b"at last")
        for client in clients:
            assert client.recv(100) == b"at last"


@pytest.mark.parametrize("state", ["idle", "half closed", "reader pauses", "dialling"])
def test_waiting_costs_no_cpu(run_gate: Callable[..., Gate], state: str) -> None:
    """Whatever a session waits for, the worker sleeps: it uses less than a fifth of a second of CPU in one second."""
    port = free_port()
    with ExitStack() as ends:
        if state == "dialling":
            address = ends.enter_context(Silent()).address
        else:
            server = ends.enter_context(socket.create_server(("127.0.0.1", 0)))
            server.settimeout(10)
            address = f"127.0.0.1:{server.getsockname()[1]}"
        gate = run_gate(open_policy(port, address, "connect_timeout: 20s"))
        for number in range(5):
            client = ends.enter_context(Sources().connect("127.0.0.1", "127.0.0.1", port))
            if state == "dialling":
                client.sendall(b"hello?" * (number % 2))
                continue
            backend = ends.enter_context(server.accept()[0])
            first, second = (client, backend) if number % 2 else (backend, client)
            if state == "half closed":
                first.shutdown(socket.SHUT_WR)
                assert second.recv(1) == b""
            elif state == "reader pauses":
                fill(first)
        (worker,) = gate.worker_pids()
        gate.wait_for_value(5, "gatekeeper_connections_total")
        start, used = time.monotonic(), cpu_s(worker)
        until(lambda: time.monotonic() - start > 1, "a second has passed", within_s=5)
        assert cpu_s(worker) - used < 0.2


def fill(connection: socket.socket) -> None:
    """Send until nothing more is taken for a moment."""
    connection.settimeout(0.3)
    try:
        while True:
            connection.send(bytes(1 << 16))
    except TimeoutError:
        pass


def cpu_s(pid: int) -> float:
    """Return the CPU time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_backend_that_is_down_is_a_reset_and_comes_back(run_gate: Callable[..., Gate]) -> None:
    """While nobody listens behind, clients are reset and the cause is counted; the first after it listens is served."""
    port, behind = free_port(), free_port()
    gate = run_gate(open_policy(port, f"127.0.0.1:{behind}", "connect_timeout: 1s"))
    for _ in range(3):
        assert Sources().is_refused("127.0.0.1", "127.0.0.1", port)
    gate.wait_for_value(3, "gatekeeper_backend_failures_total", cause="refused")
    with socket.create_server(("127.0.0.1", behind)) as server, Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
        server.settimeout(10)
        accepted, _peer = server.accept()
        with accepted:
            accepted.sendall(b"back again")
            assert client.recv(100) == b"back again"


def test_a_unix_backend_that_is_missing_is_counted(run_gate: Callable[..., Gate]) -> None:
    """A backend socket that does not exist resets the client and is its own cause."""
    port = free_port()
    gate = run_gate(open_policy(port, "unix:/nonexistent/backend.sock", "connect_timeout: 1s"))
    assert Sources().is_refused("127.0.0.1", "127.0.0.1", port)
    gate.wait_for_value(1, "gatekeeper_backend_failures_total", cause="missing")


@pytest.mark.parametrize("workers", [1, 2])
def test_max_sessions_over_all_workers(run_gate: Callable[..., Gate], workers: int) -> None:
    """A listener's max_sessions refuses whoever comes on top, and lets in again once one has left."""
    port, limit = free_port(), 5
    with TcpBackend() as backend, ExitStack() as ends:
        gate = run_gate(open_policy(port, backend.address, f"max_sessions: {limit}"), workers=workers)
        clients = []
        for number in range(limit):
            client = Sources().connect(f"127.0.{number}.1", "127.0.0.1", port)
            ends.callback(client.close)
            assert ask(client) == b"are you there?"
            clients.append(client)
        for number in range(10):
            assert Sources().is_refused(f"127.1.{number}.1", "127.0.0.1", port)
        assert backend.connections == limit
        assert gate.scrape().value("gatekeeper_connections_total", action="deny", rule="", reason="max_sessions") == 10
        clients[0].close()
        gate.wait_for_value(limit - 1, "gatekeeper_sessions", listener="door")
        with Sources().connect("127.2.0.1", "127.0.0.1", port) as again:
            assert ask(again) == b"are you there?"


@pytest.mark.timeout(120)
def test_out_of_descriptors_the_live_go_on_and_the_others_wait(run_gate: Callable[..., Gate]) -> None:
    """With 64 descriptors and 150 clients, live sessions work, metrics answer, and the waiting are served as others leave."""
    port = free_port()
    limit = [need.program("prlimit"), "--nofile=64:64"]
    with TcpBackend() as backend, ExitStack() as ends:
        gate = run_gate(open_policy(port, backend.address, "idle_timeout: 1h"), prefix=limit)
        live = Sources().connect("127.0.0.1", "127.0.0.1", port)
        ends.callback(live.close)
        assert ask(live) == b"are you there?"
        crowd = [Sources().connect(f"127.0.0.{number % 250 + 2}", "127.0.0.1", port) for number in range(150)]
        ends.callback(close_all, crowd)
        for client in crowd:
            client.sendall(b"knock")
        until(lambda: backend.connections > 10, "some of the crowd are served")
        until(lambda: "descriptor" in gate.output(), "the shortage is said")
        assert ask(live) == b"are you there?"
        assert gate.get("/healthz")[0] == 200
        served = 0
        waiting = list(crowd)
        while waiting:  # whoever is served leaves, and so makes room for the next
            client = waiting.pop(0)
            assert client.recv(5, socket.MSG_WAITALL) == b"knock"
            client.close()
            served += 1
        assert served == len(crowd)
        assert ask(live) == b"are you there?"
        gate.wait_for_value(1, "gatekeeper_sessions", listener="door")
        assert len([line for line in gate.output().splitlines() if "descriptor" in line]) < 10
        scrape = gate.scrape()
        assert scrape.value("gatekeeper_connections_total", action="allow") == len(crowd) + 1


def test_udp_flows_end_after_idle_timeout_and_max_responses(run_gate: Callable[..., Gate]) -> None:
    """A UDP flow ends when it idles, or when all the replies that were announced have come."""
    ports = [free_port() for _ in range(3)]
    with UdpBackend(lambda datagram: [datagram, datagram]) as backend:
        listeners = "".join(
            f"  - {{name: {name}, protocol: udp, listen: '127.0.0.1:{port}', backend: '{backend.address}', {more}}}\n"
            for name, port, more in (
                ("idle", ports[0], "idle_timeout: 1s"),
                ("two", ports[1], "max_responses: 2"),
                ("no-reply", ports[2], "max_responses: 0"),
            )
        )
        gate = run_gate(f"listeners:\n{listeners}default: allow\n")
        for port, replies in zip(ports, (2, 2, 0), strict=True):
            with Sources().make("127.0.0.1", socket.SOCK_DGRAM) as client:
                client.sendto(b"query", ("127.0.0.1", port))
                assert [client.recv(100) for _ in range(replies)] == [b"query"] * replies
        events = gate.wait_for_audit(3, "connection")
        assert {event["gatekeeper"]["listener"]: event["gatekeeper"]["end"] for event in events} == {
            "idle": "idle_timeout",
            "two": "responses",
            "no-reply": "responses",
        }
        assert {event["proto"] for event in events} == {"UDP"}
        gate.wait_for_value(0, "gatekeeper_sessions")
