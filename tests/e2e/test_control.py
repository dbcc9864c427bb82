"""Operators at a running gate: how it is, who is connected, who is cut, what the log says, and the view of it all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from gatekeeper.cli import daemon
from tests.cli.program import Done, gatekeeper
from tests.supervisor.service import Service, listener, rules
from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import PYTHON_PATH, Gate
from tests.support.plain_user import plain_user
from tests.support.ports import free_port
from tests.support.process import is_running
from tests.support.wait import until

RunGate = Callable[..., Gate]


def at(gate: Gate, *argv: str, **more: Any) -> Done:
    """Run a command that asks this gate."""
    return gatekeeper(*argv, "--control", str(gate.control_path), **more)


def answer(gate: Gate, *argv: str, code: int = 0) -> Any:
    """Run a command with --json and return its document."""
    done = at(gate, *argv, "--json")
    assert done.code == code, done
    return json.loads(done.out)


class Stage:
    """A gate with three listeners and two rules, and whoever is connected to it."""

    def __init__(self, run_gate: RunGate, folder: Path, ends: ExitStack, workers: int = 2) -> None:
        self.tcp, self.udp = ends.enter_context(TcpBackend()), ends.enter_context(UdpBackend())
        self.port, self.unix = free_port(), folder / "web.sock"
        self.ends = ends
        self.gate: Gate = run_gate(
            f"""
listeners:
  - {{name: web, listen: ["127.0.0.1:{self.port}", "[::1]:{self.port}"], backend: "{self.tcp.address}"}}
  - {{name: local, listen: "unix:{self.unix}", backend: "{self.tcp.address}"}}
  - {{name: dns, protocol: udp, listen: "127.0.0.1:{self.port}", backend: "{self.udp.address}"}}
default: deny
rules:
  - {{name: bad, action: deny, from: 127.0.66.0/24}}
  - {{name: office, action: allow, from: [127.0.1.0/24, "::1"]}}
  - {{name: everybody, action: allow}}
""",
            workers=workers,
        )
        self.clients: dict[str, socket.socket] = {}

    def connect(self, *sources: str, say: bytes = b"hello") -> Self:
        """Let these sources connect over TCP; "unix" is the unix socket, "udp:ADDRESS" is UDP."""
        for source in sources:
            if source == "unix":
                made = socket.socket(socket.AF_UNIX)
                made.settimeout(15)
                made.connect(str(self.unix))
            elif source.startswith("udp:"):
                made = Sources().make(source[4:], socket.SOCK_DGRAM)
                made.connect(("127.0.0.1", self.port))
            else:
                made = Sources().connect(source, "::1" if ":" in source else "127.0.0.1", self.port)
            self.clients[source] = self.ends.enter_context(made)
            assert ask(made, say) == say
        return self

    def flow(self, source: str) -> int:
        """Return the flow id of a source's session."""
        (row,) = answer(self.gate, "sessions", "--source", source)["sessions"]
        assert isinstance(row["flow_id"], int)
        return row["flow_id"]


@pytest.fixture
def stage(run_gate: RunGate, folder: Path) -> Iterator[Callable[..., Stage]]:
    """Set the stage."""
    with ExitStack() as ends:
        yield lambda **options: Stage(run_gate, folder, ends, **options)


def names(rows: list[dict[str, Any]]) -> set[str]:
    """Return who the sessions belong to, in the words of `Stage.connect`."""
    return {
        "unix" if row["src_ip"] is None else f"udp:{row['src_ip']}" if row["proto"] == "UDP" else row["src_ip"] for row in rows
    }


# ---------------------------------------------------------------------- status


