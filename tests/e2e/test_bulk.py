"""Many bytes: intact, counted, in both directions at once, and never more of them in memory than a buffer holds."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.backends import TcpBackend, read_to_end
from tests.support.clients import PATIENCE_S, Pair, Sources, send_and_end, unacknowledged
from tests.support.gate import Gate
from tests.support.ports import free_port
from tests.support.wait import until

TRANSFERS, AT_ONCE = 2000, 16
BIG = 1 << 20


def open_policy(listen: str, backend: str) -> str:
    """Return a policy that lets everybody in at one TCP listener."""
    return f"listeners:\n  - {{name: door, listen: '{listen}', backend: '{backend}'}}\ndefault: allow\n"


@pytest.mark.parametrize("backend_first", [False, True], ids=["client", "backend"])
def test_a_reader_that_pauses_stops_the_writer_and_misses_nothing(
    run_gate: Callable[..., Gate], server: socket.socket, backend_first: bool
) -> None:
    """48 MiB for somebody who does not read: the writer is stopped, the worker's memory stays, and then all arrives."""
    port = free_port()
    gate = run_gate(open_policy(f"127.0.0.1:{port}", f"127.0.0.1:{server.getsockname()[1]}"))
    (worker,) = gate.worker_pids()
    session = Pair(port, server)
    try:
        writer, reader = session.ends(backend_first)
        block = random.Random(1).randbytes(BIG)
        total, sent = 48, hashlib.sha256()
        before_kib = resident_kib(worker)
        progress = 0

        def write() -> None:
            nonlocal progress
            for number in range(total):
                part = number.to_bytes(8, "big") + block[8:]
                writer.sendall(part)
                sent.update(part)
                progress = number + 1
            writer.shutdown(socket.SHUT_WR)

        def has_stopped() -> bool:
            """Whether the writer made no progress for ten questions."""
            history.append(progress)
            return len(history) > 30 and len(set(history[-30:])) == 1 and unacknowledged(writer) > 0

        history: list[int] = []
        thread = threading.Thread(target=write)
        thread.start()
        until(has_stopped, "the writer is stopped")
        assert 0 < progress < total
        assert resident_kib(worker) - before_kib < 8192
        got, size = hashlib.sha256(), 0
        while part := reader.recv(1 << 20):
            got.update(part)
            size += len(part)
        thread.join()
        assert (size, got.digest()) == (total * BIG, sent.digest())
    finally:
        session.close()


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_an_echo_that_is_not_read_at_once_goes_on_later(run_gate: Callable[..., Gate], folder: Path, unix: bool) -> None:
    """Both directions fill up and stop while nobody reads; once the client reads, everything moves again to the end."""
    port, path = free_port(), folder / "door.sock"
    with TcpBackend(path=folder / "backend.sock" if unix else None) as backend:
        run_gate(open_policy(f"unix:{path}" if unix else f"127.0.0.1:{port}", backend.address))
        for number in range(10):
            data = random.Random(number).randbytes(BIG // 2 if unix else 16 * BIG)
            with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as client:
                client.settimeout(PATIENCE_S)
                client.connect(str(path) if unix else ("127.0.0.1", port))
                sender = threading.Thread(target=send_and_end, args=(client, data))
                sender.start()
                sender.join(number * 0.02)  # read from the beginning, or after a while
                assert read_to_end(client) == data
                sender.join()


@pytest.mark.parametrize("receive_buffer", [None, 4096])
def test_both_directions_at_once(run_gate: Callable[..., Gate], server: socket.socket, receive_buffer: int | None) -> None:
    """32 MiB each way at the same time, also to a client with a tiny receive buffer, arrive as they were."""
    port = free_port()
    run_gate(open_policy(f"127.0.0.1:{port}", f"127.0.0.1:{server.getsockname()[1]}"))
    there, back = (random.Random(seed).randbytes(32 * BIG) for seed in (1, 2))
    with Sources().make("127.0.0.1") as client:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(("127.0.0.1", port))
        backend, _peer = server.accept()
        backend.settimeout(PATIENCE_S)
        with backend, ThreadPoolExecutor(4) as pool:
            pool.submit(send_and_end, client, there)
            pool.submit(send_and_end, backend, back)
            at_backend, at_client = pool.submit(read_to_end, backend), pool.submit(read_to_end, client)
            assert at_backend.result() == there
            assert at_client.result() == back


def resident_kib(pid: int) -> int:
    """Return the resident memory of a process."""
    return next(int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))


