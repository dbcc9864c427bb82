"""One leg of a TCP session: how bytes, ends and resets pass to the other leg.

The rules:
- What is read from a leg is written to the other at once. When the other cannot take it all, reading stops until it can:
  at most one chunk (copied) or one pipe (spliced) waits, nothing queues.
- The end of a leg (FIN) becomes the end of the other once everything before it is written; the opposite direction goes on.
- A leg starts edge-triggered: as long as all it does is to send little and to end, epoll need not be told anything
  more. The price is that a short read is taken for the end of what has come, and that a hang-up in the event means
  to read until it shows. Whoever is interrupted (paused, or busy with bulk) becomes level-triggered and stays so.
- A level-triggered leg that has ended stays registered for nothing but errors; one that is paused is not registered
  at all, because epoll reports hang-ups even to those who asked for nothing.
- Errors of a leg end the session: see `gatekeeper.proxy.session`.

Reading and writing happen in one function on purpose: it saves a call per event, and this is where the time goes.
"""

from __future__ import annotations

import _socket
import select
from os import read, splice, write
from typing import TYPE_CHECKING

from gatekeeper.proxy.loop import READ, WRITE

if TYPE_CHECKING:
    from gatekeeper.proxy.pipes import Pipe
    from gatekeeper.proxy.session import TcpSession

CHUNK_BYTES = 1 << 14  # small traffic is copied; a chunk that comes full suggests that more is to come
BULK_LEAST_BYTES = 1 << 12  # a splice that moves less than this was not worth it: back to copying

SPLICE_FLAGS = 1 | 2  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK, which Python 3.11 does not name
ERROR = select.EPOLLERR
HANGUP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
EDGE = READ | select.EPOLLRDHUP | select.EPOLLET
UNWATCHED = -1
SHUT_WR = _socket.SHUT_WR


