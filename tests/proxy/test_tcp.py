"""TCP sessions through a real worker: bytes, ends, resets, refusals, time-outs, and what is counted of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import socket
import struct
import termios
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gatekeeper.policy.model import Action, Backend, Endpoint, Listener, Protocol
from gatekeeper.proxy.events import CAUSE_SHIFT
from gatekeeper.snapshot.counters import Cause, End, ListenerSlot, WorkerSlot
from tests.proxy.rig import ANYONE, Rig, listener, rule, sources
from tests.support.wait import until

PATIENCE_S = 10.0
MIB = 1 << 20
ALLOW_ALL = rule("everyone", Action.ALLOW)


def listen(host: str = "127.0.0.1", backlog: int = 100) -> tuple[socket.socket, Endpoint]:
    """Return a listening socket and its endpoint."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, 0), family=family, backlog=backlog)
    return sock, Endpoint(Protocol.TCP, 6 if ":" in host else 4, host, sock.getsockname()[1])


def backend_of(sock: socket.socket) -> Backend:
    """Return the backend that this socket is."""
    if sock.family == socket.AF_UNIX:
        return Backend(0, sock.getsockname(), 0)
    host, port = sock.getsockname()[:2]
    return Backend(6 if ":" in host else 4, host, port)


class Pair:
    """A client and the backend's side of one session."""

    def __init__(self, address: tuple[str, int], server: socket.socket, source: str = "127.0.0.1") -> None:
        self.client = socket.create_connection(address, PATIENCE_S, (source, 0))
        server.settimeout(PATIENCE_S)
        self.backend, _peer = server.accept()
        self.backend.settimeout(PATIENCE_S)

    def close(self) -> None:
        self.client.close()
        self.backend.close()


class Bed:
    """A worker with one listener before one backend socket that the test serves by hand."""

    def __init__(self, folder: Path | None = None, **limits: Any) -> None:
        if folder is None:
            self.server = socket.create_server(("127.0.0.1", 0))
        else:
            self.server = socket.socket(socket.AF_UNIX)
            self.server.bind(str(folder / "backend"))
            self.server.listen(10)
        sock, self.endpoint = listen()
        self.listener = listener("web", backend_of(self.server), self.endpoint, **limits)
        self.rig = Rig([self.listener], [ALLOW_ALL], {self.endpoint.key: sock})
        self.address = (self.endpoint.host, self.endpoint.port)
        self.pairs: list[Pair] = []

    def connect(self) -> Pair:
        pair = Pair(self.address, self.server)
        self.pairs.append(pair)
        return pair

    def close(self) -> None:
        for pair in self.pairs:
            pair.close()
        self.rig.close()
        self.server.close()


@pytest.fixture(params=["tcp", "unix"])
def bed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bed]:
    """A worker before one backend, TCP or unix."""
    made = Bed(tmp_path if request.param == "unix" else None)
    yield made
    made.close()


@pytest.fixture
def tcp_bed() -> Iterator[Bed]:
    """A worker before one TCP backend."""
    made = Bed()
    yield made
    made.close()


def read_all(sock: socket.socket) -> bytes:
    """Read to the end of the stream; a reset raises."""
    parts: list[bytes] = []
    while data := sock.recv(1 << 16):
        parts.append(data)
    return b"".join(parts)


def read_until_reset(sock: socket.socket) -> bytes:
    """Return what came before the reset; a clean end of the stream fails."""
    parts: list[bytes] = []
    while True:
        try:
            data = sock.recv(1 << 16)
        except ConnectionResetError:
            return b"".join(parts)
        assert data, f"the stream ended cleanly after {len(b''.join(parts))} bytes"
        parts.append(data)


