"""What the supervisor asks of a worker about its live sessions: to list them, to judge them again, to end them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from gatekeeper.kernel import memfd
from gatekeeper.policy.model import Action, Endpoint, Protocol
from gatekeeper.snapshot import bans
from gatekeeper.snapshot.counters import End, ListenerSlot
from tests.proxy.rig import Rig, listener, rule, sources
from tests.proxy.test_tcp import ALLOW_ALL, PATIENCE_S, Pair, backend_of, listen
from tests.support.wait import until

NOTHING: dict[str, Any] = {}


class Bed:
    """A worker with a TCP and a UDP listener, and backends that the test serves by hand."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0), backlog=1000)
        sock, endpoint = listen(backlog=1000)
        self.udp_backend = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp_backend.bind(("127.0.0.1", 0))
        self.udp_backend.settimeout(PATIENCE_S)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        self.udp_address = udp.getsockname()
        udp_endpoint = Endpoint(Protocol.UDP, 4, *self.udp_address)
        self.listeners = [
            listener("web", backend_of(self.server), endpoint),
            listener("dns", backend_of(self.udp_backend), udp_endpoint, protocol=Protocol.UDP),
        ]
        self.rig = Rig(self.listeners, [ALLOW_ALL], {endpoint.key: sock, udp_endpoint.key: udp})
        self.address = (endpoint.host, endpoint.port)
        self.open: list[Any] = [self.server, self.udp_backend]
        self.query = 0

    def connect(self, source: str = "127.0.0.1") -> Pair:
        pair = Pair(self.address, self.server, source)
        self.open.append(pair)
        return pair

    def flow(self, source: str = "127.0.0.1") -> socket.socket:
        """Return a UDP client whose datagram has reached the backend."""
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.settimeout(PATIENCE_S)
        client.bind((source, 0))
        client.sendto(b"hello", self.udp_address)
        self.udp_backend.recv(100)
        self.open.append(client)
        return client

    def ask(self, op: str, fds: list[int] | None = None, **more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the rows and the answer of a query."""
        self.query += 1
        self.rig.channel.send({"op": op, "query": self.query} | more, fds or [])
        rows: list[dict[str, Any]] = []
        while True:
            message, _fds = self.rig.channel.receive()
            assert message["query"] == self.query
            if message["op"] == "answer":
                return rows, message
            assert len(message["rows"]) <= 200
            rows += message["rows"]

    def sessions(self, most: int = 1000, **wanted: Any) -> list[dict[str, Any]]:
        """Return the sessions that match, which must be as many as the worker says."""
        rows, answer = self.ask("sessions", filter=wanted, most=most)
        assert min(answer["matched"], most) == len(rows)
        return rows

    def ban(self, *ranges: tuple[int, int, int]) -> int:
        """Put these bans in force; return how many sessions they ended."""
        fd = memfd.from_bytes("bans", bans.encode(ranges))
        _rows, answer = self.ask("bans", [fd])
        os.close(fd)
        return int(answer["ended"])

    def close(self) -> None:
        self.rig.close()
        for each in self.open:
            each.close()


@pytest.fixture
def bed() -> Iterator[Bed]:
    """Serve one TCP and one UDP listener."""
    bed = Bed()
    yield bed
    bed.close()


def number(host: str) -> int:
    """Return an IPv4 address as a number."""
    return int.from_bytes(socket.inet_aton(host), "big")


def fill(sock: socket.socket) -> None:
    """Send until nobody takes more."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 16))


def is_refused(bed: Bed, source: str) -> bool:
    """Say whether a new connection from ``source`` is reset; that may come before `connect` returns."""
    try:
        with socket.create_connection(bed.address, PATIENCE_S, (source, 0)) as sock:
            return is_reset(sock)
    except ConnectionResetError:
        return True


def is_reset(sock: socket.socket) -> bool:
    """Say whether the peer of a socket has reset the connection."""
    sock.settimeout(PATIENCE_S)
    try:
        return not sock.recv(100) and False
    except ConnectionResetError:
        return True


def test_a_session_is_described_as_it_is(bed: Bed) -> None:
    """A row has the addresses, the bytes, the state, and what the kernel knows of both connections."""
    pair = bed.connect("127.0.0.7")
    pair.client.sendall(b"12345")
    assert pair.backend.recv(100) == b"12345"
    (row,) = bed.sessions(details=True)
    assert (row["source"], row["source_port"]) == pair.client.getsockname()
    assert (row["destination"], row["destination_port"]) == bed.address
    assert (row["bytes_in"], row["bytes_out"], row["state"], row["family"]) == (5, 0, "open", 4)
    for side in ("client", "backend"):
        assert row[side]["rtt_us"] > 0
        assert (row[side]["retransmits"], row[side]["unsent"], row[side]["unacked"]) == (0, 0, 0)
    pair.close()
    assert bed.rig.record().flow == row["flow"]


def test_a_reader_that_does_not_read_shows_in_what_is_unsent(bed: Bed) -> None:
    """Bytes that the backend does not take are in the row of its connection."""
    pair = bed.connect()
    fill(pair.client)
    until(lambda: bed.sessions(details=True)[0]["backend"]["unsent"] > 0, "bytes that the backend does not take")


def test_sessions_are_chosen_by_what_they_are(bed: Bed) -> None:
    """A filter by source, flow, rule, state or age chooses just those."""
    bed.connect("127.0.0.7")
    bed.connect("127.0.0.8")
    flow = bed.flow("127.0.0.8")
    everything = bed.sessions()
    assert len(everything) == 3
    wanted: dict[str, Any] = {"sources": [[4, number("127.0.0.8"), number("127.0.0.9")], [6, 0, 1 << 127]]}
    assert {row["source"] for row in bed.sessions(**wanted)} == {"127.0.0.8"}
    assert len(bed.sessions(**wanted)) == 2
    (udp,) = bed.sessions(states=["flow"])
    assert (udp["source"], udp["source_port"], udp["bytes_in"], udp["client"]) == (*flow.getsockname(), 5, None)
    assert bed.sessions(slots=[udp["slot"]], **wanted) == [udp | {"idle_s": pytest.approx(udp["idle_s"], abs=5)}]
    assert [row["flow"] for row in bed.sessions(flows=[everything[0]["flow"]])] == [everything[0]["flow"]]
    assert bed.sessions(slots=[]) == bed.sessions(older_s=3600) == bed.sessions(idle_s=3600) == []
    assert len(bed.sessions(younger_s=3600, slots=[everything[0]["slot"]])) == 2


def test_a_session_that_one_side_has_left_is_stuck(bed: Bed) -> None:
    """A session is stuck when one side has ended and the other has not, even before the end was read."""
    bed.connect()
    assert bed.sessions(stuck=True) == []
    left = bed.connect()
    left.backend.shutdown(socket.SHUT_WR)
    until(lambda: [row["state"] for row in bed.sessions(stuck=True)] == ["backend_closed"], "the end of the backend")
    full = bed.connect()
    fill(full.client)
    full.client.shutdown(socket.SHUT_WR)  # behind more than the backend takes, so nobody has read it yet
    assert {row["state"] for row in bed.sessions(stuck=True)} >= {"backend_closed"}


def test_many_sessions_come_in_several_messages_and_no_more_than_asked_for(bed: Bed) -> None:
    """No message is longer than 200 rows, and no more rows come than were asked for."""
    for _ in range(450):
        bed.connect()
    rows, answer = bed.ask("sessions", filter={}, most=1000)
    assert answer["matched"] == len({row["flow"] for row in rows}) == 450
    rows, answer = bed.ask("sessions", filter={}, most=10)
    assert (answer["matched"], len(rows)) == (450, 10)


def test_those_that_match_are_cut_on_both_sides_and_nobody_else(bed: Bed) -> None:
    """Both sides of a session that is cut get a reset, and the others go on."""
    stays, goes = bed.connect("127.0.0.7"), bed.connect("127.0.0.8")
    bed.flow("127.0.0.8")
    wanted = {"sources": [[4, number("127.0.0.8"), number("127.0.0.8")]]}
    rows, answer = bed.ask("cut", filter=wanted, most=1)
    assert (answer["ended"], len(rows)) == (2, 1)
    assert is_reset(goes.client)
    assert is_reset(goes.backend)
    assert [bed.rig.ended(nth)[0] for nth in (1, 2)] == [End.CUT, End.CUT]
    stays.client.sendall(b"still here")
    assert stays.backend.recv(100) == b"still here"


def test_a_new_policy_ends_those_it_refuses(bed: Bed) -> None:
    """Sessions end as revoked once they are judged again, and not before; the others go on."""
    stays, goes = bed.connect("127.0.0.7"), bed.connect("127.0.0.8")
    bed.flow("127.0.0.7")
    flow = bed.flow("127.0.0.8")
    bed.rig.apply(bed.listeners, [rule("not-eight", Action.DROP, sources("127.0.0.8")), ALLOW_ALL])
    assert len(bed.sessions()) == 4  # nobody is cut before it is asked for
    _rows, answer = bed.ask("rejudge", generation=bed.rig.bindings.generation)
    assert (answer["judged"], answer["ended"]) == (4, 2)
    assert is_reset(goes.client)
    assert is_reset(goes.backend)
    assert [bed.rig.ended(nth)[0] for nth in (1, 2)] == [End.REVOKED, End.REVOKED]
    stays.client.sendall(b"still here")
    assert stays.backend.recv(100) == b"still here"
    flow.sendto(b"nobody hears", bed.udp_address)
    until(lambda: bed.rig.judged("dns", "drop", "not-eight", "rule") == 1, "the refusal of the next datagram")


def test_sessions_of_a_removed_listener_are_not_judged(bed: Bed) -> None:
    """No rule speaks of an endpoint that is gone, so its sessions go on."""
    pair = bed.connect()
    bed.rig.apply(bed.listeners[1:], [])
    _rows, answer = bed.ask("rejudge", generation=bed.rig.bindings.generation)
    assert (answer["judged"], answer["ended"]) == (0, 0)
    pair.client.sendall(b"still here")
    assert pair.backend.recv(100) == b"still here"


def test_a_ban_stands_above_the_policy_until_it_is_lifted(bed: Bed) -> None:
    """A ban ends sessions, refuses new ones whatever the policy says, survives reloads, and can be lifted."""
    stays, goes = bed.connect("127.0.0.7"), bed.connect("127.0.0.8")
    bed.flow("127.0.0.8")
    assert bed.ban((4, number("127.0.0.8"), number("127.0.0.8"))) == 2
    assert is_reset(goes.client)
    assert is_reset(goes.backend)
    assert [bed.rig.ended(nth)[0] for nth in (1, 2)] == [End.BANNED, End.BANNED]
    assert is_refused(bed, "127.0.0.8")
    until(lambda: bed.rig.judged("web", "deny", "", "ban") == 1, "the refusal")
    stays.client.sendall(b"still here")
    assert stays.backend.recv(100) == b"still here"
    # A new policy does not lift it, and is judged together with it.
    bed.rig.apply(bed.listeners, [rule("everybody-again", Action.ALLOW)])
    _rows, answer = bed.ask("rejudge", generation=bed.rig.bindings.generation)
    assert (answer["judged"], answer["ended"]) == (1, 0)
    assert is_refused(bed, "127.0.0.8")
    assert bed.ban() == 0
    bed.connect("127.0.0.8")


def test_the_books_agree_after_sessions_were_ended_from_above(bed: Bed) -> None:
    """Whatever was ended is counted once, under its cause."""
    for last in range(1, 31):
        bed.connect(f"127.0.0.{last}")
    bed.ask("cut", filter={"sources": [[4, number("127.0.0.1"), number("127.0.0.10")]]}, most=0)
    bed.ban((4, number("127.0.0.5"), number("127.0.0.20")))
    assert bed.rig.live("web") == len(bed.sessions()) == 10
    ends = {end: bed.rig.counter("web", ListenerSlot.ENDS + end) for end in End}
    assert {end: count for end, count in ends.items() if count} == {End.CUT: 10, End.BANNED: 10}


def test_others_are_served_while_thousands_are_looked_at(bed: Bed) -> None:
    """Nobody waits for a census, nor for a supervisor that does not read its rows."""
    pairs = [bed.connect(f"127.0.{nth % 200}.1") for nth in range(800)]
    bed.rig.channel.send({"op": "sessions", "query": 7, "filter": {"details": True}, "most": 800})
    pairs[-1].client.sendall(b"in between")
    assert pairs[-1].backend.recv(100) == b"in between"
    rows = []
    # Nobody reads the answers meanwhile; the worker waits for room without waiting for us.
    while (message := bed.rig.channel.receive()[0])["op"] == "rows":
        rows += message["rows"]
    assert (message, len(rows)) == ({"op": "answer", "query": 7, "matched": 800}, 800)
