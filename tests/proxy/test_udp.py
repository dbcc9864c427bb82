"""UDP flows through a real worker."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from gatekeeper.policy.model import Action, Backend, Endpoint, Protocol
from gatekeeper.snapshot.counters import Cause, End, ListenerSlot
from tests.proxy.rig import Rig, listener, rule, sources
from tests.support.wait import until

PATIENCE_S = 10.0
ALLOW_ALL = rule("everyone", Action.ALLOW)
IPV6_RECVPKTINFO = getattr(socket, "IPV6_RECVPKTINFO", 49)


def udp(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Return a bound UDP socket that times out."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    sock.settimeout(PATIENCE_S)
    return sock


class Bed:
    """A worker with one UDP listener before a backend socket that the test serves by hand."""

    def __init__(self, host: str = "127.0.0.1", **limits: float) -> None:
        self.backend = udp()
        sock = udp(host)
        family = 6 if ":" in host else 4
        if host == "0.0.0.0":
            sock.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO, as the supervisor sets it on wildcards
        if host == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
        self.endpoint = Endpoint(Protocol.UDP, family, host, sock.getsockname()[1])
        self.listener = listener(
            "dns", Backend(4, *self.backend.getsockname()), self.endpoint, protocol=Protocol.UDP, **limits  # type: ignore[arg-type]
        )  # fmt: skip
        self.rig = Rig([self.listener], [ALLOW_ALL], {self.endpoint.key: sock})
        self.address = (host, self.endpoint.port)

    def close(self) -> None:
        self.rig.close()
        self.backend.close()


@pytest.fixture
def bed() -> Iterator[Bed]:
    """A worker before one UDP backend."""
    made = Bed()
    yield made
    made.close()


@pytest.mark.parametrize("payload", [b"", b"x", b"y" * 1400, b"z" * 65507])
def test_datagrams_pass_both_ways_unchanged(bed: Bed, payload: bytes) -> None:
    """Datagrams of every size, empty ones included, arrive as they were sent, and so do the replies."""
    with udp() as client:
        client.sendto(payload, bed.address)
        data, gate = bed.backend.recvfrom(1 << 16)
        assert data == payload
        bed.backend.sendto(payload[::-1], gate)
        assert client.recvfrom(1 << 16) == (payload[::-1], bed.address)


def test_each_client_has_its_own_backend_socket(bed: Bed) -> None:
    """Replies reach the client they are meant for, and one flow is judged and counted once."""
    with udp() as first, udp() as second:
        gates = []
        for client in (first, second, first):
            client.sendto(client.getsockname()[1].to_bytes(2, "big"), bed.address)
            gates.append(bed.backend.recvfrom(100)[1])
        assert gates[0] == gates[2] != gates[1]
        bed.backend.sendto(b"two", gates[1])
        bed.backend.sendto(b"one", gates[0])
        assert first.recv(10) == b"one"
        assert second.recv(10) == b"two"
    assert bed.rig.judged("dns", "allow", "everyone", "rule") == 2
    assert bed.rig.live("dns") == 2


@pytest.mark.parametrize(("wildcard", "source"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "::1")])
def test_of_many_replies_that_leave_together_each_reaches_its_client(wildcard: str, source: str) -> None:
    """More clients at once than fit into one system call: everybody gets what was meant for it, and nothing else."""
    bed = Bed(wildcard)
    clients = [udp(source) for _ in range(150)]
    try:
        for number, client in enumerate(clients):
            client.sendto(b"%d" % number, (source, bed.endpoint.port))
        heard = [bed.backend.recvfrom(10) for _ in clients]
        for data, gate in heard * 2:
            bed.backend.sendto(b"for " + data, gate)
        for number, client in enumerate(clients):
            assert [client.recvfrom(10) for _ in range(2)] == [(b"for %d" % number, (source, bed.endpoint.port, 0, 0)[: 4 if ":" in source else 2])] * 2
        assert bed.rig.counter("dns", ListenerSlot.DATAGRAMS_LOST) == 0
    finally:
        for client in clients:
            client.close()
        bed.close()


def test_a_flow_ends_when_it_idles() -> None:
    """A flow without datagrams ends after idle_timeout; its bytes are accounted for."""
    bed = Bed(idle_s=1.0)
    try:
        with udp() as client:
            client.sendto(b"12345", bed.address)
            bed.backend.sendto(b"123", bed.backend.recvfrom(100)[1])
            assert client.recv(100) == b"123"
            assert bed.rig.ended() == (End.IDLE_TIMEOUT, 5, 3)
        assert bed.rig.live("dns") == 0
        assert bed.rig.counter("dns", ListenerSlot.BYTES_IN) == 5
    finally:
        bed.close()


def test_a_flow_ends_after_the_expected_replies() -> None:
    """With max_responses 1 the reply ends the flow; a second question asked before it keeps the flow for its reply."""
    bed = Bed(max_responses=1)
    try:
        with udp() as client:
            client.sendto(b"a", bed.address)
            client.sendto(b"b", bed.address)
            gates = [bed.backend.recvfrom(10)[1] for _ in range(2)]
            assert gates[0] == gates[1]
            bed.backend.sendto(b"A", gates[0])
            assert client.recv(10) == b"A"
            assert bed.rig.live("dns") == 1
            bed.backend.sendto(b"B", gates[0])
            assert client.recv(10) == b"B"
            assert bed.rig.ended() == (End.RESPONSES, 2, 2)
    finally:
        bed.close()


def test_no_reply_is_expected_when_none_is_allowed() -> None:
    """With max_responses 0 each datagram is forwarded and its flow is over."""
    bed = Bed(max_responses=0)
    try:
        with udp() as client:
            client.sendto(b"log line", bed.address)
            assert bed.backend.recv(100) == b"log line"
            assert bed.rig.ended() == (End.RESPONSES, 8, 0)
    finally:
        bed.close()


@pytest.mark.parametrize("action", [Action.DENY, Action.DROP])
def test_refused_datagrams_are_counted_and_leave_nothing_behind(bed: Bed, action: Action) -> None:
    """A refused source gets silence, reaches nobody, and is counted for each datagram."""
    bed.rig.apply([bed.listener], [rule("no", action, sources("127.0.0.2")), ALLOW_ALL])
    with udp("127.0.0.2") as client:
        for _ in range(3):
            client.sendto(b"let me in", bed.address)
        until(lambda: bed.rig.judged("dns", action.label, "no", "rule") == 3, "all three are judged")
    assert bed.rig.counter("dns", ListenerSlot.SESSIONS_OPENED) == 0
    bed.backend.setblocking(False)
    with pytest.raises(BlockingIOError):
        bed.backend.recv(10)


def test_a_full_table_refuses_new_flows_and_keeps_the_old() -> None:
    """At max_sessions a new client is refused with its own reason while the others talk on."""
    bed = Bed(max_sessions=1)
    try:
        with udp() as first, udp() as second:
            first.sendto(b"1", bed.address)
            gate = bed.backend.recvfrom(10)[1]
            second.sendto(b"2", bed.address)
            until(lambda: bed.rig.judged("dns", "deny", "", "max_sessions") == 1, "the second is refused")
            first.sendto(b"3", bed.address)
            assert bed.backend.recvfrom(10) == (b"3", gate)
    finally:
        bed.close()


def test_a_stale_icmp_error_costs_no_datagram() -> None:
    """A backend that was away answers again: the error of its absence does not swallow the next datagram."""
    bed = Bed()
    try:
        port = bed.backend.getsockname()[1]
        with udp() as client:
            bed.backend.close()
            client.sendto(b"lost", bed.address)
            until(lambda: bed.rig.counter("dns", ListenerSlot.BACKEND_FAILURES + Cause.REFUSED) > 0, "ICMP has come")
            bed.backend = udp("127.0.0.1", port)
            for number in range(20):
                client.sendto(bytes([number]), bed.address)
            assert [bed.backend.recv(10) for _ in range(20)] == [bytes([number]) for number in range(20)]
    finally:
        bed.close()


@pytest.mark.parametrize(("wildcard", "asked"), [("0.0.0.0", "127.0.0.3"), ("::", "::1")])
def test_a_reply_comes_from_the_address_that_was_asked(wildcard: str, asked: str) -> None:
    """On a wildcard listener the reply leaves from the very address the client sent to, and the log names it."""
    bed = Bed(wildcard, max_responses=1)
    try:
        with udp("::1" if ":" in asked else "127.0.0.1") as client:
            client.connect((asked, bed.endpoint.port))  # a connected socket takes replies from that address only
            client.send(b"who?")
            bed.backend.sendto(b"me", bed.backend.recvfrom(10)[1])
            assert client.recv(10) == b"me"
        packed = socket.inet_pton(socket.AF_INET6 if ":" in asked else socket.AF_INET, asked)
        assert bed.rig.record().destination[: len(packed)] == packed
    finally:
        bed.close()


def test_draining_serves_the_flows_there_are(bed: Bed) -> None:
    """While the service stops, known clients are served until they fall silent, and then the worker leaves."""
    with udp() as client, udp() as late:
        client.sendto(b"1", bed.address)
        gate = bed.backend.recvfrom(10)[1]
        bed.rig.channel.send({"op": "drain", "deadline_s": 60.0})
        late.sendto(b"too late", bed.address)
        until(lambda: bed.rig.counter("dns", ListenerSlot.DATAGRAMS_LOST) == 1, "the late client is ignored")
        bed.backend.sendto(b"2", gate)
        assert client.recv(10) == b"2"
        assert bed.rig.expect("drained")["sessions"] == 0
        assert bed.rig.process.wait(PATIENCE_S) == 0


def test_a_removed_listener_ends_its_flows(bed: Bed) -> None:
    """A flow cannot outlive the socket its client talks to."""
    with udp() as client:
        client.sendto(b"1", bed.address)
        assert bed.backend.recv(10) == b"1"
        bed.rig.apply([], [])
        assert bed.rig.ended() == (End.REMOVED, 1, 0)