def test_bytes_are_counted_as_sent(run_gate: Callable[..., Gate], server: socket.socket) -> None:
    """What the client and the backend sent is what the counters and the audit log say, to the byte, long or short."""
    port = free_port()
    gate = run_gate(open_policy(f"127.0.0.1:{port}", f"127.0.0.1:{server.getsockname()[1]}"), workers=2)
    sizes = [(0, 0), (1, 0), (0, 1), (7, 1_000_003), (1_000_003, 7), (3_000_017, 2_500_013)]
    for to_backend, to_client in sizes:
        session = Pair(port, server)
        with ThreadPoolExecutor(4) as both_ways:
            both_ways.submit(send_and_end, session.client, b"y" * to_backend)
            both_ways.submit(send_and_end, session.backend, b"z" * to_client)
            at_backend = both_ways.submit(read_to_end, session.backend)
            at_client = both_ways.submit(read_to_end, session.client)
            assert len(at_backend.result(PATIENCE_S)) == to_backend
            assert len(at_client.result(PATIENCE_S)) == to_client
        session.close()
    events = gate.wait_for_audit(len(sizes), "connection")
    told = sorted((event["gatekeeper"]["bytes_in"], event["gatekeeper"]["bytes_out"]) for event in events)
    assert told == sorted(sizes)
    for direction, index in (("in", 0), ("out", 1)):
        total = sum(size[index] for size in sizes)
        gate.wait_for_value(total, "gatekeeper_session_bytes_total", listener="door", direction=direction)
    gate.wait_for_value(0, "gatekeeper_sessions", listener="door")
    assert {event["gatekeeper"]["end"] for event in events} == {"finished"}


@pytest.mark.timeout(180)
@pytest.mark.slow
def test_two_thousand_transfers_arrive_intact(run_gate: Callable[..., Gate]) -> None:
    """2,000 sessions, 16 at a time, 1 B to 512 KiB each way at once in odd pieces, a third into tiny buffers: all arrives."""
    port = free_port()

    def trade(connection: socket.socket) -> None:
        """Read a seed, then send what it says while reading what the client sends; answer with its digest."""
        seed = connection.recv(8, socket.MSG_WAITALL)
        sender = threading.Thread(target=send_in_pieces, args=(connection, seed + b"backend"))
        sender.start()
        digest = hashlib.sha256(read_exactly(connection, seed + b"client")).digest()
        sender.join()
        connection.sendall(digest)
        connection.shutdown(socket.SHUT_WR)
        read_to_end(connection)

    def transfer(number: int) -> None:
        seed = number.to_bytes(8, "big")
        with Sources().make(f"127.0.{number % 200}.{number % 250 + 1}") as client:
            if number % 3 == 0:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(seed)
            sender = threading.Thread(target=send_in_pieces, args=(client, seed + b"client"))
            sender.start()
            if number % 4 == 0:
                sender.join(0.05)  # so that both directions fill up before anything is read
            got = read_exactly(client, seed + b"backend")
            sender.join()
            client.shutdown(socket.SHUT_WR)
            digest = read_to_end(client)
        assert got == content(seed + b"backend"), number
        assert digest == hashlib.sha256(content(seed + b"client")).digest(), number

    with TcpBackend(trade) as backend:
        gate = run_gate(open_policy(f"127.0.0.1:{port}", backend.address), workers=2)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(transfer, range(TRANSFERS)))
        gate.wait_for_value(0, "gatekeeper_sessions", listener="door")
        scrape = gate.scrape()
        assert scrape.value("gatekeeper_connections_total", action="allow") == TRANSFERS == backend.connections
        sent = [sum(content_size(n.to_bytes(8, "big") + who) for n in range(TRANSFERS)) for who in (b"client", b"backend")]
        bytes_total = "gatekeeper_session_bytes_total"
        assert scrape.value(bytes_total, direction="in") == sent[0] + 8 * TRANSFERS
        assert scrape.value(bytes_total, direction="out") == sent[1] + 32 * TRANSFERS


def content_size(seed: bytes) -> int:
    """Return how much is sent for a seed: as often a few bytes as half a megabyte."""
    return int(2 ** random.Random(seed).uniform(0, 19))


def content(seed: bytes) -> bytes:
    """Return what is sent for a seed."""
    return random.Random(seed + b"content").randbytes(content_size(seed))


def send_in_pieces(connection: socket.socket, seed: bytes) -> None:
    """Send the content of a seed in pieces of odd sizes."""
    data, choose, at = memoryview(content(seed)), random.Random(seed + b"pieces"), 0
    while at < len(data):
        size = int(2 ** choose.uniform(0, 17))
        connection.sendall(data[at : at + size])
        at += size


def read_exactly(connection: socket.socket, seed: bytes) -> bytes:
    """Read as much as is sent for a seed."""
    size, parts = content_size(seed), []
    while size:
        part = connection.recv(min(size, 1 << 16))
        assert part, f"the stream ended {size} bytes early"
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
