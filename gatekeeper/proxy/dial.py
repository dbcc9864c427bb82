"""What a TCP session waits with until its backend has answered."""

from __future__ import annotations

import _socket
import errno
from typing import TYPE_CHECKING

from gatekeeper.snapshot.counters import End

if TYPE_CHECKING:
    from gatekeeper.proxy.session import TcpSession

LOST = {errno.ECONNRESET, errno.EPIPE}  # it was there, may have spoken, and is gone again


class Dial:
    """Waits until the backend has answered."""

    __slots__ = ("deadline_s", "session", "watches_client")

    def __init__(self, session: TcpSession) -> None:
        self.session = session
        self.deadline_s = session.began_s + session.terms.connect_timeout_s
        self.watches_client = False

    def ready(self, _mask: int) -> None:
        """The kernel knows how the dial went."""
        session = self.session
        backend = session.backend
        shared = session.gate.shared
        error = backend.socket().getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        if error and error not in LOST:
            session.dial_failed(error)
            return
        shared.loop.unwatch(backend.fd)
        if self.watches_client:
            shared.loop.unwatch(session.client.fd)
        del shared.due[session.client.fd]
        session.connected()
        if error:
            session.lose(backend)

    def check(self, now: float) -> None:
        """See `gate.Due.check`. A dial that takes its time is worth watching whether the client still waits for it."""
        session = self.session
        if now >= self.deadline_s:
            session.dial_failed(errno.ETIMEDOUT)
        elif not self.watches_client:
            self.watches_client = True
            session.gate.shared.loop.watch(session.client.fd, 0, Impatient(session))

    def fail(self) -> None:
        """See `Failing.fail`."""
        self.session.fail()


class Impatient:
    """A client whose backend is still being dialled: nothing is expected of it but that it may be gone."""

    __slots__ = ("session",)

    def __init__(self, session: TcpSession) -> None:
        self.session = session

    def ready(self, _mask: int) -> None:
        """It is gone."""
        self.session.finish(End.CLIENT_RESET)

    def fail(self) -> None:
        """See `Failing.fail`."""
        self.session.fail()


class Retry:
    """Waits for room in the queue of a unix backend, which the kernel does not announce."""

    __slots__ = ("deadline_s", "session")

    def __init__(self, session: TcpSession) -> None:
        self.session = session
        self.deadline_s = session.began_s + session.terms.connect_timeout_s

    def check(self, now: float) -> None:
        """See `gate.Due.check`."""
        session = self.session
        if now >= self.deadline_s:
            session.dial_failed(errno.ETIMEDOUT)
            return
        del session.gate.shared.due[session.client.fd]
        if session.connect() and session.speak():
            session.begin()

    def fail(self) -> None:
        """See `Failing.fail`."""
        self.session.fail()
