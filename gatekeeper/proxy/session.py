"""One TCP session: from the dial to its last account.

dialing ──► relaying ──► finished
   │           ├──► parting: both legs have ended, and one still reads ──► finished
   │           └──► delivering: one leg was reset; the other gets what had arrived, then a reset too ──► finished
   └──► finished: the backend could not be reached
"""

from __future__ import annotations

import _socket
import errno
import os
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from gatekeeper.proxy import tcp_info
from gatekeeper.proxy.accounts import SESSIONS_OPENED, count_bytes, count_dial, count_end, count_failure
from gatekeeper.proxy.delivery import Delivery
from gatekeeper.proxy.dial import LOST, Dial, Retry
from gatekeeper.proxy.loop import WRITE
from gatekeeper.proxy.parting import Parting, unread
from gatekeeper.proxy.relay import CHUNK_BYTES, EDGE, UNWATCHED, Leg
from gatekeeper.snapshot.counters import Cause, End

if TYPE_CHECKING:
    from gatekeeper.proxy.gate import Gate

LINGER_DEFAULT = struct.pack("ii", 0, 0)  # deliver in the background, then FIN
LINGER_RESET = struct.pack("ii", 1, 0)  # close at once, with a reset
GIVEN_UP = End.HALF_CLOSE_TIMEOUT
NEGLIGIBLE_BYTES = 1 << 12  # with so little moved altogether nobody has a full buffer
PATIENCE = 10  # half-close timeouts in which a reader that was told the end takes nothing, until it is given up
RESETS = {End.CLIENT_RESET, End.BACKEND_RESET, End.REVOKED, End.CUT, End.BANNED}  # both sides get one


