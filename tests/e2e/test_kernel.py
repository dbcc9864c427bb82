"""`kernel: require`, `auto` and guarded listeners, on the running service in a network namespace of its own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gatekeeper.kernel import bpf
from gatekeeper.kernel.asm import R0, Assembler
from gatekeeper.kernel.privileges import CAP_BPF
from tests.cli.program import gatekeeper
from tests.support import need
from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.namespace import Namespace
from tests.support.plain_user import plain_user
from tests.support.ports import free_port
from tests.support.process import Process, is_running
from tests.support.services import Nginx, Sshd
from tests.support.wait import until

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(180)]

T = TypeVar("T")
FRIEND, FOE, SILENT = "10.0.1.1", "10.0.2.1", "10.0.3.1"
FRIEND_6, FOE_6 = "2001:db8:1::1", "2001:db8:2::1"
RULES = """
default: deny
rules:
  - {name: friends, action: allow, from: [10.0.1.0/24, "2001:db8:1::/48"]}
  - {name: silence, action: drop, from: 10.0.3.0/24}
"""


@pytest.fixture
def space() -> Iterator[Namespace]:
    """A network namespace where both networks are at home, with a bpf file system."""
    made = Namespace(["10.0.0.0/8", "2001:db8::/32"], pins=True)
    yield made
    made.close()


@pytest.fixture
def gate_in(space: Namespace, run_gate: Callable[..., Gate]) -> Callable[..., Gate]:
    """Start the gate in the namespace."""
    return lambda text, **options: space.inside(run_gate, text, **options)


@contextlib.contextmanager
def made_in(space: Namespace, kind: Callable[[], T]) -> Iterator[T]:
    """A backend of the namespace, opened and closed there."""
    backend: Any = space.inside(kind)
    try:
        yield backend
    finally:
        space.inside(backend.__exit__, None, None, None)


def look(space: Namespace, source: str, host: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> str:
    """What a client sees: ``allow`` (an echo), ``refused`` (no connection), ``reset`` (a connection, then none), ``silence``."""

    def try_it() -> str:
        with Sources().make(source, kind) as client:
            client.settimeout(0.5)
            try:
                client.connect((host, port))
                if kind == socket.SOCK_DGRAM:
                    client.send(b"are you there?")
                    return "allow" if client.recv(64) == b"are you there?" else "noise"
            except ConnectionRefusedError:
                return "refused"
            except TimeoutError:
                return "silence"
            except ConnectionResetError:  # it may come before `connect` returns
                return "reset"
            client.settimeout(5)
            try:
                return "allow" if ask(client) == b"are you there?" else "end"
            except (ConnectionResetError, BrokenPipeError):
                return "reset"

    return space.inside(try_it)


def programs(space: Namespace) -> list[int]:
    """The sk_lookup programs that judge in the namespace."""
    return bpf.attached(space.fd)


def value(space: Namespace, gate: Gate, name: str, **labels: str) -> float:
    """A metric of a gate in the namespace."""
    return space.inside(lambda: gate.scrape().value(name, **labels))


def capabilities(pid: int) -> int:
    """The capabilities in force in a process."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("CapEff")]
    return int(line.split()[1], 16)


def test_refusals_happen_before_there_is_a_connection(space: Namespace, gate_in: Callable[..., Gate]) -> None:
    """TCP and UDP, IPv4 and IPv6, two workers: no handshake for deny, silence for drop, allow as ever.

    Each attempt is counted under its rule and is in the audit log as the kernel's; workers saw none of them.
    """
    port = free_port()
    with made_in(space, TcpBackend) as backend, made_in(space, UdpBackend) as udp:
        gate = gate_in(f"""
kernel: require
listeners:
  - {{name: web, listen: "*:{port}", backend: "{backend.address}"}}
  - {{name: dns, protocol: udp, listen: "*:{port}", backend: "{udp.address}"}}
{RULES}""", workers=2)
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            assert look(space, FRIEND, "10.0.0.1", port, kind) == "allow"
            assert look(space, FRIEND_6, "2001:db8::1", port, kind) == "allow"
            assert look(space, FOE, "10.0.0.1", port, kind) == "refused"
            assert look(space, FOE_6, "2001:db8::1", port, kind) == "refused"
            assert look(space, SILENT, "10.0.0.1", port, kind) == "silence"
        attempts = "gatekeeper_kernel_refused_attempts_total"

        def counted() -> bool:
            denied = [value(space, gate, attempts, listener=name, action="deny", rule="") for name in ("web", "dns")]
            dropped = [value(space, gate, attempts, listener=name, action="drop", rule="silence") for name in ("web", "dns")]
            return denied == [2, 2] and min(dropped) >= 1

        until(counted, "every attempt is counted")
        assert value(space, gate, "gatekeeper_kernel_enforcing") == 1
        assert {key[1] for key, count in space.inside(lambda: gate.scrape().verdicts()).items() if count} == {"allow"}
        refusals = gate.wait_for_audit(6, "refusal")
        assert {event["gatekeeper"]["enforced_by"] for event in refusals} == {"kernel"}
        seen = {(event["src_ip"], event["dest_ip"], event["proto"], event["gatekeeper"]["action"]) for event in refusals}
        assert (FOE, "10.0.0.1", "TCP", "deny") in seen
        assert (FOE_6, "2001:db8::1", "UDP", "deny") in seen
        assert (SILENT, "10.0.0.1", "TCP", "drop") in seen
        assert all(event["dest_port"] == port and 0 < event["src_port"] < 65536 for event in refusals)
        assert backend.connections == 2