def test_status_of_a_healthy_gate(stage: Callable[..., Stage]) -> None:
    """Which policy, which workers, which listeners with what was counted there; exit code 0."""
    on = stage().connect("127.0.1.1", "127.0.2.2", "unix", "udp:127.0.1.1")
    assert Sources().is_refused("127.0.66.1", "127.0.0.1", on.port)

    def counted() -> bool:
        status = answer(on.gate, "status")
        assert (status["state"], status["pid"], status["kernel"]) == ("serving", on.gate.pid, False)
        assert status["rules"] == str(on.gate.rules_path)
        assert [worker["pid"] for worker in status["workers"]] == on.gate.worker_pids()
        web, local, dns = status["listeners"]
        assert (web["addresses"], web["backends"]) == ([f"127.0.0.1:{on.port}", f"[::1]:{on.port}"], [on.tcp.address])
        assert [(each["name"], each["sessions"], each["allowed"], each["refused"]) for each in (web, local, dns)] == [
            ("web", 2, 2, 1), ("local", 1, 1, 0), ("dns", 1, 1, 0),
        ]  # fmt: skip
        assert {(verdict["listener"], verdict["rule"], verdict["count"]) for verdict in status["verdicts"]} == {
            ("web", "office", 1), ("web", "everybody", 1), ("web", "bad", 1), ("local", "everybody", 1), ("dns", "office", 1),
        }  # fmt: skip
        return True

    until(counted, "everything is counted")
    text = at(on.gate, "status")
    assert text.code == 0
    assert text.out.startswith("serving for ")
    assert f"from {on.gate.rules_path}" in text.out
    assert ["web", f"127.0.0.1:{on.port}", "and", "1", "more", on.tcp.address, "2", "2", "1"] in [
        line.split()[:9] for line in text.out.splitlines()
    ]


def test_status_of_a_gate_that_is_not_well(stage: Callable[..., Stage]) -> None:
    """A reload that failed is said, with the reason, and the exit code is 1; so it is while the gate drains."""
    on = stage().connect("127.0.1.1")
    on.gate.reload("listeners: []\n")
    done = at(on.gate, "status")
    assert (done.code, "the last reload failed" in done.out) == (1, True)
    assert answer(on.gate, "status", code=1)["last_reload"]["successful"] is False
    on.gate.signal(signal.SIGTERM)
    until(lambda: answer(on.gate, "status", code=1)["state"] == "draining", "it drains")
    assert names(answer(on.gate, "sessions")["sessions"]) == {"127.0.1.1"}
    on.clients["127.0.1.1"].close()
    assert on.gate.wait() == 0
    assert at(on.gate, "status").code == 3


def test_counts_survive_a_worker(stage: Callable[..., Stage]) -> None:
    """A worker that was killed is back, counted as a restart, and nothing that was counted is lost."""
    on = stage(workers=1).connect("127.0.1.1")
    until(lambda: answer(on.gate, "status")["listeners"][0]["allowed"] == 1, "it is counted")
    (worker,) = on.gate.worker_pids()
    os.kill(worker, signal.SIGKILL)

    def back() -> bool:
        done = at(on.gate, "status", "--json")
        status = json.loads(done.out)
        (one,) = status["workers"]
        web = status["listeners"][0]
        return done.code == 0 and one["serving"] and one["restarts"] == 1 and (web["allowed"], web["sessions"]) == (1, 0)

    until(back, "another worker serves, and goes on counting")
    assert not is_running(worker)


# ---------------------------------------------------------------------- sessions

EVERYBODY = ("127.0.1.1", "127.0.1.2", "127.0.2.2", "::1", "unix", "udp:127.0.1.1", "udp:127.0.3.3")
FILTERS: list[tuple[tuple[str, ...], set[str]]] = [  # options, and who is shown
    ((), set(EVERYBODY)),
    (("--listener", "web"), {"127.0.1.1", "127.0.1.2", "127.0.2.2", "::1"}),
    (("--listener", "dns", "--listener", "local"), {"unix", "udp:127.0.1.1", "udp:127.0.3.3"}),
    (("--rule", "office"), {"127.0.1.1", "127.0.1.2", "::1", "udp:127.0.1.1"}),
    (("--rule", "office", "--listener", "dns"), {"udp:127.0.1.1"}),
    (("--rule", "default"), set()),
    (("--rule", "bad"), set()),
    (("--source", "127.0.1.0/24"), {"127.0.1.1", "127.0.1.2", "udp:127.0.1.1"}),
    (("--source", "127.0.1.2-127.0.2.9"), {"127.0.1.2", "127.0.2.2"}),
    (("--source", "::/0", "--source", "127.0.3.3"), {"::1", "udp:127.0.3.3"}),
    (("--source", "0.0.0.0/0", "--listener", "local"), set()),
    (("--state", "flow"), {"udp:127.0.1.1", "udp:127.0.3.3"}),
    (("--state", "open", "--source", "127.0.2.2"), {"127.0.2.2"}),
    (("--state", "dialing"), set()),
    (("--older", "1h"), set()),
    (("--younger", "1h", "--listener", "local"), {"unix"}),
    (("--idle", "1h"), set()),
    (("--idle", "0s", "--rule", "everybody"), {"127.0.2.2", "unix", "udp:127.0.3.3"}),
    (("--stuck",), set()),
]


