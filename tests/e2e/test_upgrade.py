"""`gatekeeper upgrade`: new code takes over in place while everything goes on, or it does not and nothing has changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask, close_all, nobody_listens
from tests.support.gate import PYTHON_PATH, ROOT, Gate
from tests.support.load import Load
from tests.support.plain_user import plain_user
from tests.support.ports import free_port
from tests.support.process import children, command_line, is_running
from tests.support.wait import until

pytestmark = pytest.mark.timeout(180)

SOURCES = [f"127.0.{number}.1" for number in range(1, 40)]


@pytest.fixture
def backend() -> Iterator[TcpBackend]:
    """An echo backend."""
    with TcpBackend() as serving:
        yield serving


def policy(port: int, backend: TcpBackend, more: str = "", listener: str = "") -> str:
    """Return a policy that lets everybody in but 127.9.0.0/16."""
    return f"""
listeners:
  - {{name: web, listen: "127.0.0.1:{port}", backend: "{backend.address}"{listener}}}
{more}
default: deny
rules:
  - {{name: nine, action: deny, from: 127.9.0.0/16}}
  - {{name: everybody, action: allow}}
"""


def upgrade(gate: Gate, *options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command, and return what it said."""
    return subprocess.run(
        [sys.executable, "-m", "gatekeeper", "upgrade", "--control", str(gate.control_path), *options],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH, **(env or {})}, capture_output=True, text=True, timeout=150,
    )  # fmt: skip


def descriptors(pid: int) -> list[str]:
    """Return what the descriptors of a process are, the same kind the same word."""
    names = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return sorted(name.partition(":[")[0] for name in names)