def test_a_unix_backend_that_may_not_be_written_to_is_counted_as_denied(tmp_path: Path) -> None:
    """The most common mistake with unix backends has a name of its own, in the metrics and in the record."""
    if os.geteuid() == 0:
        uid = 65534  # the worker becomes nobody, as under a supervisor that is root
        for folder in (tmp_path, *tmp_path.parents[:-2]):
            folder.chmod(folder.stat().st_mode | 0o111)
    else:
        uid = None
    with socket.socket(socket.AF_UNIX) as server:
        path = str(tmp_path / "backend")
        server.bind(path)
        server.listen(1)
        Path(path).chmod(0o400)
        sock, endpoint = listen()
        web = listener("web", Backend(0, path, 0), endpoint)
        with Rig([web], [ALLOW_ALL], {endpoint.key: sock}, uid=uid) as rig:
            turned_away((endpoint.host, endpoint.port))
            assert rig.record().end == End.BACKEND_FAILED | (Cause.DENIED + 1) << CAUSE_SHIFT
            assert rig.counter("web", ListenerSlot.BACKEND_FAILURES + Cause.DENIED) == 1


@contextlib.contextmanager
def full_backend() -> Iterator[tuple[str, int]]:
    """Give the address of a backend whose queue is full, so that the kernel leaves further SYNs unanswered."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield full.getsockname()


def acknowledged(sock: socket.socket) -> bool:
    """Say whether the other side's kernel has everything that was sent."""
    return fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)) == bytes(4)


def turned_away(address: tuple[str, int], source: str = "127.0.0.1") -> int:
    """Connect and expect nothing but a reset, which may come before `connect` returns; return the port we had."""
    with socket.socket() as client:
        client.settimeout(PATIENCE_S)
        client.bind((source, 0))
        port: int = client.getsockname()[1]
        with contextlib.suppress(ConnectionResetError):
            client.connect(address)
            assert read_until_reset(client) == b""
        return port


