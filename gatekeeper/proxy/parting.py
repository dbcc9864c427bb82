"""What is left to do for a TCP session both of whose sides have ended, while one of them still reads.

What we have written waits in the kernel. Were we to close now, the kernel would go on by itself, but not for long:
it gives up on a slow reader whose full buffer drops what is repeated, or one that sleeps, after one to three minutes,
and tells nobody; the reader waits for ever for the rest. So the descriptors are kept until everything has arrived.
"""

from __future__ import annotations

import _socket
import termios
from fcntl import ioctl
from sys import byteorder
from typing import TYPE_CHECKING

from gatekeeper.snapshot.counters import End

if TYPE_CHECKING:
    from gatekeeper.proxy.relay import Leg
    from gatekeeper.proxy.session import TcpSession


class Parting:
    """Waits until both sides have taken everything. Who takes nothing at all any more is the sweep's business."""

    __slots__ = ("reading", "session")

    def __init__(self, session: TcpSession) -> None:
        self.session = session
        self.reading = [session.client, session.backend]

    def check(self, _now: float) -> None:
        """See `gate.Due.check`."""
        self.reading = [leg for leg in self.reading if unread(leg) and not is_gone(leg)]
        if not self.reading:
            self.session.finish(End.FINISHED)

    def fail(self) -> None:
        """See `Failing.fail`."""
        self.session.fail()


def unread(leg: Leg) -> int:
    """Return how many bytes, and the end, the other host has not acknowledged yet; of a unix socket what was not read."""
    return int.from_bytes(ioctl(leg.fd, termios.TIOCOUTQ, bytes(4)), byteorder)


def is_gone(leg: Leg) -> bool:
    """Say whether the peer has reset the connection: it will not take the rest."""
    return leg.socket().getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR) != 0