class Growth(threading.Thread):
    """Scrapes again and again; ``smaller`` are counters that went back."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.smaller: list[str] = []
        self.scrapes = 0
        self._gate = gate
        self._over = threading.Event()

    def run(self) -> None:
        latest: dict[Any, float] = {}
        while not self._over.wait(0.02):
            try:
                samples = self._gate.scrape().samples
            except OSError:
                continue  # between two observers
            self.scrapes += 1
            for key, value in samples.items():
                if key[0].startswith("gatekeeper_") and key[0].endswith(("_total", "_count", "_bucket")):
                    if value < latest.get(key, 0.0):
                        self.smaller.append(f"{key}: {latest[key]:g} -> {value:g}")
                    latest[key] = value

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_under_load_nobody_is_refused_and_no_session_ends(
    run_gate: Callable[..., Gate], backend: TcpBackend, workers: int
) -> None:
    """Short sessions stream through, long ones and UDP clients stay; same process, growing counters, a complete audit log."""
    port = free_port()
    with UdpBackend() as udp, ExitStack() as ends:
        dns = f'  - {{name: dns, protocol: udp, listen: "127.0.0.1:{port}", backend: "{udp.address}"}}'
        gate = run_gate(policy(port, backend, dns), workers=workers)
        long_lived = [Sources().connect(source, "127.0.0.1", port) for source in SOURCES]
        flows = [ends.enter_context(Sources().make(source, socket.SOCK_DGRAM)) for source in SOURCES]
        for flow in flows:
            flow.connect(("127.0.0.1", port))
        for each in (*long_lived, *flows):
            assert ask(each) == b"are you there?"
        pid, old = gate.pid, gate.worker_pids()
        with Growth(gate) as growth, Load("127.0.0.1", port, SOURCES) as load:
            load.wait_for_more()
            for number in range(2):
                done = upgrade(gate, "--no-wait", "--json")
                assert done.returncode == 0, done.stderr
                assert json.loads(done.stdout)["pid"] == pid
                load.wait_for_more(100)
                assert len(gate.worker_pids()) >= 2 * workers, f"upgrade {number}: old workers drain"
                for each in long_lived:
                    assert ask(each) == b"are you there?"
                for flow in flows:
                    assert ask(flow) == b"are you there?"
            assert set(old) <= set(gate.worker_pids()), "those of the first generation still have sessions"
            for _ in range(20):
                assert Sources().is_refused("127.9.0.1", "127.0.0.1", port)
            close_all(long_lived)
            until(lambda: not set(old) & set(gate.worker_pids()), "the old workers have left")
            until(lambda: len(gate.worker_pids()) == workers, "only the latest workers are left")
        assert not load.failures
        assert not growth.smaller
        assert growth.scrapes > 5
        sessions = load.done + len(long_lived)
        gate.wait_for_value(sessions, "gatekeeper_connections_total", listener="web", action="allow")
        gate.wait_for_value(20, "gatekeeper_connections_total", listener="web", action="deny")
        gate.wait_for_value(0, "gatekeeper_sessions", listener="web")
        gate.wait_for_value(0, "gatekeeper_accept_errors_total")
        assert backend.connections == sessions
        scrape = gate.scrape()
        assert scrape.value("gatekeeper_session_duration_seconds_count", listener="web") == sessions
        lost = scrape.value("gatekeeper_events_lost_total")
        assert lost == 0


        def lines() -> list[dict[str, Any]]:
            return [event for event in gate.audit("connection") if event["gatekeeper"]["listener"] == "web"]

        def complete() -> bool:
            assert len(lines()) == sessions
            return True

        until(complete, "every session has its line")
        web = lines()
        flow_ids = [event["flow_id"] for event in gate.audit("connection")]
        assert len(set(flow_ids)) == len(flow_ids)
        assert {event["gatekeeper"]["end"] for event in web} == {"finished"}
        assert sum(event["gatekeeper"]["bytes_in"] for event in gate.audit("connection") if event["proto"] == "TCP") == scrape.value(
            "gatekeeper_session_bytes_total", listener="web", direction="in"
        )
        assert [event["gatekeeper"]["success"] for event in gate.audit("upgrade")] == [True, True]
        assert gate.exit_code() is None


def test_three_upgrades_leave_nothing_behind(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """After each, the supervisor has the same descriptors and children as before, and the same name in the process list."""
    port = free_port()
    gate = run_gate(policy(port, backend, f'  - {{name: door, listen: "unix:{backend.port}.sock", backend: "{backend.address}"}}'.replace("unix:", "unix:/tmp/gk-")), workers=2)
    before, name = descriptors(gate.pid), command_line(gate.pid)
    for number in range(3):
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
            assert ask(client) == b"are you there?"
        assert upgrade(gate).returncode == 0
        until(lambda: len(children(gate.pid)) == 3, "two workers and an observer are left")
        until(lambda: len(descriptors(gate.pid)) <= len(before) + 1, f"no descriptor leaks, upgrade {number}")
        assert command_line(gate.pid) == name
    # The block of counters of those who are gone is all that is more.
    assert sorted(descriptors(gate.pid)) == sorted([*before, "/memfd:gatekeeper-counters-retired (deleted)"])
    gate.wait_for_value(3, "gatekeeper_connections_total", listener="web", action="allow")
    for worker in gate.worker_pids():
        assert "gatekeeper-handover" not in " ".join(descriptors(worker))


def test_the_command_tells_how_far_it_is(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """It waits until the old workers have left, which they must when the drain timeout is over, and says so meanwhile."""
    port = free_port()
    gate = run_gate(policy(port, backend))
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
        assert ask(client) == b"are you there?"
        done = upgrade(gate, "--drain-timeout", "2s")
        assert done.returncode == 0, done.stderr
        assert "can take over" in done.stderr
        assert "draining: 1 old worker with 1 session, for at most" in done.stderr
        assert "all old workers have left" in done.stderr
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert "1 of their sessions had not ended by themselves" in gate.output()
    gate.wait_for_value(1, "gatekeeper_session_ends_total", end="drained")
    gate.wait_notified("RELOADING=1")


def test_limits_count_the_sessions_of_old_workers(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """`max_sessions` holds over old and new workers together."""
    port = free_port()
    gate = run_gate(policy(port, backend, listener=", max_sessions: 3"))
    with ExitStack() as ends:
        for source in SOURCES[:2]:
            assert ask(ends.enter_context(Sources().connect(source, "127.0.0.1", port))) == b"are you there?"
        assert upgrade(gate, "--no-wait").returncode == 0
        assert ask(ends.enter_context(Sources().connect(SOURCES[2], "127.0.0.1", port))) == b"are you there?"
        assert Sources().is_refused(SOURCES[3], "127.0.0.1", port)
    until(lambda: not Sources().is_refused(SOURCES[3], "127.0.0.1", port), "there is room again")


def test_a_new_policy_reaches_sessions_of_old_workers(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """Whom a reload refuses is let go, also where an old worker has the session."""
    port = free_port()
    gate = run_gate(policy(port, backend))
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as innocent, Sources().connect("127.8.0.1", "127.0.0.1", port) as guilty:
        for client in (innocent, guilty):
            assert ask(client) == b"are you there?"
        assert upgrade(gate, "--no-wait").returncode == 0
        assert gate.reload(policy(port, backend).replace("127.9.0.0/16", "127.8.0.0/16"))["success"]
        with pytest.raises(ConnectionResetError):
            guilty.recv(1)
        assert ask(innocent) == b"are you there?"
    gate.wait_for_value(1, "gatekeeper_session_ends_total", end="revoked")


def test_signals_meanwhile_are_not_lost(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """A SIGHUP that comes during an upgrade reloads, before it or after it; a SIGTERM afterwards stops as ever."""
    port = free_port()
    gate = run_gate(policy(port, backend))
    reloads = len(gate.audit("reload"))
    over = threading.Event()

    def hang_up() -> None:
        while not over.wait(0.1):
            gate.signal(signal.SIGHUP)

    thread = threading.Thread(target=hang_up)
    thread.start()
    try:
        done = upgrade(gate)
    finally:
        over.set()
        thread.join()
    assert done.returncode == 0, done.stderr
    until(lambda: len(gate.audit("reload")) > reloads, "it was reloaded")
    assert all(event["gatekeeper"]["success"] for event in gate.audit("reload"))
    gate.signal(signal.SIGTERM)
    assert gate.wait() == 0


def test_an_upgrade_stops_with_the_service(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """A stop while old workers drain waits for their sessions, too; a second signal does not."""
    port = free_port()
    gate = run_gate(policy(port, backend))
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
        assert ask(client) == b"are you there?"
        assert upgrade(gate, "--no-wait").returncode == 0
        gate.signal(signal.SIGTERM)
        gate.wait_notified("STOPPING=1")
        assert ask(client) == b"are you there?"
        assert gate.exit_code() is None
    assert gate.wait() == 0


def test_an_old_worker_that_is_killed(run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """Its sessions are gone and counted, it gets no successor, and everybody else goes on."""
    port = free_port()
    gate = run_gate(policy(port, backend))
    (old,) = gate.worker_pids()
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
        assert ask(client) == b"are you there?"
        assert upgrade(gate, "--no-wait").returncode == 0
        os.kill(old, signal.SIGKILL)
        until(lambda: len(gate.worker_pids()) == 1, "only the new one is left")
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as other:
            assert ask(other) == b"are you there?"
    gate.wait_for_value(2, "gatekeeper_connections_total", action="allow")
    gate.wait_for_value(1, "gatekeeper_session_ends_total", end="error")
    gate.wait_for_value(0, "gatekeeper_worker_restarts_total")


# ---------------------------------------------------------------------- other code than the one that runs


class Installed:
    """A gate that runs a copy of the package, which a test may replace while it runs."""

    def __init__(self, folder: Path, run_gate: Callable[..., Gate], text: str, **options: Any) -> None:
        self.home = folder / "installed"
        shutil.copytree(ROOT / "gatekeeper", self.home / "gatekeeper", ignore=shutil.ignore_patterns("__pycache__"))
        self.env = {"PYTHONPATH": str(self.home), "PYTHONDONTWRITEBYTECODE": "1"}
        self.gate = run_gate(text, env=self.env, **options)

    def change(self, file: str, old: str, new: str) -> None:
        """Replace a text in a file of the package, which must be there once."""
        path = self.home / "gatekeeper" / file
        text = path.read_text()
        assert text.count(old) == 1, (file, old)
        path.write_text(text.replace(old, new))


VERSION = (ROOT / "gatekeeper" / "__init__.py").read_text().split('__version__ = "')[1].split('"')[0]


def test_another_version_takes_over(folder: Path, run_gate: Callable[..., Gate], backend: TcpBackend) -> None:
    """Afterwards the service says that it is the other version, and everything it does is done by that one."""
    port = free_port()
    installed = Installed(folder, run_gate, policy(port, backend))
    gate = installed.gate
    installed.change("__init__.py", f'"{VERSION}"', '"99.1"')
    done = upgrade(gate, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["before"], told["version"], told["pid"]) == (VERSION, "99.1", gate.pid)
    gate.wait_for_value(1, "gatekeeper_build_info", version="99.1")
    assert f"upgraded from {VERSION} to 99.1" in gate.output()
    (event,) = gate.audit("upgrade")
    assert (event["gatekeeper"]["before"], event["gatekeeper"]["version"]) == (VERSION, "99.1")


BROKEN = {
    "a syntax error": ("supervisor/supervisor.py", "class Supervisor:", "class Supervisor", "SyntaxError"),
    "a missing library": ("supervisor/crew.py", "import time\n", "import time\nimport no_such_library\n", "no_such_library"),
    "another state": ("supervisor/handover.py", "VERSION = 1\n", "VERSION = 2\n", "version 1, and this is gatekeeper"),
    "another field": ("supervisor/handover.py", "    shards: int\n", "    shards: int\n    more: int\n", "keys that this version knows: more"),
    "another snapshot": ("snapshot/layout.py", 'b"GKSNAP', 'b"GKSNAQ', "not a snapshot"),
    "a worker that does not start": ("proxy/worker.py", "def main(", "raise SystemExit(7)\n\n\ndef main(", "its worker exited with 7"),
    "an observer that does not start": ("observer/__main__.py", "def main(", "raise SystemExit(8)\n\n\ndef main(", "its observer exited with 8"),
    "it ends without a word": ("cli/run.py", '    if file == "-":', '    return 0\n    if file == "-":', "it exited with 0 without a result"),
    "an option that is gone": ("cli/run.py", '"--control"', '"--kontrol"', "No such option"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_code_changes_nothing_and_says_so(
    folder: Path, run_gate: Callable[..., Gate], backend: TcpBackend, what: str
) -> None:
    """The command says why and its exit code is 1; sessions, processes and sockets are what they were, and it is counted."""
    port = free_port()
    installed = Installed(folder, run_gate, policy(port, backend))
    gate = installed.gate
    file, old, new, reason = BROKEN[what]
    installed.change(file, old, new)
    before = children(gate.pid), descriptors(gate.pid)
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
        done = upgrade(gate)
        assert done.returncode == 1, done.stderr
        assert reason in done.stderr
        assert ask(client) == b"are you there?"
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
        assert ask(client) == b"are you there?"
    assert "upgrade failed: nothing has changed" in gate.output()
    assert (children(gate.pid), descriptors(gate.pid)) == before
    (event,) = gate.wait_for_audit(1, "upgrade")
    assert event["gatekeeper"]["success"] is False
    assert reason in event["gatekeeper"]["error"]
    gate.wait_for_value(1, "gatekeeper_upgrades_total", result="failed")
    installed.change(file, new, old)
    assert upgrade(gate).returncode == 0
    gate.wait_for_value(1, "gatekeeper_upgrades_total", result="done")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_is_killed_while_it_proves(
    folder: Path, run_gate: Callable[..., Gate], backend: TcpBackend, number: signal.Signals
) -> None:
    """Code that hangs can be ended by hand (by itself after a minute); nothing has changed then."""
    port = free_port()
    installed = Installed(folder, run_gate, policy(port, backend))
    gate = installed.gate
    installed.change("supervisor/rehearsing.py", "    why: str | None\n", "    import time; time.sleep(600)\n    why: str | None\n")
    known = set(children(gate.pid))
    with subprocess.Popen(
        [sys.executable, "-m", "gatekeeper", "upgrade", "--control", str(gate.control_path)],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH}, stderr=subprocess.PIPE, text=True,
    ) as asking:  # fmt: skip
        until(lambda: len(children(gate.pid)) == len(known) + 1, "the child is there")
        refused = upgrade(gate)
        assert (refused.returncode, "under way already" in refused.stderr) == (3, True)
        (child,) = set(children(gate.pid)) - known
        until(lambda: "import time" not in command_line(child) and is_running(child), "it runs")
        time.sleep(0)  # it may be killed at any time
        os.kill(child, number)
        _out, said = asking.communicate(timeout=60)
        assert asking.returncode == 1
        assert f"was killed by {number.name}" in said or "told to stop" in said
    assert set(children(gate.pid)) == known
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as client:
        assert ask(client) == b"are you there?"


@pytest.mark.slow
def test_new_workers_that_fail_leave_the_old_ones_in_charge(
    folder: Path, run_gate: Callable[..., Gate], backend: TcpBackend
) -> None:
    """What no proof has shown: the new workers end when they begin to serve. The old ones serve on, until that is mended."""
    port = free_port()
    installed = Installed(folder, run_gate, policy(port, backend), workers=2)
    gate = installed.gate
    file, old = "proxy/worker.py", "        self.prepared, self.in_force = None, prepared\n"
    installed.change(file, old, f"        raise SystemExit(9)\n{old}")
    with Load("127.0.0.1", port, SOURCES) as load, subprocess.Popen(
        [sys.executable, "-m", "gatekeeper", "upgrade", "--control", str(gate.control_path)],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH}, stderr=subprocess.DEVNULL,
    ) as asking:  # fmt: skip
        until(lambda: gate.output().count("exited with 9") > 3, "the new workers fail again and again", within_s=60)
        assert gate.get("/readyz")[0] == 200
        load.wait_for_more(100)
        installed.change(file, f"        raise SystemExit(9)\n{old}", old)
        assert asking.wait(90) == 0
        load.wait_for_more(100)
    assert not load.failures


def test_an_ordinary_user_upgrades(run_gate: Callable[..., Gate], folder: Path, backend: TcpBackend) -> None:
    """Without any privilege, and as that user."""
    user = plain_user(folder)
    home = folder / "home"
    home.mkdir()
    user.own(home)
    port = free_port()
    gate = run_gate(policy(port, backend), folder=home, workers=2, prefix=user.prefix, python=user.python, env=user.env)
    with Sources().connect("127.0.0.1", "127.0.0.1", port) as client, Load("127.0.0.1", port, SOURCES) as load:
        assert ask(client) == b"are you there?"
        done = subprocess.run(
            [*user.prefix, user.python, "-m", "gatekeeper", "upgrade", "--no-wait", "--control", str(gate.control_path)],
            env={**os.environ, "PYTHONPATH": PYTHON_PATH, **user.env}, cwd=home, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        load.wait_for_more(50)
        assert ask(client) == b"are you there?"
    assert not load.failures


@pytest.mark.needs_root
def test_ambient_capabilities_survive(run_gate: Callable[..., Gate], folder: Path, backend: TcpBackend) -> None:
    """A service that may listen below 1024 though it is not root, as in our unit, still may after two upgrades."""
    user = plain_user(folder)
    home = folder / "home"
    home.mkdir()
    user.own(home)
    port = free_port()
    low = next(number for number in range(700, 1000) if nobody_listens(number))
    setpriv, *become = user.prefix
    become = [word for word in become if not word.startswith(("--inh-caps", "--bounding-set"))]
    able = (setpriv, *become, "--inh-caps=-all,+net_bind_service", "--ambient-caps=-all,+net_bind_service",
            "--bounding-set=-all,+net_bind_service")  # fmt: skip
    gate = run_gate(policy(port, backend), folder=home, prefix=able, python=user.python, env=user.env)

    def may() -> set[str]:
        return {line.split()[1] for line in Path(f"/proc/{gate.pid}/status").read_text().splitlines() if line.startswith("CapEff")}

    assert may() == {"0000000000000400"}
    for _ in range(2):
        assert upgrade(gate).returncode == 0
    assert may() == {"0000000000000400"}
    for pid in (*gate.worker_pids(), gate.observer_pid()):
        assert "CapEff:\t0000000000000000" in Path(f"/proc/{pid}/status").read_text()
    more = f'  - {{name: low, listen: "127.0.0.1:{low}", backend: "{backend.address}"}}'
    assert gate.reload(policy(port, backend, more))["success"]
    with Sources().connect("127.0.0.1", "127.0.0.1", low) as client:
        assert ask(client) == b"are you there?"
