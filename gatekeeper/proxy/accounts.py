"""Counting: what began, what moved, what ended, what the kernel dropped."""

from __future__ import annotations

import errno
from bisect import bisect_left
from typing import TYPE_CHECKING, Protocol

from gatekeeper.proxy.events import CAUSE_SHIFT
from gatekeeper.snapshot.counters import DIAL_BOUNDS_S, DURATION_BOUNDS_S, Cause, ListenerSlot

if TYPE_CHECKING:
    import socket

    from gatekeeper.proxy.gate import Shared, Terms
    from gatekeeper.snapshot.counters import End

SO_MEMINFO = 55
MEMINFO_BYTES = 36
MEMINFO_DROPS = slice(32, 36)  # SK_MEMINFO_DROPS, 32 bits

# As plain numbers: looking a member up in its enum costs more than the addition it is needed for.
SESSIONS_OPENED = int(ListenerSlot.SESSIONS_OPENED)
SESSIONS_CLOSED = int(ListenerSlot.SESSIONS_CLOSED)
BYTES_IN = int(ListenerSlot.BYTES_IN)
BYTES_OUT = int(ListenerSlot.BYTES_OUT)
ENDS = int(ListenerSlot.ENDS)
DURATION_SUM_US = int(ListenerSlot.DURATION_SUM_US)
DURATION_BUCKETS = int(ListenerSlot.DURATION_BUCKETS)
DIAL_SUM_US = int(ListenerSlot.DIAL_SUM_US)
DIAL_BUCKETS = int(ListenerSlot.DIAL_BUCKETS)

CAUSES = {
    errno.ECONNREFUSED: Cause.REFUSED,
    errno.ETIMEDOUT: Cause.TIMEOUT,
    errno.ENETUNREACH: Cause.UNREACHABLE,
    errno.EHOSTUNREACH: Cause.UNREACHABLE,
    errno.ECONNRESET: Cause.RESET,
    errno.EPIPE: Cause.RESET,
    errno.EMFILE: Cause.RESOURCES,
    errno.ENFILE: Cause.RESOURCES,
    errno.ENOBUFS: Cause.RESOURCES,
    errno.ENOMEM: Cause.RESOURCES,
    errno.EADDRNOTAVAIL: Cause.RESOURCES,  # no ephemeral port left
    errno.EAGAIN: Cause.RESOURCES,  # the queue of a unix backend is full
    errno.ELOOP: Cause.LOOP,
    errno.ENOENT: Cause.MISSING,
    errno.EACCES: Cause.DENIED,
    errno.EPERM: Cause.DENIED,
    errno.ENOTSOCK: Cause.MISSING,
}


class Ended(Protocol):
    """What TCP and UDP sessions have in common once they are over. Times are monotonic."""

    terms: Terms
    slot: int
    flow: int
    source: tuple[int, bytes, int]
    destination: tuple[bytes, int]
    began_s: float
    reported_in: int
    reported_out: int


def count_bytes(shared: Shared, session: Ended, moved_in: int, moved_out: int) -> None:
    """Bring a session's share of the byte counters up to these totals."""
    counters, block = shared.counters, session.terms.block
    counters[block + BYTES_IN] += moved_in - session.reported_in
    counters[block + BYTES_OUT] += moved_out - session.reported_out
    session.reported_in, session.reported_out = moved_in, moved_out


def count_dial(shared: Shared, terms: Terms, took_s: float) -> None:
    """Count a backend that answered after ``took_s``."""
    counters, block = shared.counters, terms.block
    counters[block + DIAL_SUM_US] += int(took_s * 1e6)
    counters[block + DIAL_BUCKETS + bisect_left(DIAL_BOUNDS_S, took_s)] += 1


def count_failure(shared: Shared, terms: Terms, error: int | None) -> Cause:
    """Count a backend that could not be reached, by errno; return the cause it was counted under."""
    cause = CAUSES.get(error or 0, Cause.OTHER)
    shared.counters[terms.block + ListenerSlot.BACKEND_FAILURES + cause] += 1
    return cause


def count_end(
    shared: Shared, session: Ended, moved_in: int, moved_out: int, end: End, cause: Cause | None = None
) -> None:
    """Close a session's account and report it; ``cause`` says why the backend could not be reached."""
    count_bytes(shared, session, moved_in, moved_out)
    counters, block = shared.counters, session.terms.block
    counters[block + SESSIONS_CLOSED] += 1
    counters[block + ENDS + end] += 1
    lasted = shared.loop.now - session.began_s
    counters[block + DURATION_SUM_US] += int(lasted * 1e6)
    counters[block + DURATION_BUCKETS + bisect_left(DURATION_BOUNDS_S, lasted)] += 1
    told = end if cause is None else end | (cause + 1) << CAUSE_SHIFT
    shared.report.connection(session, moved_in, moved_out, told)


class SocketDrops:
    """What the kernel drops at one socket because its queue or buffer is full."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.seen = self.total()

    def total(self) -> int:
        """Return the kernel's own count, modulo 2**32."""
        info = self.sock.getsockopt(1, SO_MEMINFO, MEMINFO_BYTES)  # SOL_SOCKET
        return int.from_bytes(info[MEMINFO_DROPS], "little")

    def new(self) -> int:
        """Return how many there were since the last call."""
        total = self.total()
        grown, self.seen = (total - self.seen) & 0xFFFFFFFF, total
        return grown
