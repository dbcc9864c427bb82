"""The two ends of the demonstration: a small backend, and the running gate with everything one asks it for."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gatekeeper

PATIENCE_S = 20.0
POLL_S = 0.02
ANSWER = b"welcome\n"


class DemoFailed(Exception):
    """The demonstration could not go on; the message says why."""


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody listens on; all are held until all are found, so they differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def wait_until(ready: Callable[[], bool], what: str) -> None:
    """Return when ``ready`` says so.

    Raises:
        DemoFailed: it did not within 20 s.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        if time.monotonic() > deadline:
            raise DemoFailed(f"{what} did not happen within {PATIENCE_S:g} s")
        time.sleep(POLL_S)


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the audit log, as it was and as what it says."""

    line: str
    fields: dict[str, Any]


class Backend:
    """A service that greets whoever connects and counts them. A thread of ours; a context manager."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._sock.getsockname()[1]
        self.connections = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._sock.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _address = self._sock.accept()
            except OSError:
                return
            self.connections += 1
            with client, contextlib.suppress(OSError):
                client.settimeout(PATIENCE_S)
                client.sendall(ANSWER)
                client.shutdown(socket.SHUT_WR)
                while client.recv(4096):
                    pass


class Gate:
    """``gatekeeper run`` on a rule file, as a child with its audit log on a pipe. A context manager."""

    def __init__(self, rules: Path, port: int, metrics: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{metrics}"
        self._rules = rules
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._events: list[Event] = []

    def __enter__(self) -> Self:
        home = str(Path(gatekeeper.__file__).resolve().parents[1])
        paths = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gatekeeper", "run", "--control", "off", str(self._rules)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
            env=os.environ | {"PYTHONPATH": paths}, start_new_session=True,
        )  # fmt: skip
        self._complaints: list[str] = []
        for stream, take in ((self._process.stdout, self._lines.put), (self._process.stderr, self._complaints.append)):
            threading.Thread(target=_pump, args=(stream, take), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def wait_until_ready(self) -> None:
        """Return when the gate says that it serves.

        Raises:
            DemoFailed: it ended instead, or took too long.
        """

        def ready() -> bool:
            if self._process.poll() is not None:
                said = "".join(self._complaints).strip()
                raise DemoFailed(f"gatekeeper run ended with exit code {self._process.returncode}:\n{said}")
            try:
                return bool(self.get("/readyz"))
            except OSError:
                return False

        wait_until(ready, "the start")

    def get(self, path: str) -> str:
        """Return a page of the gate's HTTP address.

        Raises:
            OSError: it cannot be had (yet).
        """
        # No proxy settings of the environment: this is loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=PATIENCE_S) as answer:
            return str(answer.read().decode())

    def talk(self, source: str) -> str:
        """Connect from ``source``, wait for what comes, and say it in words."""
        with socket.socket() as sock:
            sock.settimeout(PATIENCE_S)
            try:
                sock.bind((source, 0))
                sock.connect(("127.0.0.1", self.port))
                answer = sock.recv(100)
            except TimeoutError:
                return "silence"
            except ConnectionRefusedError:
                return "refused"
            except ConnectionResetError:
                return "reset"
            except OSError as err:
                if err.errno == errno.EADDRNOTAVAIL:
                    raise DemoFailed(f"this machine's loopback has no {source}") from err
                raise
        return f"the backend says {answer.decode().strip()!r}" if answer else "closed without a word"

    def events(self, event_type: str, **wanted: str) -> list[Event]:
        """Return the audit events of this kind so far whose fields equal ``wanted``."""
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._lines.get_nowait()
                self._events.append(Event(line, json.loads(line)))
        wanted["event_type"] = event_type
        return [event for event in self._events if wanted.items() <= event.fields.items()]

    def hang_up(self) -> None:
        """Send SIGHUP: read the rules again."""
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> int:
        """Send SIGTERM and return the exit code.

        Raises:
            DemoFailed: it did not stop.
        """
        self._process.terminate()
        try:
            return self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired as err:
            raise DemoFailed(f"it did not stop within {PATIENCE_S:g} s") from err

    def wait(self) -> int:
        """Wait until it ends by itself and return the exit code."""
        return self._process.wait()


def _pump(stream: Iterable[str], take: Callable[[str], object]) -> None:
    for line in stream:
        take(line)
