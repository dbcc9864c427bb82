"""The UDP side of an endpoint: datagrams from many clients on one socket, a connected backend socket for each.

A flow is (client, address the client used). The first datagram of a flow is judged; a refused one leaves no state behind,
so that forged sources cost nothing but the look-up. Nothing queues: what cannot be forwarded at once is lost and counted,
as on any network.
"""

from __future__ import annotations

import _socket
import errno
import socket
import struct
from typing import TYPE_CHECKING, Any

from gatekeeper.proxy.accounts import SESSIONS_OPENED, SocketDrops, count_bytes, count_end, count_failure
from gatekeeper.proxy.gate import ALLOW, Gate, Shared
from gatekeeper.proxy.loop import READ
from gatekeeper.proxy.tcp import EXHAUSTED
from gatekeeper.snapshot.counters import End, ListenerSlot
from gatekeeper.snapshot.layout import ACTION_MASK, DETAIL_SHIFT

if TYPE_CHECKING:
    from gatekeeper.proxy.gate import Prepared

BATCH_MOST = 64  # datagrams received in one turn
DRAIN_IDLE_S = 2.0  # a flow never says that it has ended; while the service stops, this much silence will do
LARGEST = 65535
BUFFER = bytearray(LARGEST)
VIEW = memoryview(BUFFER)

ANCILLARY_BYTES = _socket.CMSG_SPACE(20)  # in6_pktinfo, the larger of the two
IP_PKTINFO = 8
IPV6_PKTINFO = getattr(socket, "IPV6_PKTINFO", 50)
PKTINFO_V4 = struct.Struct("=i4s4s")  # interface, local address (the one to answer from), destination in the header
PKTINFO_V6 = struct.Struct("=16si")


