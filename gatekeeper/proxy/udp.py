"""The UDP side of an endpoint: datagrams from many clients on one socket, a connected backend socket for each.

A flow is (client, address the client used). The first datagram of a flow is judged; a refused one leaves no state behind,
so that forged sources cost nothing but the look-up. Nothing queues: what cannot be forwarded at once is lost and counted,
as on any network.

What has come is received with one system call, and the replies of a turn leave with one: a twelfth to a sixth of all that
a datagram costs.
"""

from __future__ import annotations

import _socket
import errno
from typing import TYPE_CHECKING

from gatekeeper.kernel.datagrams import MOST, Inbox, Outbox, host_and_port, name_at, reply_from
from gatekeeper.proxy.accounts import SESSIONS_OPENED, SocketDrops, count_bytes, count_end, count_failure
from gatekeeper.proxy.gate import ALLOW, Gate, Shared
from gatekeeper.proxy.loop import READ
from gatekeeper.proxy.tcp import EXHAUSTED
from gatekeeper.snapshot.counters import End, ListenerSlot
from gatekeeper.snapshot.layout import ACTION_MASK, DETAIL_SHIFT

if TYPE_CHECKING:
    import socket

    from gatekeeper.proxy.gate import Prepared

DRAIN_IDLE_S = 2.0  # a flow never says that it has ended; while the service stops, this much silence will do

INBOX, OUTBOX = Inbox(), Outbox()  # of all gates: what is in them never outlives a turn of the loop


class UdpGate(Gate):
    """Receives datagrams at one endpoint. Watched from `open` to `close`."""

    def __init__(self, shared: Shared, key: str, sock: socket.socket, *, exclusive: bool, own: bool) -> None:
        super().__init__(shared, key, sock, exclusive=exclusive, own=own)
        self.fd = sock.fileno()
        self.family = sock.family
        self.draining = False
        self.flows: dict[bytes, UdpSession] = {}  # by the client's name, and on wildcards the address it used
        self.replies: list[UdpSession] = []  # whose replies are in the outbox, in its order
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
        """See `Acceptor.accept`: forward what has arrived, as much as one call can bring."""
        flows, family, wildcard = self.flows, self.family, self.terms.wildcard
        try:
            sizes, names = INBOX.receive(self.fd, family, control=wildcard)
        except OSError:  # it says nothing about the next datagram, for which the loop comes back
            return
        rooms = INBOX.rooms
        for i, size in enumerate(sizes):
            key = name = name_at(names, i, family)
            local = None
            if wildcard:
                local = INBOX.local_address(i)
                key = name + local
            flow = flows.get(key)
            if flow is None:
                flow = self.admit(key, name, local)
                if flow is None:
                    continue
            flow.forward(rooms[i][:size])

    def admit(self, key: bytes, name: bytes, local: bytes | None) -> UdpSession | None:
        """Judge the first datagram of a flow; return the new flow, or ``None`` when it is refused."""
        terms = self.terms
        if self.draining:
            self.lose()
            return None
        host, port = host_and_port(name)
        word, family, packed = self.judge(host)
        source = (family, packed, port)
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
                    flow = self.flows[key] = UdpSession(self, key, sock, name, local, slot, source, destination)
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

    def claim_outbox(self, control_bytes: int) -> None:
        """Let replies leave from this gate's socket from now on; those that are in the outbox leave first."""
        loop = self.shared.loop
        if loop.outgoing is not None:
            loop.outgoing.send()
        OUTBOX.begin(self.fd, self.family, control_bytes)
        loop.outgoing = self

    def send(self) -> None:
        """See `loop.Sender`: what cannot leave at once is lost, as on any network."""
        self.shared.loop.outgoing = None
        replies, self.replies = self.replies, []
        for i in OUTBOX.send():
            self.lose()
            replies[i].bytes_out -= OUTBOX.size(i)

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
        self.accept()
        if self.shared.loop.outgoing is self:
            self.send()
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
        "control",  # what makes a reply leave from the address that the client used; empty where there is but one
        "datagrams",  # both ways
        "destination",
        "fd",
        "flow",
        "gate",
        "idle_limit_s",
        "key",
        "name",
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
        key: bytes,
        sock: _socket.socket,
        name: bytes,
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
        self.name = name
        self.control = b"" if local is None else reply_from(local)
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

    def forward(self, data: memoryview) -> None:
        """Send a datagram to the backend."""
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
        self.bytes_in += len(data)
        responses = self.terms.max_responses
        if responses is not None:
            self.awaited += responses
            if not self.awaited:
                self.finish(End.RESPONSES)

    def ready(self, _mask: int) -> None:
        """Put one reply into the outbox, from where it leaves within this turn; the loop comes back while there are more."""
        gate = self.gate
        if gate.shared.loop.outgoing is not gate or OUTBOX.count == MOST:
            gate.claim_outbox(len(self.control))
        try:
            size = self.sock.recv_into(OUTBOX.rooms[OUTBOX.count])
        except BlockingIOError:
            return
        except OSError as err:  # ICMP: nobody listens there at the moment
            count_failure(gate.shared, self.terms, err.errno)
            return
        OUTBOX.put(size, self.name, self.control)
        gate.replies.append(self)
        self.datagrams += 1
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
