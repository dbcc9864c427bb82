"""The other side of an observer: a supervisor and workers played by the test, with real memory, sockets and files."""

from __future__ import annotations

import contextlib
import http.client
import json
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from gatekeeper.errors import ChannelClosed
from gatekeeper.kernel import memfd
from gatekeeper.kernel.channel import Channel
from gatekeeper.proxy.events import CONNECTION, RECORD
from gatekeeper.snapshot.bindings import Bindings, VerdictKey
from gatekeeper.snapshot.counters import CAPACITY_BYTES, End, ListenerSlot, WorkerSlot
from gatekeeper.snapshot.layout import HEADER, MAGIC, SECTIONS
from tests.support.wait import until

REPOSITORY = Path(__file__).resolve().parents[2]
OFFICE = "198.51.100.7"


def make_meta(
    listeners: Sequence[str] = ("web", "ssh"), rules: Sequence[str] = ("scanners", "office"), backend: str = "127.0.0.1:8080"
) -> dict[str, Any]:
    """Return the meta section of a policy with these names; every listener is a port, every rule allows everywhere."""
    details: list[list[Any]] = []
    for index in range(len(listeners)):
        details += [[index, number, "allow", "rule"] for number in range(len(rules))]
        details.append([index, None, "deny", "default"])
    return {
        "version": 1,
        "digest": "ab" * 32,
        "counts": {"rules": len(rules), "sets_ranges": 2, "v4_ranges": 5, "v6_ranges": 3, "classes": 4, "rows": 1},
        "default": {"action": "deny", "file": "rules.yaml", "line": 9},
        "rules": [{"name": name, "action": "allow", "file": "rules.yaml", "line": 20} for name in rules],
        "listeners": [
            {
                "name": name, "protocol": "tcp", "connect_timeout_s": 5.0, "idle_timeout_s": 60.0,
                "half_close_timeout_s": 30.0, "max_responses": None, "max_sessions": None, "over_detail": 0, "ban_detail": 0,
                "on_exit": None,
            }
            for name in listeners
        ],
        "endpoints": [
            {
                "listener": index, "key": f"tcp:0.0.0.0:{8000 + index}", "protocol": "tcp", "family": 4, "host": "0.0.0.0",
                "port": 8000 + index, "address": f"0.0.0.0:{8000 + index}", "row": 0,
                "backend": {"family": 4, "host": "127.0.0.1", "port": 8080, "text": backend},
            }
            for index in range(len(listeners))
        ],
        "details": details,
        "settings": {"workers": None, "metrics": None, "control": {"socket": None, "group": None}, "audit": "stdout", "state": None, "kernel": "off"},
        "files": ["rules.yaml"],
    }  # fmt: skip


def make_snapshot(meta: dict[str, Any]) -> int:
    """Return a sealed memfd with a small snapshot: good enough to read its meta section."""
    width = {"v4": 8, "v4_index": 4, "v6_high": 8, "v6_low": 8, "v6_class": 4, "v6_index": 4, "matrix": 4}
    values = {"v4": [1], "v4_index": [0, 1], "v6_high": [0], "v6_low": [0], "v6_class": [1], "v6_index": [0, 1], "matrix": [2, 2]}
    parts = {name: b"".join(value.to_bytes(width[name], "little") for value in values[name]) for name in values}
    parts["meta"] = json.dumps(meta).encode()
    at, places, body = HEADER.size, [], b""
    at += -at % 8
    for name in SECTIONS:
        part = parts.get(name, b"")  # what only look-ups need may be empty
        places += [at, len(part)]
        padded = part + bytes(-len(part) % 8)
        body += padded
        at += len(padded)
    head = HEADER.pack(MAGIC, *places)
    return memfd.from_bytes("snapshot", head + bytes(-len(head) % 8) + body)


