"""Thousands of idle sessions: they cost little, they are in nobody's way, and their end is in nobody's way either."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest

from tests.endurance.streams.holders import Holder
from tests.support.clients import Sources, ask
from tests.support.faults import descriptors, resident_kib
from tests.support.gate import Gate
from tests.support.ports import free_port
from tests.support.wait import until

SESSION_BYTES = 1536
STALL_S = 0.05
KEPT_FDS = 150  # what a worker needs beside sessions, and what it keeps in reserve
WARM_UP = 200


@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, 2])
def test_idle_sessions_cost_little_and_end_at_once(
    run_gate: Callable[..., Gate], long: bool, workers: int
) -> None:
    """10,000 idle sessions take at most 1.5 KiB each; the gate answers beside them and while all of them end at once.

    A worker holds two descriptors for a session, so where the hard limit of open files is 20,000 one worker gets some fewer.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    count = min(10_000 if long else 2000, workers * (hard - KEPT_FDS) // 2)
    port = free_port()
    with Holder("backend") as backend:
        behind = int(backend.line())
        gate = run_gate(
            f"listeners:\n  - {{name: door, listen: '127.0.0.1:{port}', backend: '127.0.0.1:{behind}'}}\ndefault: allow\n",
            workers=workers,
        )
        pids = gate.worker_pids()
        with Holder("clients", str(port), str(WARM_UP)) as first:  # what the first sessions allocate once
            assert first.line() == "open"
        gate.wait_for_value(0, "gatekeeper_sessions")
        before_kib, before_fds = sum(map(resident_kib, pids)), sum(map(descriptors, pids))
        with Sources().connect("127.0.0.1", "127.0.0.1", port) as mine, Holder("clients", str(port), str(count)) as crowd:
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
            while gate.scrape().value("gatekeeper_sessions") > 1:
                assert ask(mine) == b"are you there?"
            assert crowd.line() == "closed"
            until(lambda: sum(map(descriptors, pids)) <= before_fds + 2, "no descriptor is left")
        after_s = gate.scrape().value("gatekeeper_loop_stall_seconds")
        print(f"longest turn of the loop before they closed {stall_s * 1e3:.1f} ms, afterwards {after_s * 1e3:.1f} ms")
        if long:
            assert after_s <= max(stall_s, STALL_S)