def test_who_is_connected(stage: Callable[..., Stage]) -> None:
    """Each filter shows whom it means, each session once, in words, with the flow id that the audit log will have."""
    on = stage().connect(*EVERYBODY)
    for options, shown in FILTERS:
        found = answer(on.gate, "sessions", *options)
        assert names(found["sessions"]) == shown, options
        assert (found["matched"], len(found["sessions"]), found["missing_workers"]) == (len(shown), len(shown), [])
    (row,) = answer(on.gate, "sessions", "--source", "127.0.2.2")["sessions"]
    client = on.clients["127.0.2.2"]
    assert {key: row[key] for key in ("listener", "rule", "reason", "proto", "path", "state", "backend", "endpoint")} == {
        "listener": "web", "rule": "everybody", "reason": "rule", "proto": "TCP", "path": "relay", "state": "open",
        "backend": on.tcp.address, "endpoint": f"127.0.0.1:{on.port}",
    }  # fmt: skip
    assert (row["src_port"], row["dest_ip"], row["dest_port"]) == (client.getsockname()[1], "127.0.0.1", on.port)
    assert (row["bytes_in"], row["bytes_out"], row["client_tcp"]) == (5, 5, None)
    client.close()
    (event,) = [each for each in on.gate.wait_for_audit(1, "connection") if each["src_ip"] == "127.0.2.2"]
    assert event["flow_id"] == row["flow_id"]


def test_sessions_for_people(stage: Callable[..., Stage]) -> None:
    """The table has a line for each session, in the order that was asked for; a limit says that there are more."""
    on = stage(workers=1)
    for number in range(1, 8):
        on.connect(f"127.0.1.{number}", say=b"x" * 1000 * ((number * 3) % 8))
    bytes_first = at(on.gate, "sessions", "--sort", "bytes", "--limit", "3")
    lines = [line.split() for line in bytes_first.out.splitlines()]
    assert lines[0] == ["FLOW", "LISTENER", "RULE", "SOURCE", "BACKEND", "STATE", "AGE", "IDLE", "IN", "OUT"]
    assert [line[3].partition(":")[0] for line in lines[1:]] == ["127.0.1.5", "127.0.1.2", "127.0.1.7"]
    assert [line[8] for line in lines[1:]] == ["7.0k", "6.0k", "5.0k"]
    assert "3 of 7 sessions" in bytes_first.err
    by_source = [line.split()[3].partition(":")[0] for line in at(on.gate, "sessions", "--sort", "source").out.splitlines()[1:]]
    assert by_source == [f"127.0.1.{number}" for number in range(1, 8)]
    oldest = [row["src_ip"] for row in answer(on.gate, "sessions", "--limit", "2")["sessions"]]
    newest = [row["src_ip"] for row in answer(on.gate, "sessions", "--limit", "2", "--reverse")["sessions"]]
    assert (oldest, newest) == (["127.0.1.1", "127.0.1.2"], ["127.0.1.7", "127.0.1.6"])
    for order in ("age", "idle", "bytes", "rate", "rtt", "source"):
        assert len(answer(on.gate, "sessions", "--sort", order)["sessions"]) == 7
    nobody = at(on.gate, "sessions", "--source", "192.0.2.1")
    assert (nobody.code, nobody.out, nobody.err) == (0, "", "no sessions\n")