def test_a_flood_is_counted_to_the_last(space: Namespace, gate_in: Callable[..., Gate]) -> None:
    """Lines of the audit log and what it says it left out add up to the attempts, across a reload."""
    port, flood = free_port(), 1000
    text = f"""
kernel: require
listeners: [{{name: web, listen: "10.0.0.1:{port}", backend: 127.0.0.1:9}}]
{RULES}"""
    gate = gate_in(text)

    def refuse(times: int) -> None:
        for _ in range(times):
            with Sources().make(FOE) as client:
                assert client.connect_ex(("10.0.0.1", port)) == errno.ECONNREFUSED

    space.inside(refuse, flood)
    assert gate.reload(text.replace("10.0.3.0", "10.0.4.0"))["success"]
    space.inside(refuse, flood)

    def complete() -> bool:
        left_out = sum(event["gatekeeper"]["count"] for event in gate.audit("refusals_suppressed"))
        told: int = len(gate.audit("refusal")) + left_out
        return told == 2 * flood

    until(complete, "every attempt is told")
    assert all(event["gatekeeper"]["enforced_by"] == "kernel" for event in gate.audit("refusals_suppressed"))
    assert value(space, gate, "gatekeeper_kernel_refused_attempts_total", listener="web", action="deny", rule="") == 2 * flood
    assert value(space, gate, "gatekeeper_refusals_suppressed_total") == 2 * flood - len(gate.audit("refusal"))


@pytest.mark.timeout(600)
def test_no_verdict_is_neither_the_old_nor_the_new_policys(
    space: Namespace, gate_in: Callable[..., Gate], *, long: bool
) -> None:
    """While policies change under load, whom both allow always gets in, and whom both refuse never does."""
    port = free_port()
    changing = "10.0.5.0/24"
    with made_in(space, TcpBackend) as backend:
        texts = [f"""
kernel: require
listeners: [{{name: web, listen: "10.0.0.1:{port}", backend: "{backend.address}"}}]
sets: {{some: [10.0.1.0/24{more}]}}
default: deny
rules: [{{name: friends, action: allow, from: some}}]
""" for more in ("", f", {changing}")]
        gate = gate_in(texts[0], workers=2)
        wrong, tried, over = [], [0], threading.Event()

        def load() -> None:
            while not over.is_set():
                for source, expected in ((FRIEND, "allow"), (FOE, "refused"), ("10.0.5.1", None)):
                    seen = look_here(source, "10.0.0.1", port)
                    tried[0] += 1
                    if expected not in (None, seen) or seen not in ("allow", "refused", "reset"):
                        wrong.append((source, seen))

        thread = space.inside(_thread_of_namespace, load, space.fd)
        for number in range(200 if long else 12):
            assert gate.reload(texts[(number + 1) % 2])["success"]
        over.set()
        thread.join()
        assert not wrong
        assert tried[0] > 100
        assert look(space, "10.0.5.1", "10.0.0.1", port) == "refused"
        assert len(programs(space)) == 1


def look_here(source: str, host: str, port: int) -> str:
    """What a client of the calling thread's namespace sees."""
    with Sources().make(source) as client:
        try:
            client.connect((host, port))
            return "allow" if ask(client) == b"are you there?" else "end"
        except ConnectionRefusedError:
            return "refused"
        except (ConnectionResetError, BrokenPipeError):
            return "reset"


def _thread_of_namespace(work: Callable[[], None], _fd: int) -> threading.Thread:
    # A new thread has the namespaces of the one that starts it.
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_nothing_is_left_when_the_supervisor_is_killed(space: Namespace, gate_in: Callable[..., Gate]) -> None:
    """After kill -9 the program is gone and the port is closed for everybody. Before that, only the supervisor had any part in it."""
    port = free_port()
    gate = gate_in(f"""
kernel: require
listeners: [{{name: web, listen: "10.0.0.1:{port}", backend: 127.0.0.1:9}}]
{RULES}""")
    (program,) = programs(space)
    maps = bpf.maps_of(program)
    assert len(maps) > 10
    assert capabilities(gate.pid) >> CAP_BPF & 1
    offspring = [*gate.worker_pids(), gate.observer_pid()]
    until(lambda: not any(map(capabilities, offspring)), "nobody else has any right, once started")
    for pid in offspring:
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        assert not [link for link in links if "bpf" in link]
    gate.signal(signal.SIGKILL)
    until(lambda: not any(map(is_running, offspring)), "all processes are gone")
    until(lambda: programs(space) == [], "the program is out of force")
    until(lambda: not bpf.program_exists(program) and not any(map(bpf.map_exists, maps)), "nothing is left in the kernel")
    assert look(space, FRIEND, "10.0.0.1", port) == "refused"


