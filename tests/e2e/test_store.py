"""The service is away for a moment, its sockets are not: the manager's descriptor store, and socket activation."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import PATIENCE_S, Sources, ask, nobody_listens
from tests.support.gate import PYTHON_PATH, Gate
from tests.support.load import Load
from tests.support.manager import Manager
from tests.support.ports import free_port
from tests.support.process import children
from tests.support.wait import until

pytestmark = pytest.mark.timeout(180)

SOURCES = [f"127.0.{number}.1" for number in range(1, 40)]


@pytest.fixture
def backend() -> Iterator[TcpBackend]:
    """An echo backend."""
    with TcpBackend() as serving:
        yield serving


@pytest.fixture
def manager(folder: Path) -> Iterator[Manager]:
    """A service manager with a descriptor store."""
    with Manager(folder) as made:
        yield made


Starter = Callable[..., Gate]


@pytest.fixture
def start(folder: Path, manager: Manager) -> Iterator[Starter]:
    """Start the service as the manager would, again and again, and wait until it serves."""
    with ExitStack() as ends:
        started: list[Gate] = []

        def run(text: str, workers: int = 1) -> Gate:
            home = folder / f"run{len(started)}"
            home.mkdir()
            ready = manager.told.count("READY=1")
            gate = Gate(home, text, workers=workers, prefix=manager.prefix, env=manager.env)
            started.append(gate)
            ends.callback(gate.stop)
            manager.wait("READY=1", ready + 1)
            return gate

        yield run


def policy(*listeners: str) -> str:
    """Return a policy that lets everybody in."""
    items = "".join(f"  - {{{item}}}\n" for item in listeners)
    return f"listeners:\n{items}default: deny\nrules:\n  - {{name: everybody, action: allow}}\n"


def web(port: int, backend: TcpBackend, name: str = "web") -> str:
    """Return a listener."""
    return f'name: {name}, listen: "127.0.0.1:{port}", backend: "{backend.address}"'


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_restart_under_load_refuses_nobody(
    start: Starter, manager: Manager, backend: TcpBackend, folder: Path, workers: int
) -> None:
    """TCP, unix and UDP: whoever comes while the service is away is served by the next one; the sockets are the same."""
    port, door = free_port(), folder / "door.sock"
    with UdpBackend() as udp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flow:
        text = policy(
            web(port, backend), f'name: door, listen: "unix:{door}", backend: "{backend.address}"',
            f'name: dns, protocol: udp, listen: "127.0.0.1:{port}", backend: "{udp.address}"',
        )  # fmt: skip
        gate = start(text, workers)
        until(lambda: len(manager.names()) == 2 * workers + 2, "the sockets and their state are in the store")
        kept = {os.fstat(fd).st_ino for name, fd in manager.store if name != "gatekeeper-state"}
        flow.settimeout(PATIENCE_S)
        flow.connect(("127.0.0.1", port))
        assert ask(flow) == b"are you there?"
        with Load("127.0.0.1", port, SOURCES) as load:
            for _ in range(2):
                load.wait_for_more()
                gate.signal(signal.SIGTERM)
                gate.wait()
                flow.send(b"while it is away")
                with socket.socket(socket.AF_UNIX) as knocking:
                    knocking.settimeout(PATIENCE_S)
                    knocking.connect(str(door))
                    gate = start(text, workers)
                    assert ask(knocking) == b"are you there?"
                assert flow.recv(64) == b"while it is away"
            load.wait_for_more()
        assert not load.failures
        assert "sockets of an earlier run are served again" in gate.output()
        assert {os.fstat(fd).st_ino for name, fd in manager.store if name != "gatekeeper-state"} == kept


def test_after_a_crash_the_sockets_are_still_there(start: Starter, manager: Manager, backend: TcpBackend) -> None:
    """The supervisor is killed: who connects then waits for the next one."""
    port = free_port()
    text = policy(web(port, backend))
    gate = start(text, 2)
    until(lambda: len(manager.names()) == 3, "they are in the store")
    gate.signal(signal.SIGKILL)
    gate.wait()
    until(lambda: not children(gate.pid), "nobody is left")
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as waiting:
        start(text, 2)
        assert ask(waiting) == b"are you there?"


@pytest.mark.parametrize("now", [1, 3])
def test_another_number_of_workers(start: Starter, manager: Manager, backend: TcpBackend, now: int) -> None:
    """What was steered to two workers cannot be steered to three: it is said, opened anew, and kept again."""
    port = free_port()
    text = policy(web(port, backend))
    start(text, 2).stop()
    gate = start(text, now)
    assert f"it is for 2 workers, and there are {now} now" in gate.output()
    for source in SOURCES[:10]:
        with Sources().connect(source, "127.0.0.1", port) as client:
            assert ask(client) == b"are you there?"
    until(lambda: len(manager.names()) == now + 1, "the new sockets are in the store, and only they")


def test_the_store_follows_the_listeners(start: Starter, manager: Manager, backend: TcpBackend) -> None:
    """Over reloads, upgrades and starts it holds what is open; what no listener wants any more is closed."""
    first, second, third = free_port(), free_port(), free_port()
    gate = start(policy(web(first, backend), web(second, backend, "other")))
    until(lambda: len(manager.names()) == 3, "two sockets are in the store")
    assert gate.reload(policy(web(first, backend), web(third, backend, "third")))["success"]
    until(lambda: len(manager.names()) == 3 and nobody_listens(second), "the removed one is gone")
    names = manager.names()
    with socket.create_connection(("127.0.0.1", third), timeout=PATIENCE_S) as client:
        assert ask(client) == b"are you there?"
    gate.stop()
    assert manager.names() == names
    gate = start(policy(web(third, backend, "third")))
    assert f"the kept socket of 127.0.0.1:{first} (tcp) is closed: no listener wants it" in gate.output()
    until(lambda: len(manager.names()) == 2, "it is not in the store any more")
    assert nobody_listens(first)


def test_a_state_that_makes_no_sense(start: Starter, manager: Manager, backend: TcpBackend) -> None:
    """It is said, and everything is opened anew."""
    port = free_port()
    text = policy(web(port, backend))
    start(text).stop()
    for index, (name, fd) in enumerate(manager.store):
        if name == "gatekeeper-state":
            os.close(fd)
            broken = os.memfd_create("broken")
            os.write(broken, b'{"format": "gatekeeper-kept", "version": 99}')
            manager.store[index] = (name, broken)
    gate = start(text)
    assert "makes no sense" in gate.output()
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
        assert ask(client) == b"are you there?"


@pytest.mark.slow
def test_newcomers_do_not_wait_for_a_long_drain(start: Starter, manager: Manager, backend: TcpBackend) -> None:
    """When sessions keep the service from ending, the sockets are given up after a while: refused is better than held up."""
    port = free_port()
    gate = start(policy(web(port, backend)))
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
        assert ask(client) == b"are you there?"
        gate.signal(signal.SIGTERM)
        manager.wait("STOPPING=1")
        assert not nobody_listens(port)
        until(lambda: nobody_listens(port), "newcomers are refused", within_s=30)
        until(lambda: not manager.names(), "the store is empty")
        assert ask(client) == b"are you there?"


def test_without_a_store_nothing_is_given_away(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """A manager that does not say that it has one is sent no descriptors: they would lie in its socket, open."""
    port = free_port()
    gate = run_gate(policy(web(port, backend)))
    gate.signal(signal.SIGKILL)
    gate.wait()
    until(lambda: nobody_listens(port), "the port is closed")
    assert not [line for line in gate.notified if line.startswith("FD")]


@pytest.mark.needs("systemd-socket-activate")
@pytest.mark.parametrize("workers", [1, 2])
def test_activated_by_systemd_again_and_again(
    folder: Path, manager: Manager, backend: TcpBackend, workers: int
) -> None:
    """systemd-socket-activate waits for the first client and starts the service, three times over: nobody is refused."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as held, ExitStack() as ends, ExitStack() as loading:
        port = held.getsockname()[1]
        # What the program leaves to systemd: holding the socket meanwhile. It takes what it is given.
        manager.store.append(("web", os.dup(held.fileno())))
        text = policy(web(port, backend))
        gates: list[Gate] = []
        load: Load | None = None
        while len(gates) < 3:
            home = folder / f"run{len(gates)}"
            home.mkdir()
            activate = (
                *manager.prefix, "systemd-socket-activate", "--fdname=web", f"-EPYTHONPATH={PYTHON_PATH}",
                f"-ENOTIFY_SOCKET={home / 'notify'}",
            )  # fmt: skip
            gates.append(Gate(home, text, workers=workers, prefix=activate))
            ends.callback(gates[-1].stop)
            if load is None:
                load = loading.enter_context(Load("127.0.0.1", port, SOURCES))
            gates[-1].wait_ready()
            load.wait_for_more()
            if len(gates) < 3:
                gates[-1].signal(signal.SIGTERM)
                gates[-1].wait()
        loading.close()
        assert load is not None
        assert not load.failures
