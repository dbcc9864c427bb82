"""Processes die or stand still under load: it costs what was theirs, and nothing else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.endurance.faults.watch import Steady, open_policy
from tests.supervisor.service import Service
from tests.support import metrics
from tests.support.backends import TcpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.load import CLIENTS, Load
from tests.support.ports import free_port
from tests.support.process import children, command_line, is_running
from tests.support.wait import until

RunGate = Callable[..., Gate]
SOURCES = [f"127.0.6.{number}" for number in range(1, 33)]
STUCK_AFTER_S = 2.0


@pytest.fixture
def backend() -> Iterator[TcpBackend]:
    """An echo service."""
    with TcpBackend() as made:
        yield made


def test_workers_die_under_load(run_gate: RunGate, backend: TcpBackend, long: bool) -> None:
    """A death cuts only the sessions of that worker. Nobody is turned away, and all is accounted for."""
    port, deaths = free_port(), 10 if long else 3
    gate = run_gate(open_policy(port, backend.address), workers=2)
    with Load("127.0.0.1", port, SOURCES) as load:
        for _ in range(deaths):
            load.wait_for_more(200)
            before = set(gate.worker_pids())
            victim, *spared = sorted(before)
            at = len(load.failures)
            died = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            until(lambda before=before: len(set(gate.worker_pids()) - before) == 1, "there is a successor")  # type: ignore[misc]
            for source in SOURCES:
                with Sources().connect(source, "127.0.0.1", port) as client:
                    assert ask(client) == b"are you there?"
            print(f"everybody is served {time.monotonic() - died:.3f} s after the death")
            load.wait_for_more(200)
            assert set(spared) < set(gate.worker_pids())
            cut = load.failures[at:]
            # Each client has one session at a time, and the kernel may hold one more that it had begun to accept.
            assert len(cut) <= CLIENTS, cut
            assert not [problem for problem in cut if "Refused" in problem or "timed out" in problem], cut
        with Steady(port):
            load.wait_for_more(10)
    gate.wait_for_value(0, "gatekeeper_sessions")
    gate.wait_for_value(deaths, "gatekeeper_worker_restarts_total")
    judged = gate.scrape().value("gatekeeper_connections_total", action="allow")
    others = 1 + deaths * len(SOURCES)
    assert load.done + others <= judged <= load.done + others + len(load.failures)


def test_a_worker_that_stands_still(folder: Path, backend: TcpBackend) -> None:
    """A worker that no longer turns is replaced; whoever came meanwhile is served by its successor, others notice nothing."""
    port, metrics_port = free_port(), free_port()
    text = open_policy(port, backend.address)
    service = Service(
        folder, text, workers=2, stuck_after_s=STUCK_AFTER_S, metrics=f"{{listen: 127.0.0.1:{metrics_port}}}"
    )
    try:
        service.ready()
        victim, other = service.workers()
        os.kill(victim, signal.SIGSTOP)
        with ExitStack() as ends:
            clients = [ends.enter_context(Sources().connect(source, "127.0.0.1", port)) for source in SOURCES]
            for client in clients:
                assert ask(client) == b"are you there?"
        assert "is stuck for" in service.output()
        assert other in service.workers()
        assert not is_running(victim)
        assert metrics.scrape(metrics_port).value("gatekeeper_connections_total", action="allow") == len(SOURCES)
    finally:
        service.stop()


def test_the_supervisor_dies_under_load(run_gate: RunGate, backend: TcpBackend, folder: Path) -> None:
    """Nobody goes on accepting when the supervisor was killed, and the next start, at once, works."""
    port, state = free_port(), folder / "state"
    state.mkdir()
    text = f"state: {state}\n" + open_policy(port, backend.address)
    for _ in range(2):
        gate = run_gate(text, workers=2)
        with Load("127.0.0.1", port, SOURCES) as load:
            load.wait_for_more(100)
            offspring = children(gate.pid)
            assert len(offspring) == 3
            gate.signal(signal.SIGKILL)
            gate.wait()
            until(lambda those=offspring: not any(map(is_running, those)), "all its processes are gone", within_s=5)  # type: ignore[misc]
            done = load.done
            at = len(load.failures)
            until(lambda at=at: "Refused" in " ".join(load.failures[at + CLIENTS :]), "clients are refused")  # type: ignore[misc]
            assert load.done <= done + CLIENTS
    gate = run_gate(text, workers=2)
    with Load("127.0.0.1", port, SOURCES) as load:
        load.wait_for_more(100)
    assert load.failures == []


def test_an_observer_that_stands_still_and_dies(folder: Path, backend: TcpBackend, long: bool) -> None:
    """The data path does not notice; the observer is replaced, and what was counted meanwhile shows."""
    port, metrics_port = free_port(), free_port()
    service = Service(
        folder, open_policy(port, backend.address), workers=1, stuck_after_s=0.5, metrics=f"{{listen: 127.0.0.1:{metrics_port}}}"
    )
    try:
        service.ready()
        until(lambda: metrics.get(metrics_port, "/readyz")[0] == 200, "it is ready")
        with Load("127.0.0.1", port, SOURCES) as load, Steady(port) as steady:
            load.wait_for_more(100)
            (observer,) = [pid for pid in children(service.pid) if "gatekeeper.observer" in command_line(pid)]
            os.kill(observer, signal.SIGSTOP)
            service.reload()  # it is told something, and does not read it
            load.wait_for_more(5000 if long else 1000)
            service.says(rf"the observer \(pid {observer}\) does not read what it is sent; killing it")
            service.says("the observer was killed by SIGKILL; starting another")
            load.wait_for_more(100)
            steady.go_on()
        assert load.failures == []
        expected = load.done + 1
        until(lambda: metrics.scrape(metrics_port).value("gatekeeper_connections_total") == expected, "all were counted")
    finally:
        service.stop()
