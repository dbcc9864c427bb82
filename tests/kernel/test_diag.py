"""sock_diag on real connections: what there is, what TCP knows of it, and how it ends."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Self

import pytest

from gatekeeper.kernel import diag
from tests.support import need
from tests.support.wait import until

Pair = tuple[socket.socket, socket.socket]
PLACES = {"IPv4": ("127.0.0.1", "127.0.0.1"), "IPv6": ("::1", "::1"), "IPv4 at a socket of IPv6": ("::", "127.0.0.1")}


class Place:
    """A listening socket and connections to it. Owns them."""

    def __init__(self, host: str) -> None:
        self.listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if ":" in host:
            self.listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.listening.bind((host, 0))
        self.listening.listen(512)
        self.port: int = self.listening.getsockname()[1]
        self.pairs: list[Pair] = []

    def come(self, host: str, source: tuple[str, int] | None = None) -> Pair:
        """Return both ends of a connection: the visitor's and ours."""
        visitor = socket.create_connection((host, self.port), 5, source)
        ours = self.listening.accept()[0]
        ours.settimeout(5)
        self.pairs.append((visitor, ours))
        return visitor, ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in [self.listening, *(end for pair in self.pairs for end in pair)]:
            sock.close()


def there(*ports: tuple[int, int]) -> list[diag.Connection]:
    """All connections at these local ports."""
    return [one for part in diag.connections(ports) for one in part]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Place, str]]:
    """A place, and the host to reach it at."""
    host, target = PLACES[request.param]
    with Place(host) as made:
        yield made, target


def test_a_connection_is_seen_as_its_socket_has_it(place: tuple[Place, str]) -> None:
    """Addresses (mapped ones as IPv4), ports, the inode of the very socket, bytes both ways, and a cookie of its own."""
    made, host = place
    visitor, ours = made.come(host)
    made.come(host)
    visitor.send(b"x" * 1000)
    assert ours.recv(2000)
    ours.send(b"y" * 300)
    assert visitor.recv(2000)
    inode = os.fstat(ours.fileno()).st_ino
    until(lambda: [one.info and one.info.bytes_out for one in there((made.port, made.port)) if one.inode == inode] == [300], "it is acknowledged")
    first, second = sorted(there((made.port, made.port)), key=lambda one: one.inode != inode)
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    assert (first.local, first.local_port, first.remote, first.remote_port) == (packed, made.port, packed, visitor.getsockname()[1])
    assert first.state == diag.ESTABLISHED
    assert first.family == (6 if ":" in host else 4)
    assert first.info is not None
    assert (first.info.bytes_in, first.info.unsent, first.info.unacked) == (1000, 0, 0)
    assert first.info.rtt_us > 0
    assert 0 <= first.info.idle_s < 60
    assert first.cookie != second.cookie


def test_what_waits_to_be_sent_is_told(place: tuple[Place, str]) -> None:
    """A peer that does not read: bytes on their way and bytes that wait for their turn, together all that was written."""
    made, host = place
    _visitor, ours = made.come(host)
    ours.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += ours.send(bytes(1 << 16))
    (one,) = there((made.port, made.port))
    assert one.info is not None
    assert one.info.unsent > 0
    assert one.info.bytes_out + one.info.unacked + one.info.unsent == sent


def test_states_are_told(place: tuple[Place, str]) -> None:
    """The visitor has closed; we have closed."""
    made, host = place
    visitor, _ours = made.come(host)
    visitor.shutdown(socket.SHUT_WR)
    until(lambda: [one.state for one in there((made.port, made.port))] == [diag.CLOSE_WAIT], "it has closed")
    _visitor, ours = made.come(host)
    ours.shutdown(socket.SHUT_WR)
    until(lambda: diag.FIN_WAIT_2 in [one.state for one in there((made.port, made.port))], "we have closed")


def test_the_filter_lets_through_the_ports_that_are_meant() -> None:
    """One range, many, more than fit into a filter, and none of ours."""
    with Place("127.0.0.1") as first, Place("127.0.0.1") as second:
        first.come("127.0.0.1")
        second.come("127.0.0.1")
        low, high = sorted((first.port, second.port))
        assert {one.local_port for one in there((low, low))} == {low}
        assert {low, high} <= {one.local_port for one in there((low, high))}
        assert {one.local_port for one in there((1, 1), (low, low), (3, 4), (high, high), (5, 5))} == {low, high}
        odd = [(port, port) for port in range(1, 65536, 2) if port not in (low, high)]
        assert len(odd) > 1000
        assert {low, high} <= {one.local_port for one in there(*odd, (65535, 65535))}
        assert there((1, 9)) == []


@pytest.mark.needs_root
def test_a_connection_can_be_ended(place: tuple[Place, str]) -> None:
    """Both ends learn of it, the other connection goes on, and there is nothing to end a second time."""
    made, host = place
    visitor, ours = made.come(host)
    other = made.come(host)
    inode = os.fstat(ours.fileno()).st_ino
    (one,) = [one for one in there((made.port, made.port)) if one.inode == inode]
    assert diag.destroy(one)
    assert not diag.destroy(one)
    with pytest.raises(ConnectionAbortedError):
        ours.recv(1)
    with pytest.raises(ConnectionResetError):
        visitor.recv(1)
    other[0].send(b"still here")
    assert other[1].recv(64) == b"still here"


@pytest.mark.needs_root
def test_a_successor_at_the_same_addresses_is_not_ended_for_another() -> None:
    """A connection is known by its cookie, not by addresses and ports that another may have by now."""
    with Place("127.0.0.1") as made:
        source = ("127.9.8.7", 0)  # where nobody else is
        visitor, _ours = made.come("127.0.0.1", source)
        source = visitor.getsockname()
        (one,) = there((made.port, made.port))
        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        visitor.close()
        until(lambda: there((made.port, made.port)) == [], "it is gone")
        again, accepted = made.come("127.0.0.1", source)
        assert not diag.destroy(one)
        again.send(b"hello")
        assert accepted.recv(64) == b"hello"


@pytest.mark.needs_root
def test_ending_takes_a_right() -> None:
    """Without CAP_NET_ADMIN connections are seen, and cannot be ended."""
    with Place("127.0.0.1") as made:
        made.come("127.0.0.1")
        code = (
            "from gatekeeper.kernel import diag\n"
            f"(one,) = [one for part in diag.connections([({made.port}, {made.port})]) for one in part]\n"
            "try:\n    diag.destroy(one)\nexcept PermissionError:\n    print('refused')\n"
        )
        without = [need.program("setpriv"), "--bounding-set=-net_admin", sys.executable, "-c", code]
        assert subprocess.run(without, capture_output=True, text=True, check=True, timeout=60).stdout == "refused\n"


def test_very_many_connections_come_in_parts() -> None:
    """Each part is small and quickly made, whatever there is; together they are all of them, each once."""
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    number = min(1500, (room - 100) // 2)
    with Place("127.0.0.1") as made:
        for _ in range(number):
            made.come("127.0.0.1")
        parts = list(diag.connections([(made.port, made.port)]))
        assert max(map(len, parts)) < 300
        cookies = [one.cookie for part in parts for one in part]
        assert len(set(cookies)) == len(cookies) == number


def test_a_dump_that_is_given_up_leaves_no_descriptor() -> None:
    """Whoever has seen enough closes the generator."""
    with Place("127.0.0.1") as made:
        made.come("127.0.0.1")
        before = len(os.listdir("/proc/self/fd"))
        going = diag.connections([(made.port, made.port)])
        next(going)
        going.close()
        assert len(os.listdir("/proc/self/fd")) == before
