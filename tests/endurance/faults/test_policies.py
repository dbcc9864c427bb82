"""A policy that cannot be had: the old one stands, the reason is said, and the next good reload works."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.endurance.faults.watch import Steady, open_policy
from tests.supervisor.service import Service
from tests.support import need
from tests.support.backends import TcpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.plain_user import plain_user
from tests.support.ports import free_port
from tests.support.process import Process, children, command_line, is_running
from tests.support.wait import until

RunGate = Callable[..., Gate]
BIG_LIST = 400_000  # entries, some tenths of a second of work for the compiler


@pytest.fixture
def backend() -> Iterator[TcpBackend]:
    """An echo service."""
    with TcpBackend() as made:
        yield made


def compilers(pid: int) -> list[int]:
    """Return the pids of the compilers of a supervisor."""
    return [child for child in children(pid) if is_running(child) and "supervisor.compile" in command_line(child)]


def with_big_list(text: str, folder: Path, entries: int = BIG_LIST) -> str:
    """Return a rule file that takes the compiler a while."""
    path = folder / f"{entries}.txt"
    if not path.exists():
        path.write_text("".join(f"{10 + (n >> 16)}.{n >> 8 & 255}.{n & 255}.{n * 37 & 254}\n" for n in range(entries)))
        path.chmod(0o644)
    return f"{text}sets: {{many: {{file: {path}}}}}\nrules: [{{name: many, action: deny, from: many}}]\n"


def missing(path: Path) -> None:
    """Nothing."""
    path.unlink()


def directory(path: Path) -> None:
    """A folder of that name."""
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    """A pipe that nobody writes to."""
    path.unlink()
    os.mkfifo(path, 0o644)


def device(path: Path) -> None:
    """A file without an end."""
    path.unlink()
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    """A file of 1 GiB, most of it zeros."""
    with path.open("ab") as file:
        file.truncate(1 << 30)


def empty(path: Path) -> None:
    """A file without a byte."""
    path.write_text("")


def binary(path: Path) -> None:
    """No text at all."""
    path.write_bytes(bytes(range(256)) * 16)


SPOILED: list[tuple[Callable[[Path], None], str]] = [
    (missing, "No such file or directory"),
    (directory, "a directory"),
    (pipe, "not a regular file"),
    (device, "not a regular file"),
    (huge, "MiB"),
    (empty, "not a policy that can be applied"),
    (binary, "not a policy that can be applied"),
]


def test_a_rule_file_that_is_none(run_gate: RunGate, backend: TcpBackend) -> None:
    """Whatever stands where the rule file was, sessions and verdicts stay, and a good file is taken again."""
    port = free_port()
    text = open_policy(port, backend.address)
    gate = run_gate(text)
    with Steady(port) as steady:
        for spoil, why in SPOILED:
            spoil(gate.rules_path)
            outcome = gate.reload()
            assert not outcome["success"], spoil.__name__
            assert why in outcome["error"], spoil.__name__
            gate.wait_for_value(0, "gatekeeper_config_last_reload_successful")
            with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
                assert ask(client) == b"are you there?"
            if gate.rules_path.is_dir():
                gate.rules_path.rmdir()
            assert gate.reload(text)["success"], spoil.__name__
            gate.wait_for_value(1, "gatekeeper_config_last_reload_successful")
        steady.go_on()


def test_a_rule_file_that_root_alone_may_read(folder: Path, backend: TcpBackend) -> None:
    """A service without privileges that may not read its rule file keeps its policy."""
    user, port = plain_user(folder), free_port()
    user.own(folder)
    text = open_policy(port, backend.address)
    gate = Gate(folder, text, prefix=user.prefix, python=user.python, env=user.env)
    try:
        gate.wait_ready()
        gate.rules_path.chmod(0)
        outcome = gate.reload()
        assert (outcome["success"], "Permission denied" in outcome["error"]) == (False, True)
        assert gate.reload(text)["success"]
    finally:
        gate.stop()


@pytest.mark.timeout(400)
def test_a_file_that_changes_while_it_is_read(run_gate: RunGate, backend: TcpBackend, folder: Path, long: bool) -> None:
    """A file that is being written in place is taken as it was at some moment, or refused: never half of it, never a hang."""
    port = free_port()
    text = open_policy(port, backend.address)
    gate = run_gate(text)
    whole = gate.rules_path.read_text()
    writing = threading.Event()
    writing.set()

    def write() -> None:
        while writing.is_set():
            gate.rules_path.write_text(whole[: len(whole) // 2])
            gate.rules_path.write_text(whole)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        with Steady(port) as steady:
            outcomes = [gate.reload() for _ in range(50 if long else 4)]
            steady.go_on()
    finally:
        writing.clear()
        writer.join()
    assert all(outcome["success"] or outcome["error"] for outcome in outcomes)
    assert len({outcome["policy"] for outcome in outcomes}) == 1
    assert gate.reload(text)["success"]


class TestCompilers:
    """The compiler comes to harm."""

    def test_it_is_killed(self, run_gate: RunGate, backend: TcpBackend, folder: Path) -> None:
        """The reload has failed, for that reason, and can be tried again."""
        port = free_port()
        text = open_policy(port, backend.address)
        gate = run_gate(text)
        gate.write(with_big_list(text, folder))
        gate.signal(signal.SIGHUP)
        (compiler,) = until(lambda: compilers(gate.pid), "there is a compiler")
        os.kill(compiler, signal.SIGKILL)
        (failed,) = gate.wait_for_audit(1, "reload")
        assert "the compiler of" in failed["gatekeeper"]["error"]
        assert "was killed" in failed["gatekeeper"]["error"]
        gate.wait_for_value(0, "gatekeeper_config_last_reload_successful")
        assert gate.reload(with_big_list(text, folder))["success"]

    def test_it_stands_still(self, run_gate: RunGate, backend: TcpBackend, folder: Path) -> None:
        """Everything goes on meanwhile, a worker that dies is replaced, and the service stops when it is told to."""
        port = free_port()
        text = open_policy(port, backend.address)
        gate = run_gate(text)
        gate.write(with_big_list(text, folder))
        gate.signal(signal.SIGHUP)
        (compiler,) = until(lambda: compilers(gate.pid), "there is a compiler")
        os.kill(compiler, signal.SIGSTOP)
        gate.signal(signal.SIGHUP)
        (worker,) = gate.worker_pids()
        os.kill(worker, signal.SIGKILL)
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
            assert ask(client) == b"are you there?"
        assert gate.get("/readyz")[0] == 200
        gate.signal(signal.SIGTERM)
        assert gate.wait(10) == 0
        until(lambda: not is_running(compiler), "the compiler is gone too")

    def test_it_needs_too_much_memory(self, folder: Path, backend: TcpBackend) -> None:
        """A policy that is too big is refused with the limit, and a smaller one is taken."""
        port = free_port()
        text = open_policy(port, backend.address)
        # An ordinary file takes about 50 MiB, most of it libraries; two million addresses take more than 100.
        compiler = [sys.executable, "-P", "-m", "gatekeeper.supervisor.compile", "--memory", str(80 << 20)]
        service = Service(folder, text, workers=1, compiler=compiler)
        try:
            service.ready()
            service.reload(with_big_list(text, folder, 5 * BIG_LIST))
            service.says(r"takes more than 80 MiB of memory|was killed|without a report")
            service.says("reload failed")
            service.reload(text)
            service.says("reloaded: serving door")
        finally:
            service.stop()

    def test_no_process_can_be_started(self, run_gate: RunGate, backend: TcpBackend) -> None:
        """A supervisor without descriptors to start the compiler with says so, and goes on."""
        port = free_port()
        text = open_policy(port, backend.address)
        gate = run_gate(text)
        before = resource.prlimit(gate.pid, resource.RLIMIT_NOFILE)
        try:
            resource.prlimit(gate.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        except PermissionError:
            pytest.skip("may not lower the limit of the supervisor")
        outcome = gate.reload()
        assert not outcome["success"]
        assert "Too many open files" in outcome["error"]
        resource.prlimit(gate.pid, resource.RLIMIT_NOFILE, before)
        assert gate.reload(text)["success"]


def test_a_port_that_somebody_took(run_gate: RunGate, backend: TcpBackend) -> None:
    """A new listener whose port is taken fails the reload with the owner's name; once it is free the reload works."""
    port, taken = free_port(), free_port()
    text = open_policy(port, backend.address)
    wider = text.replace("default", f'  - {{name: more, listen: "127.0.0.1:{taken}", backend: "{backend.address}"}}\ndefault')
    gate = run_gate(text)
    with Steady(port) as steady:
        with socket.create_server(("127.0.0.1", taken)):
            outcome = gate.reload(wider)
            assert not outcome["success"]
            assert f"cannot listen on 127.0.0.1:{taken} (tcp): the address is in use by" in outcome["error"]
            gate.wait_for_value(0, "gatekeeper_config_last_reload_successful")
        steady.go_on()
        assert gate.reload(wider)["success"]
        with Sources().connect("127.0.0.1", "127.0.0.1", taken) as client:
            assert ask(client) == b"are you there?"


class TestState:
    """The state directory cannot be used: it does not start, and says why."""

    def refused(self, folder: Path, state: Path, prefix: tuple[str, ...] = ()) -> str:
        """Try to start with this state directory and return what was said."""
        text = f"state: {state}\n" + open_policy(free_port(), "127.0.0.1:1")
        gate = Gate(folder, text, prefix=prefix)
        try:
            assert gate.wait(20) == 3
            return gate.output()
        finally:
            gate.stop()

    def test_it_is_a_file(self, folder: Path) -> None:
        (folder / "state").write_text("")
        assert f"cannot use the state directory {folder}/state: " in self.refused(folder, folder / "state")

    @pytest.mark.needs_root
    def test_it_is_full(self, folder: Path) -> None:
        disk = folder / "disk"
        disk.mkdir()
        Process([need.program("mount"), "-t", "tmpfs", "-o", "size=4k,mode=0777", "tmpfs", str(disk)], folder, "mount").wait()
        try:
            (disk / "filler").write_bytes(bytes(4096))
            assert "No space left on device" in self.refused(folder, disk)
        finally:
            Process([need.program("umount"), "--lazy", str(disk)], folder, "umount").wait()
