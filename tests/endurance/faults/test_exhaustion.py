"""Something runs out: new sessions wait or are refused and counted, live ones do not notice, and nothing hangs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.endurance.faults.watch import Steady, open_policy, share_of_a_core, stream
from tests.supervisor.service import Service
from tests.support import need
from tests.support.backends import TcpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.load import Load
from tests.support.network import RemoteNetwork
from tests.support.plain_user import plain_user
from tests.support.ports import free_port
from tests.support.process import children, command_line, is_running
from tests.support.wait import until

LIMITED = str(Path(__file__).parent / "limited_worker.py")
RunGate = Callable[..., Gate]


@pytest.fixture
def backend() -> Iterator[TcpBackend]:
    """An echo service."""
    with TcpBackend() as made:
        yield made


def speaking_client(port: int) -> socket.socket:
    """Return a connection that the kernel completed and that waits for the echo of one byte."""
    client = Sources().connect("127.0.0.1", "127.0.0.1", port)
    client.sendall(b"?")
    client.setblocking(False)
    return client


def served(clients: list[socket.socket]) -> list[socket.socket]:
    """Return those that have their echo."""
    poll = select.poll()
    by_fd = {client.fileno(): client for client in clients}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    ready = [by_fd[fd] for fd, _mask in poll.poll(0)]
    for client in ready:
        assert client.recv(1, socket.MSG_PEEK) == b"?"
    return ready


class TestDescriptors:
    """64 descriptors and 300 clients."""

    def test_a_crowd_waits(self, run_gate: RunGate, backend: TcpBackend, long: bool) -> None:
        """The worker rests while the crowd waits, says so once, and serves the next the moment somebody leaves."""
        port = free_port()
        gate = run_gate(open_policy(port, backend.address), prefix=[need.program("prlimit"), "--nofile=64:64"])
        (worker,) = gate.worker_pids()
        with ExitStack() as ends:
            steady = ends.enter_context(Steady(port))
            crowd = [ends.enter_context(speaking_client(port)) for _ in range(300)]
            until(lambda: gate.scrape().value("gatekeeper_accept_pauses_total") > 0, "accepting pauses")
            before, slowest = len(gate.output().splitlines()), steady.slowest_s
            share = share_of_a_core(worker, 10 if long else 2)
            assert share < 0.2
            assert len(gate.output().splitlines()) - before <= 4
            assert gate.get("/healthz")[0] == 200
            steady.go_on()
            assert steady.slowest_s < max(1.0, 2 * slowest)

            inside = served(crowd)
            assert 10 <= len(inside) < 32
            waiting = [client for client in crowd if client not in inside]
            left = time.monotonic()
            inside[0].close()
            until(lambda: served(waiting), "the next is served")
            print(f"{share:.2%} of a core while 300 wait; the next is served after {time.monotonic() - left:.3f} s")
            crowd = [client for client in crowd if client.fileno() >= 0]

            # They leave one by one, and all get their turn.
            said = len(gate.output().splitlines())
            began = time.monotonic()
            while crowd:
                until(lambda crowd=crowd: served(crowd), "somebody is served")  # type: ignore[misc]
                for client in served(crowd):
                    client.close()
                crowd = [client for client in crowd if client.fileno() >= 0]
            assert len(gate.output().splitlines()) - said <= 2 + 2 * (time.monotonic() - began)
        gate.wait_for_value(301, "gatekeeper_connections_total", action="allow")
        gate.wait_for_value(0, "gatekeeper_sessions")

    def test_a_reload_without_room_is_refused(self, folder: Path, backend: TcpBackend) -> None:
        """A policy whose sockets find no descriptors leaves the old one in force and every session alive."""
        port, more = free_port(), [free_port() for _ in range(40)]
        text = open_policy(port, backend.address)
        with limited(folder, text, RLIMIT_NOFILE=40) as service, Steady(port) as steady:
            added = "".join(
                f'  - {{name: more{number}, listen: "127.0.0.1:{at}", backend: "{backend.address}"}}\n' for number, at in enumerate(more)
            )
            service.reload(text.replace("default:", f"{added}default:"))
            service.says("worker 0 refused the policy: too few file descriptors")
            service.says("reload failed")
            steady.go_on()
            with socket.socket() as client:
                until(lambda: client.connect_ex(("127.0.0.1", more[0])) != 0, "what was opened for it is closed again")
            service.reload(text)
            service.says("reloaded: serving door")
            steady.go_on()
            assert "starting another" not in service.output()


HOARD = """
import os, sys
pipes = [os.pipe() for _ in range(int(sys.argv[1]))]
print("full", flush=True)
sys.stdin.read()
"""


class TestPipes:
    """The user has used up its share of the memory of pipes."""

    @pytest.fixture
    def no_pipes(self, folder: Path) -> Iterator[None]:
        """Hoard pipes, as the very user that workers run as."""
        pages = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text())
        pipes = pages // 16 + 16  # of 16 pages each
        user = plain_user(folder)
        hard = [need.program("prlimit"), f"--nofile={2 * pipes + 100}"]
        if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * pipes + 100:
            pytest.skip(f"needs {2 * pipes + 100} file descriptors (ulimit -n)")
        command = [*hard, *user.prefix, user.python, "-c", HOARD, str(pipes)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hoarder:
            assert hoarder.stdout is not None
            assert hoarder.stdout.readline() == "full\n"
            yield
            hoarder.communicate("")

    @pytest.mark.usefixtures("no_pipes")
    def test_streams_are_copied(self, run_gate: RunGate, backend: TcpBackend, long: bool) -> None:
        """Bulk goes both ways unharmed without pipes worth the name."""
        port, size = free_port(), (256 if long else 16) << 20
        gate = run_gate(open_policy(port, backend.address))
        with Steady(port) as steady:
            with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
                assert stream(client, size) == size
            steady.go_on()
        gate.wait_for_value(0, "gatekeeper_sessions")


@pytest.mark.needs_root
class TestPorts:
    """A network namespace with room for ten connections to the backend."""

    PORTS = 10

    @pytest.fixture
    def few_ports(self, remote: RemoteNetwork) -> Iterator[RemoteNetwork]:
        def between(ports: str) -> None:
            subprocess.run([*remote.exec_prefix(), "sysctl", "-qw", f"net.ipv4.ip_local_port_range={ports}"], check=True)

        between(f"40000 {40000 + self.PORTS - 1}")
        yield remote
        between("32768 60999")

    def test_ports_run_out(self, run_gate: RunGate, few_ports: RemoteNetwork) -> None:
        """Who finds no port to the backend is reset and counted; the live go on, and a port that is free is used at once."""
        inside, port = few_ports.inside, free_port()
        with inside(TcpBackend) as backend, ExitStack() as ends:
            gate = run_gate(open_policy(port, backend.address), prefix=few_ports.exec_prefix())

            def join(number: int) -> socket.socket | None:
                try:
                    client = ends.enter_context(inside(Sources().connect, f"127.0.2.{number + 1}", "127.0.0.1", port))
                    return client if ask(client) else None
                except ConnectionError:
                    return None

            clients = [join(number) for number in range(3 * self.PORTS)]
            live = [client for client in clients if client is not None]
            assert 1 <= len(live) <= self.PORTS
            seen = inside(gate.scrape)
            assert seen.value("gatekeeper_backend_failures_total", cause="resources") == len(clients) - len(live)
            assert seen.value("gatekeeper_sessions") == len(live)
            for client in live:
                assert ask(client) == b"are you there?"
            live[0].shutdown(socket.SHUT_WR)
            assert live[0].recv(1) == b""
            until(lambda: join(3 * self.PORTS), "the port is used again")


class TestAudit:
    """The audit log cannot be written."""

    @pytest.mark.needs_root
    def test_the_disk_is_full(self, run_gate: RunGate, backend: TcpBackend, folder: Path) -> None:
        """Sessions go on, it is said once, and once there is room all is written."""
        disk = folder / "disk"
        disk.mkdir()
        subprocess.run([need.program("mount"), "-t", "tmpfs", "-o", "size=8m,mode=0777", "tmpfs", disk], check=True)
        try:
            filler, port = disk / "filler", free_port()
            filler.write_bytes(bytes((8 << 20) - 16384))
            gate = run_gate(open_policy(port, backend.address), audit=str(disk / "audit.jsonl"))
            with Load("127.0.0.1", port, ["127.0.0.1"]) as load:
                until(lambda: "the audit log cannot be written" in gate.output(), "it is said", within_s=30)
                load.wait_for_more(100)
                filler.unlink()
                until(lambda: "the audit log can be written again" in gate.output(), "it is said", within_s=30)
            assert load.failures == []
            assert gate.output().count("the audit log cannot be written") == 1
            written = disk / "audit.jsonl"

            def complete() -> bool:
                sessions = written.read_text().count('"event_type":"connection"')
                assert sessions == load.done, f"{sessions} in the log, {load.done} were there"
                return True

            until(complete, "every session is in the log")
            assert gate.scrape().value("gatekeeper_events_lost_total") == 0
            gate.stop()
        finally:
            subprocess.run([need.program("umount"), "--lazy", disk], check=True)

    @pytest.mark.timeout(400)
    def test_nobody_reads(self, run_gate: RunGate, backend: TcpBackend, folder: Path, long: bool) -> None:
        """A pipe that nobody empties costs lines, which are counted; sessions, metrics, reloads and the stop go on."""
        pipe, port = folder / "pipe", free_port()
        os.mkfifo(pipe, 0o666)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            gate = run_gate(open_policy(port, backend.address), audit=str(pipe))
            with Load("127.0.0.1", port, ["127.0.0.1"]) as load:
                load.wait_for_more(500)
                if long:  # until the observer's buffer is full, too
                    until(lambda: gate.scrape().value("gatekeeper_events_lost_total", **{"class": "audit"}), "some are lost", 300)
                gate.signal(signal.SIGHUP)
                until(lambda: "reloaded" in gate.output(), "it reloads")
                load.wait_for_more(100)
            assert load.failures == []
            gate.wait_for_value(load.done, "gatekeeper_connections_total")
            gate.stop()
            assert "the audit log did not take the last lines" in gate.output()
        finally:
            os.close(reader)


class TestMemory:
    """The worker gets no more memory than it has once it serves."""

    CROWD = 3000

    @pytest.fixture
    def many_descriptors(self) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard < 2 * self.CROWD:
            pytest.skip(f"needs {2 * self.CROWD} file descriptors (ulimit -n)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        yield
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    @pytest.mark.usefixtures("many_descriptors")
    def test_sessions_or_the_worker(self, folder: Path) -> None:
        """What cannot be had costs sessions or a worker, never the service: once the crowd has left it serves."""
        port = free_port()
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as crowded:
            text = open_policy(port, f"127.0.0.1:{crowded.getsockname()[1]}")
            with limited(folder, text) as service, ExitStack() as ends:
                (worker,) = limited_workers(service)
                os.kill(worker, signal.SIGUSR1)
                for number in range(self.CROWD):
                    with contextlib.suppress(ConnectionError, TimeoutError):
                        ends.enter_context(Sources().connect(f"127.0.1.{number % 200 + 1}", "127.0.0.1", port))
                failed = re.compile(r"out of memory|MemoryError|Cannot allocate memory|worker 0 .* starting another")
                until(lambda: failed.search(service.output()), "memory runs out")
                ends.close()
                until(lambda: serves(port, crowded), "it serves")


def serves(port: int, backend: socket.socket) -> bool:
    """Say whether the words of a new client reach the backend."""
    backend.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            backend.accept()[0].close()
    backend.settimeout(1)
    try:
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
            client.sendall(b"are you there?")
            connection, _peer = backend.accept()
            with connection:
                connection.settimeout(1)
                return connection.recv(100) == b"are you there?"
    except OSError:
        return False


def limited_workers(service: Service) -> list[int]:
    """Return the pids of the living workers."""
    return [pid for pid in children(service.pid) if is_running(pid) and LIMITED in command_line(pid)]


@contextlib.contextmanager
def limited(folder: Path, text: str, **limits: int) -> Iterator[Service]:
    """Run a service whose only worker is under these limits. It may print tracebacks: running out of memory is one."""
    home = Path(tempfile.mkdtemp(dir=folder))
    home.chmod(0o755)
    service = Service(home, text, workers=1, worker=[sys.executable, LIMITED, json.dumps(limits)])
    service.may_print_tracebacks = True
    try:
        yield service.ready()
    finally:
        service.stop()
        print(service.output())  # shown when the test fails
