"""Reloads that change more than rules, and reloads at the worst moment."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.backends import TcpBackend, UdpBackend, banner
from tests.support.clients import Sources, ask, nobody_listens
from tests.support.gate import Gate
from tests.support.load import Load
from tests.support.ports import block, free_port
from tests.support.process import is_running
from tests.support.wait import until

SOURCES = [f"127.0.{number}.1" for number in range(1, 40)]


def open_policy(*listeners: str) -> str:
    """Return a policy that lets everybody in at these listeners."""
    return "listeners:\n" + "".join(f"  - {{{listener}}}\n" for listener in listeners) + "default: allow\n"


def test_a_listener_gets_another_backend_and_another_name(run_gate: Callable[..., Gate]) -> None:
    """New sessions go to the new backend and count under the new name; a live one stays where it is."""
    port = free_port()
    with TcpBackend() as old, TcpBackend(banner) as new:
        gate = run_gate(open_policy(f"name: web, listen: '127.0.0.1:{port}', backend: '{old.address}'"), workers=2)
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as before:
            assert ask(before) == b"are you there?"
            changed = open_policy(f"name: renamed, listen: '127.0.0.1:{port}', backend: '{new.address}'")
            assert gate.reload(changed)["success"] is True
            with Sources().connect("127.0.0.1", "127.0.0.1", port) as after:
                assert after.recv(100).startswith(b"hello")
            assert ask(before) == b"are you there?"
        told = gate.wait_for_audit(2, "connection")
        backends = {event["gatekeeper"]["listener"]: event["gatekeeper"]["backend"] for event in told}
        assert backends == {"web": old.address, "renamed": new.address}
        assert gate.scrape().verdicts() == {
            ("web", "allow", "", "default"): 1,
            ("renamed", "allow", "", "default"): 1,
        }


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_listener_is_widened_and_narrowed(run_gate: Callable[..., Gate], workers: int, protocol: str) -> None:
    """From one address to all addresses of the same port and back, by reload: our own socket is not in our own way."""
    port = free_port()
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with TcpBackend() as tcp, UdpBackend() as udp:
        backend = tcp.address if protocol == "tcp" else udp.address

        def at(host: str) -> str:
            return open_policy(f"name: web, protocol: {protocol}, listen: '{host}:{port}', backend: '{backend}'")

        gate = run_gate(at("127.0.0.1"), workers=workers)
        for host in ("0.0.0.0", "127.0.0.1", "*", "127.0.0.1"):
            assert gate.reload(at(host))["success"] is True, gate.output()
            for source in SOURCES[:6]:
                with Sources().make(source, kind) as client:
                    client.connect(("127.0.0.1", port))
                    assert ask(client) == b"are you there?"


def test_a_removed_udp_listener_ends_its_flows(run_gate: Callable[..., Gate]) -> None:
    """A flow of a listener that is gone cannot be answered any more, so it ends, and the port is closed."""
    ports = free_port(), free_port()
    with UdpBackend() as backend, Sources().make("127.0.0.1", socket.SOCK_DGRAM) as client:
        dns, other = (
            f"name: {name}, protocol: udp, listen: '127.0.0.1:{port}', backend: '{backend.address}'"
            for name, port in zip(("dns", "other"), ports, strict=True)
        )
        gate = run_gate(open_policy(dns, other))
        client.connect(("127.0.0.1", ports[0]))
        assert ask(client) == b"are you there?"
        assert gate.reload(open_policy(other))["success"] is True
        (event,) = gate.wait_for_audit(1, "connection")
        assert event["gatekeeper"]["end"] == "removed"

        def is_closed() -> bool:
            try:
                client.send(b"anybody?")
                client.recv(100)
            except ConnectionRefusedError:
                return True
            return False

        until(is_closed, "the port is closed")


def test_many_reloads_at_once_end_with_the_latest_file(run_gate: Callable[..., Gate]) -> None:
    """A storm of SIGHUPs while the file keeps changing: nobody is refused who must not be, and the last file holds."""
    port = free_port()
    with TcpBackend() as backend:
        web = f"name: web, listen: '127.0.0.1:{port}', backend: '{backend.address}'"
        gate = run_gate(open_policy(web), workers=2)
        with Load("127.0.0.1", port, SOURCES) as load:
            for number in range(40):
                gate.write(open_policy(web) + f"rules:\n  - {{name: r{number}, action: deny, from: 127.8.0.{number}}}\n")
                gate.signal(signal.SIGHUP)
                load.wait_for_more(5)
            last = open_policy(web) + "rules:\n  - {name: last, action: deny, from: 127.9.0.1}\n"
            gate.write(last)
            gate.signal(signal.SIGHUP)
            until(lambda: Sources().is_refused("127.9.0.1", "127.0.0.1", port), "the last file is in force")
            assert not Sources().is_refused("127.8.0.39", "127.0.0.1", port)
            load.wait_for_more()
        assert load.failures == []


@pytest.mark.timeout(120)
def test_workers_killed_during_reloads(run_gate: Callable[..., Gate]) -> None:
    """A worker that dies while a reload is under way: the reload has one clear outcome, and both workers enforce it."""
    port = free_port()
    with TcpBackend() as backend:
        web = f"name: web, listen: '127.0.0.1:{port}', backend: '{backend.address}'"
        gate = run_gate(open_policy(web), workers=2)
        for number in range(6):
            text = open_policy(web) + f"rules:\n  - {{name: r{number}, action: deny, from: 127.{8 + number}.0.0/16}}\n"
            gate.write(text)
            before = len(gate.audit("reload"))
            gate.signal(signal.SIGHUP)
            victim = random.Random(number).choice(gate.worker_pids())
            subprocess.run(["kill", "-9", str(victim)], check=True)
            until(lambda before=before: len(gate.audit("reload")) > before, "the reload ends")  # type: ignore[misc]
            until(lambda: len(gate.worker_pids()) == 2, "both workers are there")
            if gate.audit("reload")[-1]["gatekeeper"]["success"] is not True:
                assert gate.reload()["success"] is True
            refused = f"127.{8 + number}"
            for source in range(20):
                assert Sources().is_refused(f"{refused}.0.{source + 1}", "127.0.0.1", port)
                assert not Sources().is_refused(f"127.100.{number}.{source + 1}", "127.0.0.1", port)


def test_a_killed_worker_is_replaced_for_udp_too(run_gate: Callable[..., Gate]) -> None:
    """Datagrams sent while there is no worker wait for the new one; a flow begins anew and is judged again."""
    port = free_port()
    with UdpBackend() as backend, ExitStack() as ends:
        gate = run_gate(
            open_policy(f"name: dns, protocol: udp, listen: '127.0.0.1:{port}', backend: '{backend.address}'"), workers=2
        )
        clients = [ends.enter_context(Sources().make(source, socket.SOCK_DGRAM)) for source in SOURCES]
        for client in clients:
            client.connect(("127.0.0.1", port))
            assert ask(client) == b"are you there?"
        victim = gate.worker_pids()[0]
        subprocess.run(["kill", "-9", str(victim)], check=True)
        until(lambda: not is_running(victim), "the worker is gone")
        for client in clients:
            assert ask(client) == b"are you there?"
        judged = gate.scrape().value("gatekeeper_connections_total", listener="dns", action="allow")
        assert len(SOURCES) < judged < 2 * len(SOURCES)  # the other worker's flows went on


def test_a_thousand_ports(run_gate: Callable[..., Gate]) -> None:
    """A range of 1,000 ports with two workers opens, serves at its ends and in between, and shrinks by reload."""
    host = f"127.77.{block()}.1"
    with TcpBackend() as backend:

        def ports(first: int, last: int) -> str:
            return open_policy(f"name: range, listen: '{host}:{first}-{last}', backend: '{backend.address}'")

        gate = run_gate(ports(20000, 20999), workers=2)
        for port in (20000, 20001, 20499, 20998, 20999):
            for source in SOURCES[:3]:
                with Sources().connect(source, host, port) as client:
                    assert ask(client) == b"are you there?"
        assert gate.reload(ports(20500, 20999))["success"] is True
        until(lambda: nobody_listens(20499, host) and nobody_listens(20000, host), "the lower half is closed")
        with Sources().connect("127.0.0.1", host, 20500) as client:
            assert ask(client) == b"are you there?"


def test_a_unix_listener_after_a_crash_and_after_a_reload(run_gate: Callable[..., Gate], folder: Path) -> None:
    """A socket file that a killed gate left behind is no obstacle, and a removed listener takes its file along."""
    path = folder / "door.sock"
    port = free_port()
    with TcpBackend() as backend:
        web = f"name: web, listen: '127.0.0.1:{port}', backend: '{backend.address}'"
        local = f"name: local, listen: 'unix:{path}', backend: '{backend.address}'"
        gate = run_gate(open_policy(web, local))
        gate.signal(signal.SIGKILL)
        gate.wait()
        assert path.exists()
        again = run_gate(open_policy(web, local))
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(path))
            assert ask(client) == b"are you there?"
        assert again.reload(open_policy(web))["success"] is True
        until(lambda: not path.exists(), "the socket file is gone")
