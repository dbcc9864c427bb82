"""`reload --confirm`: a policy on trial cuts nobody, and the one before it comes back unless somebody confirms."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import Done, gatekeeper
from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask, nobody_listens
from tests.support.gate import Gate
from tests.support.load import Load
from tests.support.namespace import Namespace
from tests.support.ports import free_port
from tests.support.wait import until

RunGate = Callable[..., Gate]
OUT = "127.0.0.2"  # whom the policy on trial refuses


def policy(port: int, backend: TcpBackend, *more: str, refused: str | None = None, head: str = "") -> str:
    """Return a policy with a listener at ``port``."""
    rule = f"rules:\n  - {{name: out, action: deny, from: {refused}}}\n" if refused else ""
    web = f"  - {{name: web, listen: '127.0.0.1:{port}', backend: '{backend.address}'}}\n"
    return f"{head}listeners:\n{web}{''.join(more)}default: allow\n{rule}"


def run(gate: Gate, *argv: str) -> Done:
    """Run a command that asks this gate."""
    return gatekeeper(*argv, "--control", str(gate.control_path))


def result(gate: Gate, *argv: str) -> dict[str, Any]:
    """Return what a command that succeeds prints as JSON."""
    done = run(gate, *argv, "--json")
    assert done.code == 0, done
    found: dict[str, Any] = json.loads(done.out)
    return found


def is_refused(port: int) -> bool:
    """Whether the policy on trial is in force."""
    return Sources().is_refused(OUT, "127.0.0.1", port)


@pytest.fixture
def backend() -> Any:
    """An echo service."""
    with TcpBackend() as backend:
        yield backend


def test_confirmed(run_gate: RunGate, backend: TcpBackend, folder: Path) -> None:
    """Nobody is cut before it is confirmed, then those it refuses are, and only then it is the last good policy."""
    port, state = free_port(), folder / "state"
    head = f"state: {state}\n"
    gate = run_gate(policy(port, backend, head=head), workers=2)
    until((state / "last-good").exists, "the first policy is saved")
    first = (state / "last-good").read_bytes()
    with Sources().connect(OUT, "127.0.0.1", port) as session:
        assert ask(session) == b"are you there?"
        gate.write(policy(port, backend, refused=OUT, head=head))
        on_trial = result(gate, "reload", "--confirm", "1h")
        assert (on_trial["changed"], on_trial["ended"], on_trial["confirm_within_s"]) == (True, 0, 3600.0)
        assert is_refused(port)
        assert ask(session) == b"are you there?"
        gate.wait_for_value(1, "gatekeeper_config_unconfirmed")
        assert "not confirmed" in gate.get("/")[1]
        status = json.loads(run(gate, "status", "--json").out)
        assert (status["unconfirmed"]["policy"], status["unconfirmed"]["before"]) == (on_trial["policy"], on_trial["before"])
        assert "comes back at" in run(gate, "status").out
        assert (state / "last-good").read_bytes() == first
        confirmed = result(gate, "confirm")
        assert (confirmed["policy"], confirmed["ended"], confirmed["saved"]) == (on_trial["policy"], 1, True)
        with pytest.raises(ConnectionResetError):
            session.recv(1)
    assert (state / "last-good").read_bytes() != first
    assert not (state / "unconfirmed").exists()
    gate.wait_for_value(0, "gatekeeper_config_unconfirmed")
    (event,) = gate.wait_for_audit(1, "confirm")
    assert (event["gatekeeper"]["ended"], event["gatekeeper"]["by"]) == (1, os.geteuid())
    assert is_refused(port)
    done = run(gate, "confirm")
    assert (done.code, "no policy waits to be confirmed" in done.err) == (3, True)


@pytest.mark.parametrize("how", ["deadline", "command"])
def test_not_confirmed(run_gate: RunGate, backend: TcpBackend, how: str) -> None:
    """The policy before it comes back with its listeners and backends, and no session notices anything of it all."""
    ports = free_port(), free_port(), free_port()
    with UdpBackend() as udp:
        kept = f"  - {{name: dns, protocol: udp, listen: '127.0.0.1:{ports[0]}', backend: '{udp.address}'}}\n"
        removed = f"  - {{name: removed, listen: '127.0.0.1:{ports[1]}', backend: '{backend.address}'}}\n"
        added = f"  - {{name: added, listen: '127.0.0.1:{ports[2]}', backend: '{backend.address}'}}\n"
        gate = run_gate(policy(ports[0], backend, kept, removed), workers=2)
        digest = json.loads(run(gate, "status", "--json").out)["policy"]
        with (
            Sources().connect(OUT, "127.0.0.1", ports[0]) as session,
            Sources().connect(OUT, "127.0.0.1", ports[1]) as other,
            Sources().make(OUT, socket.SOCK_DGRAM) as flow,
        ):
            flow.connect(("127.0.0.1", ports[0]))
            assert ask(session) == ask(other) == ask(flow) == b"are you there?"
            gate.write(policy(ports[0], backend, kept, added, refused=OUT))
            before = json.loads(run(gate, "reload", "--confirm", "1s" if how == "deadline" else "1h", "--json").out)
            assert [item["listener"] for item in before["listeners_opened"]] == ["added"]
            assert [item["listener"] for item in before["listeners_closed"]] == ["removed"]
            if how == "command":
                assert is_refused(ports[0])
                assert nobody_listens(ports[1])
                assert not nobody_listens(ports[2])
                assert result(gate, "rollback") == {"policy": digest, "before": before["policy"]}
            (event,) = gate.wait_for_audit(1, "rollback")
            assert (event["gatekeeper"]["cause"], event["gatekeeper"]["policy"]) == (how, digest)
            assert not is_refused(ports[0])
            assert not Sources().is_refused(OUT, "127.0.0.1", ports[1])
            assert nobody_listens(ports[2])
            assert ask(session) == ask(other) == ask(flow) == b"are you there?"
            assert len(udp.senders) == 1
    gate.wait_for_value(0, "gatekeeper_config_last_reload_successful")
    gate.wait_for_value(0, "gatekeeper_config_unconfirmed")
    assert json.loads(run(gate, "status", "--json").out)["policy"] == digest
    # The file is still the one on trial; whoever asks for it gets it.
    assert result(gate, "reload")["policy"] == before["policy"]
    assert is_refused(ports[0])


def test_one_trial_at_a_time(run_gate: RunGate, backend: TcpBackend) -> None:
    """A command is refused meanwhile, a signal is remembered: the file is read again when the trial has ended."""
    port = free_port()
    gate = run_gate(policy(port, backend))
    gate.write(policy(port, backend, refused=OUT))
    result(gate, "reload", "--confirm", "1h")
    for argv in (("reload",), ("reload", "--confirm", "5s")):
        done = run(gate, *argv)
        assert done.code == 3
        assert "waits to be confirmed until" in done.err
    gate.signal(signal.SIGHUP)
    until(lambda: "the file is read again after that" in gate.output(), "it says so")
    gate.write(policy(port, backend, refused="127.0.0.3"))
    result(gate, "confirm")
    until(lambda: Sources().is_refused("127.0.0.3", "127.0.0.1", port), "the newer file is in force")
    assert not is_refused(port)


def test_a_signal_does_not_bring_back_what_was_rolled_back(run_gate: RunGate, backend: TcpBackend) -> None:
    """The file that nobody confirmed is not applied by a SIGHUP, remembered or new: the rotation of logs sends one, too."""
    port = free_port()
    gate = run_gate(policy(port, backend))
    gate.write(policy(port, backend, refused=OUT))
    result(gate, "reload", "--confirm", "1h")
    gate.signal(signal.SIGHUP)
    until(lambda: "the file is read again after that" in gate.output(), "the signal is remembered")
    result(gate, "rollback")
    until(lambda: gate.output().count("the policy that was rolled back; only") == 1, "the file was looked at")
    gate.signal(signal.SIGHUP)
    until(lambda: gate.output().count("the policy that was rolled back; only") == 2, "it was looked at again")
    assert not is_refused(port)
    result(gate, "reload")
    assert is_refused(port)
    assert gate.reload()["success"]


def test_a_trial_that_cannot_be_installed(run_gate: RunGate, backend: TcpBackend) -> None:
    """A reload that fails is no trial."""
    port = free_port()
    gate = run_gate(policy(port, backend))
    gate.write(policy(port, backend) + "tests: [{from: 127.0.0.9, to: web, expect: deny}]\n")
    done = run(gate, "reload", "--confirm", "1h")
    assert done.code == 1
    assert "127.0.0.9" in done.err
    assert run(gate, "rollback").code == 3
    gate.wait_for_value(0, "gatekeeper_config_unconfirmed")
    gate.wait_for_value(0, "gatekeeper_config_last_reload_successful")


def test_an_address_that_somebody_took_meanwhile(run_gate: RunGate, backend: TcpBackend) -> None:
    """Going back matters more than one listener: that one is named, and opened by the next reload."""
    port, gone = free_port(), free_port()
    removed = f"  - {{name: removed, listen: '127.0.0.1:{gone}', backend: '{backend.address}'}}\n"
    text = policy(port, backend, removed)
    gate = run_gate(text)
    gate.write(policy(port, backend, refused=OUT))
    result(gate, "reload", "--confirm", "1h")
    with socket.create_server(("127.0.0.1", gone)):
        done = run(gate, "rollback")
        assert done.code == 3
        assert f"cannot listen on 127.0.0.1:{gone}" in done.err
        assert not is_refused(port)
    gate.write(text)
    assert result(gate, "reload")["changed"] is False
    assert not Sources().is_refused(OUT, "127.0.0.1", gone)


def test_a_stop_during_a_trial(run_gate: RunGate, backend: TcpBackend, folder: Path) -> None:
    """A service that ends before anybody has confirmed starts with the last good policy, not with the file."""
    port = free_port()
    head = f"state: {folder / 'state'}\n"
    gate = run_gate(policy(port, backend, head=head))
    until((folder / "state/last-good").exists, "the first policy is saved")
    on_trial = policy(port, backend, refused=OUT, head=head)
    gate.write(on_trial)
    result(gate, "reload", "--confirm", "1h")
    gate.signal(signal.SIGKILL)
    gate.wait()
    again = run_gate(on_trial, folder=gate.rules_path.parent, metrics_port=gate.metrics_port)
    assert not is_refused(port)
    assert "was never confirmed; a reload applies it" in again.output()
    again.wait_for_value(1, "gatekeeper_config_from_last_good")
    again.wait_for_value(0, "gatekeeper_config_last_reload_successful")
    assert again.reload()["success"]
    assert is_refused(port)
    again.wait_for_value(0, "gatekeeper_config_from_last_good")
    assert again.stop() == 0


@pytest.mark.needs_root
@pytest.mark.parametrize("how", ["rollback", "confirm", "stop", "kill"])
def test_guarded_listeners(run_gate: RunGate, how: str) -> None:
    """The kernel, which outlives the service with `on_exit: closed`, has the policy before again when the service stops."""
    port = free_port()
    space = Namespace(pins=True)
    try:

        def policy(refused: str) -> str:
            return (
                f"listeners:\n  - {{name: ssh, listen: '127.0.0.1:{port}', path: guard, on_exit: closed}}\ndefault: allow\n"
                f"rules:\n  - {{name: out, action: deny, from: {refused}}}\n"
            )

        def gets_in(source: str) -> bool:
            try:
                space.inside(Sources().connect, source, "127.0.0.1", port).close()
            except ConnectionRefusedError:
                return False
            return True

        with space.inside(socket.create_server, ("127.0.0.1", port)):
            gate = space.inside(run_gate, policy("127.0.0.9"))
            with space.inside(Sources().connect, OUT, "127.0.0.1", port) as session:
                gate.write(policy(OUT))
                result(gate, "reload", "--confirm", "1h")
                assert (gets_in(OUT), gets_in("127.0.0.9")) == (False, True)
                session.send(b"nobody ended this session")
                kept = how in {"confirm", "kill"}  # a service that is killed can put nothing back
                if how in {"rollback", "confirm"}:
                    assert result(gate, how).get("ended", 0) == int(kept)
                else:
                    gate.signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
                    gate.wait()
                assert (gets_in(OUT), gets_in("127.0.0.9")) == (not kept, kept)
    finally:
        space.close()


def test_trials_under_load(run_gate: RunGate, backend: TcpBackend) -> None:
    """Ten trials, each rolled back, while clients come and go: not one of them is refused or broken."""
    port = free_port()
    with Load("127.0.0.1", port, [f"127.0.{number}.1" for number in range(1, 20)]) as load:
        gate = run_gate(policy(port, backend), workers=2)
        load.failures.clear()
        for _ in range(10):
            gate.write(policy(port, backend, refused=OUT))
            result(gate, "reload", "--confirm", "1h")
            load.wait_for_more(20)
            result(gate, "rollback")
            load.wait_for_more(20)
        assert load.failures == []