def test_what_tcp_says(stage: Callable[..., Stage]) -> None:
    """With details both sides of a session have a round-trip time, and what a side does not take is there to see."""
    on = stage(workers=1).connect("127.0.1.1", "udp:127.0.1.1")
    (row,) = answer(on.gate, "sessions", "--listener", "web", "--details")["sessions"]
    for side in (row["client_tcp"], row["backend_tcp"]):
        assert side["rtt_us"] > 0
        assert (side["unsent"], side["unacked"]) == (0, 0)
    (flow,) = answer(on.gate, "sessions", "--listener", "dns", "--details")["sessions"]
    assert (flow["client_tcp"], flow["backend_tcp"]) == (None, None)
    client = on.clients["127.0.1.1"]
    client.setblocking(False)

    def is_stuffed() -> bool:
        """Whether the echo, which the client does not read, has filled everything in between."""
        try:
            client.send(b"x" * (1 << 16))
        except BlockingIOError:
            (row,) = answer(on.gate, "sessions", "--listener", "web", "--details")["sessions"]
            return bool(row["client_tcp"]["unsent"] + row["client_tcp"]["unacked"] > 0)
        return False

    until(is_stuffed, "the client's side has unsent bytes", 30)
    assert "RTT" in at(on.gate, "sessions", "--details").out