class UdpGate(Gate):
    """Receives datagrams at one endpoint. Watched from `open` to `close`."""

    def __init__(self, shared: Shared, key: str, sock: socket.socket, *, exclusive: bool, own: bool) -> None:
        super().__init__(shared, key, sock, exclusive=exclusive, own=own)
        self.batch = 1
        self.draining = False
        self.flows: dict[Any, UdpSession] = {}
        self.drops = SocketDrops(sock)

    def open(self, policy: Prepared, index: int) -> None:
        """Start to receive under this policy."""
        self.bind_policy(policy, index)
        self.sock.setblocking(False)
        self.shared.loop.watch(self.sock.fileno(), READ, self)

    def ready(self, _mask: int) -> None:
        """See `Handler.ready`: sessions come first."""
        self.shared.loop.acceptors.append(self)

    def fail(self) -> None:
        """See `Failing.fail`: the listener stays, whatever went wrong with one datagram."""
        self.shared.counters[self.terms.block + ListenerSlot.ACCEPT_ERRORS] += 1

    def accept(self) -> None:
        """See `Acceptor.accept`: forward what has arrived."""
        flows = self.flows
        wildcard = self.terms.wildcard
        receive = self.sock.recvfrom_into
        for taken in range(self.batch):
            try:
                if wildcard:
                    size, ancillary, _flags, peer = self.sock.recvmsg_into([BUFFER], ANCILLARY_BYTES)
                    local = local_address(ancillary)
                    key: Any = (peer, local)
                else:
                    size, peer = receive(BUFFER)
                    key, local = peer, None
            except BlockingIOError:
                self.batch = taken or 1
                return
            except OSError:  # an ICMP error about one of our replies: it says nothing about the next datagram
                continue
            flow = flows.get(key)
            if flow is None:
                flow = self.admit(key, peer, local)
                if flow is None:
                    continue
            flow.forward(size)
        self.batch = min(self.batch * 2, BATCH_MOST)

    def admit(self, key: Any, peer: Any, local: bytes | None) -> UdpSession | None:
        """Judge the first datagram of a flow; return the new flow, or ``None`` when it is refused."""
        terms = self.terms
        if self.draining:
            self.lose()
            return None
        word, family, packed = self.judge(peer[0])
        source = (family, packed, peer[1])
        destination = terms.destination if local is None else (local, terms.destination[1])
        if word & ACTION_MASK != ALLOW or (terms.max_sessions is not None and not self.has_room()):
            reported = self.refuse(word)
            if reported:
                self.shared.report.refusal(reported, terms.number, source, destination)
            return None
        shared = self.shared
        slot = self.slots[word >> DETAIL_SHIFT]
        shared.counters[slot] += 1
        failure = errno.EMFILE
        if shared.open_fds < shared.max_fds:
            try:
                sock = _socket.socket(terms.backend_family, _socket.SOCK_DGRAM | _socket.SOCK_NONBLOCK)
            except OSError as err:
                failure = err.errno or 0
            else:
                failure = sock.connect_ex(terms.backend_address)
                if not failure:
                    flow = self.flows[key] = UdpSession(self, key, sock, peer, local, slot, source, destination)
                    return flow
                sock.close()
        if failure in EXHAUSTED:
            shared.starve(
                f"{self.key}: no file descriptor for another flow (raise LimitNOFILE= or ulimit -n); "
                "its datagrams are lost, live flows go on"
            )
        self.lose()
        count_failure(shared, terms, failure)
        return None

    def lose(self) -> None:
        """Count a datagram that was allowed, yet not forwarded."""
        self.shared.counters[self.terms.block + ListenerSlot.DATAGRAMS_LOST] += 1

    def measure(self) -> int:
        """Account for what the kernel dropped because the receive buffer was full; a UDP socket has no queue length."""
        self.shared.counters[self.terms.block + ListenerSlot.ACCEPT_OVERFLOWS] += self.drops.new()
        return 0

    def drain(self, *, receive: bool = True) -> None:
        """Serve the flows there are, and no new ones; without ``receive`` only their replies: others read the socket now."""
        self.draining = True
        if not receive:
            self.shared.loop.unwatch(self.sock.fileno())
        for flow in self.flows.values():
            flow.idle_limit_s = min(flow.idle_limit_s, DRAIN_IDLE_S)

    def close(self) -> None:
        """Forward what is still queued, then end the flows, which cannot hear from their clients any more, and the socket."""
        self.batch = BATCH_MOST
        self.accept()
        for flow in list(self.flows.values()):
            flow.finish(End.REMOVED)
        self.shared.loop.unwatch(self.sock.fileno())
        self.sock.close()


