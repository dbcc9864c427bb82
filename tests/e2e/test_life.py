"""The life of the service: changed while it runs, its processes killed, stopped with sessions open."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask, close_all, nobody_listens
from tests.support.gate import Gate
from tests.support.load import Load
from tests.support.ports import free_port
from tests.support.process import is_running
from tests.support.wait import until

SOURCES = [f"127.0.{number}.1" for number in range(1, 40)]


@pytest.fixture
def backend() -> Iterator[TcpBackend]:
    """An echo backend."""
    with TcpBackend() as serving:
        yield serving


def policy(ports: list[int], backend: TcpBackend, rules: str, extra: str = "") -> str:
    """Return a policy with one listener for each port, named web0, web1, ..."""
    listeners = "".join(
        f"  - {{name: web{index}, listen: '127.0.0.1:{port}', backend: '{backend.address}'}}\n"
        for index, port in enumerate(ports)
    )
    return f"listeners:\n{listeners}{extra}default: deny\nrules:\n{rules}"


EVERYBODY = "  - {name: everybody, action: allow}\n"
NOT_NINE = "  - {name: nine, action: deny, from: 127.9.0.0/16}\n" + EVERYBODY


def is_refused(source: str, port: int) -> bool:
    """Whether a new connection is reset without an answer."""
    return Sources().is_refused(source, "127.0.0.1", port)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 2])
def test_reload_under_load_changes_verdicts_and_ends_only_whom_it_refuses(
    run_gate: Callable[..., Gate], backend: TcpBackend, workers: int
) -> None:
    """While short sessions stream through and long ones stay open, reloads change verdicts, add and remove listeners."""
    first, second = free_port(), free_port()
    with UdpBackend() as udp, ExitStack() as ends:
        dns = f"  - {{name: dns, protocol: udp, listen: '127.0.0.1:{first}', backend: '{udp.address}'}}\n"
        gate = run_gate(policy([first], backend, EVERYBODY, dns), workers=workers)
        pids = gate.worker_pids()
        long_lived = [Sources().connect(source, "127.0.0.1", first) for source in SOURCES[:10]]
        revoked = Sources().connect("127.9.0.1", "127.0.0.1", first)
        ends.callback(close_all, [*long_lived, revoked])
        assert ask(revoked) == b"are you there?"
        flow = ends.enter_context(Sources().make("127.0.0.1", socket.SOCK_DGRAM))
        flow.connect(("127.0.0.1", first))
        assert ask(flow) == b"are you there?"
        load = ends.enter_context(Load("127.0.0.1", first, SOURCES))
        load.wait_for_more()
        assert nobody_listens(second)

        assert gate.reload(policy([first, second], backend, NOT_NINE, dns))["success"] is True
        assert is_refused("127.9.0.9", first)
        assert is_refused("127.9.0.9", second)
        with pytest.raises(ConnectionResetError):
            ask(revoked)
        with Sources().connect("127.0.0.1", "127.0.0.1", second) as added:
            assert ask(added) == b"are you there?"
            load.wait_for_more()

            assert gate.reload(policy([first], backend, EVERYBODY, dns))["success"] is True
            until(lambda: nobody_listens(second), "the removed listener is closed")
            assert ask(added) == b"are you there?"  # the listener has gone, its session has not
        assert not is_refused("127.9.0.9", first)
        load.wait_for_more()

        for session in long_lived:
            assert ask(session) == b"are you there?"
        assert ask(flow) == b"are you there?"
        assert len(udp.senders) == 1
        assert load.failures == []
        assert gate.worker_pids() == pids


def test_a_broken_file_changes_nothing_and_says_why(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """Broken YAML, an unknown key, a failing test, a taken port and a missing file each leave the old policy in force."""
    port = free_port()
    good = policy([port], backend, NOT_NINE)
    gate = run_gate(good)
    with socket.create_server(("127.0.0.1", free_port())) as taken, Load("127.0.0.1", port, SOURCES) as load:
        broken = {
            "yaml": "listeners: [",
            "key": good + "colour: blue\n",
            "test": good + "tests:\n  - {from: 127.9.0.1, to: web0, expect: allow}\n",
            "port": policy([port, taken.getsockname()[1]], backend, EVERYBODY),
            "default": good.replace("default: deny\n", ""),
        }
        for what, text in broken.items():
            event = gate.reload(text)
            assert event["success"] is False, what
            assert event["error"], what
            gate.wait_for_value(0, "gatekeeper_config_last_reload_successful")
            assert is_refused("127.9.0.9", port), what
            load.wait_for_more(10)
        gate.rules_path.unlink()
        before = len(gate.audit("reload"))
        gate.signal(signal.SIGHUP)
        until(lambda: len(gate.audit("reload")) > before, "the missing file is reported")
        assert gate.audit("reload")[-1]["gatekeeper"]["success"] is False
        for text in ("rules.yaml:", "colour", str(taken.getsockname()[1])):
            assert text in gate.output()
        load.wait_for_more(10)
        assert gate.reload(policy([port], backend, EVERYBODY))["success"] is True
        gate.wait_for_value(1, "gatekeeper_config_last_reload_successful")
        assert not is_refused("127.9.0.9", port)
        assert load.failures == []


@pytest.mark.timeout(120)
def test_a_big_list_is_reloaded_under_load(run_gate: Callable[..., Gate], backend: TcpBackend, folder: Path) -> None:
    """A set file of 200,000 networks that changes is in force after SIGHUP, and no session fails meanwhile."""
    port = free_port()
    addresses = folder / "blocked.txt"
    networks = [f"{10 + (n >> 16)}.{(n >> 8) & 255}.{n & 255}.0/28" for n in range(200_000)]
    addresses.write_text("\n".join(networks) + "\n")
    sets = f"sets:\n  blocked: {{file: {addresses}}}\n"
    rules = "  - {name: blocked, action: deny, from: blocked}\n" + EVERYBODY
    gate = run_gate(policy([port], backend, rules, sets), workers=2)
    with Load("127.0.0.1", port, SOURCES) as load:
        assert not is_refused("127.9.0.1", port)
        for blocked in (True, False):
            addresses.write_text("\n".join([*networks, *["127.9.0.0/24 # new"] * blocked]) + "\n")
            assert gate.reload()["success"] is True
            assert is_refused("127.9.0.1", port) is blocked
        addresses.write_text("127.9.0.0/33\n")
        assert gate.reload()["success"] is False
        assert f"{addresses}:1:1" in gate.output()
        load.wait_for_more()
    assert load.failures == []


def test_counters_survive_reloads(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """A rule that goes and comes back goes on counting where it was, whatever its place in the file."""
    port = free_port()
    gate = run_gate(policy([port], backend, NOT_NINE))
    expected: Counter[tuple[str, str, str, str]] = Counter()
    for rules in (NOT_NINE, EVERYBODY, "  - {name: new, action: drop, from: 127.8.0.0/16}\n" + NOT_NINE, NOT_NINE):
        assert gate.reload(policy([port], backend, rules))["success"]
        for source in ("127.0.0.1", "127.9.0.1"):
            refused = is_refused(source, port)
            assert refused == (source == "127.9.0.1" and rules != EVERYBODY)
            expected["web0", "deny" if refused else "allow", "nine" if refused else "everybody", "rule"] += 1
        gate.wait_for_verdicts(expected)
        gate.wait_for_value(1, "gatekeeper_policy_info", hash=gate.audit("reload")[-1]["gatekeeper"]["policy"])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_replaced_and_nobody_is_refused(
    run_gate: Callable[..., Gate], backend: TcpBackend, workers: int
) -> None:
    """A worker killed with -9 costs its own sessions; whoever connects meanwhile waits in the queue and is served."""
    port = free_port()
    gate = run_gate(policy([port], backend, EVERYBODY), workers=workers)
    for _ in range(2):
        with ExitStack() as ends:
            victim, *others = gate.worker_pids()
            old = [Sources().connect(source, "127.0.0.1", port) for source in SOURCES]
            ends.callback(close_all, old)
            assert [ask(client) for client in old] == [b"are you there?"] * len(old)
            sessions = gate.scrape().value("gatekeeper_sessions")
            assert sessions == len(old)
            judged = gate.scrape().value("gatekeeper_connections_total")
            subprocess.run(["kill", "-9", str(victim)], check=True)
            new = [Sources().connect(source, "127.0.0.1", port) for source in SOURCES]
            ends.callback(close_all, new)
            for client in new:
                assert ask(client) == b"are you there?"
            survivors = [client for client in old if is_alive(client)]
            assert len(survivors) < len(old)
            assert bool(survivors) == bool(others)
            until(lambda: len(gate.worker_pids()) == workers, "the successor is there")
            assert victim not in gate.worker_pids()
            assert set(others) <= set(gate.worker_pids())
            gate.wait_for_value(judged + len(new), "gatekeeper_connections_total")
            gate.wait_for_value(len(survivors) + len(new), "gatekeeper_sessions")
        gate.wait_for_value(0, "gatekeeper_sessions")
    gate.wait_for_value(2, "gatekeeper_worker_restarts_total")
    assert len(gate.wait_for_audit(2, "worker_restart")) == 2


def is_alive(client: socket.socket) -> bool:
    """Whether an echo session still works."""
    try:
        return ask(client) == b"are you there?"
    except OSError:
        return False


def test_a_killed_observer_is_replaced_and_the_data_path_does_not_notice(
    run_gate: Callable[..., Gate], backend: TcpBackend
) -> None:
    """After kill -9 of the observer, sessions go on, and the successor's counters go on where they were."""
    port = free_port()
    gate = run_gate(policy([port], backend, EVERYBODY))
    with Load("127.0.0.1", port, SOURCES) as load:
        load.wait_for_more()
        before = gate.scrape().value("gatekeeper_connections_total")
        old = gate.observer_pid()
        subprocess.run(["kill", "-9", str(old)], check=True)
        load.wait_for_more()
        until(lambda: not is_running(old) and gate_answers(gate), "the successor answers")
        load.wait_for_more(10)
    assert load.failures == []
    assert gate.scrape().value("gatekeeper_connections_total") > before