def test_sessions_that_are_stuck(run_gate: RunGate) -> None:
    """A session that one side has closed and the other has not is found, whichever side it was."""
    port, silent = free_port(), threading.Event()

    def never_ends(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            pass
        silent.wait(30)

    def ends_at_once(connection: socket.socket) -> None:
        connection.shutdown(socket.SHUT_WR)
        silent.wait(30)

    with TcpBackend(never_ends) as patient, TcpBackend(ends_at_once) as hasty:
        other = free_port()
        gate = run_gate(f"""
listeners:
  - {{name: patient, listen: "127.0.0.1:{port}", backend: "{patient.address}"}}
  - {{name: hasty, listen: "127.0.0.1:{other}", backend: "{hasty.address}"}}
default: allow
""")
        try:
            with (
                Sources().connect("127.0.1.1", "127.0.0.1", port) as left,
                Sources().connect("127.0.1.2", "127.0.0.1", port),
                Sources().connect("127.0.1.3", "127.0.0.1", other),
            ):
                left.shutdown(socket.SHUT_WR)

                def are_found() -> bool:
                    rows = answer(gate, "sessions", "--stuck")["sessions"]
                    return {(row["src_ip"], row["state"]) for row in rows} == {
                        ("127.0.1.1", "client_closed"), ("127.0.1.3", "backend_closed"),
                    }  # fmt: skip

                until(are_found, "both are found")
                assert answer(gate, "cut", "--stuck")["ended"] == 2
                assert names(answer(gate, "sessions")["sessions"]) == {"127.0.1.2"}
        finally:
            silent.set()


@pytest.mark.timeout(120)
def test_very_many_sessions(run_gate: RunGate) -> None:
    """Two thousand sessions come in many parts, none is missing, none comes twice; a table of them has as many lines."""
    port = free_port()
    with TcpBackend() as tcp, ExitStack() as ends:
        gate = run_gate(f'listeners: [{{name: web, listen: "127.0.0.1:{port}", backend: "{tcp.address}"}}]\ndefault: allow\n', workers=2)
        for number in range(2000):
            ends.enter_context(Sources().connect(f"127.0.{number % 16 + 1}.{number % 251 + 1}", "127.0.0.1", port))
        until(lambda: answer(gate, "sessions", "--state", "open")["matched"] == 2000, "all are open", 60)
        rows = answer(gate, "sessions")["sessions"]
        assert len({row["flow_id"] for row in rows}) == len(rows) == 2000
        assert len(at(gate, "sessions", "--limit", "0").out.splitlines()) == 2001
        assert len(at(gate, "sessions").out.splitlines()) == 101
        cut = answer(gate, "cut", "--source", "127.0.1.0/24")
        assert cut["ended"] == len(cut["sessions"]) == 125


# ---------------------------------------------------------------------- cut


def test_cut_by_id(stage: Callable[..., Stage]) -> None:
    """The session with this id is reset on both sides and counted as cut; nobody else notices; the log says who did it."""
    on = stage().connect("127.0.1.1", "127.0.1.2", "udp:127.0.1.1")
    flow = on.flow("127.0.1.2")
    done = at(on.gate, "cut", str(flow), "12345")
    assert (done.code, done.err) == (0, "cut 1 session\nthere is no session 12345, or not of this kind\n")
    assert str(flow) in done.out
    with pytest.raises(ConnectionResetError):
        on.clients["127.0.1.2"].recv(1)
    assert ask(on.clients["127.0.1.1"]) == ask(on.clients["udp:127.0.1.1"]) == b"are you there?"
    (event,) = on.gate.wait_for_audit(1, "connection")
    assert (event["flow_id"], event["gatekeeper"]["end"]) == (flow, "cut")
    (event,) = on.gate.wait_for_audit(1, "cut")
    assert event["gatekeeper"] == {"ended": 1, "by": os.geteuid()}
    assert f"uid {os.geteuid()} (pid {os.getpid()}) cut 1 session" in on.gate.output()
    on.connect("127.0.1.2")  # it may come again


def test_cut_by_filter(stage: Callable[..., Stage]) -> None:
    """What fits all options is cut, TCP and UDP alike; a dry run only says what would be."""
    on = stage().connect(*EVERYBODY)
    dry = at(on.gate, "cut", "--rule", "office", "--source", "127.0.0.0/8", "--dry-run")
    assert (dry.code, dry.err) == (0, "would cut 3 sessions\n")
    assert answer(on.gate, "sessions")["matched"] == len(EVERYBODY)
    cut = answer(on.gate, "cut", "--rule", "office", "--source", "127.0.0.0/8")
    assert (cut["ended"], names(cut["sessions"])) == (3, {"127.0.1.1", "127.0.1.2", "udp:127.0.1.1"})
    assert names(answer(on.gate, "sessions")["sessions"]) == set(EVERYBODY) - names(cut["sessions"])
    on.clients["udp:127.0.1.1"].send(b"again")
    assert on.clients["udp:127.0.1.1"].recv(100) == b"again"  # a new session
    assert answer(on.gate, "cut", "--all")["ended"] == 5
    assert answer(on.gate, "sessions")["sessions"] == []


CUT_NOBODY: list[tuple[tuple[str, ...], int, str]] = [  # options, the exit code, a part of the message
    ((), 2, "say which sessions"),
    (("--all", "--listener", "web"), 2, "--all stands alone"),
    (("--older", "1h"), 1, "cut 0 sessions"),
    (("1",), 1, "there is no session 1"),
    (("--listener", "nobody"), 2, 'no listener "nobody"; there are: dns, local, web'),
    (("--source", "127.0.1.1/24"), 2, 'did you mean "127.0.1.0/24"'),
    (("--state", "asleep"), 2, "asleep"),
    (("--older", "soon"), 2, "not a duration"),
]
SAY_NOTHING: list[dict[str, Any]] = [
    {}, {"listenr": ["web"]}, {"listener": []}, {"all": 1}, {"all": False, "stuck": False}, {"older_s": None},
]  # fmt: skip


def test_cuts_that_cut_nobody(stage: Callable[..., Stage]) -> None:
    """Without a word about which, with a mistake, or when nobody fits, nobody is cut, and the exit code says which it was.

    The daemon itself refuses a cut without a filter, or with one that it does not know.
    """
    on = stage(workers=1).connect("127.0.1.1")
    for argv, code, message in CUT_NOBODY:
        done = at(on.gate, "cut", *argv)
        assert (done.code, done.out) == (code, "")
        assert message in done.err
        assert ask(on.clients["127.0.1.1"]) == b"are you there?"
    with daemon.connect(str(on.gate.control_path)) as gate:
        for args in SAY_NOTHING:
            with pytest.raises(daemon.Refused) as caught:
                gate.ask("cut", **args)
            assert caught.value.exit_code == 2
            assert ask(on.clients["127.0.1.1"]) == b"are you there?"


# ---------------------------------------------------------------------- log tail


class Tail:
    """A running `gatekeeper log tail`."""

    def __init__(self, gate: Gate, *argv: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "gatekeeper", "log", "tail", "--control", str(gate.control_path), *argv],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": PYTHON_PATH}, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self.notes: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self._child.stdout, self.lines), (self._child.stderr, self.notes))
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))  # noqa: PERF401 - while it comes

    def wait(self) -> int:
        """Wait for its end."""
        code = self._child.wait(30)
        for thread in self._threads:
            thread.join(10)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.send_signal(signal.SIGINT)
        self._child.wait(10)
        for thread in self._threads:
            thread.join(10)
        for stream in (self._child.stdout, self._child.stderr):
            assert stream is not None
            stream.close()


