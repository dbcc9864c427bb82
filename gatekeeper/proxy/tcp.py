"""The TCP side of an endpoint: accept, judge, then a session or a refusal."""

from __future__ import annotations

import _socket
import errno
import os
import select
from typing import TYPE_CHECKING, Any

from gatekeeper.proxy.accounts import SocketDrops
from gatekeeper.proxy.gate import ALLOW, DROP, Gate, Shared, unmapped
from gatekeeper.proxy.loop import READ
from gatekeeper.proxy.session import LINGER_DEFAULT, LINGER_RESET, TcpSession
from gatekeeper.snapshot.counters import ListenerSlot, WorkerSlot
from gatekeeper.snapshot.layout import ACTION_MASK, DETAIL_SHIFT

if TYPE_CHECKING:
    import socket

    from gatekeeper.proxy.gate import Prepared

BATCH_MOST = 64  # connections accepted in one turn
FDS_PER_SESSION = 2

# While descriptors or memory are exhausted the kernel keeps the listener readable, so the loop would spin.
# Stop watching it for a moment instead: what waits in the queue is served as soon as there is room.
PAUSE_S = 0.1
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

# Refusals a second from which on accepted sockets are made to inherit "close with a reset", which saves half of the
# system calls of a refusal and costs one more for whoever is allowed; and how few end that.
FLOOD_BEGINS = 100
FLOOD_ENDS = 20

DIALLING = (TcpSession.hear, TcpSession.open, TcpSession.connect, TcpSession.speak, TcpSession.begin)

TCP_INFO_QUEUE = slice(24, 28)  # struct tcp_info: tcpi_unacked, which is the queue's length for a listening socket
TCP_INFO_BYTES = 32