def test_a_stopped_observer_holds_nobody_up(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """While the observer does not run (SIGSTOP), sessions go on; afterwards all of them have been counted."""
    port = free_port()
    gate = run_gate(policy([port], backend, EVERYBODY))
    with Load("127.0.0.1", port, SOURCES) as load:
        load.wait_for_more()
        observer = gate.observer_pid()
        subprocess.run(["kill", "-STOP", str(observer)], check=True)
        try:
            load.wait_for_more(2000)
        finally:
            subprocess.run(["kill", "-CONT", str(observer)], check=True)
    assert load.failures == []
    gate.wait_for_value(load.done, "gatekeeper_connections_total", action="allow")


def gate_answers(gate: Gate) -> bool:
    """Whether /metrics is served."""
    try:
        return gate.get("/metrics")[0] == 200
    except OSError:
        return False


def test_nothing_outlives_a_killed_supervisor(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """After kill -9 of the supervisor no worker, observer or listening port is left."""
    port = free_port()
    gate = run_gate(policy([port], backend, EVERYBODY), workers=2)
    offspring = [*gate.worker_pids(), gate.observer_pid()]
    assert len(offspring) == 3
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
        assert ask(client) == b"are you there?"
        gate.signal(signal.SIGKILL)
        until(lambda: not any(is_running(pid) for pid in offspring), "all processes are gone")
        assert nobody_listens(port)
        assert nobody_listens(gate.metrics_port)


def test_draining_lets_live_sessions_finish(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """After SIGTERM nobody new gets in, a live session goes on to its end, and then the gate exits with 0."""
    port = free_port()
    gate = run_gate(policy([port], backend, EVERYBODY), workers=2)
    with ExitStack() as ends:
        clients = [ends.enter_context(Sources().connect(source, "127.0.0.1", port)) for source in SOURCES[:8]]
        for client in clients:
            assert ask(client) == b"are you there?"
        assert gate.get("/readyz")[0] == 200
        gate.signal(signal.SIGTERM)
        gate.wait_notified("STOPPING=1")
        until(lambda: nobody_listens(port), "newcomers are refused by the kernel")
        assert gate.get("/readyz")[0] == 503
        for client in clients:
            assert ask(client) == b"are you there?"
        for client in clients[1:]:
            client.close()
        assert ask(clients[0], b"x" * 300_000) == b"x" * 300_000
        assert gate.exit_code() is None
    assert gate.wait() == 0
    assert how_sessions_ended(gate, SOURCES[:8]) == {"finished": len(clients)}


def how_sessions_ended(gate: Gate, sources: list[str]) -> Counter[str]:
    """Return end -> number of sessions from these sources; those who only try whether somebody listens come from others."""
    return Counter(event["gatekeeper"]["end"] for event in gate.audit("connection") if event["src_ip"] in sources)


def test_the_service_manager_is_told_how_it_goes(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """sd_notify: READY and STATUS at start, WATCHDOG while it lives, RELOADING around a reload, STOPPING at the end."""
    port = free_port()
    gate = run_gate(policy([port], backend, EVERYBODY), env={"WATCHDOG_USEC": "1000000"})
    for _ in range(2):
        gate.wait_notified("WATCHDOG=1")
        gate.notified.clear()
    gate.reload()
    gate.wait_notified("READY=1")
    assert "RELOADING=1" in gate.notified
    assert any(line.startswith("MONOTONIC_USEC=") for line in gate.notified)
    assert any(line.startswith("STATUS=serving web0") for line in gate.notified)
    gate.signal(signal.SIGINT)
    gate.wait_notified("STOPPING=1")
    assert gate.wait() == 0


def test_a_second_signal_ends_the_draining(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """Whoever asks twice need not wait for sessions that do not end; they are in the audit log all the same."""
    port = free_port()
    gate = run_gate(policy([port], backend, EVERYBODY))
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
        assert ask(client) == b"are you there?"
        gate.signal(signal.SIGTERM)
        gate.wait_notified("STOPPING=1")
        gate.signal(signal.SIGTERM)
        assert gate.wait() == 0
    assert how_sessions_ended(gate, ["127.0.0.1"]) == {"drained": 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_drains_too(run_gate: Callable[..., Gate], backend: TcpBackend, number: signal.Signals) -> None:
    """Ctrl-C in a terminal and a service manager reach all processes at once; workers and observer leave it to the first."""
    port = free_port()
    gate = run_gate(policy([port], backend, EVERYBODY), workers=2)
    with Sources().connect(SOURCES[0], "127.0.0.1", port) as client:
        assert ask(client) == b"are you there?"
        assert gate.get("/healthz")[0] == 200
        os.killpg(gate.pid, number)
        gate.wait_notified("STOPPING=1")
        until(lambda: nobody_listens(port), "newcomers are refused")
        assert len(gate.worker_pids()) >= 1
        assert ask(client) == b"are you there?"
    assert gate.wait() == 0
    assert how_sessions_ended(gate, [SOURCES[0]]) == {"finished": 1}
