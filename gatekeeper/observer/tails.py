"""Audit lines for those who follow the log at a terminal, beside the log itself.

Each reader has a unix socket that keeps messages apart (SEQPACKET): a message is some whole lines, and sending never
waits. What a slow reader does not take is kept up to a bound; what is beyond is left out, and the reader is told how
many lines are missing. Nobody else notices.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator

from gatekeeper.observer.audit import service_event
from gatekeeper.observer.sink import Sink

MOST_TAILS = 16  # the supervisor grants fewer; a reader may go on after it has hung up there
MOST_WAITING_BYTES = 1 << 20
MESSAGE_BYTES = 1 << 15  # of a message with several lines


class Outlets:
    """Where lines go: the audit log, if there is one, and whoever follows it."""

    def __init__(self, sink: Sink | None) -> None:
        self.sink = sink
        self._tails: set[Tail] = set()

    def put(self, lines: list[str]) -> None:
        """Write whole lines, or count them as lost. Never waits."""
        if self.sink is not None:
            self.sink.put(lines)
        for tail in list(self._tails):
            tail.put(lines)

    def add(self, fd: int) -> None:
        """Let a reader follow from now on. Takes over the descriptor of its socket."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError:  # it is something else
            os.close(fd)
            return
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET or len(self._tails) >= MOST_TAILS:
            sock.close()
            return
        self._tails.add(Tail(sock, self._tails.discard))


class Tail:
    """One reader. Owns its socket. ``gone`` is called when the reader is."""

    def __init__(self, sock: socket.socket, gone: Callable[[Tail], None]) -> None:
        self._socket = sock
        self._gone = gone
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._missing = 0
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self.close)  # it has nothing to say: this is its end

    def put(self, lines: list[str]) -> None:
        """Send lines as soon as the reader takes them."""
        for message, count in _messages(lines):
            if self._missing or self._waiting_bytes + len(message) > MOST_WAITING_BYTES:
                self._missing += count
            else:
                self._waiting.append(message)
                self._waiting_bytes += len(message)
        self._flush()

    def close(self) -> None:
        """Hang up."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._gone(self)

    def _flush(self) -> None:
        while self._waiting:
            message = self._waiting[0]
            try:
                self._socket.send(message)
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._flush)
                return
            except OSError:
                self.close()
                return
            self._waiting.popleft()
            self._waiting_bytes -= len(message)
            if not self._waiting and self._missing:
                line = service_event({"event_type": "events_lost", "class": "tail", "count": self._missing}, time.time())
                self._missing = 0
                self._waiting.append(line.encode("ascii"))
                self._waiting_bytes += len(line)
        self._loop.remove_writer(self._socket.fileno())


def _messages(lines: list[str]) -> Iterator[tuple[bytes, int]]:
    """Return lines as messages of a bounded size, and how many are in each. A longer line is a message of its own."""
    part: list[str] = []
    size = 0
    for line in lines:
        if part and size + len(line) > MESSAGE_BYTES:
            yield "".join(part).encode("ascii", "backslashreplace"), len(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    if part:
        yield "".join(part).encode("ascii", "backslashreplace"), len(part)
