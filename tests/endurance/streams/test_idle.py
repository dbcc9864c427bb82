"""Thousands of idle sessions: they cost little, they are in nobody's way, and their end is in nobody's way either."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.endurance.streams.holders import Holder
from tests.support.backends import TcpBackend
from tests.support.clients import Sources, ask
from tests.support.faults import descriptors, resident_kib
from tests.support.gate import Gate
from tests.support.ports import free_port
from tests.support.wait import until

SESSION_BYTES = 1536
STALL_S = 0.05
KEPT_FDS = 600  # what a worker needs beside sessions, and what it keeps for pipes
WARM_UP = 200


@pytest.fixture
def open_files() -> Iterator[int]:
    """How many files a process of ours may open: enough for everything here, where the hard limit can be raised to that."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(before[1], 2 * 10_000 + 2 * KEPT_FDS)
    with contextlib.suppress(ValueError, OSError):  # takes CAP_SYS_RESOURCE, which not every root has
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[0], wanted))
    yield resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, 2])
def test_idle_sessions_cost_little_and_end_at_once(
    run_gate: Callable[..., Gate], long: bool, workers: int, open_files: int
) -> None:
    """10,000 idle sessions take at most 1.5 KiB each; the gate answers beside them and while all of them end at once.

    A worker holds two descriptors for a session, so where the hard limit of open files is 20,000 and cannot be raised
    one worker gets some fewer.
    """
    count = min(10_000 if long else 2000, workers * (open_files - KEPT_FDS) // 2)
    port, other_port = free_port(), free_port()
    with Holder("backend") as backend, TcpBackend() as other:  # the other one has nothing to do with the crowd
        gate = run_gate(
            f"listeners:\n  - {{name: door, listen: '127.0.0.1:{port}', backend: '127.0.0.1:{backend.line()}'}}\n"
            f"  - {{name: other, listen: '127.0.0.1:{other_port}', backend: '{other.address}'}}\ndefault: allow\n",
            workers=workers,
        )
        pids = gate.worker_pids()
        with Holder("clients", str(port), str(WARM_UP)) as first:  # what the first sessions allocate once
            assert first.line() == "open"
        gate.wait_for_value(0, "gatekeeper_sessions")
        before_kib, before_fds = sum(map(resident_kib, pids)), sum(map(descriptors, pids))
        with Sources().connect("127.0.0.1", "127.0.0.1", other_port) as mine, Holder("clients", str(port), str(count)) as crowd:
            assert crowd.line() == "open"
            gate.wait_for_value(count + 1, "gatekeeper_sessions")
            each = (sum(map(resident_kib, pids)) - before_kib) * 1024 / count
            print(f"{count} idle sessions: {each:.0f} bytes each")
            if long:  # with fewer, the pages that memory is handed out in would be a large part of it
                assert each <= SESSION_BYTES
            assert ask(mine) == b"are you there?"
            with Sources().connect("127.0.0.2", "127.0.0.1", port) as another:
                assert ask(another) == b"are you there?"
            stall_s = gate.scrape().value("gatekeeper_loop_stall_seconds")
            crowd.tell()
            slowest_s = wait_beside(mine, lambda: gate.scrape().value("gatekeeper_sessions") <= 1)
            assert crowd.line() == "closed"
            until(lambda: sum(map(descriptors, pids)) <= before_fds + 2, "no descriptor is left")
        after_s = gate.scrape().value("gatekeeper_loop_stall_seconds")
        print(f"longest turn of the loop before they closed {stall_s * 1e3:.1f} ms, afterwards {after_s * 1e3:.1f} ms; "
              f"slowest answer meanwhile {slowest_s * 1e3:.1f} ms")  # fmt: skip
        if long:
            assert after_s <= max(stall_s, STALL_S)


def wait_beside(mine: socket.socket, over: Callable[[], bool]) -> float:
    """Ask again and again until it is over; return how long the slowest answer took, in seconds."""
    done = threading.Event()

    def watch() -> None:
        until(over, "it is over", 60)
        done.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    slowest_s = 0.0
    while not done.is_set():
        asked = time.monotonic()
        assert ask(mine) == b"are you there?"
        slowest_s = max(slowest_s, time.monotonic() - asked)
    watcher.join()
    return slowest_s
