"""Many datagrams with one system call: each keeps its bytes, its source and the address it was sent to."""

from __future__ import annotations

import errno
import select
import socket
import sys
from collections.abc import Iterator

import pytest

from gatekeeper.kernel.datagrams import MOST, NAME_BYTES, Inbox, Outbox, host_and_port, name_at, reply_from

IPV6_RECVPKTINFO = getattr(socket, "IPV6_RECVPKTINFO", 49)
LARGEST = 65507  # over IPv4


def bound(host: str, *, tells_local: bool = False) -> socket.socket:
    """Return a UDP socket with plenty of room that does not block."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    if tells_local and sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
    elif tells_local:
        sock.setsockopt(socket.IPPROTO_IP, 8, 1)
    sock.bind((host, 0))
    sock.setblocking(False)
    return sock


@pytest.fixture(params=["127.0.0.1", "::1"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets of one family."""
    with bound(request.param) as one, bound(request.param) as other:
        yield one, other


def take(inbox: Inbox, sock: socket.socket, *, control: bool = False) -> list[tuple[bytes, tuple[str, int]]]:
    """Return what has come: the bytes and their source."""
    select.select([sock], [], [], 5.0)
    sizes, names = inbox.receive(sock.fileno(), sock.family, control=control)
    return [
        (bytes(inbox.rooms[i][:size]), host_and_port(name_at(names, i, sock.family))) for i, size in enumerate(sizes)
    ]


def name_of(sock: socket.socket) -> bytes:
    """Return the name of a socket as the kernel writes it."""
    host, port = sock.getsockname()[:2]
    assert isinstance(port, int)
    packed = port.to_bytes(2, "big")
    if sock.family == socket.AF_INET:
        return socket.AF_INET.to_bytes(2, sys.byteorder) + packed + socket.inet_aton(host) + bytes(8)
    return socket.AF_INET6.to_bytes(2, sys.byteorder) + packed + bytes(4) + socket.inet_pton(socket.AF_INET6, host) + bytes(4)


def test_what_has_come_is_taken_in_with_its_source(pair: tuple[socket.socket, socket.socket]) -> None:
    """Of every size, empty ones too, in order; a box takes `MOST`, the next call the rest, and then there is nothing."""
    here, there = pair
    sent = [b"x" * size for size in (0, 1, 1400, 60000)] + [b"%d" % number for number in range(MOST)]
    for data in sent:
        there.sendto(data, here.getsockname())
    inbox = Inbox()
    first = take(inbox, here)
    assert len(first) == MOST
    got = first + take(inbox, here)
    assert got == [(data, there.getsockname()[:2]) for data in sent]
    assert inbox.receive(here.fileno(), here.family, control=False) == ([], b"")


def test_what_was_put_into_the_box_leaves_together(pair: tuple[socket.socket, socket.socket]) -> None:
    """Each to its name, of every size; afterwards the box is empty and can be used for another family."""
    outbox, inbox = Outbox(), Inbox()
    for here, there in (pair, pair[::-1]):
        outbox.begin(here.fileno(), here.family, 0)
        sent = [b"", b"y", b"z" * 60000, *(b"%d" % number for number in range(MOST - 3))]
        for data in sent:
            outbox.rooms[outbox.count][: len(data)] = data
            outbox.put(len(data), name_of(there), b"")
        assert outbox.send() == []
        assert outbox.count == 0
        assert take(inbox, there) == [(data, here.getsockname()[:2]) for data in sent]
    assert outbox.send() == []


def test_one_that_cannot_be_sent_holds_up_nobody() -> None:
    """The box says which they were: too large, or to an address that cannot be."""
    with bound("127.0.0.1") as here, bound("127.0.0.1") as there:
        outbox, name = Outbox(), name_of(there)
        outbox.begin(here.fileno(), here.family, 0)
        for size, to in ((1, name), (LARGEST + 1, name), (2, name), (3, name[:2] + bytes(14)), (LARGEST, name)):
            outbox.put(size, to, b"")
        assert outbox.send() == [1, 3]
        assert [len(data) for data, _source in take(Inbox(), there)] == [1, 2, LARGEST]


@pytest.mark.parametrize(("wildcard", "asked", "client"), [("0.0.0.0", "127.0.0.9", "127.0.0.1"), ("::", "::1", "::1")])
def test_a_reply_can_leave_from_the_address_that_was_asked(wildcard: str, asked: str, client: str) -> None:
    """On a wildcard socket the box knows which address that was, for each datagram."""
    with bound(wildcard, tells_local=True) as here, bound(client) as there:
        inbox, outbox = Inbox(), Outbox()
        for _ in range(2):  # the second time with what the kernel wrote the first time
            for data in (b"1", b"2"):
                there.sendto(data, (asked, here.getsockname()[1]))
            assert [data for data, _source in take(inbox, here, control=True)] == [b"1", b"2"]
            local = inbox.local_address(1)
            assert local == socket.inet_pton(here.family, asked)
            control = reply_from(local)
            outbox.begin(here.fileno(), here.family, len(control))
            outbox.rooms[0][:2] = b"me"
            outbox.put(2, name_of(there), control)
            assert outbox.send() == []
            assert take(Inbox(), there) == [(b"me", (asked, here.getsockname()[1]))]


def test_boxes_serve_sockets_of_both_families_in_turns() -> None:
    """What one family's names or control messages have left behind does not cut off the other's."""
    inbox = Inbox()
    with (
        bound("0.0.0.0", tells_local=True) as four, bound("::1") as six, bound("127.0.0.1") as from_four,
        bound("::1") as from_six,
    ):  # fmt: skip
        for _ in range(3):
            from_four.sendto(b"4", ("127.0.0.1", four.getsockname()[1]))
            assert take(inbox, four, control=True) == [(b"4", from_four.getsockname())]
            assert inbox.local_address(0) == socket.inet_aton("127.0.0.1")
            from_six.sendto(b"6", six.getsockname())
            assert take(inbox, six) == [(b"6", from_six.getsockname()[:2])]
            with pytest.raises(OSError, match="which address"):
                inbox.local_address(0)


def test_an_error_of_the_socket_is_raised_once() -> None:
    """An ICMP message that nobody listens is an error of this call, not of the next."""
    with bound("127.0.0.1") as here:
        with bound("127.0.0.1") as gone:
            address = gone.getsockname()
        here.connect(address)
        here.send(b"anybody?")
        select.select([here], [], [], 5.0)
        inbox = Inbox()
        with pytest.raises(OSError) as raised:
            inbox.receive(here.fileno(), here.family, control=False)
        assert raised.value.errno == errno.ECONNREFUSED
        assert inbox.receive(here.fileno(), here.family, control=False) == ([], b"")


def test_names_are_as_long_as_the_kernel_says() -> None:
    """What is written is what the kernel reads, on every architecture."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with bound(host) as here, bound(host) as there:
            there.sendto(b"", here.getsockname())
            select.select([here], [], [], 5.0)
            _sizes, names = Inbox().receive(here.fileno(), family, control=False)
            assert name_at(names, 0, family) == name_of(there)
            assert len(name_of(there)) == NAME_BYTES[family]