def test_without_the_key_nothing_is_loaded_and_the_right_is_given_up(space: Namespace, gate_in: Callable[..., Gate]) -> None:
    """`kernel: off` is the default: workers refuse, and the supervisor keeps no right to load programs."""
    port = free_port()
    gate = gate_in(f'listeners: [{{name: web, listen: "10.0.0.1:{port}", backend: 127.0.0.1:9}}]\n{RULES}')
    assert programs(space) == []
    assert not capabilities(gate.pid) >> CAP_BPF & 1
    assert look(space, FOE, "10.0.0.1", port) in ("reset", "end")
    assert value(space, gate, "gatekeeper_kernel_enforcing") == 0


def test_auto_goes_on_without_the_right_and_require_does_not(
    space: Namespace, gate_in: Callable[..., Gate], folder: Path
) -> None:
    """Without CAP_BPF: `auto` warns and lets workers refuse, `require` says what is missing and exits with 3."""
    port = free_port()
    without = [need.program("setpriv"), "--bounding-set=-bpf"]
    text = f'listeners: [{{name: web, listen: "10.0.0.1:{port}", backend: 127.0.0.1:9}}]\n{RULES}'
    gate = gate_in("kernel: auto\n" + text, prefix=without)
    assert "CAP_BPF" in gate.output()
    assert "workers refuse instead" in gate.output()
    assert value(space, gate, "gatekeeper_kernel_enforcing") == 0
    assert look(space, FOE, "10.0.0.1", port) in ("reset", "end")
    gate.stop()
    home = folder / "second"
    home.mkdir()
    second = space.inside(Gate, home, "kernel: require\n" + text, prefix=without)
    assert second.wait(20) == 3
    assert "CAP_BPF" in second.output()
    second.stop()


def test_another_program_in_the_namespace(space: Namespace, gate_in: Callable[..., Gate], folder: Path) -> None:
    """Somebody else's program may let in what we refuse: `auto` says so and goes on, `require` does not start."""
    code = Assembler()
    code.do(R0, "=", 1)
    code.exit()
    program = bpf.load(code.assemble({}), code.listing())
    link = bpf.attach(program, space.fd)
    port = free_port()
    text = f'listeners: [{{name: web, listen: "10.0.0.1:{port}", backend: 127.0.0.1:9}}]\n{RULES}'
    gate = gate_in("kernel: auto\n" + text)
    assert "another sk_lookup program" in gate.output()
    assert look(space, FOE, "10.0.0.1", port) == "refused"
    gate.stop()
    home = folder / "second"
    home.mkdir()
    second = space.inside(Gate, home, "kernel: require\n" + text)
    assert second.wait(20) == 3
    assert "another sk_lookup program" in second.output()
    second.stop()
    os.close(link)
    os.close(program)
    assert programs(space) == []


def test_a_plain_user_with_two_capabilities_is_enough(
    space: Namespace, gate_in: Callable[..., Gate], folder: Path
) -> None:
    """Not root, with CAP_BPF and CAP_NET_ADMIN as systemd gives them: the kernel refuses."""
    user = plain_user(folder)
    home = folder / "home"
    home.mkdir()
    user.own(home)
    capable = [
        *(part for part in user.prefix if not part.startswith(("--inh-caps", "--bounding-set"))),
        "--inh-caps=-all,+bpf,+net_admin", "--ambient-caps=-all,+bpf,+net_admin", "--bounding-set=-all,+bpf,+net_admin",
    ]  # fmt: skip
    port = free_port()
    gate = gate_in(f"""
kernel: require
listeners: [{{name: web, listen: "10.0.0.1:{port}", backend: 127.0.0.1:9}}]
{RULES}""", folder=home, prefix=capable, python=user.python, env=user.env)
    assert look(space, FOE, "10.0.0.1", port) == "refused"
    until(lambda: not any(map(capabilities, [*gate.worker_pids(), gate.observer_pid()])), "nobody else has any right")


# ---------------------------------------------------------------------- guarded listeners


def guarding(port: int, on_exit: str, more: str = "", protocol: str = "tcp") -> str:
    """A policy over a port that somebody else owns."""
    return f"""
listeners:
  - {{name: service, protocol: {protocol}, listen: "*:{port}", path: guard, on_exit: {on_exit}}}
{more}{RULES}"""