def reset(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_bytes_pass_both_ways_and_both_ends_are_passed_on(bed: Bed) -> None:
    """What either side sends arrives at the other, and a session whose sides both ended is counted as finished."""
    pair = bed.connect()
    pair.client.sendall(b"question")
    assert pair.backend.recv(100) == b"question"
    pair.backend.sendall(b"answer!")
    assert pair.client.recv(100) == b"answer!"
    pair.client.close()
    assert pair.backend.recv(100) == b""
    pair.backend.close()
    assert bed.rig.ended() == (End.FINISHED, 8, 7)
    assert bed.rig.judged("web", "allow", "everyone", "rule") == 1
    assert bed.rig.counter("web", ListenerSlot.BYTES_IN) == 8
    assert bed.rig.counter("web", ListenerSlot.BYTES_OUT) == 7
    assert bed.rig.live("web") == 0


def test_the_server_may_speak_first(bed: Bed) -> None:
    """A banner reaches a client that has said nothing."""
    pair = bed.connect()
    pair.backend.sendall(b"220 ready\r\n")
    assert pair.client.recv(100) == b"220 ready\r\n"


def test_a_half_closed_client_still_gets_its_answer(bed: Bed) -> None:
    """The end of one direction leaves the other open."""
    pair = bed.connect()
    pair.client.sendall(b"all I have to say")
    pair.client.shutdown(socket.SHUT_WR)
    assert read_all(pair.backend) == b"all I have to say"
    pair.backend.sendall(b"x" * MIB)
    pair.backend.close()
    assert len(read_all(pair.client)) == MIB
    assert bed.rig.ended() == (End.FINISHED, 17, MIB)


def test_a_half_closed_backend_still_hears_the_client(bed: Bed) -> None:
    """The same the other way round."""
    pair = bed.connect()
    pair.backend.sendall(b"bye")
    pair.backend.shutdown(socket.SHUT_WR)
    assert read_all(pair.client) == b"bye"
    pair.client.sendall(b"y" * MIB)
    pair.client.close()
    assert len(read_all(pair.backend)) == MIB
    assert bed.rig.ended() == (End.FINISHED, MIB, 3)


def test_a_client_that_ends_at_once_is_passed_on_as_an_end(tcp_bed: Bed) -> None:
    """A connection that is closed before its backend was dialled reaches the backend, which sees an end, not a reset."""
    client = socket.create_connection(tcp_bed.address)
    client.close()
    tcp_bed.server.settimeout(PATIENCE_S)
    backend, _peer = tcp_bed.server.accept()
    backend.settimeout(PATIENCE_S)
    assert backend.recv(10) == b""
    backend.close()
    assert tcp_bed.rig.ended() == (End.FINISHED, 0, 0)


def test_of_a_crowd_that_is_let_in_together_each_is_served_by_what_it_did() -> None:
    """Clients that waited in one queue are dialled for in steps: none is taken for another, and none holds up the others."""
    server, (sock, endpoint) = socket.create_server(("127.0.0.1", 0), backlog=100), listen()
    crowd = [socket.create_connection((endpoint.host, endpoint.port), PATIENCE_S) for _ in range(40)]
    speaking, ending, silent, gone = crowd[0::4], crowd[1::4], crowd[2::4], crowd[3::4]
    for number, client in enumerate(crowd):
        if client in gone:
            reset(client)
        elif client not in silent:
            client.sendall(b"%d" % number)
    for client in ending:
        client.shutdown(socket.SHUT_WR)
    with Rig([listener("web", backend_of(server), endpoint)], [ALLOW_ALL], {endpoint.key: sock}) as rig:
        server.settimeout(PATIENCE_S)
        backends = [server.accept()[0] for _ in range(30)]
        for number, client in enumerate(crowd):
            if client in silent:
                client.sendall(b"%d" % number)
        for backend in backends:
            backend.settimeout(PATIENCE_S)
            backend.sendall(b"for " + backend.recv(10))
        for number, client in enumerate(crowd):
            if client not in gone:
                assert client.recv(10) == b"for %d" % number
        for each in [*backends, *speaking, *ending, *silent]:
            each.close()
        ends = Counter(rig.ended(number)[0] for number in range(1, 41))
        assert ends == {End.FINISHED: 30, End.CLIENT_RESET: 10}
        assert rig.live("web") == 0
    server.close()


@pytest.mark.parametrize("size", [0, 1, MIB])
def test_a_reset_of_the_client_reaches_the_backend_after_the_data(tcp_bed: Bed, size: int) -> None:
    """What had arrived before a reset is delivered, and the backend does not take the stream for complete."""
    pair = tcp_bed.connect()
    pair.client.sendall(b"z" * size)
    until(lambda: acknowledged(pair.client), "the gate has taken everything")
    reset(pair.client)
    assert len(read_until_reset(pair.backend)) == size
    assert tcp_bed.rig.ended() == (End.CLIENT_RESET, size, 0)


@pytest.mark.parametrize("size", [0, 1, MIB])
def test_a_reset_of_the_backend_reaches_the_client_after_the_data(tcp_bed: Bed, size: int) -> None:
    """Data that waits in the gate while the client does not read survives the backend's reset."""
    pair = tcp_bed.connect()
    if size:
        pair.backend.sendall(b"z" * size)
        until(lambda: acknowledged(pair.backend), "the gate has taken everything")
    reset(pair.backend)
    assert len(read_until_reset(pair.client)) == size
    assert tcp_bed.rig.ended() == (End.BACKEND_RESET, 0, size)


def test_a_reset_travels_through_a_session_that_is_half_closed(tcp_bed: Bed) -> None:
    """A client that has ended its stream and is then gone does not leave the backend alone with an open session."""
    pair = tcp_bed.connect()
    pair.client.shutdown(socket.SHUT_WR)
    assert pair.backend.recv(10) == b""
    reset(pair.client)
    until(lambda: pair.backend.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), "the reset arrives")
    assert tcp_bed.rig.ended()[0] is End.CLIENT_RESET


