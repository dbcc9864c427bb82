"""The supervisor with the real processes: start, signals, reload, death, stop."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gatekeeper.kernel import privileges
from tests.supervisor.service import PATH, Service, listener, rules
from tests.support.backends import TcpBackend, UdpBackend
from tests.support.ports import free_port
from tests.support.process import Process, children, is_running
from tests.support.wait import until

Start = Callable[..., Service]
PASSED = [f"-E{name}" for name in ("PYTHONPATH", "NOTIFY_SOCKET", "WATCHDOG_USEC")]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Start services, each in a folder of its own, and end them after the test."""
    services: list[Service] = []

    def run(text: str, name: str = "one", **options: Any) -> Service:
        home = folder / name
        home.mkdir()
        services.append(Service(home, text, **options))
        return services[-1]

    yield run
    for service in services:
        service.stop()


@pytest.fixture
def backend() -> Iterator[TcpBackend]:
    """An echo server."""
    with TcpBackend() as echo:
        yield echo


def echoes(port: int, host: str = "127.0.0.1", source: str = "127.0.0.1") -> bool:
    """Say whether an echo comes back through a listener."""
    try:
        with socket.create_connection((host, port), 5, (source, 0)) as client:
            client.sendall(b"hello")
            return client.recv(10) == b"hello"
    except ConnectionError:
        return False