def visit(on: Stage, source: str) -> None:
    """Connect, talk, and leave."""
    with Sources().connect(source, "127.0.0.1", on.port) as client:
        assert ask(client) == b"are you there?"


@pytest.mark.parametrize("audit", ["off", None])
def test_the_log_is_followed(run_gate: RunGate, audit: str | None) -> None:
    """Events come as they happen, those that are asked for, as the log's own lines, even when the log is off."""
    port = free_port()
    with TcpBackend() as tcp:
        text = f"""
listeners: [{{name: web, listen: "127.0.0.1:{port}", backend: "{tcp.address}"}}]
default: deny
rules: [{{name: friends, action: allow, from: 127.0.1.0/24}}]
"""
        gate = run_gate(text, audit=audit)
        with Tail(gate, "--json") as everything, Tail(gate) as people, Tail(gate, "--type", "refusal", "--json") as refusals:

            def sees_refusals() -> bool:
                assert Sources().is_refused("127.0.2.2", "127.0.0.1", port)
                return bool(everything.lines and people.lines and refusals.lines)

            until(sees_refusals, "all three follow")
            with Sources().connect("127.0.1.1", "127.0.0.1", port) as client:
                assert ask(client) == b"are you there?"
            until(lambda: any('"connection"' in line for line in everything.lines), "the connection is in the log")
            until(lambda: any(" connection " in line for line in people.lines), "people see it")
            events = [json.loads(line) for line in everything.lines]
            assert {event["event_type"] for event in events} - {"refusals_suppressed"} == {"refusal", "connection"}
            assert {json.loads(line)["event_type"] for line in refusals.lines} == {"refusal"}
            assert any("finished after" in line and "14 in, 14 out, by friends" in line for line in people.lines)
            assert any("deny by default" in line for line in people.lines)
            if audit is None:
                logged = gate.audit_path.read_text().splitlines()
                assert all(line in logged for line in everything.lines)


def test_a_number_of_events(stage: Callable[..., Stage]) -> None:
    """With --count it ends by itself: a script can wait for something to happen."""
    on = stage(workers=1)
    tail = Tail(on.gate, "--count", "2", "--rule", "bad", "--json")
    with tail:

        def has_two() -> bool:
            visit(on, "127.0.1.1")
            Sources().is_refused("127.0.66.1", "127.0.0.1", on.port)
            return len(tail.lines) >= 2

        until(has_two, "two of them came")
        assert tail.wait() == 0
        assert [json.loads(line)["gatekeeper"]["rule"] for line in tail.lines] == ["bad", "bad"]