@pytest.mark.timeout(120)
def test_everything_arrives_at_a_reader_that_sleeps(bed: Bed) -> None:
    """50 MiB to a backend that does not read for a while: nothing is lost, and meanwhile nothing piles up in the worker."""
    pair = bed.connect()
    data = random.Random(1).randbytes(50 * MIB)

    def send() -> None:
        pair.client.sendall(data)
        pair.client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    before = resident_bytes(bed.rig.process.pid)
    moved = -1

    def stalled() -> bool:
        nonlocal moved
        now = bed.rig.counter("web", ListenerSlot.BYTES_IN)
        still, moved = now == moved and now > 0, now
        return still and bed.rig.counters[WorkerSlot.HEARTBEAT_MS] > 0

    with contextlib.suppress(AssertionError):
        until(stalled, "the gate stops reading", within_s=3.0)
    assert resident_bytes(bed.rig.process.pid) - before < 4 * MIB
    digest = hashlib.sha256()
    while part := pair.backend.recv(1 << 18):
        digest.update(part)
    sender.join(PATIENCE_S)
    assert digest.digest() == hashlib.sha256(data).digest()
    pair.backend.close()
    assert bed.rig.ended() == (End.FINISHED, len(data), 0)


def resident_bytes(pid: int) -> int:
    """Return what a process holds in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(120)
def test_chunks_of_every_size_arrive_intact_both_ways(bed: Bed) -> None:
    """Copying, splicing and the changes between them neither lose, double nor reorder a byte."""
    pair = bed.connect()
    rng = random.Random(7)
    outward, inward = rng.randbytes(3 * MIB), rng.randbytes(3 * MIB)

    def send(sock: socket.socket, data: bytes, seed: int) -> None:
        rng, at = random.Random(seed), 0
        while at < len(data):
            size = rng.choice([1, 2, 100, 1 << 14, (1 << 14) + 1, 1 << 16, 300_000])
            sock.sendall(data[at : at + size])
            at += size
        sock.shutdown(socket.SHUT_WR)

    got: dict[str, bytes] = {}
    threads = [
        threading.Thread(target=send, args=(pair.client, outward, 1)),
        threading.Thread(target=send, args=(pair.backend, inward, 2)),
        threading.Thread(target=lambda: got.__setitem__("out", read_all(pair.backend))),
        threading.Thread(target=lambda: got.__setitem__("in", read_all(pair.client))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got["out"] == outward
    assert got["in"] == inward
    assert bed.rig.ended() == (End.FINISHED, len(outward), len(inward))


def test_a_backend_that_refuses_costs_a_reset_and_is_counted() -> None:
    """Nobody listens: the client is reset at once, and the cause is known."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nowhere = backend_of(gone)
    sock, endpoint = listen()
    with Rig([listener("web", nowhere, endpoint)], [ALLOW_ALL], {endpoint.key: sock}) as rig:
        turned_away((endpoint.host, endpoint.port))
        assert rig.ended()[0] is End.BACKEND_FAILED
        assert rig.counter("web", ListenerSlot.BACKEND_FAILURES + Cause.REFUSED) == 1
        assert rig.live("web") == 0


def test_a_missing_unix_backend_is_counted_as_missing(tmp_path: Path) -> None:
    """The path of a unix backend does not exist."""
    sock, endpoint = listen()
    with Rig(
        [listener("web", Backend(0, str(tmp_path / "no"), 0), endpoint)], [ALLOW_ALL], {endpoint.key: sock}
    ) as rig:
        turned_away((endpoint.host, endpoint.port))
        rig.record()
        assert rig.counter("web", ListenerSlot.BACKEND_FAILURES + Cause.MISSING) == 1


def test_a_dial_that_is_not_answered_times_out() -> None:
    """A backend whose queue is full swallows the SYN: the dial ends after connect_timeout and the client is reset."""
    with full_backend() as address:
        sock, endpoint = listen()
        web = listener("web", Backend(4, *address), endpoint, connect_s=0.5)
        with Rig([web], [ALLOW_ALL], {endpoint.key: sock}) as rig:
            with socket.create_connection((endpoint.host, endpoint.port), PATIENCE_S) as client:
                client.sendall(b"hello?")
                assert read_until_reset(client) == b""
            assert rig.ended()[0] is End.BACKEND_FAILED
            assert rig.counter("web", ListenerSlot.BACKEND_FAILURES + Cause.TIMEOUT) == 1