def refused(port: int) -> bool:
    """Say whether nobody listens."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("workers", [1, 2])
def test_it_serves_and_stops(start: Start, backend: TcpBackend, workers: int) -> None:
    """It says READY once it serves, STOPPING when told to stop, and ends with 0 when its sessions have ended."""
    port = free_port()
    service = start(rules(listener(port, backend.port)), workers=workers).ready()
    assert len(service.workers()) == workers
    assert all(echoes(port, source=f"127.0.0.{last}") for last in range(1, 11))
    service.says(rf"serving web with {workers} worker.*policy [0-9a-f]{{12}}")
    until(lambda: service.notifications().count("WATCHDOG=1") >= 3, "the watchdog is fed again and again")
    service.signal(signal.SIGTERM)
    assert service.wait() == 0
    assert any(item.startswith("STOPPING=1") for item in service.notifications())


@pytest.mark.parametrize("text", ["listeners: [", "listeners: []\nrules: nonsense\n"])
def test_a_broken_file_at_start(start: Start, text: str) -> None:
    """A file that is not a policy ends the start with exit code 1, and every problem is printed with its place."""
    service = start(text)
    assert service.wait(30) == 1
    assert re.search(r"rules\.yaml:\d+:\d+: ", service.output())
    assert "is not a policy that can be applied" in service.output()


def test_a_missing_file_at_start(folder: Path) -> None:
    """A file that cannot be read is exit code 3."""
    command = [sys.executable, "-c", "import sys; from gatekeeper import supervisor; sys.exit(supervisor.run(sys.argv[1]))"]
    with Process([*command, "/nowhere/rules.yaml"], folder, "run", env=PATH) as process:
        assert process.wait(30) == 3
        assert process.output() == "gatekeeper: error: cannot read /nowhere/rules.yaml: No such file or directory\n"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_gatekeeper_is_told_about_the_first(start: Start, backend: TcpBackend, workers: int) -> None:
    """The same addresses again are exit code 3, and the supervisor that has them is named; it serves on."""
    port = free_port()
    first = start(rules(listener(port, backend.port)), workers=workers).ready()
    second = start(rules(listener(port, backend.port)), name="two", workers=workers)
    assert second.wait(30) == 3
    assert f"cannot listen on 127.0.0.1:{port} (tcp): the address is in use by " in second.output()
    if os.geteuid() == 0:  # nobody else may look into a gatekeeper
        assert f"in use by pid {first.pid} (" in second.output()
    assert echoes(port)


def test_one_state_directory_one_service(start: Start, backend: TcpBackend, folder: Path) -> None:
    """A second service with the same state directory is told who has it."""
    more = f"state: {folder}/state\n"
    first = start(rules(listener(free_port(), backend.port), more=more)).ready()
    second = start(rules(listener(free_port(), backend.port), more=more), name="two")
    assert second.wait(30) == 3
    assert f"in use by another gatekeeper, pid {first.pid}" in second.output()


def test_a_failed_start_leaves_nothing_behind(start: Start, backend: TcpBackend, folder: Path) -> None:
    """When the last of the addresses is taken, what was opened before is closed and its socket file removed."""
    path = folder / "gate.sock"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        local = f'  - {{name: local, listen: "unix:{path}", backend: "127.0.0.1:{backend.port}"}}\n'
        service = start(rules(local), metrics=f"{{listen: 127.0.0.1:{taken.getsockname()[1]}}}")
        assert service.wait(30) == 3
        assert "metrics: cannot listen on 127.0.0.1" in service.output()
    assert not path.exists()


@pytest.mark.needs_root
def test_workers_have_no_privileges(start: Start, backend: TcpBackend) -> None:
    """A worker and the observer run as the account, without any capability, and can gain none."""
    service = start(rules(listener(free_port(), backend.port)), workers=2).ready()
    assert len(children(service.pid)) == 3
    become = privileges.who_to_become()
    assert become is not None

    def dropped() -> bool:
        for pid in children(service.pid):
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
            assert status["Uid"].split() == [str(become.uid)] * 4
            assert status["Gid"].split() == [str(become.gid)] * 4
            assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
            assert status["NoNewPrivs"] == "1"
        return True

    until(dropped, "all children have dropped their privileges")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_replaced_and_nobody_is_refused(start: Start, backend: TcpBackend, workers: int) -> None:
    """Its sockets live in the supervisor, so whoever comes meanwhile waits for the successor."""
    port = free_port()
    service = start(rules(listener(port, backend.port)), workers=workers).ready()
    for _ in range(3):
        before = service.workers()
        os.kill(before[0], signal.SIGKILL)
        assert all(echoes(port, source=f"127.0.0.{last}") for last in range(1, 21))
        until(lambda before=before: len(set(service.workers()) - set(before)) == 1, "there is a successor")  # type: ignore[misc]
    service.says(r"worker \d \(pid \d+\) was killed by SIGKILL; starting another", times=3)


def test_a_killed_observer_is_replaced(start: Start, backend: TcpBackend) -> None:
    """An observer that dies is started again, and the data path does not notice."""
    port = free_port()
    service = start(rules(listener(port, backend.port)), workers=1).ready()
    worker = service.workers()

    def observers() -> set[int]:
        return set(children(service.pid)) - set(worker)

    (before,) = until(observers, "there is an observer")
    os.kill(before, signal.SIGKILL)
    service.says("the observer was killed by SIGKILL; starting another")
    until(lambda: observers() - {before}, "there is another observer")
    assert echoes(port)
    assert service.workers() == worker


def test_nobody_outlives_the_supervisor(start: Start, backend: TcpBackend) -> None:
    """Killed with -9, the supervisor takes all processes with it, and the ports are closed."""
    port = free_port()
    service = start(rules(listener(port, backend.port)), workers=2).ready()
    offspring = children(service.pid)
    assert len(offspring) == 3
    service.signal(signal.SIGKILL)
    service.wait()
    until(lambda: not any(map(is_running, offspring)), "all processes are gone")
    assert refused(port)


class TestReload:
    """SIGHUP."""

    @pytest.mark.parametrize("workers", [1, 2])
    def test_listeners_come_and_go(self, start: Start, backend: TcpBackend, workers: int) -> None:
        """A listener that is new serves, one that is gone refuses, one that stays keeps its sessions; no worker restarts."""
        old, new, stays = free_port(), free_port(), free_port()
        service = start(rules(listener(old, backend.port), listener(stays, backend.port, "stays")), workers=workers).ready()
        pids = service.workers()
        with socket.create_connection(("127.0.0.1", stays), 5) as session:
            session.sendall(b"before")
            assert session.recv(10) == b"before"
            service.reload(rules(listener(new, backend.port, "new"), listener(stays, backend.port, "stays")))
            service.says("reloaded: serving new, stays")
            session.sendall(b"after")
            assert session.recv(10) == b"after"
        assert all(echoes(port, source=f"127.0.0.{last}") for port in (new, stays) for last in range(1, 11))
        until(lambda: refused(old), "the old listener is closed")
        assert service.workers() == pids
        states = [item.split("\n")[0] for item in service.notifications() if item != "WATCHDOG=1"]
        assert states == ["READY=1", "RELOADING=1", "READY=1"]

    def test_a_policy_changes_for_new_connections(self, start: Start, backend: TcpBackend) -> None:
        """After a reload every worker judges by the new rules."""
        port = free_port()
        service = start(rules(listener(port, backend.port)), workers=2).ready()
        service.reload(rules(listener(port, backend.port), default="deny"))
        service.says("reloaded")
        assert not any(echoes(port, source=f"127.0.0.{last}") for last in range(1, 11))

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("listeners: [", r"rules\.yaml:\d+:\d+: "),
            ("listeners: []\ndefault: perhaps\n", r"rules\.yaml:\d+:\d+: "),
        ],
    )
    def test_a_broken_file_changes_nothing(self, start: Start, backend: TcpBackend, text: str, why: str) -> None:
        """The problems are printed with their place, the old policy is said to stay, and it does."""
        port = free_port()
        service = start(rules(listener(port, backend.port))).ready()
        service.reload(text)
        service.says(why)
        service.says("reload failed: the policy [0-9a-f]{12} stays in force")
        assert echoes(port)
        until(lambda: "the last reload failed" in "\n".join(service.notifications()), "the service manager knows")
        service.reload(rules(listener(port, backend.port), default="deny"))
        service.says("reloaded")
        assert not echoes(port)

    def test_a_missing_file_changes_nothing(self, start: Start, backend: TcpBackend) -> None:
        """A file that is gone is named, and the old policy stays."""
        port = free_port()
        service = start(rules(listener(port, backend.port))).ready()
        service.rules.unlink()
        service.reload()
        service.says("cannot read .*rules.yaml: No such file")
        assert echoes(port)

    def test_an_address_that_is_taken_changes_nothing(self, start: Start, backend: TcpBackend) -> None:
        """When one new listener cannot be opened, no other is, and the owner is named."""
        port, other = free_port(), free_port()
        service = start(rules(listener(port, backend.port)), workers=2).ready()
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = taken.getsockname()[1]
            service.reload(rules(listener(other, backend.port, "other"), listener(address, backend.port, "taken")))
            service.says(rf"cannot listen on 127\.0\.0\.1:{address} \(tcp\): .* by pid {os.getpid()} ")
        assert refused(other)
        assert echoes(port)

    def test_settings_that_take_a_restart(self, start: Start, backend: TcpBackend) -> None:
        """Changed settings of processes are not applied, and that is said aloud."""
        port = free_port()
        service = start(rules(listener(port, backend.port)), workers=1).ready()
        service.reload(rules(listener(port, backend.port), more="workers: 2\n"))
        service.says("`workers` has changed in the file; that takes a restart")
        assert len(service.workers()) == 1

    def test_many_signals_one_reload(self, start: Start, backend: TcpBackend) -> None:
        """Signals that come while a reload is under way lead to one more; the last file is in force in the end."""
        port = free_port()
        service = start(rules(listener(port, backend.port)), workers=2).ready()
        for _ in range(10):
            service.reload()
        service.reload(rules(listener(port, backend.port), default="deny"))
        until(lambda: not echoes(port), "the last file is in force")
        service.says("reloaded")
        assert service.output().count("reloaded") < 11


    def test_workers_that_die_meanwhile(self, start: Start, backend: TcpBackend) -> None:
        """Whenever workers die during reloads, in the end all judge by the policy that is said to be in force."""
        port, other = free_port(), free_port()
        with_other = listener(port, backend.port) + listener(other, backend.port, "other")
        texts = {"allow": rules(with_other), "deny": rules(listener(port, backend.port), default="deny")}
        service = start(texts["allow"], workers=2).ready()
        for attempt in range(1, 10):
            default = "deny" if attempt % 2 else "allow"
            service.reload(texts[default])
            if attempt % 3:
                until(service.workers, "there is a worker to kill")
                time.sleep(attempt / 40)  # at another moment of the reload each time
                for pid in service.workers()[: 1 + attempt % 2]:
                    os.kill(pid, signal.SIGKILL)
            service.says("reloaded|reload failed", times=attempt)
            in_force = "deny" if "serving web with" in service.says("serving") else "allow"
            until(lambda: len(service.workers()) == 2, "both workers live")
            seen = [echoes(port, source=f"127.0.0.{last}") for last in range(1, 11)]
            assert seen == [in_force == "allow"] * 10
            if in_force == "deny":
                until(lambda: refused(other), "the listener that is gone is closed")
            else:
                assert all(echoes(other, source=f"127.0.0.{last}") for last in range(1, 11))

    @pytest.mark.parametrize("family", [4, 6])
    def test_datagram_listeners_come_and_go(self, start: Start, family: int) -> None:
        """UDP listeners on a wildcard are added by a reload, answer from the address that was asked, and are removed."""
        port, extra = free_port(), free_port()
        wildcard, host = ("0.0.0.0", "127.0.0.3") if family == 4 else ("[::]", "::1")
        with UdpBackend() as udp:
            one = listener(port, udp.port, "one", wildcard, "udp")
            service = start(rules(one), workers=2).ready()
            service.reload(rules(one, listener(extra, udp.port, "two", wildcard, "udp")))
            service.says("reloaded: serving one, two")
            for number in (port, extra):
                for _ in range(10):
                    with socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as client:
                        client.settimeout(5)
                        client.connect((host, number))
                        client.send(b"hello")
                        assert client.recv(10) == b"hello"
            service.reload(rules(one))
            service.says("reloaded: serving one with")
            with socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as client:
                client.settimeout(5)
                client.connect((host, extra))

                def unreachable() -> bool:
                    try:
                        client.send(b"anybody?")
                        client.recv(10)
                    except ConnectionRefusedError:
                        return True
                    return False

                until(unreachable, "the removed listener is closed")


class TestStop:
    """SIGTERM and SIGINT."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_sessions_may_end(self, start: Start, backend: TcpBackend, number: signal.Signals) -> None:
        """New connections are refused at once, a live session goes on, and when it has ended so has the service."""
        port = free_port()
        service = start(rules(listener(port, backend.port)), workers=2).ready()
        with socket.create_connection(("127.0.0.1", port), 5) as session:
            session.sendall(b"before")
            assert session.recv(10) == b"before"
            service.signal(number)
            service.says("stopping")
            until(lambda: refused(port), "newcomers are refused")
            session.sendall(b"after")
            assert session.recv(10) == b"after"
            assert service.exit_code() is None
        assert service.wait() == 0

    def test_the_deadline(self, start: Start, backend: TcpBackend) -> None:
        """Sessions that do not end are ended at the deadline, and that is still a clean stop."""
        port = free_port()
        service = start(rules(listener(port, backend.port)), drain_timeout_s=0.2).ready()
        with socket.create_connection(("127.0.0.1", port), 5) as session:
            session.sendall(b"hello")
            assert session.recv(10) == b"hello"
            service.signal(signal.SIGTERM)
            assert service.wait() == 0

    def test_a_second_signal_does_not_wait(self, start: Start, backend: TcpBackend) -> None:
        """The second signal ends live sessions at once."""
        port = free_port()
        service = start(rules(listener(port, backend.port))).ready()
        with socket.create_connection(("127.0.0.1", port), 5) as session:
            session.sendall(b"hello")
            assert session.recv(10) == b"hello"
            service.signal(signal.SIGTERM)
            service.says("stopping: sessions have 300 s")
            service.signal(signal.SIGTERM)
            assert service.wait() == 0

    @pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
    def test_signals_that_mean_something_elsewhere(self, start: Start, backend: TcpBackend, number: signal.Signals) -> None:
        """Whoever rotates logs as for another server ends nothing: neither the service nor a session."""
        port = free_port()
        service = start(rules(listener(port, backend.port))).ready()
        with socket.create_connection(("127.0.0.1", port), 5) as session:
            service.signal(number)
            service.reload(rules(listener(port, backend.port)))  # handled after it
            service.says("reloaded")
            session.sendall(b"hello")
            assert session.recv(10) == b"hello"

    def test_unix_sockets_are_removed(self, start: Start, backend: TcpBackend, folder: Path) -> None:
        """The file of a unix listener is gone after the stop."""
        path = folder / "gate.sock"
        text = rules(f'  - {{name: local, listen: "unix:{path}", backend: "127.0.0.1:{backend.port}"}}\n')
        service = start(text, workers=2).ready()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(path))
            client.sendall(b"hello")
            assert client.recv(10) == b"hello"
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
        assert not path.exists()


@pytest.mark.needs("systemd-socket-activate")
class TestActivation:
    """Sockets from systemd-socket-activate."""

    @pytest.mark.parametrize("workers", [1, 2])
    def test_tcp(self, start: Start, backend: TcpBackend, workers: int) -> None:
        """The inherited socket serves, whatever the number of workers, and its first client is not lost."""
        port = free_port()
        prefix = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", *PASSED]
        service = start(rules(listener(port, backend.port)), prefix=prefix, workers=workers)
        until(lambda: echoes(port), "the first client is served")
        service.ready()
        assert all(echoes(port, source=f"127.0.0.{last}") for last in range(1, 21))

    def test_a_socket_that_nobody_wants(self, start: Start, backend: TcpBackend) -> None:
        """An inherited socket without a listener is an error that names it: its clients would wait for ever."""
        port = free_port()
        prefix = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "--fdname=extra", *PASSED]
        service = start(rules(listener(free_port(), backend.port)), prefix=prefix)
        until(lambda: not refused(port), "somebody connects")
        assert service.wait(30) == 3
        assert f"wants the inherited extra (tcp 127.0.0.1:{port})" in service.output()
