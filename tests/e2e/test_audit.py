"""The audit log says what happened, to whom, under which rule; and nothing else can be made to stand there."""

from __future__ import annotations

import datetime as dt
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.ports import free_port
from tests.support.wait import until


def test_a_connection_and_its_refusals_are_told_in_full(run_gate: Callable[..., Gate]) -> None:
    """A session's line and a refusal's line carry addresses, rule, bytes, duration and end, under one flow id each."""
    port = free_port()
    with TcpBackend() as backend, UdpBackend() as udp:
        gate = run_gate(f"""
listeners:
  - {{name: web, listen: "127.0.0.1:{port}", backend: "{backend.address}"}}
  - {{name: dns, protocol: udp, listen: "0.0.0.0:{port}", backend: "{udp.address}"}}
default: deny
rules:
  - {{name: noise, action: drop, from: 127.8.0.0/16}}
  - {{name: friends, action: allow, from: 127.0.0.0/16}}
""")
        began = dt.datetime.now(dt.UTC)
        with Sources().connect("127.0.0.7", "127.0.0.1", port) as client:
            client_port = client.getsockname()[1]
            assert ask(client, b"x" * 1234) == b"x" * 1234
        ports = {}
        for source in ("127.8.0.1", "127.1.0.1"):
            with Sources().make(source) as client:
                ports[source] = client.getsockname()[1]
                with pytest.raises(ConnectionResetError):
                    connect_and_read(client, port)
        with Sources().make("127.9.0.1", socket.SOCK_DGRAM) as client:
            client.sendto(b"query", ("127.0.0.5", port))
            ports["127.9.0.1"] = client.getsockname()[1]
            (connection,) = gate.wait_for_audit(1, "connection")
            refusals = {event["src_ip"]: event for event in gate.wait_for_audit(3, "refusal")}

    ended = dt.datetime.fromisoformat(connection["timestamp"])
    assert began <= ended <= dt.datetime.now(dt.UTC)
    assert {key: connection[key] for key in ("src_ip", "src_port", "dest_ip", "dest_port", "proto")} == {
        "src_ip": "127.0.0.7",
        "src_port": client_port,
        "dest_ip": "127.0.0.1",
        "dest_port": port,
        "proto": "TCP",
    }
    told = connection["gatekeeper"]
    assert 0 <= told.pop("duration_s") < 60
    assert told == {
        "listener": "web",
        "action": "allow",
        "rule": "friends",
        "reason": "rule",
        "peer_ip": "127.0.0.7",
        "backend": backend.address,
        "bytes_in": 1234,
        "bytes_out": 1234,
        "end": "finished",
        "enforced_by": "worker",
    }
    for source, listener, action, rule, to in (
        ("127.8.0.1", "web", "drop", "noise", "127.0.0.1"),
        ("127.1.0.1", "web", "deny", "", "127.0.0.1"),
        ("127.9.0.1", "dns", "deny", "", "127.0.0.5"),
    ):
        refusal = refusals[source]
        told = refusal["gatekeeper"]
        assert (told["listener"], told["action"], told["rule"]) == (listener, action, rule)
        assert told["reason"] == ("rule" if rule else "default")
        assert (refusal["src_port"], refusal["dest_ip"], refusal["dest_port"]) == (ports[source], to, port)
        assert (told["bytes_in"], told["bytes_out"], told["end"]) == (0, 0, "refused")
    flows = [event["flow_id"] for event in [connection, *refusals.values()]]
    assert len(set(flows)) == len(flows)


def connect_and_read(client: socket.socket, port: int) -> None:
    """Be reset, now or in a moment."""
    client.connect(("127.0.0.1", port))
    client.recv(1)


def test_a_flood_of_refusals_is_summed_up(run_gate: Callable[..., Gate]) -> None:
    """Of 400 refusals the log shows some and counts the others: lines and counts add up to what was refused."""
    port, knocks = free_port(), 400
    with TcpBackend() as backend:
        gate = run_gate(f"listeners:\n  - {{name: web, listen: '127.0.0.1:{port}', backend: '{backend.address}'}}\ndefault: deny\n")
        for number in range(knocks):
            assert Sources().is_refused(f"127.0.{number % 256}.{number // 256 + 1}", "127.0.0.1", port)
        gate.wait_for_value(knocks, "gatekeeper_connections_total", action="deny")

        def told() -> int:
            suppressed = sum(int(event["gatekeeper"]["count"]) for event in gate.audit("refusals_suppressed"))
            return len(gate.audit("refusal")) + suppressed

        until(lambda: told() == knocks, "every refusal is in the log or in its sums")
        assert 0 < len(gate.audit("refusal")) < knocks


def test_the_log_can_be_rotated(run_gate: Callable[..., Gate], folder: Path) -> None:
    """After the file was renamed and the gate got SIGHUP, new events are in a new file and none is lost."""
    port = free_port()
    with TcpBackend() as backend:
        gate = run_gate(f"listeners:\n  - {{name: web, listen: '127.0.0.1:{port}', backend: '{backend.address}'}}\ndefault: allow\n")
        for number in range(3):
            with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
                assert ask(client) == b"are you there?"
            gate.wait_for_audit(1, "connection")
            gate.audit_path.rename(folder / f"rotated-{number}")
            assert gate.reload()["success"] is True
    assert not any(event["event_type"] == "connection" for event in gate.audit())
    lines = [line for number in range(3) for line in (folder / f"rotated-{number}").read_text().splitlines()]
    assert sum('"event_type":"connection"' in line for line in lines) == 3


def test_events_of_the_service_itself_are_told(run_gate: Callable[..., Gate]) -> None:
    """Start, reload and stop are in the log, with time and policy."""
    port = free_port()
    with TcpBackend() as backend:
        gate = run_gate(f"listeners:\n  - {{name: web, listen: '127.0.0.1:{port}', backend: '{backend.address}'}}\ndefault: allow\n")
        gate.wait_for_audit(1, "start")
        gate.reload()
        gate.stop()
    events = gate.audit()
    assert [event["event_type"] for event in events] == ["start", "reload", "stop"]
    for event in events:
        dt.datetime.fromisoformat(event["timestamp"])


def test_events_on_stdout_are_alone_there(run_gate: Callable[..., Gate], folder: Path) -> None:
    """With `audit: stdout` every line on stdout is an event; what the service says to people is on stderr."""
    port = free_port()
    to_file = ["sh", "-c", f'exec "$0" "$@" >{folder}/stdout']
    with TcpBackend() as backend:
        text = f"listeners:\n  - {{name: web, listen: '127.0.0.1:{port}', backend: '{backend.address}'}}\ndefault: allow\n"
        gate = run_gate(text, audit="stdout", prefix=to_file)
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
            assert ask(client) == b"are you there?"
        until(lambda: "connection" in (folder / "stdout").read_text(), "the connection is told")
        gate.stop()
    events = [json.loads(line) for line in (folder / "stdout").read_text().splitlines()]
    assert sorted(event["event_type"] for event in events) == ["connection", "start", "stop"]
    assert "serving web" in gate.output()