def test_the_log_is_followed_across_observers(stage: Callable[..., Stage]) -> None:
    """When the observer dies the tail goes on with its successor, and says that something may be missing."""
    on = stage(workers=1)
    with Tail(on.gate, "--json") as tail:

        def sees_more(than: int) -> Callable[[], bool]:
            def sees() -> bool:
                visit(on, "127.0.1.1")
                return len(tail.lines) > than

            return sees

        until(sees_more(0), "it follows")
        os.kill(on.gate.observer_pid(), signal.SIGKILL)
        until(lambda: tail.notes == ["the log was interrupted: events may be missing here"], "it notices")
        until(sees_more(len(tail.lines) + 1), "it follows again")


def test_tails_do_not_grow_without_bound(stage: Callable[..., Stage]) -> None:
    """Eight follow at most; a place is free again when one leaves. Only sockets that keep messages apart are written to."""
    on = stage(workers=1)
    path = str(on.gate.control_path)
    with ExitStack() as ends:
        for number in range(9):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ends.enter_context(ours)
            ends.enter_context(theirs)
            gate = ends.enter_context(daemon.connect(path))
            if number < 8:
                gate.begin("tail", [theirs.fileno()])
            else:
                with pytest.raises(daemon.Refused, match="8 others follow"):
                    gate.begin("tail", [theirs.fileno()])
    with daemon.connect(path) as gate:
        for fds in ([], [0, 1]):
            with pytest.raises(daemon.Refused, match="takes one descriptor"):
                gate.begin("tail", fds)
    observer = on.gate.observer_pid()
    for wrong in (os.open("/dev/null", os.O_RDWR), os.open(".", os.O_PATH), socket.socket(socket.AF_INET).detach()):
        with daemon.connect(path) as gate:
            until_begun(gate, wrong)
        os.close(wrong)
    visit(on, "127.0.1.1")
    on.gate.wait_for_audit(1, "connection")
    assert on.gate.observer_pid() == observer


def until_begun(gate: daemon.Daemon, fd: int) -> None:
    """Begin a tail as soon as there is a place."""

    def begun() -> bool:
        try:
            gate.begin("tail", [fd])
        except daemon.Refused:
            return False
        return True

    until(begun, "there is a place")


# ---------------------------------------------------------------------- top


def test_a_frame_of_top(stage: Callable[..., Stage]) -> None:
    """One frame has rates, refusals by rule, and the newest and busiest sessions; without a terminal it is all there is."""
    on = stage(workers=1).connect("127.0.1.1", "127.0.1.2")
    stop = threading.Event()

    def busy() -> None:
        while not stop.wait(0.02):
            assert ask(on.clients["127.0.1.2"], b"x" * 1000) == b"x" * 1000
            Sources().is_refused("127.0.66.1", "127.0.0.1", on.port)

    work = threading.Thread(target=busy)
    work.start()
    try:
        frame = answer(on.gate, "top", "--interval", "2s")
        text = at(on.gate, "top", "--interval", "2s", "--rows", "1")
    finally:
        stop.set()
        work.join(30)
    web = next(each for each in frame["listeners"] if each["name"] == "web")
    assert web["sessions"] == 2
    assert web["in_per_s"] > 0
    assert web["out_per_s"] > 0
    assert web["refused_per_s"] > 0
    assert [(item["listener"], item["rule"], item["action"]) for item in frame["refusals"]] == [("web", "bad", "deny")]
    assert [row["src_ip"] for row in frame["busiest"]] == ["127.0.1.2", "127.0.1.1"]
    assert [row["src_ip"] for row in frame["newest"]] == ["127.0.1.2", "127.0.1.1"]
    assert frame["status"]["state"] == "serving"
    for title in ("REFUSED", "BUSIEST SESSIONS", "NEWEST SESSIONS"):
        assert title in text.out.splitlines()
    assert text.code == 0