class UdpSession:
    """One flow. Owns its backend socket."""

    __slots__ = (
        "active_s",
        "awaited",  # replies still expected; only with max_responses
        "began_s",
        "bytes_in",
        "bytes_out",
        "datagrams",  # both ways
        "destination",
        "fd",
        "flow",
        "gate",
        "idle_limit_s",
        "key",
        "local",
        "peer",
        "reported_in",
        "reported_out",
        "seen",
        "slot",
        "sock",
        "source",
        "terms",
    )

    def __init__(
        self,
        gate: UdpGate,
        key: Any,
        sock: _socket.socket,
        peer: Any,
        local: bytes | None,
        slot: int,
        source: tuple[int, bytes, int],
        destination: tuple[bytes, int],
    ) -> None:
        shared = gate.shared
        self.gate = gate
        self.terms = gate.terms
        self.key = key
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.local = local
        self.slot = slot
        self.source = source
        self.destination = destination
        self.began_s = self.active_s = shared.loop.now
        self.idle_limit_s = self.terms.idle_timeout_s
        self.flow = shared.report.flow_id()
        self.bytes_in = self.bytes_out = self.reported_in = self.reported_out = 0
        self.datagrams = self.seen = self.awaited = 0
        shared.sessions[self.fd] = self
        shared.open_fds += 1
        shared.counters[self.terms.block + SESSIONS_OPENED] += 1
        shared.loop.watch(self.fd, READ, self)

    def forward(self, size: int) -> None:
        """Send the first ``size`` bytes of the shared buffer to the backend."""
        data = VIEW[:size]
        try:
            self.sock.send(data)
        except OSError:
            # The error may be an ICMP message about an earlier datagram, and reading it has cleared it.
            try:
                self.sock.send(data)
            except OSError as err:
                self.gate.lose()
                count_failure(self.gate.shared, self.terms, err.errno)
                return
        self.datagrams += 1
        self.bytes_in += size
        responses = self.terms.max_responses
        if responses is not None:
            self.awaited += responses
            if not self.awaited:
                self.finish(End.RESPONSES)

    def ready(self, _mask: int) -> None:
        """Bring one reply to the client; the loop comes back while there are more."""
        try:
            size = self.sock.recv_into(BUFFER)
        except BlockingIOError:
            return
        except OSError as err:  # ICMP: nobody listens there at the moment
            count_failure(self.gate.shared, self.terms, err.errno)
            return
        self.datagrams += 1
        try:
            if self.local is None:
                self.gate.sock.sendto(VIEW[:size], self.peer)
            else:
                self.gate.sock.sendmsg([VIEW[:size]], [reply_from(self.local)], 0, self.peer)
        except OSError:
            self.gate.lose()
        else:
            self.bytes_out += size
        if self.terms.max_responses is not None:
            self.awaited -= 1
            if self.awaited <= 0:
                self.finish(End.RESPONSES)

    def fail(self) -> None:
        """See `Failing.fail`."""
        self.finish(End.ERROR)

    def live(self) -> bool:
        """See `gate.Session.live`. Of one that has ended, the descriptor may be another's by now."""
        return self.gate.shared.sessions.get(self.fd) is self

    def state(self) -> str:
        """See `gate.Session.state`."""
        return "flow"

    def moved(self) -> tuple[int, int]:
        """See `gate.Session.moved`."""
        return self.bytes_in, self.bytes_out

    def idle_s(self, now: float) -> float:
        """See `gate.Session.idle_s`."""
        return 0.0 if self.datagrams != self.seen else now - self.active_s

    def tcp_details(self) -> tuple[None, None]:
        """See `gate.Session.tcp_details`."""
        return None, None

    def sweep(self, now: float) -> None:
        """See `gate.Session.sweep`."""
        if self.datagrams != self.seen:
            self.seen = self.datagrams
            self.active_s = now
            count_bytes(self.gate.shared, self, self.bytes_in, self.bytes_out)
        elif now - self.active_s >= self.idle_limit_s:
            self.finish(End.IDLE_TIMEOUT)

    def finish(self, end: End) -> None:
        """See `gate.Session.finish`."""
        shared = self.gate.shared
        if not self.live():
            return
        del shared.sessions[self.fd]
        del self.gate.flows[self.key]
        shared.loop.handlers.pop(self.fd, None)
        self.sock.close()  # the only copy, so epoll forgets it
        shared.open_fds -= 1
        count_end(shared, self, self.bytes_in, self.bytes_out, end)


def local_address(ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """Return the packed address a datagram was sent to."""
    for level, kind, data in ancillary:
        if level == _socket.IPPROTO_IP and kind == IP_PKTINFO:
            return bytes(PKTINFO_V4.unpack_from(data)[1])
        if level == _socket.IPPROTO_IPV6 and kind == IPV6_PKTINFO:
            return bytes(PKTINFO_V6.unpack_from(data)[0])
    raise OSError("the kernel did not say which address a datagram came to")


def reply_from(local: bytes) -> tuple[int, int, bytes]:
    """Return the control message that makes a reply leave from ``local``."""
    if len(local) == 4:
        return _socket.IPPROTO_IP, IP_PKTINFO, PKTINFO_V4.pack(0, local, local)
    return _socket.IPPROTO_IPV6, IPV6_PKTINFO, PKTINFO_V6.pack(local, 0)