def test_a_client_that_gives_up_while_its_backend_is_dialled_holds_nothing() -> None:
    """A reset during a dial that is not answered ends the session long before connect_timeout."""
    with full_backend() as address:
        sock, endpoint = listen()
        web = listener("web", Backend(4, *address), endpoint, connect_s=60.0)
        with Rig([web], [ALLOW_ALL], {endpoint.key: sock}) as rig:
            client = socket.create_connection((endpoint.host, endpoint.port), PATIENCE_S)
            until(lambda: rig.live("web") == 1, "the dial has begun")
            reset(client)
            assert rig.ended()[0] is End.CLIENT_RESET


def test_a_unix_backend_with_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    """The kernel refuses at once what it would let wait on TCP; the client must not see the difference."""
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as filler:
        path = str(tmp_path / "backend")
        server.bind(path)
        server.listen(0)
        server.settimeout(PATIENCE_S)
        filler.connect(path)
        sock, endpoint = listen()
        with (
            Rig([listener("web", Backend(0, path, 0), endpoint)], [ALLOW_ALL], {endpoint.key: sock}) as rig,
            socket.create_connection((endpoint.host, endpoint.port), PATIENCE_S) as client,
        ):
            client.sendall(b"patience")
            until(lambda: rig.live("web") == 1, "the dial has begun")
            with server.accept()[0], server.accept()[0] as backend:
                backend.settimeout(PATIENCE_S)
                assert backend.recv(100) == b"patience"


@pytest.mark.parametrize(("limits", "end"), [
    ({"idle_s": 1.0}, End.IDLE_TIMEOUT),
    ({"half_close_s": 1.0}, End.HALF_CLOSE_TIMEOUT),
])  # fmt: skip
def test_idle_sessions_end(limits: dict[str, Any], end: End) -> None:
    """A session in which nothing moves ends after its idle time; after a half-close, after that one's."""
    bed = Bed(**limits)
    try:
        pair = bed.connect()
        pair.client.sendall(b"x")
        assert pair.backend.recv(10) == b"x"
        if end is End.HALF_CLOSE_TIMEOUT:
            pair.client.shutdown(socket.SHUT_WR)
            assert pair.backend.recv(10) == b""
        assert bed.rig.ended() == (end, 1, 0)
        assert read_until_reset(pair.client) == b""
        if end is End.IDLE_TIMEOUT:
            assert read_until_reset(pair.backend) == b""
    finally:
        bed.close()


@pytest.mark.parametrize("action", [Action.DENY, Action.DROP])
def test_a_refused_client_never_reaches_the_backend(tcp_bed: Bed, action: Action) -> None:
    """Deny and drop end the connection with a reset (a drop's dies at the first router), count once, dial nobody."""
    rules = [rule("no", action, sources("127.0.0.2")), ALLOW_ALL]
    tcp_bed.rig.apply([tcp_bed.listener], rules)
    port = turned_away(tcp_bed.address, "127.0.0.2")
    record = tcp_bed.rig.record()
    assert (record.source[:4], record.source_port) == (socket.inet_aton("127.0.0.2"), port)
    assert record.destination_port == tcp_bed.endpoint.port
    assert tcp_bed.rig.judged("web", action.label, "no", "rule") == 1
    assert tcp_bed.rig.counter("web", ListenerSlot.SESSIONS_OPENED) == 0
    tcp_bed.server.setblocking(False)
    with pytest.raises(BlockingIOError):
        tcp_bed.server.accept()