def serve(port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A socket at a port of both families."""
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    if kind == socket.SOCK_STREAM:
        sock.listen(64)
    return sock


def reaches(space: Namespace, source: str, host: str, port: int) -> bool | None:
    """Whether a connection is completed; ``None``: neither that nor refused."""

    def try_it() -> bool | None:
        with Sources().make(source) as client:
            client.settimeout(0.5)
            result = client.connect_ex((host, port))
            return {0: True, errno.ECONNREFUSED: False}.get(result)

    return space.inside(try_it)


@pytest.mark.needs("nginx", "curl")
def test_nginx_is_put_under_a_policy_where_it_is(
    space: Namespace, gate_in: Callable[..., Gate], folder: Path
) -> None:
    """The server owns its port before, while and after we run; it sees real addresses; its restart needs nothing from us."""
    home = folder / "nginx"
    home.mkdir()
    nginx = space.inside(Nginx, home)
    (nginx.www / "page").write_text("hello")

    def get(source: str) -> str:
        argv = [need.program("curl"), "-s", "--max-time", "5", "--interface", source, f"http://127.0.0.1:{nginx.port}/page"]
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout

    text = f"""
listeners:
  - {{name: web, listen: "127.0.0.1:{nginx.port}", path: guard, on_exit: open}}
default: deny
rules:
  - {{name: friends, action: allow, from: [127.0.1.0/24]}}
"""
    assert space.inside(get, "127.0.2.1") == "hello"
    gate = gate_in(text)
    assert space.inside(get, "127.0.1.1") == "hello"
    assert space.inside(get, "127.0.2.1") == ""
    assert "127.0.1.1 - -" in (home / "access.log").read_text()
    nginx.signal(signal.SIGHUP)  # new workers with new sockets' owners
    assert space.inside(get, "127.0.1.1") == "hello"
    nginx.stop()
    assert space.inside(get, "127.0.1.1") == ""
    again = folder / "again"
    again.mkdir()
    restarted = space.inside(_restart, nginx, again)
    until(lambda: space.inside(get, "127.0.1.1") == "hello", "nginx is back")
    assert space.inside(get, "127.0.2.1") == ""
    until(lambda: value(space, gate, "gatekeeper_kernel_refused_attempts_total", listener="web", action="deny", rule="") >= 2,
          "refusals are counted")  # fmt: skip
    until(lambda: value(space, gate, "gatekeeper_kernel_passed_attempts_total", listener="web", rule="friends") >= 3, "and what passed")
    assert gate.wait_for_audit(2, "refusal")[0]["gatekeeper"]["enforced_by"] == "kernel"
    gate.stop()
    assert space.inside(get, "127.0.2.1") == "hello"
    assert programs(space) == []
    restarted.stop()


@pytest.mark.needs("nginx")
def test_nginx_restarts_under_load_by_its_own_means(space: Namespace, gate_in: Callable[..., Gate], folder: Path) -> None:
    """Reloads, and a new binary in place of the old one, under load: no allowed request fails, none of the others gets in."""
    home = folder / "nginx"
    home.mkdir()
    nginx = space.inside(Nginx, home)
    (nginx.www / "page").write_text("hello")
    nginx.stop()  # in the foreground it puts no new binary in its place
    configuration = home / "nginx.conf"
    configuration.write_text(configuration.read_text().replace("daemon off;", ""))
    argv = [need.program("nginx"), "-e", str(home / "error.log"), "-p", str(home), "-c", str(configuration)]
    space.inside(subprocess.run, argv, check=True, timeout=30)
    pid_file = home / "nginx.pid"
    until(lambda: pid_file.exists() and pid_file.read_text(), "it runs")
    master = int(pid_file.read_text())
    gate_in(f"""
listeners:
  - {{name: web, listen: "127.0.0.1:{nginx.port}", path: guard, on_exit: open}}
default: deny
rules:
  - {{name: friends, action: allow, from: [127.0.1.0/24]}}
""")
    over, seen = threading.Event(), Counter[tuple[str, str]]()

    def get(source: str) -> str:
        with Sources().make(source) as client:
            client.settimeout(10)
            try:
                client.connect(("127.0.0.1", nginx.port))
                client.send(b"GET /page HTTP/1.0\r\n\r\n")
                received = b""
                while data := client.recv(4096):
                    received += data
            except OSError as err:
                return type(err).__name__
            return received.decode().rpartition("\r\n")[2]

    def load() -> None:
        while not over.is_set():
            for source in ("127.0.1.1", "127.0.2.1"):
                seen[source, get(source)] += 1

    def served_more() -> None:
        before = seen["127.0.1.1", "hello"]
        until(lambda: seen["127.0.1.1", "hello"] >= before + 50, "it goes on serving")

    thread = space.inside(_thread_of_namespace, load, space.fd)
    try:
        for _ in range(5):
            os.kill(master, signal.SIGHUP)
            served_more()
        before = master
        os.kill(before, signal.SIGUSR2)
        until(lambda: pid_file.exists() and pid_file.read_text().strip() not in ("", str(before)), "the new one runs")
        master = int(pid_file.read_text())
        served_more()
        os.kill(before, signal.SIGQUIT)
        until(lambda: not is_running(before), "the old one has gone")
        served_more()
    finally:
        over.set()
        thread.join()
        os.kill(master, signal.SIGTERM)
        until(lambda: not is_running(master), "it has ended")
    assert set(seen) == {("127.0.1.1", "hello"), ("127.0.2.1", "ConnectionRefusedError")}
    assert seen["127.0.1.1", "hello"] == len((home / "access.log").read_text().splitlines())


def _restart(nginx: Nginx, folder: Path) -> Process:
    """Start nginx once more with the configuration it had."""
    home = nginx.folder
    return Process([need.program("nginx"), "-e", "stderr", "-p", str(home), "-c", f"{home}/nginx.conf"], folder, "nginx")


@pytest.mark.needs("sshd", "ssh", "ssh-keygen")
def test_sshd_is_guarded_by_name_of_the_client(space: Namespace, gate_in: Callable[..., Gate], folder: Path) -> None:
    """A real login from an allowed address, and from others not even a banner; sshd logs the real address."""
    home = folder / "sshd"
    home.mkdir()
    with space.inside(Sshd, home) as sshd:
        gate_in(f"""
listeners:
  - {{name: ssh, listen: "127.0.0.1:{sshd.port}", path: guard, on_exit: open}}
default: deny
rules:
  - {{name: friends, action: allow, from: [127.0.1.0/24]}}
""")

        def login(source: str) -> subprocess.CompletedProcess[str]:
            options = sshd.client_options("127.0.0.1", sshd.port)
            argv = [need.program("ssh"), *options, f"-oBindAddress={source}", "127.0.0.1", "echo", "in"]
            return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)

        assert space.inside(login, "127.0.1.7").stdout == "in\n"
        refused = space.inside(login, "127.0.2.7")
        assert refused.returncode == 255
        assert "refused" in refused.stderr
        assert "Connection from 127.0.1.7" in sshd.output()
        assert "127.0.2.7" not in sshd.output()


def test_closed_outlives_us_and_is_taken_over(space: Namespace, gate_in: Callable[..., Gate], folder: Path) -> None:
    """`on_exit: closed`: after kill -9 the last policy stays in force; the next start takes the link over, with a new policy.

    A policy that guards nothing takes it away.
    """
    port, relayed = free_port(), free_port()
    text = guarding(port, "closed", f'  - {{name: web, listen: "10.0.0.1:{relayed}", backend: 127.0.0.1:9}}\n')
    with space.inside(serve, port):
        gate = gate_in(text)
        assert reaches(space, FRIEND, "10.0.0.1", port) is True
        assert reaches(space, FRIEND_6, "2001:db8::1", port) is True
        assert reaches(space, FOE, "10.0.0.1", port) is False
        assert reaches(space, SILENT, "10.0.0.1", port) is None
        offspring = [*gate.worker_pids(), gate.observer_pid()]
        gate.signal(signal.SIGKILL)
        until(lambda: not any(map(is_running, offspring)), "all processes are gone")
        before = programs(space)
        assert len(before) == 1
        assert reaches(space, FRIEND, "10.0.0.1", port) is True
        assert reaches(space, FOE, "10.0.0.1", port) is False
        assert reaches(space, SILENT, "10.0.0.1", port) is False
        assert reaches(space, FRIEND, "10.0.0.1", relayed) is False
        second = gate_in(text.replace("10.0.1.0/24", "10.0.2.0/24"))
        assert len(programs(space)) == 1
        assert programs(space) != before
        assert reaches(space, FRIEND, "10.0.0.1", port) is False
        assert reaches(space, FOE, "10.0.0.1", port) is True
        assert second.stop() == 0
        assert reaches(space, FRIEND, "10.0.0.1", port) is False
        third = gate_in("kernel: off\n" + text.split("listeners:")[0] + f"""
listeners: [{{name: web, listen: "10.0.0.1:{relayed}", backend: 127.0.0.1:9}}]
{RULES}""")
        assert "still in force" in third.output()
        third.stop()
        fourth = gate_in(guarding(port, "open"))
        assert reaches(space, FOE, "10.0.0.1", port) is False
        fourth.signal(signal.SIGKILL)
        until(lambda: programs(space) == [], "nothing is left")
        assert reaches(space, FOE, "10.0.0.1", port) is True


def test_a_reload_changes_what_outlives_us(space: Namespace, gate_in: Callable[..., Gate]) -> None:
    """From open to closed and back, without a gap; a port turns from relayed to guarded and its owner can have it."""
    port = free_port()
    with made_in(space, TcpBackend) as backend:
        relayed = f"""
kernel: require
listeners: [{{name: service, listen: "10.0.0.1:{port}", backend: "{backend.address}"}}]
{RULES}"""
        gate = gate_in(relayed)
        assert look(space, FRIEND, "10.0.0.1", port) == "allow"
        assert gate.reload(guarding(port, "closed"))["success"]
        assert reaches(space, FRIEND, "10.0.0.1", port) is False, "nobody listens there now"
        with space.inside(serve, port):
            assert reaches(space, FRIEND, "10.0.0.1", port) is True
            assert reaches(space, FOE, "10.0.0.1", port) is False
            assert gate.reload(guarding(port, "open"))["success"]
            gate.signal(signal.SIGKILL)
            until(lambda: programs(space) == [], "nothing is left")
            assert reaches(space, FOE, "10.0.0.1", port) is True


def test_a_listener_is_not_guarded_by_a_reload_that_has_no_kernel(space: Namespace, gate_in: Callable[..., Gate]) -> None:
    """A file that guards is not applied by a service that was started without the kernel's part: it says that takes a restart."""
    port, guarded = free_port(), free_port()
    gate = gate_in(f'listeners: [{{name: web, listen: "10.0.0.1:{port}", backend: 127.0.0.1:9}}]\n{RULES}')
    outcome = gate.reload(guarding(guarded, "open"))
    assert not outcome["success"]
    assert "takes a restart" in outcome["error"]


def test_datagrams_are_guarded(space: Namespace, gate_in: Callable[..., Gate]) -> None:
    """UDP: what is allowed arrives with its real address, what is denied gets an ICMP error, what is dropped gets nothing."""
    port = free_port()
    with space.inside(serve, port, socket.SOCK_DGRAM) as service:
        gate_in(guarding(port, "open", protocol="udp"))

        def send(source: str) -> str:
            with Sources().make(source, socket.SOCK_DGRAM) as client:
                client.connect(("10.0.0.1", port))
                client.send(source.encode())
                poll = select.poll()
                poll.register(client, select.POLLIN)
                return "refused" if poll.poll(200) else ""

        assert [space.inside(send, source) for source in (FOE, SILENT, FRIEND)] == ["refused", "", ""]
        service.settimeout(5)
        data, address = service.recvfrom(64)
        assert (data.decode(), address[0]) == (FRIEND, f"::ffff:{FRIEND}")
        service.setblocking(False)
        with pytest.raises(BlockingIOError):
            service.recv(1)


def test_closed_needs_the_bpf_file_system(run_gate: Callable[..., Gate], folder: Path) -> None:
    """Where nothing can be pinned, `on_exit: closed` is not promised: it does not start and says what to mount."""
    bare = Namespace(["10.0.0.0/8"])
    home: Any = folder / "bare"
    home.mkdir()
    if os.path.ismount("/sys/fs/bpf"):
        bare.close()
        return
    gate = bare.inside(Gate, home, guarding(free_port(), "closed"))
    assert gate.wait(20) == 3
    assert "mount -t bpf bpf /sys/fs/bpf" in gate.output()
    assert bpf.attached(bare.fd) == []
    gate.stop()
    bare.close()


# ---------------------------------------------------------------------- live sessions that are somebody else's


class Visits:
    """A service at a port of both families, and connections to it that stay open, all in the namespace. Owns its sockets."""

    def __init__(self) -> None:
        self.port = free_port()
        self._listening = serve(self.port)
        self._listening.settimeout(5)
        self._sockets = [self._listening]

    def come(self, source: str, host: str = "10.0.0.1") -> tuple[socket.socket, socket.socket]:
        """Return both ends of a connection: the visitor's and the service's."""
        visitor = Sources().make(source)
        visitor.settimeout(5)
        visitor.connect((host, self.port))
        service = self._listening.accept()[0]
        service.settimeout(5)
        self._sockets += [visitor, service]
        return visitor, service

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


def still_talks(ends: tuple[socket.socket, socket.socket]) -> bool:
    """Whether what the visitor says arrives; ``False``: both ends have learnt that it is over."""
    visitor, service = ends
    try:
        visitor.send(b"well?")
        return service.recv(64) == b"well?"
    except (ConnectionResetError, ConnectionAbortedError, BrokenPipeError):
        return False


def ask_daemon(gate: Gate, *argv: str, code: int = 0) -> Any:
    """Run a command that asks this gate, and return its document."""
    done = gatekeeper(*argv, "--control", str(gate.control_path), "--json")
    assert done.code == code, done
    return json.loads(done.out)


def sessions(gate: Gate, *argv: str) -> list[dict[str, Any]]:
    """Live sessions as `gatekeeper sessions` has them."""
    rows: list[dict[str, Any]] = ask_daemon(gate, "sessions", *argv)["sessions"]
    return rows


@pytest.fixture
def visits(space: Namespace) -> Iterator[Visits]:
    """A service that is going to be guarded."""
    made = space.inside(Visits)
    yield made
    made.close()


@pytest.fixture
def stranger(space: Namespace) -> Iterator[Visits]:
    """A service that is in no policy."""
    made = space.inside(Visits)
    yield made
    made.close()


def test_sessions_of_guarded_listeners_are_shown_beside_relayed_ones(
    space: Namespace, gate_in: Callable[..., Gate], visits: Visits, stranger: Visits
) -> None:
    """With their rule, addresses, bytes, and what TCP knows; IPv4, IPv6, and IPv4 at a socket of both; filters choose among them."""
    relayed = free_port()
    with made_in(space, TcpBackend) as backend:
        gate = gate_in(guarding(
            visits.port, "open", f'  - {{name: web, listen: "10.0.0.1:{relayed}", backend: "{backend.address}"}}\n'
        ))  # fmt: skip
        first = space.inside(visits.come, FRIEND)
        second = space.inside(visits.come, FRIEND_6, "2001:db8::1")
        first[0].send(b"x" * 1000)
        assert first[1].recv(1000)
        first[1].send(b"y" * 300)
        first[0].recv(1000)
        space.inside(stranger.come, FRIEND)
        with space.inside(Sources().make, FRIEND) as through:
            space.inside(through.connect, ("10.0.0.1", relayed))
            through.settimeout(5)
            assert ask(through) == b"are you there?"
            rows = sessions(gate, "--details")
            paths = sorted((row["listener"], row["path"]) for row in rows)
            assert paths == [("service", "guard"), ("service", "guard"), ("web", "relay")]
        (row,) = [row for row in rows if row["src_ip"] == FRIEND and row["path"] == "guard"]
        assert (row["src_port"], row["dest_ip"], row["dest_port"]) == (first[0].getsockname()[1], "10.0.0.1", visits.port)
        assert (row["rule"], row["state"], row["bytes_in"], row["bytes_out"]) == ("friends", "open", 1000, 300)
        assert row["client_tcp"]["rtt_us"] > 0
        assert row["backend_tcp"] is None
        assert [row["src_ip"] for row in sessions(gate, "--source", "2001:db8::/32")] == [FRIEND_6]
        assert sessions(gate, "--state", "client_closed") == []
        second[0].shutdown(socket.SHUT_WR)
        until(lambda: [row["src_ip"] for row in sessions(gate, "--stuck")] == [FRIEND_6], "one side has closed")


def test_sessions_of_guarded_listeners_can_be_cut(space: Namespace, gate_in: Callable[..., Gate], visits: Visits) -> None:
    """Those that are meant, both ends learn of it, the others go on; counted, and in the audit log as the kernel's."""
    gate = gate_in(guarding(visits.port, "open"))
    first, second = space.inside(visits.come, FRIEND), space.inside(visits.come, "10.0.1.2")
    ask_daemon(gate, "cut", "--source", FRIEND)
    assert not still_talks(first)
    assert still_talks(second)
    (event,) = gate.wait_for_audit(1, "connection")
    assert (event["src_ip"], event["src_port"], event["dest_port"]) == (FRIEND, first[0].getsockname()[1], visits.port)
    assert {key: event["gatekeeper"][key] for key in ("listener", "action", "rule", "end", "enforced_by")} == {
        "listener": "service", "action": "allow", "rule": "friends", "end": "cut", "enforced_by": "kernel",
    }  # fmt: skip
    assert value(space, gate, "gatekeeper_session_ends_total", listener="service", end="cut") == 1
    assert [row["src_ip"] for row in sessions(gate)] == ["10.0.1.2"]


def test_a_new_policy_reaches_sessions_that_are_open(
    space: Namespace, gate_in: Callable[..., Gate], visits: Visits, stranger: Visits
) -> None:
    """Whom it refuses is cut off at once and told of under the rule that had let it in; others, and strangers, do not notice."""
    text = guarding(visits.port, "open")
    gate = gate_in(text)
    sources = [(FRIEND, "10.0.0.1"), ("10.0.1.2", "10.0.0.1"), (FRIEND_6, "2001:db8::1")]
    first, second, third = (space.inside(visits.come, *each) for each in sources)
    other = space.inside(stranger.come, FRIEND)
    outcome = gate.reload(text.replace("10.0.1.0/24", "10.0.1.2"))
    assert outcome["success"]
    assert (outcome["judged"], outcome["ended"]) == (3, 1)
    assert [still_talks(ends) for ends in (first, second, third, other)] == [False, True, True, True]
    (event,) = gate.wait_for_audit(1, "connection")
    assert (event["src_ip"], event["gatekeeper"]["rule"], event["gatekeeper"]["end"]) == (FRIEND, "friends", "revoked")
    assert value(space, gate, "gatekeeper_session_ends_total", listener="service", end="revoked") == 1


def test_a_reload_that_keeps_sessions_keeps_guarded_ones(
    space: Namespace, gate_in: Callable[..., Gate], visits: Visits
) -> None:
    """`on_reload: keep`: who is in stays in, newcomers are refused."""
    text = "on_reload: keep\n" + guarding(visits.port, "open")
    gate = gate_in(text)
    first = space.inside(visits.come, FRIEND)
    assert gate.reload(text.replace("10.0.1.0/24", "10.0.1.2"))["success"]
    assert still_talks(first)
    assert reaches(space, FRIEND, "10.0.0.1", visits.port) is False


def test_a_ban_is_in_the_kernel_and_reaches_guarded_sessions(
    space: Namespace, gate_in: Callable[..., Gate], visits: Visits
) -> None:
    """Addresses and networks, both families, before there is a connection; lifted, they are let in again; counted as bans."""
    relayed = free_port()
    more = f'  - {{name: web, listen: "10.0.0.1:{relayed}", backend: 127.0.0.1:9}}\n'
    gate = gate_in(guarding(visits.port, "open", more))
    first, second = space.inside(visits.come, FRIEND), space.inside(visits.come, "10.0.1.2")
    third = space.inside(visits.come, FRIEND_6, "2001:db8::1")
    for source in (FRIEND, "2001:db8:1::/64"):
        told = ask_daemon(gate, "ban", source)
        assert (told["ended"], told["kernel"]) == (1, True)
    until(lambda: not still_talks(first) and not still_talks(third), "the banned have learnt of it")
    assert still_talks(second)
    assert reaches(space, FRIEND, "10.0.0.1", visits.port) is False
    assert reaches(space, FRIEND_6, "2001:db8::1", visits.port) is False
    assert reaches(space, "10.0.1.2", "10.0.0.1", visits.port) is True
    assert look(space, FRIEND, "10.0.0.1", relayed) == "refused"
    until(lambda: value(space, gate, "gatekeeper_kernel_refused_attempts_total", listener="web", action="deny", rule="ban") == 1,
          "a ban is counted as one")  # fmt: skip
    ends = [event["gatekeeper"]["end"] for event in gate.wait_for_audit(2, "connection")]
    assert ends == ["banned", "banned"]
    assert {event["gatekeeper"]["reason"] for event in gate.wait_for_audit(3, "refusal")} == {"ban"}
    ask_daemon(gate, "unban", FRIEND)
    until(lambda: reaches(space, FRIEND, "10.0.0.1", visits.port) is True, "the ban is lifted")


def test_a_program_that_comes_later_is_noticed(space: Namespace, gate_in: Callable[..., Gate]) -> None:
    """Said, and to be seen in a metric and in the status, for as long as it is there; we go on, and reloads work."""
    port = free_port()
    text = guarding(port, "open")
    gate = gate_in(text)
    assert value(space, gate, "gatekeeper_kernel_other_programs") == 0
    code = Assembler()
    code.do(R0, "=", 1)
    code.exit()
    program = bpf.load(code.assemble({}), code.listing())
    link = bpf.attach(program, space.fd)
    until(lambda: value(space, gate, "gatekeeper_kernel_other_programs") == 1, "it is noticed")
    assert "another sk_lookup program" in gate.output()
    assert ask_daemon(gate, "status")["kernel_others"] == 1
    assert gate.reload(text)["success"]
    os.close(link)
    os.close(program)
    until(lambda: value(space, gate, "gatekeeper_kernel_other_programs") == 0, "it is gone")
    assert "no other sk_lookup programs" in gate.output()


def test_an_upgrade_keeps_the_kernel_refusing(space: Namespace, gate_in: Callable[..., Gate], visits: Visits) -> None:
    """While the new code takes over, and afterwards: nobody who is refused gets in, drops stay silent, sessions and counts go on."""
    relayed = free_port()
    with made_in(space, TcpBackend) as backend:
        gate = gate_in("kernel: require" + guarding(
            visits.port, "open", f'  - {{name: web, listen: "10.0.0.1:{relayed}", backend: "{backend.address}"}}\n'
        ))  # fmt: skip
        first = space.inside(visits.come, FRIEND)
        ask_daemon(gate, "ban", "10.0.1.9")
        (before,) = programs(space)
        over, seen = threading.Event(), Counter[tuple[str, str]]()

        def load() -> None:
            while not over.is_set():
                for source in (FRIEND, FOE, "10.0.1.9"):
                    seen[source, look_here(source, "10.0.0.1", relayed)] += 1

        thread = space.inside(_thread_of_namespace, load, space.fd)
        try:
            ask_daemon(gate, "upgrade")
            until(lambda: programs(space) != [before], "the new one's program is in force")
            until(lambda: seen[FOE, "refused"] > 20, "it goes on")
        finally:
            over.set()
            thread.join()
        assert set(seen) == {(FRIEND, "allow"), (FOE, "refused"), ("10.0.1.9", "refused")}
        assert len(programs(space)) == 1
        assert still_talks(first)
        assert look(space, SILENT, "10.0.0.1", relayed) == "silence"
        assert reaches(space, FOE, "10.0.0.1", visits.port) is False
        assert value(space, gate, "gatekeeper_kernel_enforcing") == 1
        refused = seen[FOE, "refused"]

        def counted_and_told() -> bool:
            counted = value(space, gate, "gatekeeper_kernel_refused_attempts_total", listener="web", action="deny", rule="")
            assert counted == refused
            lines = [event for event in gate.audit("refusal") if event["src_ip"] == FOE and event["dest_port"] == relayed]
            left_out = [event["gatekeeper"] for event in gate.audit("refusals_suppressed")]
            assert len(lines) + sum(each["count"] for each in left_out if (each["listener"], each["reason"]) == ("web", "default")) == refused
            return True

        until(counted_and_told, "every refusal is counted and told, those during the upgrade too")
        gate.signal(signal.SIGKILL)
        until(lambda: programs(space) == [], "nothing is left")
