"""What the tests of this folder have in common: a policy, the CPU of a process, a stream that must not stop."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.clients import Sources, ask
from tests.support.wait import until


def open_policy(port: int, backend: str, more: str = "") -> str:
    """Return a rule file that lets everybody in; ``more`` are further lines of the listener."""
    extra = "".join(f"    {line}\n" for line in more.splitlines())
    return f'listeners:\n  - name: door\n    listen: "127.0.0.1:{port}"\n    backend: "{backend}"\n{extra}default: allow\n'


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, in seconds."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def share_of_a_core(pid: int, for_s: float) -> float:
    """Watch a process for a while and return how much of one core it used, 0.0 to 1.0."""
    began, used = time.monotonic(), cpu_s(pid)
    until(lambda: time.monotonic() - began >= for_s, f"{for_s:g} s have passed", within_s=for_s + 30)
    return (cpu_s(pid) - used) / (time.monotonic() - began)


def threads(pid: int) -> int:
    """Return how many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


class Steady:
    """A session that asks and checks the answer ten times a second, from its beginning to the end of the context.

    ``slowest_s`` is the longest wait for an answer so far. An answer that is wrong or does not come fails the test.
    """

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.slowest_s = 0.0
        self.answers = 0
        self._problem: BaseException | None = None
        self._connection = Sources().connect(source, "127.0.0.1", port)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stopping.wait(0.1):
                asked = time.monotonic()
                words = f"answer {self.answers}".encode()
                assert ask(self._connection, words) == words
                self.slowest_s = max(self.slowest_s, time.monotonic() - asked)
                self.answers += 1
        except (OSError, AssertionError) as err:
            self._problem = err

    def go_on(self) -> None:
        """Return once five more answers have come."""
        goal = self.answers + 5

        def answered() -> bool:
            if self._problem is not None:
                raise RuntimeError("the session did not live on") from self._problem
            return self.answers >= goal

        until(answered, "the session is alive")

    def __enter__(self) -> Self:
        self._thread.start()
        self.go_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(30)
        self._connection.close()
        if error is None and self._problem is not None:
            raise self._problem


def stream(connection: socket.socket, size: int) -> int:
    """Send ``size`` bytes to an echo service while reading them back; return how many came back as they were."""
    block = bytes(range(256)) * 1024
    sender = threading.Thread(target=_send, args=(connection, block, size), daemon=True)
    sender.start()
    right = at = 0
    while at < size:
        data = connection.recv(1 << 16)
        if not data:
            break
        start = at % len(block)
        expected = (block + block)[start : start + len(data)]
        right += len(data) if data == expected else 0
        at += len(data)
    sender.join(30)
    return right


def _send(connection: socket.socket, block: bytes, size: int) -> None:
    while size:
        size -= connection.send(block[: min(size, len(block))]) if size >= len(block) else connection.send(block[:size])
