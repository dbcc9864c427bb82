"""Clients and backends that misbehave as told: latency, slices, stalls, small buffers, silence, half-closes, resets.

A `Stage` plays any number of them in one thread. What each does is a `Plan`; what became of it is in its `Peer`::

    with Stage() as stage:
        backend = stage.listen(lambda number: Plan(sends=5000, slices=(1, 100)))
        client = stage.connect(("127.0.0.1", port), Plan(sends=1 << 20, stalls=0.1, then=Then.RESET), number=7)
        stage.wait([client])
        assert client.outcome is Outcome.RESET_BY_US and backend.peers[0].received >= client.acknowledged

Every byte can be checked: a client names its number in its first eight bytes, and both sides know what number 7 says.
A black hole that does not even complete the handshake is `tests.support.backends.Silent`.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import heapq
import itertools
import math
import os
import random
import select
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.wait import until

NAME_BYTES = 8
BLOCK_BYTES = 1_048_573  # a prime, so that no stream repeats in step with buffers, pipes or chunks
ACKNOWLEDGED_S = 1.0  # how long a reset waits for acknowledgements that make no progress
POLL_S = 0.005
_BLOCK = memoryview(random.Random(2026).randbytes(BLOCK_BYTES))

Address = tuple[str, int] | str


class Then(enum.Enum):
    """What follows once everything is sent."""

    END = enum.auto()  # half-close, read on to the other's end, close
    RESET = enum.auto()  # reset, as soon as the kernel in front has acknowledged everything, or no more of it
    STAY = enum.auto()  # neither, until the stage closes or the other side leaves


class Outcome(enum.Enum):
    """What became of a peer."""

    LIVE = enum.auto()
    FINISHED = enum.auto()  # both sides have ended, in order
    RESET = enum.auto()  # the other side reset the connection, or it could not be made
    RESET_BY_US = enum.auto()
    CLOSED = enum.auto()  # the stage closed first


@dataclass(frozen=True, slots=True)
class Plan:
    """What one peer does; the default is a peer that says nothing and behaves."""

    sends: int = 0  # bytes; a client's name is counted, so one that is to be recognized sends at least eight
    slices: tuple[int, int] = (1 << 16, 1 << 16)  # the least and the most bytes of one read or write, small ones as likely
    latency_s: float = 0.0  # before the first read or write
    stalls: float = 0.0  # the chance of a stall after a read or write
    stall_s: float = 0.05  # the longest stall
    receive_buffer: int | None = None  # SO_RCVBUF
    reads: bool = True
    then: Then = Then.END


def part(stream: int, offset: int, most: int) -> memoryview:
    """Return some bytes of a stream from ``offset`` on: one at least, ``most`` at most."""
    start = (stream * 7919 + offset) % BLOCK_BYTES
    return _BLOCK[start : start + most]


def wrong_at(stream: int, offset: int, data: bytes) -> int | None:
    """Return the first place, in the stream, at which ``data`` is not what belongs there."""
    seen = memoryview(data)
    while seen:
        right = part(stream, offset, len(seen))
        if seen[: len(right)] != right:
            return offset + next(at for at, byte in enumerate(right) if seen[at] != byte)
        offset += len(right)
        seen = seen[len(right) :]
    return None


class Peer:
    """One connection and how it goes. Everything but ``outcome`` may lag behind while it is live."""

    def __init__(self, sock: socket.socket, plan: Plan | None, number: int | None, *, client: bool) -> None:
        self.sock = sock
        self.plan = plan or Plan()
        self.known = plan is not None  # a backend's plan may depend on the number that it has yet to read
        self.number = number
        self.client = client
        self.local: Any = sock.getsockname()
        self.sent = self.received = 0
        self.acknowledged = 0  # when it was reset by us: bytes that the kernel in front had by then
        self.wrong_at: int | None = None
        self.outcome = Outcome.LIVE
        self.ended = self.other_ended = False
        self.held: bytes = b""  # the beginning of a name
        self.mask = 0
        self.resetting_since_s = 0.0
        self.unacknowledged = -1

    def whole(self, received: int) -> bool:
        """Say whether it ended in order, having sent everything and having read just these bytes, all of them right."""
        arrived = self.wrong_at is None and self.received == received
        return self.outcome is Outcome.FINISHED and self.sent == self.plan.sends and arrived


class Listening:
    """A backend: ``address`` is what a rule file takes, ``peers`` are the connections it got."""

    def __init__(self, sock: socket.socket, plan: Plan | Callable[[int], Plan]) -> None:
        self.sock = sock
        self.plan = plan
        self.peers: list[Peer] = []
        name = sock.getsockname()
        self.address = f"unix:{name}" if isinstance(name, str) else f"{name[0]}:{name[1]}"


class Stage:
    """Plays peers in a thread of its own from here to `close`, which ends all of them."""

    def __init__(self, seed: int = 0) -> None:
        self._chance = random.Random(seed)
        self._epoll = select.epoll()
        self._peers: dict[int, Peer] = {}
        self._listening: dict[int, Listening] = {}
        self._timers: list[tuple[float, int, Peer]] = []
        self._order = itertools.count()
        self._lock = threading.RLock()
        self._closing = False
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ who plays

    def connect(self, address: Address, plan: Plan, number: int = 0, source: str | None = None) -> Peer:
        """Add a client, connected once this returns.

        Raises:
            OSError: the connection could not be made.
        """
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        try:
            if plan.receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, plan.receive_buffer)
            if source is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((source, 0))
            sock.settimeout(30)
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        peer = Peer(sock, plan, number, client=True)
        self._add(peer)
        return peer

    def listen(self, plan: Plan | Callable[[int], Plan], path: Path | None = None, port: int = 0) -> Listening:
        """Add a backend on ``path`` or a port of 127.0.0.1; ``plan`` may depend on the number the client names.

        A callable is asked once the number was read, so the backend keeps quiet until then.
        """
        if path is not None:
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(path))
            path.chmod(0o777)
        else:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if isinstance(plan, Plan) and plan.receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, plan.receive_buffer)
            sock.bind(("127.0.0.1", port))
        sock.listen(4096)
        sock.setblocking(False)
        listening = Listening(sock, plan)
        with self._lock:
            self._listening[sock.fileno()] = listening
            self._epoll.register(sock.fileno(), select.EPOLLIN)
        return listening

    def stop_listening(self, listening: Listening, *, kill: bool = False) -> None:
        """Accept no more; with ``kill`` its connections end too, as when its process is killed."""
        with self._lock:
            del self._listening[listening.sock.fileno()]
            self._epoll.unregister(listening.sock.fileno())
            listening.sock.close()
            for peer in listening.peers if kill else ():
                self._done(peer, Outcome.CLOSED)

    def wait(self, peers: Iterable[Peer] | None = None, within_s: float = 30.0) -> None:
        """Return when these peers, or all, have come to an end."""

        def over() -> bool:
            if self._problem is not None:
                raise RuntimeError("the stage broke down") from self._problem
            live = [peer for peer in everyone if peer.outcome is Outcome.LIVE]
            assert not live, f"{len(live)} live on; number {live[0].number} sent {live[0].sent}, got {live[0].received}"
            return True

        with self._lock:
            everyone = list(self._peers.values() if peers is None else peers)
        until(over, "all have come to an end", within_s)

    def close(self) -> None:
        """Close everything."""
        self._closing = True
        self._thread.join(10)
        with self._lock:
            for peer in list(self._peers.values()):
                self._done(peer, Outcome.CLOSED)
            for listening in list(self._listening.values()):
                self.stop_listening(listening)
        self._epoll.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ the play

    def _add(self, peer: Peer) -> None:
        peer.sock.setblocking(False)
        with self._lock:
            self._peers[peer.sock.fileno()] = peer
            if peer.plan.latency_s:
                self._pause(peer, peer.plan.latency_s)
            else:
                self._watch(peer)

    def _run(self) -> None:
        try:
            while not self._closing:
                now = time.monotonic()
                patience = max(0.0, min(0.05, self._timers[0][0] - now)) if self._timers else 0.05
                for fd, mask in self._epoll.poll(patience):
                    with self._lock:
                        if fd in self._listening:
                            self._accept(self._listening[fd])
                        elif fd in self._peers:
                            self._step(self._peers[fd], mask)
                now = time.monotonic()
                with self._lock:
                    while self._timers and self._timers[0][0] <= now:
                        peer = heapq.heappop(self._timers)[2]
                        if peer.outcome is Outcome.LIVE:
                            self._go_on(peer)
        except BaseException as err:
            self._problem = err
            raise

    def _accept(self, listening: Listening) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _peer = listening.sock.accept()
                fixed = listening.plan if isinstance(listening.plan, Plan) else None
                peer = Peer(sock, fixed, None, client=False)
                peer.listening = listening  # type: ignore[attr-defined]
                listening.peers.append(peer)
                self._add(peer)
                if fixed is not None and not fixed.sends and fixed.then is not Then.STAY:
                    self._go_on(peer)

    def _step(self, peer: Peer, mask: int) -> None:
        try:
            if mask & ~select.EPOLLOUT:
                self._read(peer)
            if mask & select.EPOLLOUT:
                self._write(peer)
        except BlockingIOError:
            pass
        except OSError:
            self._lost(peer)
        if peer.outcome is Outcome.LIVE:
            if peer.plan.stalls and self._chance.random() < peer.plan.stalls:
                self._pause(peer, self._chance.random() * peer.plan.stall_s)
            else:
                self._go_on(peer)

    def _go_on(self, peer: Peer) -> None:
        """Do what follows from where the peer is, then wait for what it needs."""
        plan = peer.plan
        try:
            if peer.known and peer.sent == plan.sends and not peer.ended:
                if plan.then is Then.RESET:
                    self._reset_when_acknowledged(peer)
                    return
                if plan.then is Then.END:
                    peer.ended = True
                    peer.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._lost(peer)
            return
        if peer.other_ended and (peer.ended or plan.then is Then.STAY):
            self._done(peer, Outcome.FINISHED)
            return
        self._watch(peer)

    def _lost(self, peer: Peer) -> None:
        """It was reset; a reset that was met while writing may have data before it that was not read yet."""
        with contextlib.suppress(OSError):
            while peer.plan.reads and not peer.other_ended:
                self._read(peer)
        self._done(peer, Outcome.RESET)

    def _reset_when_acknowledged(self, peer: Peer) -> None:
        now = time.monotonic()
        left = int.from_bytes(fcntl.ioctl(peer.sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        if left != peer.unacknowledged:
            peer.unacknowledged, peer.resetting_since_s = left, now
        if left and now - peer.resetting_since_s < ACKNOWLEDGED_S:
            self._pause(peer, POLL_S)
            return
        peer.acknowledged = peer.sent - left
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._done(peer, Outcome.RESET_BY_US)

    def _slice(self, plan: Plan) -> int:
        least, most = plan.slices
        if least == most:
            return least
        return int(least * math.exp(self._chance.random() * math.log(most / least)))

    def _read(self, peer: Peer) -> None:
        if peer.other_ended or not (peer.plan.reads or not peer.known):
            return
        data = peer.sock.recv(self._slice(peer.plan) if peer.known else NAME_BYTES - len(peer.held))
        if not data:
            peer.other_ended = True
            peer.known = True  # whoever ends without a name gets the plan of one that says nothing
            return
        if not peer.client and peer.received < NAME_BYTES:
            self._read_name(peer, data)
        elif peer.number is not None and peer.wrong_at is None:
            peer.wrong_at = wrong_at(2 * peer.number + peer.client, peer.received, data)
        peer.received += len(data)

    def _read_name(self, peer: Peer, data: bytes) -> None:
        missing = NAME_BYTES - len(peer.held)
        peer.held += data[:missing]
        if len(peer.held) == NAME_BYTES and peer.number is None:
            peer.number = int.from_bytes(peer.held, "big")
            plan = peer.listening.plan  # type: ignore[attr-defined]
            if not peer.known:
                peer.plan, peer.known = plan(peer.number), True
                if peer.plan.receive_buffer is not None:
                    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, peer.plan.receive_buffer)
            if len(data) > missing:
                peer.wrong_at = wrong_at(2 * peer.number, NAME_BYTES, data[missing:])

    def _write(self, peer: Peer) -> None:
        left = peer.plan.sends - peer.sent
        if not left or not peer.known:
            return
        size = min(left, self._slice(peer.plan))
        number = peer.number or 0
        if peer.client and peer.sent < NAME_BYTES:
            data: bytes | memoryview = number.to_bytes(NAME_BYTES, "big")[peer.sent : peer.sent + size]
        else:
            data = part(2 * number + (not peer.client), peer.sent, size)
        peer.sent += peer.sock.send(data)

    def _watch(self, peer: Peer) -> None:
        wants_read = (peer.plan.reads or not peer.known) and not peer.other_ended
        wants_write = peer.known and peer.sent < peer.plan.sends
        mask = (select.EPOLLIN if wants_read else 0) | (select.EPOLLOUT if wants_write else 0)
        if mask == peer.mask:
            return
        if not peer.mask:
            self._epoll.register(peer.sock.fileno(), mask)
        elif mask:
            self._epoll.modify(peer.sock.fileno(), mask)
        else:
            self._epoll.unregister(peer.sock.fileno())
        peer.mask = mask

    def _pause(self, peer: Peer, seconds: float) -> None:
        if peer.mask:
            self._epoll.unregister(peer.sock.fileno())
            peer.mask = 0
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), peer))

    def _done(self, peer: Peer, outcome: Outcome) -> None:
        if peer.outcome is not Outcome.LIVE:
            return
        if peer.mask:
            self._epoll.unregister(peer.sock.fileno())
            peer.mask = 0
        del self._peers[peer.sock.fileno()]
        peer.sock.close()
        peer.outcome = outcome


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open; 0 when we may not know, as only root may look into workers."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir())) if os.geteuid() == 0 else 0


def resident_kib(pid: int, which: str = "VmRSS") -> int:
    """Return the resident memory of a process, or with ``VmHWM`` the most it has ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))
