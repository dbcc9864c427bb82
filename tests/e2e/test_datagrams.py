"""UDP through the gate: every datagram as it was, and replies from the address that was asked."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.support.backends import UdpBackend
from tests.support.clients import Sources, close_all
from tests.support.gate import Gate
from tests.support.ports import free_port

LARGEST = 65507


def open_policy(listen: str, backend: str, more: str = "") -> str:
    """Return a policy that lets everybody in at one UDP listener."""
    return f"listeners:\n  - {{name: dns, protocol: udp, listen: '{listen}', backend: '{backend}'{more}}}\ndefault: allow\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_datagrams_of_every_size_pass(run_gate: Callable[..., Gate], host: str) -> None:
    """Empty, small and largest datagrams arrive one by one with their borders, both ways."""
    port = free_port()
    with UdpBackend(host=host) as backend, Sources().make(host, socket.SOCK_DGRAM) as client:
        gate = run_gate(open_policy(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", backend.address))
        client.connect((host, port))
        sizes = [0, 1, 512, 1472, 1473, 9000, LARGEST, 0]
        for size in sizes:
            sent = bytes(size % 251 for _ in range(size))
            client.send(sent)
            assert client.recv(1 << 16) == sent
        assert len(backend.senders) == 1  # one flow, one backend socket
        gate.wait_for_value(sum(sizes), "gatekeeper_session_bytes_total", direction="in")
        gate.wait_for_value(sum(sizes), "gatekeeper_session_bytes_total", direction="out")
        assert gate.scrape().value("gatekeeper_connections_total", listener="dns", action="allow") == 1


def test_replies_leave_from_the_address_that_was_asked(run_gate: Callable[..., Gate]) -> None:
    """At a wildcard listener a client that asks 127.0.0.3 is answered by 127.0.0.3, and each address is its own flow."""
    port = free_port()
    with UdpBackend() as backend, Sources().make("127.0.0.1", socket.SOCK_DGRAM) as client:
        gate = run_gate(open_policy(f"0.0.0.0:{port}", backend.address))
        for host in ("127.0.0.3", "127.0.0.4", "127.0.0.3"):
            client.sendto(b"who?", (host, port))
            assert client.recvfrom(100) == (b"who?", (host, port))
        assert len(backend.senders) == 2
        assert gate.scrape().value("gatekeeper_connections_total") == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_flows_of_many_clients_do_not_mix(run_gate: Callable[..., Gate], workers: int) -> None:
    """200 clients with one flow each get their own answers, in order, and the backend sees 200 senders."""
    port = free_port()
    with UdpBackend() as backend, ExitStack() as ends:
        gate = run_gate(open_policy(f"127.0.0.1:{port}", backend.address), workers=workers)
        clients = [Sources().make(f"127.0.{number}.1", socket.SOCK_DGRAM) for number in range(200)]
        ends.callback(close_all, clients)
        for client in clients:
            client.connect(("127.0.0.1", port))
        for round_number in range(5):
            for number, client in enumerate(clients):
                client.send(b"%d of %d" % (round_number, number))
            for number, client in enumerate(clients):
                assert client.recv(100) == b"%d of %d" % (round_number, number)
        assert len(backend.senders) == 200
        gate.wait_for_value(200, "gatekeeper_sessions", listener="dns")
        assert gate.scrape().value("gatekeeper_connections_total", action="allow") == 200


def test_a_backend_that_was_away_costs_only_what_was_sent_meanwhile(run_gate: Callable[..., Gate]) -> None:
    """A flow outlives its backend's absence; the first datagram after it is back is answered."""
    port, behind = free_port(), free_port()
    gate = run_gate(open_policy(f"127.0.0.1:{port}", f"127.0.0.1:{behind}"))
    with Sources().make("127.0.0.1", socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", port))
        for count in (1, 2):
            client.send(b"anybody?")
            gate.wait_for_value(count, "gatekeeper_backend_failures_total", cause="refused")  # the ICMP error of each
        with UdpBackend(port=behind):
            client.send(b"back?")
            assert client.recv(100) == b"back?"
        assert gate.scrape().value("gatekeeper_connections_total") == 1
