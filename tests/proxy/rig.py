"""One real worker process and, in place of the supervisor, the test: it hands over sockets and policies by hand."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from gatekeeper.kernel import memfd
from gatekeeper.kernel.channel import Channel
from gatekeeper.policy.model import (
    Action,
    Backend,
    Config,
    Endpoint,
    Listener,
    Place,
    Policy,
    Protocol,
    Rule,
    Settings,
    Sources,
)
from gatekeeper.policy.ranges import AddressSet
from gatekeeper.proxy.events import END_MASK, RECORD
from gatekeeper.snapshot import encode
from gatekeeper.snapshot.bindings import Bindings, VerdictKey
from gatekeeper.snapshot.counters import CAPACITY_BYTES, End, ListenerSlot, WorkerSlot
from gatekeeper.snapshot.reader import Snapshot
from tests.support.wait import until

ROOT = Path(__file__).parents[2]
PLACE = Place("rules.yaml", 1, 1)
PATIENCE_S = 10.0


class Record(NamedTuple):
    """A decoded event record, in the order of `events.RECORD`."""

    kind: int
    end: int
    family: int
    slot: int
    endpoint: int
    source_port: int
    destination_port: int
    flow: int
    began: float
    lasted_s: float
    bytes_in: int
    bytes_out: int
    source: bytes
    destination: bytes


def sources(first: str, last: str | None = None) -> Sources:
    """Return an IPv4 or IPv6 range as the sources of a rule."""
    family = socket.AF_INET6 if ":" in first else socket.AF_INET
    low = int.from_bytes(socket.inet_pton(family, first), "big")
    high = int.from_bytes(socket.inet_pton(family, last or first), "big")
    ranges = [(low, high)]
    included = AddressSet.of(v6=ranges) if ":" in first else AddressSet.of(v4=ranges)
    return Sources(included, AddressSet.EMPTY, anyone=False, from_text=f"{first}-{last}", except_text="")


ANYONE = Sources(AddressSet.EVERYTHING, AddressSet.EMPTY, anyone=True, from_text="any", except_text="")


def rule(name: str, action: Action, who: Sources = ANYONE) -> Rule:
    """Return a rule for every listener."""
    return Rule(name, action, who, None, PLACE)


def listener(
    name: str,
    backend: Backend,
    *endpoints: Endpoint,
    protocol: Protocol = Protocol.TCP,
    connect_s: float = 5.0,
    idle_s: float = 60.0,
    half_close_s: float = 30.0,
    max_responses: int | None = None,
    max_sessions: int | None = None,
) -> Listener:
    """Return a listener with short names for what tests vary."""
    return Listener(
        name, protocol, endpoints, backend, connect_s, idle_s, half_close_s, max_responses, max_sessions, PLACE
    )


class Rig:
    """A worker under orders. ``sockets`` are listening sockets by endpoint key; the rig owns all it is given."""

    def __init__(
        self,
        listeners: list[Listener],
        rules: list[Rule],
        sockets: dict[str, socket.socket],
        default: Action = Action.DENY,
        nofile: int | None = None,
        uid: int | None = None,
    ) -> None:
        self.counters_fd = memfd.create("counters", CAPACITY_BYTES)
        self.counters = memoryview(mmap.mmap(self.counters_fd, CAPACITY_BYTES)).cast("B").cast("Q")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.events, worker_events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.events.setblocking(False)
        ours.settimeout(PATIENCE_S)
        self.channel = Channel(ours)
        self.bindings = Bindings()
        self.sockets = dict(sockets)
        self.records: list[Record] = []
        limit = [] if nofile is None else ["prlimit", f"--nofile={nofile}:{nofile}"]
        command = [*limit, sys.executable, "-m", "gatekeeper.proxy", "--channel", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT)
        theirs.close()
        start: dict[str, Any] = {"op": "start", "worker": 0, "workers": 1, "supervisor_pid": os.getpid()}
        self.channel.send(
            start | {"uid": uid, "gid": uid, "groups": uid and []}, [self.counters_fd, worker_events.fileno()]
        )
        worker_events.close()
        self.expect("ready")
        self.channel.send({"op": "siblings"}, [self.counters_fd])
        self.apply(listeners, rules, default)

    def apply(self, listeners: list[Listener], rules: list[Rule], default: Action = Action.DENY) -> None:
        """Put a policy in force, as a reload does; sockets not handed over before go first."""
        policy = Policy(tuple(listeners), tuple(rules), default, PLACE)
        snapshot_fd = memfd.create("snapshot")
        encode.write(Config(policy, Settings(workers=1), "0" * 64), snapshot_fd)
        snapshot = Snapshot(memoryview(mmap.mmap(snapshot_fd, 0, prot=mmap.PROT_READ)))
        self.bindings = self.bindings.bind(self.bindings.generation + 1, snapshot.meta)
        bindings_fd = memfd.from_bytes("bindings", self.bindings.to_json())
        if self.sockets:
            keys = list(self.sockets)
            fds = [sock.fileno() for sock in self.sockets.values()]
            self.channel.send({"op": "listen", "keys": keys, "shared": [False] * len(keys)}, fds)
            for sock in self.sockets.values():
                sock.close()
            self.sockets.clear()
        generation = self.bindings.generation
        self.channel.send({"op": "prepare", "generation": generation}, [snapshot_fd, bindings_fd])
        os.close(snapshot_fd)
        os.close(bindings_fd)
        self.expect("prepared")
        self.channel.send({"op": "commit", "generation": generation})
        self.expect("committed")

    def expect(self, op: str) -> dict[str, Any]:
        """Return the worker's next message, which must be this one."""
        message, _fds = self.channel.receive()
        assert message["op"] == op, message
        return message

    def counter(self, listener_name: str, slot: int) -> int:
        """Return one counter of a listener."""
        return self.counters[self.bindings.listeners[listener_name] + slot]

    def worker_counter(self, slot: WorkerSlot) -> int:
        """Return one counter of the worker itself."""
        return self.counters[slot]

    def judged(self, listener_name: str, action: str, rule_name: str, reason: str) -> int:
        """Return how many connections got this verdict."""
        return self.counters[self.bindings.verdicts[VerdictKey(listener_name, action, rule_name, reason)]]

    def live(self, listener_name: str) -> int:
        """Return how many sessions there are."""
        opened = self.counter(listener_name, ListenerSlot.SESSIONS_OPENED)
        return opened - self.counter(listener_name, ListenerSlot.SESSIONS_CLOSED)

    def record(self, wanted: int = 1) -> Record:
        """Return the ``wanted``-th event record from now on, counting from 1, once it has come."""

        def arrived() -> bool:
            try:
                data = self.events.recv(1 << 20)
            except BlockingIOError:
                data = b""
            self.records += [Record(*fields) for fields in RECORD.iter_unpack(data)]
            return len(self.records) >= wanted

        until(arrived, f"event record {wanted}")
        return self.records[wanted - 1]

    def ended(self, wanted: int = 1) -> tuple[End, int, int]:
        """Return how the ``wanted``-th session ended, and its bytes in and out."""
        record = self.record(wanted)
        return End(record.end & END_MASK), record.bytes_in, record.bytes_out

    def close(self) -> None:
        """End the worker, whatever it does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        self.channel.close()
        self.events.close()
        os.close(self.counters_fd)
        for sock in self.sockets.values():
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
