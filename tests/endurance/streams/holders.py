"""Programs that hold many idle sessions, so that their descriptors do not count against the test's own limit.

`python -m tests.endurance.streams.holders backend`: an echo backend; prints its port.
`python -m tests.endurance.streams.holders clients PORT COUNT`: opens COUNT sessions, each proved by an echo, and prints "open";
at any line on stdin it closes all of them at once, prints "closed" and ends.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[3]
AT_ONCE = 100  # dialled before the first echo is awaited: far below any queue's length


def backend() -> None:
    """Echo until stdin ends."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    poller = select.epoll()
    poller.register(listener.fileno(), select.EPOLLIN)
    poller.register(0, select.EPOLLIN)
    held: dict[int, socket.socket] = {}
    while True:
        for fd, _mask in poller.poll():
            if fd == 0:
                return
            if fd == listener.fileno():
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sock, _peer = listener.accept()
                        held[sock.fileno()] = sock
                        poller.register(sock.fileno(), select.EPOLLIN)
                continue
            try:
                data = held[fd].recv(4096)
                if data:
                    held[fd].sendall(data)
                    continue
            except ConnectionError:
                pass
            held.pop(fd).close()


def clients(port: int, count: int) -> None:
    """Hold ``count`` sessions until a line comes."""
    held: list[socket.socket] = []
    while len(held) < count:
        fresh = []
        for number in range(len(held), min(count, len(held) + AT_ONCE)):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((f"127.0.{number % 250}.{1 + number % 100}", 0))
            sock.settimeout(20)
            sock.connect(("127.0.0.1", port))
            sock.send(b"?")
            fresh.append(sock)
        for sock in fresh:
            assert sock.recv(1) == b"?"
        held += fresh
    print("open", flush=True)
    sys.stdin.readline()
    for sock in held:
        sock.close()
    print("closed", flush=True)


class Holder:
    """One of the programs above, from the outside; it ends with the context."""

    def __init__(self, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.endurance.streams.holders", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def line(self) -> str:
        """Return what it prints next."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self) -> None:
        """Send it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()


def main(words: list[str]) -> None:
    """Do what the words say, with as many descriptors as we may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if words == ["backend"]:
        backend()
    else:
        clients(int(words[1]), int(words[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