class Leg:
    """One end of a session: the descriptor bytes are read from; ``other`` is where they go. Owns ``fd``."""

    __slots__ = (
        "bulk",  # read by splice for now
        "done",  # the end of this leg was passed on to the other
        "ended",  # the end of this leg was read
        "fd",
        "interest",  # what epoll was asked for
        "other",
        "pending",  # copied bytes that the other leg did not take yet
        "pipe",  # held only while bytes are in it
        "piped",  # how many
        "received",  # bytes read so far
        "session",
        "sock",  # the socket object of ``fd``, once one was needed
    )

    def __init__(self, session: TcpSession, fd: int, sock: _socket.socket | None) -> None:
        self.session = session
        self.fd = fd
        self.sock = sock
        self.other: Leg = self  # until both exist
        self.interest = UNWATCHED
        self.received = 0
        self.pending: bytes | None = None
        self.pipe: Pipe | None = None
        self.piped = 0
        self.bulk = self.ended = self.done = False

    def fail(self) -> None:
        """See `Failing.fail`."""
        self.session.fail()

    def ready(self, mask: int) -> None:
        """Deal with what epoll reported of this leg: write what waits for it, read what has come and pass it on."""
        if mask != READ:
            other = self.other
            if other.blocked() and not other.push():
                return
            if self.ended:
                if mask & ERROR:  # it had ended, and now it is gone altogether
                    self.session.lose(self)
                elif not mask & WRITE and self.interest != EDGE:
                    self.watch(UNWATCHED)  # a unix peer that closed; whether we mind shows when we write to it
                return
        if self.pending is not None or self.piped or self.ended:
            return
        if self.bulk:
            self.pull_bulk(mask)
            return
        while True:
            try:
                data = read(self.fd, CHUNK_BYTES)
            except BlockingIOError:
                return
            except OSError:
                self.session.lose(self)
                return
            size = len(data)
            if not size:
                self.end()
                return
            self.received += size
            other = self.other
            try:
                sent = write(other.fd, data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.session.lose(other)
                return
            if sent != size:
                self.pending = data[sent:]
                self.watch_as_needed()
                other.watch_as_needed()
                return
            if size == CHUNK_BYTES:
                self.bulk = True
                self.watch_as_needed()  # not just READ: the other leg may be waiting for room here
                return
            if not mask & HANGUP or self.interest != EDGE:
                return

    def blocked(self) -> bool:
        """Say whether bytes of this leg wait for the other one."""
        return self.pending is not None or self.piped > 0

    def pull_bulk(self, mask: int) -> None:
        """Move what has come through a pipe, without the bytes ever being copied to us."""
        session = self.session
        pipe = session.pipes.take()
        if pipe is None:
            self.bulk = False
            self.ready(mask)
            return
        # One pipe a turn: epoll comes back for more, and whoever sends little does not wait behind whoever sends much.
        try:
            moved = splice(self.fd, pipe.write_fd, pipe.size, flags=SPLICE_FLAGS)
        except BlockingIOError:
            session.pipes.give_back(pipe)
            self.bulk = False
            return
        except OSError:
            session.pipes.give_back(pipe)
            session.lose(self)
            return
        if not moved:
            session.pipes.give_back(pipe)
            self.end()
            return
        self.received += moved
        self.bulk = moved >= BULK_LEAST_BYTES
        self.pipe, self.piped = pipe, moved
        if self.push_pipe():  # else it waits for the other leg with its pipe, or the session is over
            session.pipes.give_back(pipe)

    def push(self) -> bool:
        """Write what waits for the other leg; say whether all went and the session goes on."""
        other = self.other
        if self.piped:
            pipe = self.pipe
            if not self.push_pipe():
                return False
            self.session.pipes.give_back(pipe)  # type: ignore[arg-type]  # piped bytes are in a pipe
        elif self.pending is not None:
            try:
                sent = write(other.fd, self.pending)
            except BlockingIOError:
                return False
            except OSError:
                self.session.lose(other)
                return False
            if sent < len(self.pending):
                self.pending = self.pending[sent:]
                return False
            self.pending = None
        self.watch_as_needed()
        other.watch_as_needed()
        return True

    def push_pipe(self) -> bool:
        """Empty the pipe into the other leg. When all went, the pipe is the caller's again."""
        other = self.other
        pipe = self.pipe
        assert pipe is not None
        while self.piped:
            try:
                self.piped -= splice(pipe.read_fd, other.fd, self.piped, flags=SPLICE_FLAGS)
            except BlockingIOError:
                self.watch_as_needed()
                other.watch_as_needed()
                return False
            except OSError:
                self.session.lose(other)
                return False
        self.pipe = None
        return True

    def end(self) -> None:
        """The leg has ended and all it sent is written: pass the end on."""
        self.ended = self.done = True
        other = self.other
        if other.done:
            self.session.part()
            return
        try:
            other.socket().shutdown(SHUT_WR)
        except OSError:  # it is gone already
            self.session.lose(other)
            return
        self.session.half_closed()
        if self.interest != EDGE:
            self.watch_as_needed()

    def watch_as_needed(self) -> None:
        """Ask epoll for just what the state of both legs calls for."""
        mask = 0 if self.ended or self.blocked() else READ
        if self.other.blocked():
            mask |= WRITE
        self.watch(mask if mask or self.ended else UNWATCHED)

    def watch(self, mask: int) -> None:
        """Ask epoll for ``mask``."""
        if mask == self.interest or (mask == 0 and self.interest == EDGE):
            return
        epoll = self.session.epoll
        if mask == UNWATCHED:
            epoll.unregister(self.fd)
        elif self.interest == UNWATCHED:
            epoll.register(self.fd, mask)
        else:
            epoll.modify(self.fd, mask)
        self.interest = mask

    def socket(self) -> _socket.socket:
        """Return the socket object of this leg: needed for options and shutdown only, so it is made late."""
        if self.sock is None:
            # The family only tells how addresses are read; naming one spares the look-ups that find it out.
            self.sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0, self.fd)
        return self.sock

    def release(self) -> int:
        """Drop what still waits, and return the descriptor, which is the caller's to close."""
        if self.pending is not None or self.pipe is not None:
            self.drop_waiting()
        return self.fd if self.sock is None else self.sock.detach()

    def drop_waiting(self) -> None:
        """Forget the bytes of this leg that were not delivered."""
        self.pending = None
        if self.pipe is not None:
            self.session.pipes.discard(self.pipe)
            self.pipe = None
        self.piped = 0
