"""A reload reaches live sessions: those that the new policy refuses end, all others notice nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.cli.program import gatekeeper
from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.ports import free_port
from tests.support.wait import until

RunGate = Callable[..., Gate]


def policy(listeners: str, *refused: str, more: str = "") -> str:
    """Return a policy that lets in everybody but these sources."""
    rules = f"rules:\n  - {{name: out, action: deny, from: [{', '.join(refused)}]}}\n" if refused else ""
    return f"{more}listeners:\n{listeners}default: allow\n{rules}"


def both(port: int, tcp: TcpBackend, udp: UdpBackend) -> str:
    """Return a TCP and a UDP listener at one port."""
    return (
        f"  - {{name: web, listen: '127.0.0.1:{port}', backend: '{tcp.address}'}}\n"
        f"  - {{name: dns, protocol: udp, listen: '127.0.0.1:{port}', backend: '{udp.address}'}}\n"
    )


def flow(stack: ExitStack, source: str, port: int) -> socket.socket:
    """Return a UDP client that has been answered."""
    client = stack.enter_context(Sources().make(source, socket.SOCK_DGRAM))
    client.connect(("127.0.0.1", port))
    assert ask(client) == b"are you there?"
    return client


def was_reset(client: socket.socket) -> bool:
    """Whether a connection has been reset."""
    try:
        client.recv(1)
    except ConnectionResetError:
        return True
    return False


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", ["command", "signal"])
def test_a_reload_ends_what_it_refuses_and_nothing_else(run_gate: RunGate, workers: int, how: str) -> None:
    """TCP sessions are reset and UDP flows end, as revoked; the others go on, over the same backend sockets."""
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp, ExitStack() as stack:
        listeners = both(port, tcp, udp)
        gate = run_gate(policy(listeners), workers=workers)
        sources = [f"127.0.{number}.1" for number in range(1, 9)]
        sessions = {source: stack.enter_context(Sources().connect(source, "127.0.0.1", port)) for source in sources}
        for session in sessions.values():
            assert ask(session) == b"are you there?"
        flows = {source: flow(stack, source, port) for source in sources}
        senders = set(udp.senders)
        refused = sources[::2]
        gate.write(policy(listeners, *refused))
        if how == "command":
            done = gatekeeper("reload", "--json", "--control", str(gate.control_path))
            assert done.code == 0, done
            result = json.loads(done.out)
            assert (result["changed"], result["judged"], result["ended"]) == (True, 16, 8)
        else:
            assert gate.reload()["success"]
        # What was asked for has happened when the command returns: nothing to wait for.
        for source in refused:
            assert was_reset(sessions[source])
            flows[source].settimeout(0.2)
            flows[source].send(b"anybody?")
            with pytest.raises(TimeoutError):
                flows[source].recv(100)
        for source in set(sources) - set(refused):
            assert ask(sessions[source]) == b"are you there?"
            assert ask(flows[source]) == b"are you there?"
        assert udp.senders == senders
        ended = gate.wait_for_audit(8, "connection")
        assert {(event["src_ip"], event["gatekeeper"]["end"]) for event in ended} == {(one, "revoked") for one in refused}
        event = gate.audit("reload")[0]["gatekeeper"]
        assert (event["judged"], event["ended"], event["cause"]) == (16, 8, how)
        assert event["by"] == (os.geteuid() if how == "command" else None)


def test_a_rule_file_may_keep_them(run_gate: RunGate) -> None:
    """With `on_reload: keep` a policy concerns new sessions only."""
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp, ExitStack() as stack:
        listeners = both(port, tcp, udp)
        gate = run_gate(policy(listeners))
        session = stack.enter_context(Sources().connect("127.0.0.2", "127.0.0.1", port))
        assert ask(session) == b"are you there?"
        client = flow(stack, "127.0.0.2", port)
        assert gate.reload(policy(listeners, "127.0.0.2", more="on_reload: keep\n"))["success"]
        assert Sources().is_refused("127.0.0.2", "127.0.0.1", port)
        assert ask(session) == b"are you there?"
        assert ask(client) == b"are you there?"
        # What counts is what the new file says, not the one before.
        assert gate.reload(policy(listeners, "127.0.0.2"))["ended"] == 2
        assert was_reset(session)


def test_sessions_of_a_removed_tcp_listener_go_on(run_gate: RunGate) -> None:
    """A listener that is gone takes no connections; those there are stay, and are still judged if it comes back."""
    ports = free_port(), free_port()
    with TcpBackend() as backend:
        web, other = (
            f"  - {{name: {name}, listen: '127.0.0.1:{port}', backend: '{backend.address}'}}\n"
            for name, port in zip(("web", "other"), ports, strict=True)
        )
        gate = run_gate(policy(web + other))
        with Sources().connect("127.0.0.2", "127.0.0.1", ports[0]) as session:
            assert ask(session) == b"are you there?"
            assert gate.reload(policy(other))["success"]
            assert ask(session) == b"are you there?"


def test_a_session_whose_worker_dies_in_the_middle(run_gate: RunGate) -> None:
    """A worker that dies while it judges holds up nothing: its sessions are gone, those of the other are judged."""
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp, ExitStack() as stack:
        listeners = both(port, tcp, udp)
        gate = run_gate(policy(listeners), workers=2)
        sources = [f"127.0.{number}.1" for number in range(1, 9)]
        sessions = [stack.enter_context(Sources().connect(source, "127.0.0.1", port)) for source in sources]
        for session in sessions:
            assert ask(session) == b"are you there?"
        for turn in range(3):
            gate.write(policy(listeners, *sources[: turn + 1]))
            before = len(gate.audit("reload"))
            gate.signal(signal.SIGHUP)
            os.kill(gate.worker_pids()[turn % 2], signal.SIGKILL)
            until(lambda before=before: len(gate.audit("reload")) > before, "the reload ends")  # type: ignore[misc]
            until(lambda: len(gate.worker_pids()) == 2, "both workers are there")
        assert gate.reload()["success"]
        for source in sources[:3]:
            assert Sources().is_refused(source, "127.0.0.1", port)
        assert not Sources().is_refused(sources[3], "127.0.0.1", port)