class TcpSession:
    """One client and its backend. Owns both descriptors from the moment it is made."""

    __slots__ = (
        "active_s",  # when bytes were last seen to move
        "backend",
        "began_s",
        "client",
        "destination",
        "dialing",  # the backend has not answered yet
        "epoll",
        "flow",
        "gate",
        "idle_limit_s",
        "pipes",
        "reported_in",
        "reported_out",
        "slot",
        "source",
        "terms",
        "undelivered",  # bytes that waited for a reader when nothing was read any more; `None` while bytes move
    )

    def __init__(
        self, gate: Gate, fd: int, slot: int, source: tuple[int, bytes, int], destination: tuple[bytes, int]
    ) -> None:
        """Take over an accepted client. ``slot`` is its verdict's counter; `TcpGate.dial` comes next."""
        shared = gate.shared
        self.gate = gate
        self.terms = gate.terms
        self.epoll = shared.loop.epoll
        self.pipes = shared.pipes
        self.slot = slot
        self.source = source
        self.destination = destination
        self.began_s = self.active_s = shared.loop.now
        self.idle_limit_s = self.terms.idle_timeout_s
        self.reported_in = self.reported_out = 0
        self.undelivered: int | None = None
        self.flow = shared.report.flow_id()
        self.client = Leg(self, fd, None)
        self.backend = self.client  # until `open` has made one
        self.dialing = True
        shared.sessions[fd] = self
        shared.open_fds += 2
        shared.counters[self.terms.block + SESSIONS_OPENED] += 1

    # -- dialing: one step after the other, each for all who were let in together (`TcpGate.dial`). A step says
    # whether the next may follow; if not, the session waits for something, or is over.

    def hear(self) -> bool:
        """Take what the client has already said: most clients speak first."""
        client = self.client
        try:
            data = os.read(client.fd, CHUNK_BYTES)
        except BlockingIOError:
            return True
        except OSError:  # it has given up, and the backend need not know that there was somebody
            self.finish(End.CLIENT_RESET)
            return False
        if data:
            client.received = len(data)
            client.pending = data
        else:  # it has ended before it began; the backend is to see just that
            client.ended = True
        return True

    def open(self) -> bool:
        """Make the backend's leg."""
        try:
            sock = _socket.socket(self.terms.backend_family, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK)
        except OSError as err:
            self.dial_failed(err.errno)
            return False
        client = self.client
        self.backend = backend = Leg(self, sock.fileno(), sock)
        client.other, backend.other = backend, client
        return True

    def connect(self) -> bool:
        """Start to connect, once or again."""
        terms = self.terms
        sock = self.backend.socket()
        if self.client.pending is not None and terms.backend_family != _socket.AF_UNIX:
            # The last segment of the handshake leaves with what the client has said then: one wake-up of the backend
            # instead of two, and two segments less. The kernel goes back to its usual ways by itself.
            sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_QUICKACK, 0)
        error = sock.connect_ex(terms.backend_address)
        self.dialing = error != 0
        if error and error != errno.EINPROGRESS:
            if error == errno.EAGAIN and terms.backend_family == _socket.AF_UNIX:  # its queue is full
                self.gate.shared.due[self.client.fd] = Retry(self)
            else:
                self.dial_failed(error)
            return False
        if terms.may_meet_itself and sock.getsockname() == terms.backend_address:
            self.dial_failed(errno.ELOOP)
            return False
        return True

    def speak(self) -> bool:
        """Pass on what the client has said. Nearby backends are connected by now, and taking the bytes proves it.

        Waiting for the connection to become writable would be three more system calls.
        """
        client = self.client
        data = client.pending
        if data is None:
            return True
        try:
            sent = os.write(self.backend.fd, data)
        except BlockingIOError:
            return True
        except OSError as err:
            if err.errno in LOST:
                self.connected()
                self.lose(self.backend)
            else:
                self.dial_failed(err.errno)
            return False
        self.dialing = False
        client.pending = data[sent:] or None
        return True

    def begin(self) -> bool:
        """Relay, or wait until the backend has answered."""
        if self.dialing:
            shared = self.gate.shared
            shared.due[self.client.fd] = dial = Dial(self)
            shared.loop.watch(self.backend.fd, WRITE, dial)
        else:
            self.connected()
        return True

    def connected(self) -> None:
        """The backend has answered: count the dial and relay from now on."""
        shared = self.gate.shared
        client, backend = self.client, self.backend
        count_dial(shared, self.terms, time.monotonic() - self.began_s)
        handlers = shared.loop.handlers
        handlers[client.fd] = client
        handlers[backend.fd] = backend
        if client.pending is None and not client.ended:
            register = self.epoll.register
            register(client.fd, EDGE)
            register(backend.fd, EDGE)
            client.interest = backend.interest = EDGE
            return
        backend.watch_as_needed()
        client.watch_as_needed()
        if client.ended:
            client.end()

    def dial_failed(self, error: int | None) -> None:
        """The backend cannot be reached: count why (errno), and reset the client."""
        self.finish(End.BACKEND_FAILED, count_failure(self.gate.shared, self.terms, error))

    # -- relaying

    def half_closed(self) -> None:
        """One direction has ended: from now on the other one has less time to idle."""
        self.active_s = self.gate.shared.loop.now
        self.idle_limit_s = self.terms.half_close_timeout_s

    def part(self) -> None:
        """Both sides have ended: finish, once they have taken everything."""
        client, backend = self.client, self.backend
        if client.received + backend.received <= NEGLIGIBLE_BYTES or not (unread(client) or unread(backend)):
            self.finish(End.FINISHED)
            return
        shared = self.gate.shared
        for leg in (client, backend):
            if leg.interest != UNWATCHED:
                leg.watch(UNWATCHED)
            shared.loop.handlers.pop(leg.fd, None)
            with suppress(OSError):  # told before, or gone
                leg.socket().shutdown(_socket.SHUT_WR)
        self.half_closed()
        shared.due[client.fd] = Parting(self)

    def lose(self, leg: Leg) -> None:
        """``leg`` was reset: deliver what had come from it, then reset the other one."""
        shared = self.gate.shared
        alive = leg.other
        alive.drop_waiting()
        for each in (leg, alive):
            if each.interest != UNWATCHED:
                each.watch(UNWATCHED)
            shared.loop.handlers.pop(each.fd, None)
        delivery = Delivery(self, leg)
        shared.due[self.client.fd] = delivery
        delivery.step()

    # -- for people

    def state(self) -> str:
        """See `gate.Session.state`."""
        client, backend = self.client, self.backend
        waiting = self.gate.shared.due.get(client.fd)
        if isinstance(waiting, Delivery):
            return "resetting"
        if (waiting is not None and not isinstance(waiting, Parting)) or backend is client:
            return "dialing"
        for leg, state in ((client, "client_closed"), (backend, "backend_closed")):
            # The end of one that sends more than the other takes is in the kernel, where we have not read it yet.
            if leg.done or (leg.blocked() and tcp_info.has_closed(leg.fd)):
                return state
        return "open"

    def moved(self) -> tuple[int, int]:
        """See `gate.Session.moved`."""
        return self.client.received, 0 if self.backend is self.client else self.backend.received

    def idle_s(self, now: float) -> float:
        """See `gate.Session.idle_s`."""
        return 0.0 if self.moved() != (self.reported_in, self.reported_out) else now - self.active_s

    def tcp_details(self) -> tuple[dict[str, int] | None, dict[str, int] | None]:
        """See `gate.Session.tcp_details`."""
        dialed = self.backend is not self.client and self.terms.backend_family != _socket.AF_UNIX
        return (
            tcp_info.details(self.client.fd) if self.source[0] else None,
            tcp_info.details(self.backend.fd) if dialed else None,
        )

    # -- ending

    def fail(self) -> None:
        """See `Failing.fail`."""
        self.finish(End.ERROR)

    def live(self) -> bool:
        """See `gate.Session.live`. Of one that has ended, the descriptors may be another's by now."""
        return self.gate.shared.sessions.get(self.client.fd) is self

    def sweep(self, now: float) -> None:
        """See `gate.Session.sweep`."""
        moved_in, moved_out = self.moved()
        if moved_in != self.reported_in or moved_out != self.reported_out:
            self.active_s = now
            self.undelivered = None
            count_bytes(self.gate.shared, self, moved_in, moved_out)
        elif self.undelivered is None:
            self.undelivered = self.count_undelivered()
        elif now - self.active_s >= self.idle_limit_s:
            # A slow reader is not an idle one: megabytes that wait in the kernel may take it longer than the limit.
            left = self.count_undelivered()
            if left < self.undelivered:
                self.undelivered = left
                self.active_s = now
                return
            if left and (self.client.done or self.backend.done) and now - self.active_s < PATIENCE * self.idle_limit_s:
                return  # it may sleep; were we to go, the kernel would soon give it up without a word
            self.finish(End.HALF_CLOSE_TIMEOUT if self.client.done or self.backend.done else End.IDLE_TIMEOUT)

    def count_undelivered(self) -> int:
        """Return how many bytes the two sides have not taken yet, in our hands and in the kernel's."""
        waiting = 0
        for leg in {self.client, self.backend}:
            waiting += unread(leg) + leg.piped + len(leg.pending or b"")
        return waiting

    def finish(self, end: End, cause: Cause | None = None) -> None:
        """See `gate.Session.finish`. Whoever was not told the end of its stream gets a reset, unless both were FINISHED."""
        shared = self.gate.shared
        client, backend = self.client, self.backend
        if shared.sessions.get(client.fd) is not self:
            return
        del shared.sessions[client.fd]
        shared.due.pop(client.fd, None)
        handlers = shared.loop.handlers
        legs = (client,) if backend is client else (client, backend)
        moved_in, moved_out = client.received, 0 if backend is client else backend.received
        for leg in legs:
            handlers.pop(leg.fd, None)
            # A side that was told the end has a whole stream and may still be reading it: only a reset of the
            # other side, which can not take its answer any more, is worth another. Or that it has not read for too long.
            if end in RESETS or (end is not End.FINISHED and not leg.other.done) or (end is GIVEN_UP and unread(leg)):
                leg.socket().setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, LINGER_RESET)
            shared.loop.closing.append(leg.release())
        for leg in legs:
            leg.other = leg.session = None  # type: ignore[assignment]  # no cycles may be left to the collector
        shared.open_fds -= 2
        count_end(shared, self, moved_in, moved_out, end, cause)