def test_max_sessions_refuses_new_ones_and_evicts_nobody() -> None:
    """At the limit a new session is refused with its own reason; when one ends there is room again, at once."""
    bed = Bed(max_sessions=2)
    try:
        first, second = bed.connect(), bed.connect()
        turned_away(bed.address)
        assert bed.rig.judged("web", "deny", "", "max_sessions") == 1
        assert bed.rig.judged("web", "allow", "everyone", "rule") == 2
        second.close()
        until(lambda: bed.rig.live("web") == 1, "the second session has ended")
        bed.connect().client.sendall(b"x")
        first.client.sendall(b"still here")
        assert first.backend.recv(100) == b"still here"
    finally:
        bed.close()


def test_a_flood_of_refusals_changes_nothing_for_those_who_are_allowed() -> None:
    """While sockets inherit "close with a reset", refusals are still resets and sessions still end with all their data."""
    server = socket.create_server(("127.0.0.1", 0))
    sock, endpoint = listen()
    address = (endpoint.host, endpoint.port)
    rules = [rule("no", Action.DENY, sources("127.0.0.2")), ALLOW_ALL]
    with (
        server,
        sock.dup() as watched,
        Rig([listener("web", backend_of(server), endpoint)], rules, {endpoint.key: sock}),
    ):

        def inherits_resets() -> bool:
            return watched.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 1, 0)

        def flooded() -> bool:
            for _ in range(150):
                turned_away(address, "127.0.0.2")
            return inherits_resets()

        def answered_in_full() -> None:
            pair = Pair(address, server)
            pair.client.shutdown(socket.SHUT_WR)
            assert pair.backend.recv(10) == b""
            pair.backend.sendall(b"z" * MIB)
            pair.backend.close()
            assert len(read_all(pair.client)) == MIB
            pair.close()

        answered_in_full()
        until(flooded, "the flood is noticed")
        for _ in range(3):
            answered_in_full()
            turned_away(address, "127.0.0.2")
        until(lambda: not inherits_resets(), "the flood has passed")
        answered_in_full()
        turned_away(address, "127.0.0.2")


def test_refusals_beyond_the_budget_are_counted_and_summed_up(tcp_bed: Bed) -> None:
    """A flood of refusals is counted to the last one, while the log gets some and the number of the others."""
    tcp_bed.rig.apply([tcp_bed.listener], [rule("no", Action.DENY)])
    for _ in range(300):
        turned_away(tcp_bed.address)
    until(lambda: tcp_bed.rig.judged("web", "deny", "no", "rule") == 300, "all are judged")

    def summed_up() -> bool:
        tcp_bed.rig.record(len(tcp_bed.rig.records) + 1)
        told = [record for record in tcp_bed.rig.records if record.kind == 2]
        left_out = sum(record.bytes_in for record in tcp_bed.rig.records if record.kind == 3)
        assert len(told) < 200
        return len(told) + left_out == 300

    until(summed_up, "told and suppressed refusals add up")


def test_a_new_policy_changes_verdicts_and_ends_no_session(tcp_bed: Bed) -> None:
    """After a commit the next connection is judged by the new policy; live sessions go on; counters keep their names."""
    pair = tcp_bed.connect()
    tcp_bed.rig.apply([tcp_bed.listener], [rule("closed", Action.DENY), ALLOW_ALL])
    turned_away(tcp_bed.address)
    pair.client.sendall(b"on we go")
    assert pair.backend.recv(100) == b"on we go"
    assert tcp_bed.rig.judged("web", "allow", "everyone", "rule") == 1
    assert tcp_bed.rig.judged("web", "deny", "closed", "rule") == 1


def test_listeners_come_and_go_with_the_policy(tcp_bed: Bed) -> None:
    """A removed listener is closed while its sessions go on; a new one is watched."""
    pair = tcp_bed.connect()
    sock, endpoint = listen("::1")
    tcp_bed.rig.sockets[endpoint.key] = sock
    other = Listener(**{name: getattr(tcp_bed.listener, name) for name in tcp_bed.listener.__slots__} | {
        "name": "other", "endpoints": (endpoint,),
    })  # fmt: skip
    tcp_bed.rig.apply([other], [ALLOW_ALL])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(tcp_bed.address, PATIENCE_S)
    second = Pair((endpoint.host, endpoint.port), tcp_bed.server, "::1")
    for each in (pair, second):
        each.client.sendall(b"hello")
        assert each.backend.recv(100) == b"hello"
    second.close()
    assert tcp_bed.rig.live("web") == 1


