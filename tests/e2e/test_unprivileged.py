"""Without any privilege the gate does everything but listen below port 1024."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import need
from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.plain_user import PlainUser, plain_user
from tests.support.ports import free_port
from tests.support.wait import until


@pytest.fixture
def user(folder: Path) -> PlainUser:
    """An ordinary user."""
    return plain_user(folder)


@pytest.mark.timeout(120)
def test_an_unprivileged_user_gets_everything(run_gate: Callable[..., Gate], folder: Path, user: PlainUser) -> None:
    """As an ordinary user: TCP, UDP and unix listeners, two workers, steering, reload, metrics, audit, worker restart."""
    home = folder / "home"
    home.mkdir()
    user.own(home)
    port = free_port()
    with TcpBackend() as backend, UdpBackend() as udp:
        text = f"""
listeners:
  - {{name: web, listen: ["127.0.0.1:{port}", "[::1]:{port}", "unix:{home}/door.sock"], backend: "{backend.address}"}}
  - {{name: dns, protocol: udp, listen: ["*:{port}"], backend: "{udp.address}"}}
default: deny
rules:
  - {{name: nine, action: drop, from: 127.9.0.0/16}}
  - {{name: others, action: allow}}
"""
        gate = run_gate(text, folder=home, workers=2, prefix=user.prefix, python=user.python, env=user.env)
        for pid in [gate.pid, *gate.worker_pids(), gate.observer_pid()]:
            status = Path(f"/proc/{pid}/status").read_text()
            assert "CapEff:\t0000000000000000" in status
        for source, host in (("127.0.0.1", "127.0.0.1"), ("127.5.0.1", "127.0.0.1"), ("::1", "::1")):
            with Sources().connect(source, host, port) as client, Sources().make(source, socket.SOCK_DGRAM) as datagrams:
                assert ask(client) == b"are you there?"
                datagrams.connect((host, port))
                assert ask(datagrams) == b"are you there?"
        with socket.socket(socket.AF_UNIX) as local:
            local.settimeout(10)
            local.connect(f"{home}/door.sock")
            assert ask(local) == b"are you there?"
        assert Sources().is_refused("127.9.0.1", "127.0.0.1", port)
        victim = gate.worker_pids()[0]
        subprocess.run(["kill", "-9", str(victim)], check=True)
        until(lambda: len(gate.worker_pids()) == 2 and victim not in gate.worker_pids(), "a new worker is there")
        assert gate.reload(text.replace("127.9.0.0/16", "127.8.0.0/16"))["success"] is True
        for number in range(20):
            with Sources().connect(f"127.9.{number}.1", "127.0.0.1", port) as client:
                assert ask(client) == b"are you there?"
        gate.wait_for_value(1, "gatekeeper_connections_total", rule="nine", action="drop")
        gate.wait_for_audit(20, "connection")
        gate.signal(signal.SIGTERM)
        gate.wait_notified("STOPPING=1")


@pytest.mark.parametrize("command", ["check", "run", "explain"])
def test_a_file_that_may_not_be_read_is_3(folder: Path, user: PlainUser, command: str) -> None:
    """A rule file that belongs to somebody else is exit code 3, not bad usage, and the message says why."""
    rules = folder / "rules.yaml"
    rules.write_text("version: 1\n")
    rules.chmod(0)
    more = ("127.0.0.1", "80") if command == "explain" else ()
    done = subprocess.run(
        [*user.prefix, user.python, "-m", "gatekeeper", command, str(rules), *more],
        env=user.env, cwd="/", capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 3, done
    assert f"cannot read {rules}: Permission denied" in done.stderr


def test_a_port_below_1024_is_refused_with_the_reason(folder: Path, user: PlainUser) -> None:
    """Without the privilege a low port is exit code 3, and the message says what is missing."""
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) < 1024:
        pytest.skip("this host lets everybody listen below port 1024")
    rules = folder / "rules.yaml"
    rules.write_text(
        "version: 1\nworkers: 1\nmetrics: off\naudit: off\ndefault: deny\n"
        "listeners:\n  - {name: low, listen: '127.0.0.77:1023', backend: '127.0.0.1:9'}\n"
    )
    done = subprocess.run(
        [*user.prefix, user.python, "-m", "gatekeeper", "run", str(rules)],
        cwd="/",
        env=user.env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 3, done
    assert "127.0.0.77:1023" in done.stderr
    assert "permi" in done.stderr.lower() or "privilege" in done.stderr.lower()


@pytest.mark.needs("systemd-socket-activate")
def test_a_service_manager_hands_over_what_the_user_may_not_open(
    run_gate: Callable[..., Gate], folder: Path, user: PlainUser
) -> None:
    """Socket activation: the port was opened by somebody else, and the very first connection, which started us, is served."""
    home = folder / "home"
    home.mkdir()
    user.own(home)
    port = low_port() if user.prefix else free_port()
    activate = [need.program("systemd-socket-activate"), f"--listen=127.0.0.1:{port}", "--setenv=PYTHONPATH"]
    with TcpBackend() as backend, socket.socket() as first:
        gate = run_gate(
            f"listeners:\n  - {{name: web, listen: '127.0.0.1:{port}', backend: '{backend.address}'}}\ndefault: allow\n",
            folder=home,
            workers=2,
            prefix=[*activate, "--setenv=NOTIFY_SOCKET", *user.prefix],
            python=user.python,
            env=user.env,
            before_ready=lambda: until(lambda: first.connect_ex(("127.0.0.1", port)) == 0, "the port is open"),
        )
        first.settimeout(10)
        assert ask(first) == b"are you there?"
        for number in range(20):
            with Sources().connect(f"127.0.{number}.1", "127.0.0.1", port) as client:
                assert ask(client) == b"are you there?"
        gate.wait_for_value(21, "gatekeeper_connections_total", action="allow")


def low_port() -> int:
    """Return a free port below 1024 that has no well-known owner."""
    for port in range(860, 870):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("ports 860 to 869 are all taken")
