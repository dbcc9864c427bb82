"""Backends that die, vanish, swallow or slam the door: clients learn it soon, others do not notice, nothing is left behind."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.backends import Silent, reset
from tests.support.clients import Sources, ask
from tests.support.faults import Outcome, Plan, Stage, Then, descriptors, resident_kib
from tests.support.gate import Gate
from tests.support.metrics import Scrape
from tests.support.ports import free_port
from tests.support.wait import until

CROWD = 50
SOON_S = 3.0  # generous, as the machine may be busy; docs/robustness.md has the figures
MIB = 1 << 20
POOLED_FDS = 32  # pipes that a worker keeps for reuse
ANSWERS = Plan(sends=1000)


@pytest.fixture
def stage() -> Iterator[Stage]:
    """Where clients and backends play."""
    with Stage() as made:
        yield made


def rules(**listeners: str) -> str:
    """Return rules that let everybody in; each listener is ``name="port, backend, further keys"``."""
    lines = []
    for name, text in listeners.items():
        port, backend, *more = text.split(", ")
        keys = "".join(f", {key}" for key in more)
        lines.append(f"  - {{name: {name}, listen: '127.0.0.1:{port}', backend: '{backend}'{keys}}}\n")
    return f"listeners:\n{''.join(lines)}default: allow\n"


def worker_of(gate: Gate) -> int:
    """Return the pid of its only worker."""
    (pid,) = gate.worker_pids()
    return pid


def no_descriptor_is_left(gate: Gate, pid: int, before: int) -> None:
    """Return when all sessions are gone, and with them their descriptors."""
    gate.wait_for_value(0, "gatekeeper_sessions")
    until(lambda: descriptors(pid) <= before + POOLED_FDS, "no descriptor is left")


def failures(scrape: Scrape, cause: str) -> float:
    """Return how many dials failed so."""
    return scrape.value("gatekeeper_backend_failures_total", cause=cause)


def is_served(stage: Stage, port: int) -> bool:
    """Whether a whole exchange of 1,000 bytes each way works."""
    with contextlib.suppress(OSError):
        client = stage.connect(("127.0.0.1", port), ANSWERS, number=1)
        stage.wait([client])
        return client.whole(1000)
    return False


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_backend_is_killed_and_comes_back(run_gate: Callable[..., Gate], folder: Path, stage: Stage, kind: str) -> None:
    """Live sessions end, whoever comes is reset at once with the cause counted, and the first after it listens is served."""
    port, behind_port, path = free_port(), free_port(), folder / "backend.sock"
    where = {"path": path} if kind == "unix" else {"port": behind_port}
    behind = stage.listen(Plan(then=Then.STAY), **where)
    gate = run_gate(rules(door=f"{port}, {behind.address}"))
    pid = worker_of(gate)
    before = descriptors(pid)
    live = [stage.connect(("127.0.0.1", port), Plan(sends=100, then=Then.STAY), n) for n in range(CROWD)]
    until(lambda: sum(peer.received for peer in behind.peers) == 100 * CROWD, "all sessions are there")
    stage.stop_listening(behind, kill=True)
    stage.wait(live)
    assert {peer.outcome for peer in live} <= {Outcome.FINISHED, Outcome.RESET}
    begun = time.monotonic()
    for _ in range(CROWD):
        assert Sources().is_refused("127.0.0.1", "127.0.0.1", port)
    assert time.monotonic() - begun < SOON_S
    assert failures(gate.scrape(), "refused") == CROWD
    path.unlink(missing_ok=True)
    back = stage.listen(lambda _number: ANSWERS, **where)
    assert is_served(stage, port)
    assert len(back.peers) == 1
    no_descriptor_is_left(gate, pid, before)


def test_a_unix_backend_vanishes(run_gate: Callable[..., Gate], folder: Path, stage: Stage) -> None:
    """Without its path a listening backend is missing for new clients; live sessions go on; a new path is found at once."""
    port, path = free_port(), folder / "backend.sock"
    old = stage.listen(Plan(sends=10, then=Then.STAY), path)
    gate = run_gate(rules(door=f"{port}, {old.address}"))
    pid = worker_of(gate)
    before = descriptors(pid)
    with socket.create_connection(("127.0.0.1", port), 10) as live:
        assert len(live.recv(10, socket.MSG_WAITALL)) == 10
        path.unlink()
        for _ in range(CROWD):
            assert Sources().is_refused("127.0.0.1", "127.0.0.1", port)
        assert failures(gate.scrape(), "missing") == CROWD
        live.sendall(b"still here")
        until(lambda: old.peers[0].received == 10, "the live session goes on")
        stage.listen(lambda _number: ANSWERS, path)
        assert is_served(stage, port)
    no_descriptor_is_left(gate, pid, before)


def test_a_black_hole_costs_its_own_clients_time_and_nobody_else(run_gate: Callable[..., Gate], stage: Stage) -> None:
    """Dials that nobody answers end after connect_timeout, all of them, while the listener beside works on."""
    port, other = free_port(), free_port()
    behind = stage.listen(lambda _number: ANSWERS)
    with Silent() as hole:
        gate = run_gate(rules(door=f"{port}, {hole.address}, connect_timeout: 1s", other=f"{other}, {behind.address}"))
        pid = worker_of(gate)
        before = descriptors(pid)
        begun = time.monotonic()
        lost = [stage.connect(("127.0.0.1", port), Plan(sends=100, then=Then.STAY), n) for n in range(CROWD)]
        assert is_served(stage, other)
        stage.wait(lost)
        assert 0.9 < time.monotonic() - begun < 1 + SOON_S
        assert {peer.outcome for peer in lost} == {Outcome.RESET}
        assert failures(gate.scrape(), "timeout") == CROWD
        no_descriptor_is_left(gate, pid, before)


def test_a_backend_that_never_reads_stops_its_own_client_only(run_gate: Callable[..., Gate], stage: Stage) -> None:
    """Clients of a backend that accepts and never reads are stopped, cost no memory, and end by the idle timeout."""
    port, other = free_port(), free_port()
    deaf = stage.listen(Plan(reads=False, then=Then.STAY, receive_buffer=4096))
    behind = stage.listen(lambda _number: ANSWERS)
    gate = run_gate(rules(door=f"{port}, {deaf.address}, idle_timeout: 3s", other=f"{other}, {behind.address}"))
    pid = worker_of(gate)
    before, before_kib = descriptors(pid), resident_kib(pid)
    clients = [stage.connect(("127.0.0.1", port), Plan(sends=64 * MIB), n) for n in range(CROWD // 5)]
    until(lambda: len(deaf.peers) == len(clients), "all are accepted")
    assert is_served(stage, other)
    assert resident_kib(pid) - before_kib < 8192
    stage.wait(clients)
    assert {peer.outcome for peer in clients} == {Outcome.RESET}
    assert gate.scrape().value("gatekeeper_session_ends_total", end="idle_timeout") == len(clients)
    no_descriptor_is_left(gate, pid, before)


@pytest.mark.parametrize("speaks", [0, 100], ids=["silent client", "client speaks"])
def test_a_backend_that_resets_on_accept_looks_so(run_gate: Callable[..., Gate], stage: Stage, speaks: int) -> None:
    """Its reset arrives as a reset, each time, and nothing is left of the session."""
    port = free_port()
    behind = stage.listen(Plan(then=Then.RESET))
    gate = run_gate(rules(door=f"{port}, {behind.address}"))
    pid = worker_of(gate)
    before = descriptors(pid)
    clients = []
    for number in range(CROWD):
        with contextlib.suppress(ConnectionResetError):  # the reset may come before `connect` returns
            clients.append(stage.connect(("127.0.0.1", port), Plan(sends=speaks, then=Then.STAY), number))
    stage.wait(clients)
    assert {peer.outcome for peer in clients} <= {Outcome.RESET}
    gate.wait_for_value(CROWD, "gatekeeper_session_ends_total", end="backend_reset")
    no_descriptor_is_left(gate, pid, before)


def test_clients_that_reset_while_their_backend_is_dialled_leave_nothing(run_gate: Callable[..., Gate]) -> None:
    """Whoever gives up during a dial into a black hole is forgotten when the dial is."""
    port = free_port()
    with Silent() as hole:
        gate = run_gate(rules(door=f"{port}, {hole.address}, connect_timeout: 1s"))
        pid = worker_of(gate)
        before = descriptors(pid)
        for number in range(CROWD):
            client = Sources().connect("127.0.0.1", "127.0.0.1", port)
            if number % 2:
                client.sendall(b"hello?")
            reset(client)
        no_descriptor_is_left(gate, pid, before)
        verdicts = gate.scrape().verdicts()
        assert verdicts == {("door", "allow", "", "default"): CROWD}
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as last, pytest.raises(ConnectionResetError):
            ask(last)