def test_a_worker_drains_and_leaves() -> None:
    """After `drain` nobody new is let in, the live session ends by itself, and then the worker exits cleanly."""
    bed = Bed()
    try:
        pair = bed.connect()
        bed.rig.channel.send({"op": "drain", "deadline_s": 30.0})
        until(lambda: refused(bed.address), "the listener is closed")
        bed.server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                bed.server.accept()[0].close()  # those who asked before it was
        pair.client.sendall(b"last words")
        assert pair.backend.recv(100) == b"last words"
        pair.close()
        assert bed.rig.expect("drained")["sessions"] == 0
        assert bed.rig.process.wait(PATIENCE_S) == 0
    finally:
        bed.close()


def refused(address: tuple[str, int]) -> bool:
    """Say whether nobody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(address) != 0


def test_a_drain_ends_at_its_deadline(tcp_bed: Bed) -> None:
    """A session that does not end is ended when the deadline has passed, and counted so."""
    pair = tcp_bed.connect()
    tcp_bed.rig.channel.send({"op": "drain", "deadline_s": 0.2})
    assert tcp_bed.rig.expect("drained")["sessions"] == 1
    assert read_until_reset(pair.client) == b""
    assert tcp_bed.rig.ended()[0] is End.DRAINED


def test_out_of_descriptors_new_clients_wait_and_live_sessions_go_on() -> None:
    """With no descriptor to be had the listener pauses; the first that waits is served once a session has ended."""
    server = socket.create_server(("127.0.0.1", 0), backlog=100)
    sock, endpoint = listen(backlog=100)
    web = listener("web", backend_of(server), endpoint)
    with Rig([web], [ALLOW_ALL], {endpoint.key: sock}, nofile=80) as rig:
        clients = [socket.create_connection((endpoint.host, endpoint.port), PATIENCE_S) for _ in range(30)]
        until(lambda: rig.worker_counter(WorkerSlot.ACCEPT_PAUSES) > 0, "the listener pauses")
        served = rig.live("web")
        assert 0 < served < 30
        server.settimeout(PATIENCE_S)
        backends = [server.accept()[0] for _ in range(served)]
        clients[0].sendall(b"still here")
        for backend in backends:
            backend.settimeout(PATIENCE_S)
        assert backends[0].recv(100) == b"still here"
        clients[0].close()
        backends[0].close()
        backends.append(server.accept()[0])
        for open_socket in [*clients, *backends, server]:
            open_socket.close()
        until(lambda: rig.judged("web", "allow", "everyone", "rule") == 30, "everybody was served in the end")


def test_peers_without_an_address_match_only_rules_for_anyone(tmp_path: Path) -> None:
    """On a unix listener a rule for all addresses says nothing; one for anyone does."""
    server = socket.create_server(("127.0.0.1", 0))
    endpoint = Endpoint(Protocol.TCP, 0, str(tmp_path / "front"), 0)
    front = socket.socket(socket.AF_UNIX)
    front.bind(endpoint.host)
    front.listen(10)
    web = listener("web", backend_of(server), endpoint)
    everywhere = sources("0.0.0.0", "255.255.255.255")
    with Rig([web], [rule("v4", Action.ALLOW, everywhere)], {endpoint.key: front}) as rig:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE_S)
            client.connect(endpoint.host)
            assert client.recv(10) == b""
        assert rig.judged("web", "deny", "", "default") == 1
        rig.apply([web], [rule("all", Action.ALLOW, ANYONE)])
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE_S)
            client.connect(endpoint.host)
            backend, _peer = server.accept()
            backend.sendall(b"welcome")
            assert client.recv(10) == b"welcome"
            backend.close()
    server.close()
