"""The close matrix: who closes first, how, with how much still to come, and how late the other one reads.

Every case is one session. Client and backend first say hello, so that the session exists. Then

- FIN: the one that closes sends ``size`` bytes and half-closes. The other begins to read ``delay_s`` later; it must get all
  of them and then an end. It answers with as many bytes and an end, and all of that must arrive as well.
- RST: the one that closes sends ``size`` bytes, waits until the kernel in front has acknowledged them (or no more of
  them), and resets. The other begins to read ``delay_s`` later; it must get all that was acknowledged, and then a reset.

A unix socket knows no RST. The signs it has:
- The kernel tells ECONNRESET to the other side of a unix socket that was closed while bytes for it lay unread; this is how
  a unix backend resets here, and the client must see an RST.
- Nobody can produce that sign at will: it needs bytes that the other side has sent and that nobody has read. So the
  reset of a client reaches a unix backend as the end of *both* directions at once, after the data: reading ends, POLLHUP
  is raised and writing fails with EPIPE. An orderly end leaves writing open. That tells the two apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import select
import socket
import sys
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.support.backends import reset
from tests.support.faults import part, wrong_at
from tests.support.wait import until

PATIENCE_S = 12.0
SETTLED_S = 0.5  # acknowledgements that make no progress for this long make none any more
MIB = 1 << 20
HELLO_BYTES = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the matrix."""

    number: int
    backend_first: bool
    resets: bool
    size: int
    delay_s: float

    def __str__(self) -> str:
        first = "backend" if self.backend_first else "client"
        return f"{first}-{'RST' if self.resets else 'FIN'}-{self.size}-{self.delay_s:g}s"


CASES = [
    Case(number, *fields)
    for number, fields in enumerate(itertools.product((False, True), (False, True), (0, 1, MIB), (0.0, 2.0)))
]


@dataclass(slots=True)
class Reading:
    """What a reader got: right bytes, and then ``end``, ``reset``, ``nothing`` (for a long time), or a wrong byte."""

    size: int
    end: str


def read(sock: socket.socket, stream: int) -> Reading:
    """Read until nothing more comes."""
    size = 0
    while True:
        try:
            data = sock.recv(1 << 16)
        except ConnectionResetError:
            return Reading(size, "reset")
        except TimeoutError:
            return Reading(size, "nothing")
        if not data:
            return Reading(size, "end")
        wrong = wrong_at(stream, size, data)
        if wrong is not None:
            return Reading(wrong, "wrong byte")
        size += len(data)


def send(sock: socket.socket, stream: int, size: int) -> None:
    """Send the first bytes of a stream."""
    sent = 0
    while sent < size:
        piece = part(stream, sent, size - sent)
        sock.sendall(piece)
        sent += len(piece)


def settled(sock: socket.socket) -> int:
    """Return how many bytes the kernel in front has not acknowledged, once it has all or takes no more."""
    left, since = -1, time.monotonic()
    while True:
        now_left = int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        if now_left != left:
            left, since = now_left, time.monotonic()
        if left == 0 or time.monotonic() - since > SETTLED_S:
            return left
        time.sleep(0.005)


def is_over_both_ways(sock: socket.socket) -> bool:
    """Whether a unix socket that has ended for reading has ended for writing too."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    events = poll.poll(0)
    try:
        sock.send(b"still there?")
    except (BrokenPipeError, ConnectionResetError):
        return bool(events and events[0][1] & select.POLLHUP)
    return False


def play(case: Case, client: socket.socket, backend: socket.socket) -> str | None:
    """Play one case; return what went wrong, or ``None``."""
    first, second = (backend, client) if case.backend_first else (client, backend)
    if case.resets:
        return play_reset(case, first, second)
    writer = threading.Thread(target=send_and_end, args=(first, 2, case.size))
    writer.start()
    time.sleep(case.delay_s)
    got = read(second, 2)
    writer.join(PATIENCE_S)
    if got != Reading(case.size, "end"):
        return f"{got.end} after {got.size} of {case.size} bytes instead of an end"
    answers = threading.Thread(target=send_and_end, args=(second, 3, case.size))
    answers.start()
    time.sleep(case.delay_s)
    back = read(first, 3)
    answers.join(PATIENCE_S)
    if back != Reading(case.size, "end"):
        return f"the answer: {back.end} after {back.size} of {case.size} bytes instead of an end"
    return None


def send_and_end(sock: socket.socket, stream: int, size: int) -> None:
    """Send, and end; a proxy that reset the connection shows on the other side."""
    with contextlib.suppress(OSError):
        send(sock, stream, size)
        sock.shutdown(socket.SHUT_WR)


def play_reset(case: Case, first: socket.socket, second: socket.socket) -> str | None:
    """As `play`, for a reset."""
    if first.family == socket.AF_UNIX:
        second.sendall(b"?")  # stays unread, so that the close is a reset
        until(lambda: first.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT), "the byte that stays unread has come")
    send(first, 2, case.size)
    # What lies in a unix socket's queue is the reader's already, whoever closes.
    acknowledged = case.size if first.family == socket.AF_UNIX else case.size - settled(first)
    reset(first)
    time.sleep(case.delay_s)
    got = read(second, 2)
    if not acknowledged <= got.size <= case.size or got.end == "wrong byte":
        return f"{got.end} after {got.size} bytes, of {acknowledged} that had been acknowledged"
    if second.family == socket.AF_UNIX and got.end == "end":
        return None if is_over_both_ways(second) else "an end that looks orderly instead of a reset"
    return None if got.end == "reset" else f"{got.end} instead of a reset, after all {got.size} bytes"


class Sessions:
    """Makes sessions through a proxy: the client's end here, the backend's end there. ``listener`` is the backend."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self._arrived: dict[int, socket.socket] = {}
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _peer = self.listener.accept()
            except OSError:
                return
            sock.settimeout(PATIENCE_S)
            with contextlib.suppress(OSError):
                hello = sock.recv(HELLO_BYTES, socket.MSG_WAITALL if sock.recv(1, socket.MSG_PEEK) != b"E" else 0)
                if hello == b"E":  # somebody only asks whether the way through is open
                    sock.sendall(hello)
                    sock.close()
                elif len(hello) == HELLO_BYTES:
                    self._arrived[hello[1]] = sock  # before the client hears of it
                    sock.sendall(hello)

    @contextlib.contextmanager
    def open(self, number: int, port: int) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Give (client's end, backend's end) of session ``number`` through ``port``."""
        hello = b"\1" + bytes([number])
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
            client.sendall(hello)
            assert client.recv(HELLO_BYTES, socket.MSG_WAITALL) == hello
            with self._arrived.pop(number) as backend:
                yield client, backend

    def close(self) -> None:
        """Accept no more."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self.listener.close()


def backend_socket(path: Path | None = None) -> socket.socket:
    """Return a listening TCP socket, or a unix one at ``path``."""
    if path is None:
        return socket.create_server(("127.0.0.1", 0), backlog=128)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    path.chmod(0o777)
    sock.listen(128)
    return sock


def run_all(port: int, sessions: Sessions) -> dict[Case, str | None]:
    """Play all cases at once through ``port``; each maps to what went wrong, or ``None``."""

    def run(case: Case) -> str | None:
        try:
            with sessions.open(case.number, port) as (client, backend):
                return play(case, client, backend)
        except (OSError, AssertionError) as err:
            return f"{type(err).__name__}: {err}"

    with ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))