class TcpGate(Gate):
    """Accepts connections at one endpoint. Watched from `open` to `close`."""

    def __init__(self, shared: Shared, key: str, sock: socket.socket, *, exclusive: bool, own: bool) -> None:
        super().__init__(shared, key, sock, exclusive=exclusive, own=own)
        self.batch = 1
        self.fresh: list[TcpSession] = []  # accepted in this turn, not dialled for yet
        self.paused = False
        self.paused_until_s = 0.0
        self.refused = 0  # since the last `measure`
        self.flooded = False  # sockets that complete now inherit LINGER_RESET
        self.mixed = False  # some that are still queued completed before `flooded` changed
        self.drops = SocketDrops(sock)

    def open(self, policy: Prepared, index: int) -> None:
        """Start to accept under this policy."""
        self.bind_policy(policy, index)
        self.sock.setblocking(False)
        if not self.exclusive:  # a predecessor may have died in a flood
            self.mixed = True
            set_linger(self.sock.fileno(), LINGER_DEFAULT)
        self.watch()

    def watch(self) -> None:
        """Ask the loop for new connections; of several workers with one socket it wakes one."""
        self.shared.loop.watch(self.sock.fileno(), READ | (select.EPOLLEXCLUSIVE if self.exclusive else 0), self)

    def ready(self, _mask: int) -> None:
        """See `Handler.ready`: sessions come first."""
        self.shared.loop.acceptors.append(self)

    def fail(self) -> None:
        """See `Failing.fail`: the listener stays, whatever went wrong with one connection."""
        self.shared.counters[self.terms.block + ListenerSlot.ACCEPT_ERRORS] += 1

    def accept(self) -> None:
        """See `Acceptor.accept`: take in whoever waits, then dial for all who may pass."""
        try:
            self.take()
        finally:
            if self.fresh:
                fresh, self.fresh = self.fresh, []
                self.dial(fresh)

    def take(self) -> None:
        """Accept and judge. The batch grows while it finds work, so that a quiet listener costs no extra call."""
        shared = self.shared
        if self.paused or (shared.loop.ends and self.terms.max_sessions is not None):  # an end may make room
            return
        take = self.sock._accept  # type: ignore[attr-defined]  # noqa: SLF001 - a descriptor without a wrapper object
        for taken in range(self.batch):
            if shared.open_fds + FDS_PER_SESSION > shared.max_fds:
                self.pause("too few file descriptors for another session (raise LimitNOFILE= or ulimit -n)")
                return
            try:
                fd, peer = take()
            except BlockingIOError:
                self.batch = taken or 1
                self.mixed = False
                return
            except OSError as err:
                if err.errno in EXHAUSTED:
                    self.pause(os.strerror(err.errno))
                    return
                shared.counters[self.terms.block + ListenerSlot.ACCEPT_ERRORS] += 1  # it left before we came
                continue
            try:
                self.admit(fd, peer)
            except MemoryError:
                self.pause("out of memory")
                return
        self.batch = min(self.batch * 2, BATCH_MOST)

    def admit(self, fd: int, peer: Any) -> None:
        """Judge one accepted connection and take it over or turn it away."""
        terms = self.terms
        if terms.destination[1]:
            word, family, packed = self.judge(peer[0])
            port = peer[1]
        else:
            word, family, packed = self.judge_local()
            port = 0
        if word & ACTION_MASK == ALLOW and (terms.max_sessions is None or self.has_room()):
            slot = self.slots[word >> DETAIL_SHIFT]
            self.shared.counters[slot] += 1
            os.set_blocking(fd, False)
            if self.flooded or self.mixed:
                set_linger(fd, LINGER_DEFAULT)
            destination = local_address(fd) if terms.wildcard else terms.destination
            session = None
            try:
                session = TcpSession(self, fd, slot, (family, packed, port), destination)
                self.fresh.append(session)
            except MemoryError:
                if session is None:
                    os.close(fd)
                else:
                    session.fail()
                raise
            return
        self.refused += 1
        slot = self.refuse(word)
        if slot:
            destination = local_address(fd) if terms.wildcard else terms.destination
            self.shared.report.refusal(slot, terms.number, (family, packed, port), destination)
        if word & ACTION_MASK == DROP:
            hide(fd, family)
        if self.mixed or not self.flooded:
            set_linger(fd, LINGER_RESET)
        os.close(fd)

    def dial(self, sessions: list[TcpSession]) -> None:
        """Dial for sessions that were let in together: each step for all of them before the next.

        In a row the same system call finds the kernel's code in the cache, and a backend that the first connection woke
        is still awake for the others. Dialling for one after the other costs a connection 5 % more.
        """
        for step in DIALLING:
            ready = []
            for session in sessions:
                try:
                    if step(session):
                        ready.append(session)
                except MemoryError:
                    session.fail()
                    if not self.paused:
                        self.pause("out of memory")
                except Exception:  # noqa: BLE001 - the loop's promise: a session's fault is its own
                    self.shared.loop.give_up(session)
            sessions = ready

    def pause(self, why: str) -> None:
        """Stop accepting for a moment."""
        shared = self.shared
        shared.counters[WorkerSlot.ACCEPT_PAUSES] += 1
        self.paused_until_s = shared.loop.now + PAUSE_S
        shared.due[self.sock.fileno()] = self  # first, as memory may be what is missing
        self.paused = True
        shared.loop.unwatch(self.sock.fileno())
        shared.starve(f"{self.key}: {why}; new connections wait in the kernel's queue, live sessions go on")

    def check(self, now: float) -> None:
        """See `gate.Due.check`: go on accepting."""
        if now < self.paused_until_s:
            return
        try:
            self.watch()
        except (MemoryError, OSError):
            self.shared.loop.handlers.pop(self.sock.fileno(), None)
            self.paused_until_s = now + PAUSE_S
            return
        del self.shared.due[self.sock.fileno()]
        self.paused = False
        self.batch = 1

    def adapt(self) -> None:
        """Once a second: be quick at whatever there is more of, refusals or sessions."""
        refused, self.refused = self.refused, 0
        if self.exclusive or not self.own:  # another worker accepts from this very socket, now or soon
            return
        if refused < FLOOD_ENDS if self.flooded else refused >= FLOOD_BEGINS:
            self.flooded = not self.flooded
            self.mixed = True
            set_linger(self.sock.fileno(), LINGER_RESET if self.flooded else LINGER_DEFAULT)

    def measure(self) -> int:
        """Account for the kernel's queue drops and return the queue's length. Called once a second."""
        self.adapt()
        self.shared.counters[self.terms.block + ListenerSlot.ACCEPT_OVERFLOWS] += self.drops.new()
        if not self.terms.destination[1]:
            return 0  # unix sockets do not tell
        info = self.sock.getsockopt(_socket.IPPROTO_TCP, _socket.TCP_INFO, TCP_INFO_BYTES)
        return int.from_bytes(info[TCP_INFO_QUEUE], "little")

    def close(self, *, judge_queued: bool = True) -> None:
        """Judge what is still queued, unless others do, then close the socket. Sessions go on."""
        self.batch = BATCH_MOST
        for _ in range(BATCH_MOST if judge_queued else 0):
            self.accept()
            if self.paused or self.batch < BATCH_MOST:
                break
        self.shared.due.pop(self.sock.fileno(), None)
        self.shared.loop.unwatch(self.sock.fileno())
        self.sock.close()
        self.paused = True  # its turn to accept may still come


def set_linger(fd: int, value: bytes) -> None:
    """Choose how a descriptor is closed; one whose connection is gone already does not mind."""
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0, fd)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, value)
    sock.detach()


def hide(fd: int, family: int) -> None:
    """Let whatever is sent from now on die at the first router."""
    if family:
        level, option = (
            (_socket.IPPROTO_IP, _socket.IP_TTL) if family == 4 else (_socket.IPPROTO_IPV6, _socket.IPV6_UNICAST_HOPS)
        )
        sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0, fd)
        sock.setsockopt(level, option, 1)
        sock.detach()


def local_address(fd: int) -> tuple[bytes, int]:
    """Return the (packed address, port) that a client of a wildcard listener connected to."""
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0, fd)
    host, port = sock.getsockname()[:2]
    sock.detach()
    return unmapped(host), port
