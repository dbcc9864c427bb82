"""Many sessions at once, in chunks of every size, with stalls and small buffers: every byte arrives, nothing hangs or piles up."""

from __future__ import annotations

import math
import os
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.endurance.streams.closing import Reading, read, send
from tests.support.faults import NAME_BYTES, Outcome, Peer, Plan, Stage, descriptors, part, resident_kib
from tests.support.gate import Gate
from tests.support.ports import free_port
from tests.support.wait import until

MIB = 1 << 20
CHUNK_KIB = 16  # what a direction holds at most in the worker's own memory while its reader stalls
SLACK_KIB = 16 << 10
STEPS = 200  # about ten times as many reads and writes of one stream at most; slices stay at one byte and up
STALLS = 10  # in a session, about, on each side


def open_policy(port: int, backend: str, more: str = "") -> str:
    """Return a policy that lets everybody in at one listener."""
    return f"listeners:\n  - {{name: door, listen: '127.0.0.1:{port}', backend: '{backend}'{more}}}\ndefault: allow\n"


def plans(count: int, most: int, seed: int) -> list[tuple[Plan, Plan]]:
    """Return (client's plan, backend's plan) for each session: sizes from a name's to ``most``, small ones as likely."""
    chance = random.Random(seed)

    def size() -> int:
        if chance.random() < 0.05:
            return most
        return int(NAME_BYTES * math.exp(chance.random() * math.log(most / NAME_BYTES)))

    def plan(number: int, sends: int, reads: int) -> Plan:
        largest = max(1 << chance.randrange(8, 19), max(sends, reads) // STEPS)
        usual = largest / math.log(largest)
        return Plan(
            sends=sends,
            slices=(1, largest),
            latency_s=chance.random() * 0.2,
            stalls=min(0.5, STALLS * usual / (sends + reads)),
            stall_s=0.2,
            receive_buffer=4096 if number % 3 == 0 else None,
        )

    sizes = [(size(), size()) for _ in range(count)]
    return [
        (plan(number, asks, answers), plan(number, answers, asks)) for number, (asks, answers) in enumerate(sizes)
    ]


def how_it_ended(gate: Gate, client: Peer) -> dict[str, Any] | None:
    """Return what the audit log says of a client's session."""
    found = [event for event in gate.audit("connection") if (event["src_ip"], event["src_port"]) == client.local]
    return {key: found[0]["gatekeeper"][key] for key in ("end", "bytes_in", "bytes_out", "duration_s")} if found else None


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_crowd_gets_every_byte(run_gate: Callable[..., Gate], folder: Path, long: bool, kind: str) -> None:
    """Both ways at once, from one byte to megabytes, a third with 4 KiB receive buffers: all whole, memory bounded.

    `GATEKEEPER_SEED` repeats a run, or makes another of it.
    """
    count, most = (2000, 4 * MIB) if long else (100, MIB // 8)
    seed = int(os.environ.get("GATEKEEPER_SEED") or count)
    planned = plans(count, most, seed)
    port = free_port()
    with Stage(seed) as stage:
        behind = stage.listen(lambda number: planned[number][1], folder / "backend.sock" if kind == "unix" else None)
        gate = run_gate(open_policy(port, behind.address))
        (worker,) = gate.worker_pids()
        before_kib, before_fds = resident_kib(worker), descriptors(worker)
        clients = [
            stage.connect(("127.0.0.1", port), plan, number, source=f"127.0.{number % 200}.1")
            for number, (plan, _answer) in enumerate(planned)
        ]
        stage.wait(clients, within_s=800 if long else 50)
        # A client may be done while megabytes of it still trickle through a 4 KiB buffer that the kernel probes now and then.
        stage.wait(behind.peers, within_s=800 if long else 50)
        assert len(behind.peers) == count
        backends = {peer.number: peer for peer in behind.peers}
        broken = [
            (peer.number, "client" if peer.client else "backend", peer.outcome, peer.received, peer.wrong_at)
            for number, (asked, answered) in enumerate(planned)
            for peer, due in ((clients[number], answered.sends), (backends[number], asked.sends))
            if not peer.whole(due)
        ]
        for number, *what in broken[:10]:
            print(number, *what, planned[number or 0], how_it_ended(gate, clients[number or 0]), sep="\n  ")
        assert not broken
        assert resident_kib(worker, "VmHWM") - before_kib <= 2 * CHUNK_KIB * count + SLACK_KIB
        gate.wait_for_value(0, "gatekeeper_sessions")
        gate.wait_for_value(sum(plan.sends for plan, _ in planned), "gatekeeper_session_bytes_total", direction="in")
        gate.wait_for_value(sum(plan.sends for _, plan in planned), "gatekeeper_session_bytes_total", direction="out")
        until(lambda: descriptors(worker) <= before_fds + 32, "no descriptor is left")  # but 16 pooled pipes


@pytest.mark.parametrize("backend_reads", [False, True], ids=["to client", "to backend"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_reader_may_sleep_longer_than_a_half_close_lasts(
    run_gate: Callable[..., Gate], folder: Path, long: bool, backend_reads: bool, kind: str
) -> None:
    """A stream and its FIN wait for a reader that sleeps three times the half-close timeout: all arrives, then the end.

    50 MiB do not fit into what is on the way, so the FIN comes after the sleep; 50,000 bytes do, and the FIN waits with them.
    """
    port = free_port()
    kwargs = {"path": str(folder / "b.sock")} if kind == "unix" else {}
    server = socket.socket(socket.AF_UNIX) if kind == "unix" else socket.create_server(("127.0.0.1", 0))
    with server:
        if kind == "unix":
            server.bind(kwargs["path"])
            (folder / "b.sock").chmod(0o777)
            server.listen(10)
        backend = f"unix:{kwargs['path']}" if kind == "unix" else f"127.0.0.1:{server.getsockname()[1]}"
        gate = run_gate(open_policy(port, backend, ", half_close_timeout: 1s"))
        sessions = []
        for size in (50_000, (50 if long else 10) * MIB):
            client = socket.create_connection(("127.0.0.1", port), 30)
            accepted, _peer = server.accept()
            accepted.settimeout(30)
            writer, reader = (client, accepted) if backend_reads else (accepted, client)

            def write(sock: socket.socket = writer, size: int = size) -> None:
                send(sock, 1, size)
                sock.shutdown(socket.SHUT_WR)

            thread = threading.Thread(target=write)
            thread.start()
            sessions.append((size, writer, reader, thread))
        # The first session is ended by the timeout, which shows that the readers have slept long enough.
        gate.wait_for_value(1, "gatekeeper_session_ends_total", end="half_close_timeout")
        for size, writer, reader, thread in sessions:
            assert read(reader, 1) == Reading(size, "end")
            thread.join(30)
            reader.close()
            writer.close()


def test_a_slow_reader_is_not_an_idle_one(run_gate: Callable[..., Gate]) -> None:
    """What the kernel holds for a reader takes it longer than the half-close timeout: all arrives, as it goes on reading."""
    port, size = free_port(), 5 * MIB  # more than the kernel holds
    # It ends at once, then reads 400 KB a second: the gate may write again every two seconds.
    slow = Plan(slices=(1 << 15, 1 << 15), stalls=1.0, stall_s=0.16, receive_buffer=1 << 15)
    with Stage() as stage:
        behind = stage.listen(lambda _number: slow)
        run_gate(open_policy(port, behind.address, ", half_close_timeout: 1s"))
        client = stage.connect(("127.0.0.1", port), Plan(sends=size))
        stage.wait([client, *behind.peers], within_s=40)
        stage.wait(behind.peers, within_s=40)
        assert client.whole(0)
        assert behind.peers[0].whole(size)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_copying_and_splicing_change_in_mid_stream(run_gate: Callable[..., Gate], folder: Path, kind: str) -> None:
    """Bulk, single bytes and bulk again in one session, to readers that pause in between: no byte is lost, doubled or moved."""
    bursts = [1, MIB, 1, 1, 3 * MIB + 1, 16384, 1, 16383, 16385, 2 * MIB, 4096, 4095, 1, 5 * MIB]
    total = sum(bursts)
    port = free_port()
    with Stage() as stage:
        plan = Plan(sends=NAME_BYTES, slices=(1, 1 << 17), stalls=0.05, stall_s=0.01)
        behind = stage.listen(plan, folder / "backend.sock" if kind == "unix" else None)
        run_gate(open_policy(port, behind.address))
        with socket.create_connection(("127.0.0.1", port), 30) as client:
            client.sendall((5).to_bytes(NAME_BYTES, "big"))
            sent = NAME_BYTES
            for burst in bursts:
                until(lambda: behind.peers and behind.peers[0].received == sent, "the burst before has arrived")  # noqa: B023
                goal = sent + burst
                while sent < goal:
                    piece = part(10, sent, goal - sent)
                    client.sendall(piece)
                    sent += len(piece)
            client.shutdown(socket.SHUT_WR)
            stage.wait(behind.peers)
        (peer,) = behind.peers
        assert (peer.outcome, peer.received, peer.wrong_at) == (Outcome.FINISHED, total + NAME_BYTES, None)