def test_top_at_a_terminal(stage: Callable[..., Stage]) -> None:
    """At a terminal it shows frame after frame, survives a daemon that goes away, and ends with 0 at Ctrl-C."""
    on = stage(workers=1).connect("127.0.1.1")
    ours, theirs = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "gatekeeper", "top", "--control", str(on.gate.control_path), "--interval", "200ms"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"PYTHONPATH": PYTHON_PATH, "COLUMNS": "150", "LINES": "40"},
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:

        def shows(*words: bytes) -> Callable[[], bool]:
            def look() -> bool:
                nonlocal shown
                shown += os.read(ours, 1 << 16)
                return all(word in shown for word in words)

            return look

        until(shows(b"serving", b"LISTENER", b"127.0.1.1", b"NEWEST SESSIONS"), "a frame is shown")
        on.clients["127.0.1.1"].close()
        on.gate.signal(signal.SIGTERM)
        shown = b""
        until(shows(b"no daemon answers at"), "it says that the daemon is gone", 20)
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 0
    finally:
        child.kill()
        child.wait(10)
        os.close(ours)


# ---------------------------------------------------------------------- where, and who


def test_where_the_rule_file_says(folder: Path) -> None:
    """Without --control the rule file says where the socket is; a place that cannot be had is exit code 3."""
    text = rules(listener(free_port(), free_port()), more="control: {socket: ./operators.sock}\n")
    with Service(folder, text, control=None) as service:
        service.ready()
        done = gatekeeper("status", "--control", str(folder / "operators.sock"))
        assert done.code == 0
    (folder / "second").mkdir()
    (folder / "second" / "operators.sock").write_text("somebody else's")
    with Service(folder / "second", text, control=None) as service:
        assert service.wait() == 3
        assert "is there already and is no socket" in service.output()
    (folder / "third").mkdir()
    with Service(folder / "third", text, control="off") as service:
        service.ready()
        assert gatekeeper("status", "--control", str(folder / "third" / "operators.sock")).code == 3


def test_a_default_that_cannot_be_had_is_a_warning(folder: Path) -> None:
    """Nobody asked for a socket: when the usual place cannot be had the service serves without one, and says so."""
    (folder / "control.sock").write_text("somebody else's")
    (folder / "rules").mkdir()
    text = rules(listener(free_port(), free_port()))
    with Service(folder / "rules", text, control=None, prefix=("env", f"RUNTIME_DIRECTORY={folder}:/nowhere")) as service:
        service.ready()
        service.says("warning: .*control.sock is there already and is no socket.*will find nobody")
    (folder / "control.sock").unlink()
    (folder / "more").mkdir()
    with Service(folder / "more", text, control=None, prefix=("env", f"RUNTIME_DIRECTORY={folder}:/nowhere")) as service:
        service.ready()
        assert gatekeeper("status", "--control", str(folder / "control.sock")).code == 0


@pytest.mark.parametrize("command", [("status",), ("sessions",), ("cut", "--all"), ("top",), ("log", "tail")])
def test_without_a_daemon(folder: Path, command: tuple[str, ...]) -> None:
    """Each command says that there is none and where it looked, and ends with 3."""
    path = folder / "control.sock"
    done = gatekeeper(*command, "--control", str(path))
    assert (done.code, done.out) == (3, "")
    assert f"no daemon answers at {path}: is it running?" in done.err
    assert gatekeeper(*command).code == 3  # the environment says off


def test_a_daemon_that_does_not_answer(stage: Callable[..., Stage]) -> None:
    """A daemon that stands still is reported, not waited for without end."""
    on = stage(workers=1)
    on.gate.signal(signal.SIGSTOP)
    try:
        with daemon.connect(str(on.gate.control_path), patience_s=0.5) as gate, pytest.raises(daemon.Unreachable, match="does not answer"):
            gate.ask("status")
    finally:
        on.gate.signal(signal.SIGCONT)


@pytest.mark.needs_root
def test_an_ordinary_user_is_told_what_to_do(stage: Callable[..., Stage], folder: Path) -> None:
    """Who may not connect reads why, and what would help; exit code 3."""
    on = stage(workers=1)
    user = plain_user(folder)
    done = subprocess.run(
        [*user.prefix, user.python, "-m", "gatekeeper", "status", "--control", str(on.gate.control_path)],
        capture_output=True, text=True, cwd="/", env=os.environ | user.env, timeout=50,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert "you may not connect to" in done.stderr
    assert "become root" in done.stderr