class Stage:
    """One observer process and everything around it. Use it as a context manager."""

    def __init__(
        self, folder: Path, workers: int = 2, audit: str = "file", audit_fd: int | None = None, *, metrics: bool = True,
        command: Sequence[str] = ("-m", "gatekeeper.observer"), prefix: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Open everything; `start` starts the observer.

        ``audit_fd`` (it stays the caller's) replaces the file ``audit.log`` in ``folder``; ``command`` is for Python and
        comes after ``prefix``, which must exec.
        """
        self.command = command
        self.prefix = prefix
        self.folder = folder
        self.audit_path = folder / "audit.log"
        self.audit = audit
        self.metrics = metrics
        self.bindings = Bindings()
        self.meta: dict[str, Any] = {}
        self.generation = 0
        self._ends = contextlib.ExitStack()
        if audit_fd is None:
            audit_fd = os.open(self.audit_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            self._ends.callback(os.close, audit_fd)
        self._audit_fd = audit_fd
        self._http = self._ends.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))
        self.port = int(self._http.getsockname()[1])
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(workers)]
        self.events = [self._ends.enter_context(ours) for ours, _ in pairs]
        self._theirs = [self._ends.enter_context(theirs) for _, theirs in pairs]
        self.counters: list[memoryview] = []
        self._counters_fds: list[int] = []
        for index in range(workers):
            self.counters.append(memoryview(b""))
            self._counters_fds.append(-1)
            self.new_counters(index)
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Channel | None = None
        self.now = {
            "ready": True, "draining": False, "restarts_total": 0, "last_reload_successful": True,
            "last_reload_timestamp": 1750000000.5, "last_reload_error": None, "started": time.time() - 100,
            "workers": [
                {"index": index, "pid": 100 + index, "alive": True, "restarts": 0, "uptime_s": 100.0} for index in range(workers)
            ],
        }  # fmt: skip
        self.bind(make_meta())

    # -- the supervisor's part

    def start(self, *, hang_up: bool = False, **changes: Any) -> Self:
        """Start an observer (the one before, if any, is killed) and tell it everything; wait until it serves.

        Raises:
            ChannelClosed: it ended instead, or ``hang_up`` asked for the channel to be closed at once.
        """
        self.kill()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, (self.folder / "stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-P", *self.command, "--channel", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                start_new_session=True,
            )
        ours.settimeout(20)
        self.channel = Channel(ours)
        fds = [self._audit_fd] if self.audit != "off" else []
        if self.metrics:
            fds.append(self._http.fileno())
        start = {
            "op": "start", "workers": len(self.events), "uid": None, "gid": None, "groups": None,
            "supervisor_pid": os.getpid(), "audit": self.audit, "metrics": self.metrics,
        }  # fmt: skip
        self.channel.send({**start, **changes}, [*fds, *(sock.fileno() for sock in self._theirs)])
        if hang_up:
            self.channel.close()
            self.channel = None
            raise ChannelClosed("as asked")
        for index in range(len(self.events)):
            self.tell_counters(index)
        self.tell_policy()
        self.tell_state()
        message, _fds = self.channel.receive()
        assert message == {"op": "ready"}
        if self.metrics:
            until(self.serves, "the observer serves HTTP")
        return self

    def serves(self) -> bool:
        """Say whether HTTP is answered.

        Raises:
            RuntimeError: the observer has ended; nothing will be.
        """
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"the observer ended: {self.stderr()}")
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as client:
            client.settimeout(0.5)
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            try:
                return client.recv(100).startswith(b"HTTP/1.1 200")
            except TimeoutError:
                return False

    def tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        assert self.channel is not None
        self.channel.send(message, list(fds))

    def tell_state(self, **changes: Any) -> None:
        self.now |= changes
        self.tell({"op": "state", "state": self.now})

    def bind(self, meta: dict[str, Any]) -> None:
        """Put a policy in force; `tell_policy` lets the observer know."""
        self.generation += 1
        self.meta = meta
        self.bindings = self.bindings.bind(self.generation, meta)

    def tell_policy(self) -> None:
        snapshot, names = make_snapshot(self.meta), memfd.from_bytes("bindings", self.bindings.to_json())
        try:
            self.tell({"op": "policy", "generation": self.generation}, [snapshot, names])
        finally:
            os.close(snapshot)
            os.close(names)

    def new_counters(self, worker: int) -> None:
        """Give a worker new counters that continue the old ones, as a successor gets; `tell_counters` passes them on."""
        fd = memfd.create(f"counters-{worker}", CAPACITY_BYTES)
        if self._counters_fds[worker] >= 0:
            os.pwrite(fd, bytes(self.counters[worker][:4096]), 0)
        self._counters_fds[worker] = fd
        self._ends.callback(os.close, fd)
        self.counters[worker] = memoryview(mmap.mmap(fd, CAPACITY_BYTES)).cast("Q")
        self.beat()

    def tell_counters(self, worker: int) -> None:
        self.tell({"op": "counters", "worker": worker}, [self._counters_fds[worker]])

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
        if self.channel is not None:
            self.channel.close()
        self.process = self.channel = None

    def hang_up(self, within_s: float = 10) -> int:
        """Close the channel, as a supervisor that ends; return the observer's exit code."""
        assert self.channel is not None
        assert self.process is not None
        self.channel.close()
        self.channel = None
        return self.process.wait(within_s)

    # -- the workers' part

    def beat(self) -> None:
        """Let every worker's loop turn."""
        for view in self.counters:
            if len(view):
                view[WorkerSlot.HEARTBEAT_MS] = int(time.monotonic() * 1000)

    def slot(self, listener: str = "web", action: str = "allow", rule: str = "office", reason: str = "rule") -> int:
        return self.bindings.verdicts[VerdictKey(listener, action, rule, reason)]

    def block(self, listener: str, offset: ListenerSlot) -> int:
        return self.bindings.listeners[listener] + offset

    def endpoint(self, listener: str = "web") -> int:
        return next(number for key, number in self.bindings.endpoints.items() if key.listener == listener)

    def record(self, kind: int = CONNECTION, **changes: Any) -> bytes:
        """Return a record of a plain session to web, with changes."""
        values = {
            "end": End.FINISHED, "family": 4, "slot": self.slot(), "endpoint": self.endpoint(), "port": 40000, "to_port": 8000,
            "flow": 7, "start": 1750000000.25, "duration": 1.5, "bytes_in": 10, "bytes_out": 20,
            "source": socket.inet_aton(OFFICE), "destination": socket.inet_aton("192.0.2.1"),
        } | changes  # fmt: skip
        return RECORD.pack(kind, *values.values())

    def report(self, *records: bytes, worker: int = 0) -> None:
        self.events[worker].send(b"".join(records))

    # -- what can be seen

    def get(self, path: str, headers: dict[str, str] | None = None, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """Return status, headers (lower case names) and body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def text(self, path: str) -> str:
        status, _headers, body = self.get(path)
        assert status == 200, (status, body)
        return body.decode()

    def value(self, sample: str) -> float:
        """Return the value of one sample of /metrics, written exactly as there; -1.0 when it is missing."""
        found = [line.rpartition(" ")[2] for line in self.text("/metrics").splitlines() if line.rpartition(" ")[0] == sample]
        return float(found[0]) if found else -1.0

    def lines(self, path: Path | None = None) -> list[dict[str, Any]]:
        """Return the audit log, parsed; a broken line is an error."""
        data = (path or self.audit_path).read_bytes()
        assert data == b"" or data.endswith(b"\n"), data[-200:]
        return [json.loads(line) for line in data.splitlines()]

    def wait_for_lines(self, count: int) -> list[dict[str, Any]]:
        return until(lambda: found if len(found := self.lines()) >= count else [], f"{count} audit lines")

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._ends.close()


@contextlib.contextmanager
def on_stage(folder: Path, **options: Any) -> Iterator[Stage]:
    """Yield a stage with an observer that serves."""
    with Stage(folder, **options) as stage:
        yield stage.start()
