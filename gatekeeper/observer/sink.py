"""Where audit lines go, written by a thread of its own: a stuck reader or a full disk stops that thread and nothing else.

Lines wait in a bounded buffer. When it is full, new lines are left out and counted; it is said once on stderr, and
once writing works again the log itself says how many are missing. A line that was written in part is completed before
anything else; if the log was exchanged meanwhile, it is written to the new one whole.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import threading
import time
from collections import deque
from typing import Protocol

from gatekeeper.observer.audit import service_event
from gatekeeper.observer.say import say

MOST_WAITING_BYTES = 8 << 20
RETRY_S = 1.0
JOURNAL_SOCKET = "/run/systemd/journal/socket"
LONGEST_DATAGRAM_BYTES = 1 << 16  # a longer line is cut: only the text of a failed reload can be that long
JOURNAL_FIELDS = b"\nPRIORITY=6\nSYSLOG_IDENTIFIER=gatekeeper\n"


class Target(Protocol):
    """Something lines can be written to, blocking. Owns its descriptor."""

    def write(self, lines: memoryview) -> int:
        """Write some of ``lines``, return how many bytes (0: its reader is not ready); ``OSError``: try again later."""

    def close(self) -> None:
        """Close the descriptor."""


class FileTarget:
    """A file, pipe, terminal or stream socket."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.regular = stat.S_ISREG(os.fstat(fd).st_mode)

    def write(self, lines: memoryview) -> int:
        try:
            # Whole lines that a pipe takes at once or not at all: being killed in between breaks none.
            return os.write(self.fd, lines if self.regular else lines[: _lines_end(lines, select.PIPE_BUF)])
        except BlockingIOError:  # a pipe that is full and that somebody made non-blocking
            poll = select.poll()
            poll.register(self.fd, select.POLLOUT)
            poll.poll(RETRY_S * 1000)
            return 0

    def close(self) -> None:
        os.close(self.fd)


class JournalTarget:
    """journald's native protocol: a datagram for each line."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.socket.setblocking(True)
        try:
            self.address = self.socket.getpeername()
        except OSError:
            self.address = JOURNAL_SOCKET

    def write(self, lines: memoryview) -> int:
        line = bytes(lines[: _line_end(lines)])
        datagram = b"MESSAGE=" + line[:-1] + JOURNAL_FIELDS
        try:
            self.socket.send(datagram)
        except OSError as err:
            if err.errno == errno.EMSGSIZE:
                datagram = datagram[:LONGEST_DATAGRAM_BYTES] + JOURNAL_FIELDS
            else:  # the journal was restarted
                self.socket.connect(self.address)
            self.socket.send(datagram)
        return len(line)

    def close(self) -> None:
        self.socket.close()


class Sink:
    """The audit log. `put` never blocks; all else about it happens in its thread."""

    def __init__(self, target: Target, most_waiting_bytes: int = MOST_WAITING_BYTES) -> None:
        self.lost = 0  # lines, since the start
        self._target = target
        self._next_target: Target | None = None
        self._most = most_waiting_bytes
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._missing = 0  # lost lines that the log does not know of yet
        self._closing = False
        self._failing = False
        self._gave_up = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def put(self, lines: list[str]) -> None:
        """Queue whole lines, or count them as lost."""
        data = "".join(lines).encode("ascii", "backslashreplace")
        with self._changed:
            if self._missing and self._waiting_bytes <= self._most // 2:
                self._confess()
            if self._missing or self._waiting_bytes + len(data) > self._most:
                first = not self._missing
                self._missing += len(lines)
                self.lost += len(lines)
            else:
                first = False
                self._waiting.append(data)
                self._waiting_bytes += len(data)
                self._changed.notify()
        if first:
            say("the audit log does not take what happens as fast as it happens: lines are being left out and counted")

    def swap(self, target: Target) -> None:
        """Write to ``target`` from now on; the old one is closed."""
        with self._changed:
            if self._next_target is not None:
                self._next_target.close()
            self._next_target = target
            self._changed.notify()

    def close(self, patience_s: float) -> bool:
        """Write what waits, for at most ``patience_s``, and close the target; say whether all of it was written.

        A target that fails is not waited for.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(patience_s)
        return not (self._thread.is_alive() or self._gave_up)

    def _confess(self) -> None:
        line = service_event({"event_type": "events_lost", "class": "audit", "count": self._missing}, time.time())
        data = line.encode("ascii")
        self._missing = 0
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self._changed.notify()

    def _run(self) -> None:
        while not self._gave_up:
            with self._changed:
                while not (self._waiting or self._closing or self._next_target):
                    self._changed.wait()
                self._exchange()
                if not self._waiting:
                    if self._closing:
                        break
                    continue
                data = self._waiting.popleft()
            self._write(memoryview(data))
            with self._changed:
                self._waiting_bytes -= len(data)
                if self._missing and not self._waiting:
                    self._confess()
        self._target.close()

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                written = self._target.write(data[done:])
            except OSError as err:
                if self._closing and not self._next_target:
                    self._gave_up = True
                    return
                self._wait_after(err)
            else:
                done += written
                if self._failing and written:
                    self._failing = False
                    say("the audit log can be written again")
            with self._changed:
                if self._exchange() and done < len(data):
                    done = bytes(data).rfind(b"\n", 0, done) + 1

    def _wait_after(self, err: OSError) -> None:
        if not self._failing:
            self._failing = True
            say(f"the audit log cannot be written, trying again every {RETRY_S:g} s: {err.strerror}")
        with self._changed:
            self._changed.wait_for(lambda: self._next_target is not None or self._closing, RETRY_S)

    def _exchange(self) -> bool:
        if self._next_target is None:
            return False
        self._target.close()
        self._target, self._next_target = self._next_target, None
        return True


def _line_end(lines: memoryview) -> int:
    """Return the length of the first line, its newline included."""
    found = bytes(lines[:4096]).find(b"\n")
    return (found if found >= 0 else bytes(lines).index(b"\n")) + 1


def _lines_end(lines: memoryview, most_bytes: int) -> int:
    """Return the length of as many whole lines as ``most_bytes`` hold, of the first one if it is longer."""
    return bytes(lines[:most_bytes]).rfind(b"\n") + 1 or _line_end(lines)
