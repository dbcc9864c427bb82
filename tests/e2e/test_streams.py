"""What the gate carries is what was sent: bytes, ends, resets, in both directions and through every kind of socket."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.backends import TcpBackend, banner, read_to_end, reset
from tests.support.clients import PATIENCE_S, Pair, Sources, ask, send_and_end, unacknowledged
from tests.support.gate import Gate
from tests.support.ports import free_port, free_ports
from tests.support.wait import until

BIG = 1 << 20


def open_policy(listen: str, backend: str, more: str = "") -> str:
    """Return a policy that lets everybody in at one TCP listener."""
    return f"listeners:\n  - {{name: door, listen: '{listen}', backend: '{backend}'{more}}}\ndefault: allow\n"


@pytest.fixture
def pair(run_gate: Callable[..., Gate], server: socket.socket) -> Iterator[Pair]:
    """One session through a gate of its own; it ends before the gate does."""
    port = free_port()
    run_gate(open_policy(f"127.0.0.1:{port}", f"127.0.0.1:{server.getsockname()[1]}"))
    made = Pair(port, server)
    yield made
    made.close()


@pytest.mark.parametrize("backend_first", [False, True], ids=["client", "backend"])
@pytest.mark.parametrize("size", [0, 1, BIG])
def test_half_close_leaves_the_other_direction_open(pair: Pair, backend_first: bool, size: int) -> None:
    """Whoever ends first can still be answered: its FIN arrives after its data, and the answer comes back whole."""
    first, second = pair.ends(backend_first)
    data = random.Random(size).randbytes(size)
    sender = threading.Thread(target=send_and_end, args=(first, data))
    sender.start()
    assert read_to_end(second) == data
    sender.join()
    for _ in range(3):  # the open direction goes on working, message by message
        second.sendall(b"still here")
        assert first.recv(100) == b"still here"
    answer = data[::-1] + b"done"
    replier = threading.Thread(target=send_and_end, args=(second, answer))
    replier.start()
    assert read_to_end(first) == answer
    replier.join()


@pytest.mark.parametrize("backend_first", [False, True], ids=["client", "backend"])
@pytest.mark.parametrize("size", [0, 1, BIG])
def test_a_reset_arrives_as_a_reset_after_the_data(pair: Pair, backend_first: bool, size: int) -> None:
    """Data that was received before a reset is delivered, and then the other side is reset, never cleanly ended."""
    first, second = pair.ends(backend_first)
    data = random.Random(size).randbytes(size)
    received = bytearray()

    def read() -> None:
        while len(received) < size:
            received.extend(second.recv(1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    first.sendall(data)
    reader.join(PATIENCE_S)
    assert bytes(received) == data
    reset(first)
    with pytest.raises(ConnectionResetError):
        second.recv(1)


@pytest.mark.parametrize("backend_first", [False, True], ids=["client", "backend"])
def test_a_reset_waits_for_a_reader_that_is_slow(pair: Pair, backend_first: bool) -> None:
    """What the gate's host had acknowledged before a reset still reaches a reader that begins to read only afterwards."""
    first, second = pair.ends(backend_first)
    data = random.Random(0).randbytes(300_000)
    first.sendall(data)
    until(lambda: unacknowledged(first) == 0, "all is acknowledged")
    reset(first)
    received = bytearray()
    while len(received) < len(data):
        received += second.recv(1 << 16)
    assert bytes(received) == data
    with pytest.raises(ConnectionResetError):
        second.recv(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_end_right_behind_the_request_ends_one_direction_only(run_gate: Callable[..., Gate], workers: int) -> None:
    """400 clients send a request and their end at once, before the gate has dialled; each gets its whole answer."""
    port = free_port()

    def answer(connection: socket.socket) -> None:
        request = read_to_end(connection)
        connection.sendall(request * 100)
        connection.shutdown(socket.SHUT_WR)

    with TcpBackend(answer) as backend:
        run_gate(open_policy(f"127.0.0.1:{port}", backend.address), workers=workers)
        for number in range(400):
            request = b"" if number % 4 == 0 else b"%d," % number
            with Sources().connect(f"127.0.{number % 250}.1", "127.0.0.1", port) as client:
                send_and_end(client, request)
                assert read_to_end(client) == request * 100
        assert backend.connections == 400


@pytest.mark.parametrize("resets", [False, True], ids=["end", "reset"])
def test_a_backend_that_hangs_up_at_once_looks_so_to_the_client(run_gate: Callable[..., Gate], resets: bool) -> None:
    """A backend that ends on accept is an end, one that resets is a reset, whether the client has spoken or not."""
    port = free_port()

    def hang_up(connection: socket.socket) -> None:
        if resets:
            reset(connection)
        else:
            connection.shutdown(socket.SHUT_WR)
            read_to_end(connection)

    with TcpBackend(hang_up) as backend:
        gate = run_gate(open_policy(f"127.0.0.1:{port}", backend.address))
        for number in range(100):
            if resets:  # the reset may come before `connect` returns
                with pytest.raises(ConnectionResetError), Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
                    client.recv(1)
                continue
            with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
                if number % 2:
                    client.sendall(b"hello")
                assert client.recv(1) == b""
        gate.wait_for_value(0, "gatekeeper_sessions")
        ends_told = {event["gatekeeper"]["end"] for event in gate.wait_for_audit(100, "connection")}
        assert ends_told == {"backend_reset" if resets else "finished"}


def test_clients_that_vanish_at_once_are_judged_and_forgotten(run_gate: Callable[..., Gate]) -> None:
    """300 clients that connect and reset at once: each is judged once, and no session or descriptor stays."""
    port, clients = free_port(), 300
    with TcpBackend() as backend:
        gate = run_gate(open_policy(f"127.0.0.1:{port}", backend.address))
        (worker,) = gate.worker_pids()
        before = descriptors(worker)
        for number in range(clients):
            reset(Sources().connect(f"127.0.{number % 250}.1", "127.0.0.1", port))
        gate.wait_for_value(clients, "gatekeeper_connections_total", action="allow")
        gate.wait_for_value(0, "gatekeeper_sessions")
        until(lambda: descriptors(worker) <= before + 2, "no descriptor is left")  # but a pooled pipe


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open; 0 when we may not know, as only root may look into workers."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir())) if os.geteuid() == 0 else 0


def test_a_server_that_speaks_first_is_heard(run_gate: Callable[..., Gate]) -> None:
    """A banner reaches a client that has not said a word."""
    port = free_port()
    with TcpBackend(banner) as backend:
        run_gate(open_policy(f"127.0.0.1:{port}", backend.address))
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
            assert client.recv(100) == b"hello, who is there?\r\n"
            assert ask(client) == b"are you there?"


def test_an_ipv6_listener_before_an_ipv4_backend_and_the_other_way(run_gate: Callable[..., Gate]) -> None:
    """The two sides of a session need not speak the same version of IP."""
    ports = [free_port(), free_port()]
    with TcpBackend() as four, TcpBackend(host="::1") as six:
        run_gate(f"""
listeners:
  - {{name: six-to-four, listen: "[::1]:{ports[0]}", backend: "{four.address}"}}
  - {{name: four-to-six, listen: "127.0.0.1:{ports[1]}", backend: "{six.address}"}}
default: deny
rules:
  - {{name: loopback, action: allow, from: ["::1", 127.0.0.1]}}
""")
        for source, port in (("::1", ports[0]), ("127.0.0.1", ports[1])):
            with Sources().connect(source, source, port) as client:
                assert ask(client) == b"are you there?"


def test_unix_listener_and_unix_backend(run_gate: Callable[..., Gate], folder: Path) -> None:
    """A unix socket can be guarded and can stand behind; peers without an address match only rules for anyone."""
    port, path, path_named = free_port(), folder / "door.sock", folder / "named.sock"
    with TcpBackend(path=folder / "backend.sock") as backend:
        gate = run_gate(f"""
listeners:
  - {{name: to-unix, listen: "127.0.0.1:{port}", backend: "{backend.address}"}}
  - {{name: from-unix, listen: "unix:{path}", backend: "{backend.address}"}}
  - {{name: closed, listen: "unix:{path_named}", backend: "{backend.address}"}}
default: deny
rules:
  - {{name: every-address, action: allow, from: [0.0.0.0/0, "::/0"]}}
  - {{name: anyone, action: allow, to: from-unix}}
""")
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
            assert ask(client) == b"are you there?"
        with socket.socket(socket.AF_UNIX) as local:
            local.settimeout(PATIENCE_S)
            local.connect(str(path))
            sender = threading.Thread(target=send_and_end, args=(local, b"x" * BIG))
            sender.start()
            assert len(read_to_end(local)) == BIG
            sender.join()
        with socket.socket(socket.AF_UNIX) as local:
            local.settimeout(PATIENCE_S)
            local.connect(str(path_named))
            try:
                assert local.recv(1) == b""  # a unix socket may know no reset
            except ConnectionResetError:
                pass
        assert gate.scrape().verdicts() == {
            ("to-unix", "allow", "every-address", "rule"): 1,
            ("from-unix", "allow", "anyone", "rule"): 1,
            ("closed", "deny", "", "default"): 1,
        }
        assert backend.connections == 2


def test_a_port_range_keeps_the_port(run_gate: Callable[..., Gate]) -> None:
    """A backend without a port gets each connection at the port the client asked for."""
    first = free_ports(3)
    servers = [socket.create_server(("127.0.0.5", first + offset)) for offset in range(3)]
    try:
        run_gate(open_policy(f"127.0.0.1:{first}-{first + 2}", "127.0.0.5"))
        for offset, server in enumerate(servers):
            server.settimeout(PATIENCE_S)
            with Sources().connect("127.0.0.1", "127.0.0.1", first + offset) as client:
                accepted, _peer = server.accept()
                with accepted:
                    client.sendall(b"to you")
                    assert accepted.recv(100) == b"to you"
    finally:
        for server in servers:
            server.close()
