"""A worker's place: what a successor inherits, when one is stuck, how long restarts wait."""

from __future__ import annotations

import os
import struct

import pytest

from gatekeeper.kernel import memfd
from gatekeeper.snapshot.bindings import Bindings, VerdictKey
from gatekeeper.snapshot.counters import CAPACITY_BYTES, LISTENER_SLOTS, WORKER_SLOTS, End, ListenerSlot, WorkerSlot
from gatekeeper.supervisor.worker import Backoff, inheritance


def test_a_successor_goes_on_counting() -> None:
    """All counts survive; the sessions that died are closed and count as errors; gauges and the worker's clock are zero."""
    block = WORKER_SLOTS
    verdict = block + LISTENER_SLOTS
    bindings = Bindings(1, {"ssh": block}, {VerdictKey("ssh", "allow", "", "default"): verdict}, next_slot=verdict + 1)
    slots = [0] * (verdict + 1)
    slots[WorkerSlot.HEARTBEAT_MS] = 123456
    slots[WorkerSlot.EVENTS_LOST_REFUSAL] = 5
    slots[block + ListenerSlot.SESSIONS_OPENED] = 10
    slots[block + ListenerSlot.SESSIONS_CLOSED] = 7
    slots[block + ListenerSlot.ENDS + End.ERROR] = 1
    slots[block + ListenerSlot.BYTES_IN] = 1000
    slots[block + ListenerSlot.ACCEPT_QUEUE] = 4
    slots[verdict] = 99
    fd = memfd.create("test", CAPACITY_BYTES)
    os.pwrite(fd, struct.pack(f"={len(slots)}Q", *slots), 0)
    after = struct.unpack(f"={len(slots)}Q", inheritance(fd, bindings))
    os.close(fd)
    expected = list(slots)
    expected[WorkerSlot.HEARTBEAT_MS] = 0
    expected[block + ListenerSlot.SESSIONS_CLOSED] = 10
    expected[block + ListenerSlot.ENDS + End.ERROR] = 4
    expected[block + ListenerSlot.ACCEPT_QUEUE] = 0
    assert list(after) == expected


def test_counters_of_a_worker_gone_mad_do_no_harm() -> None:
    """Whatever a dead worker left in its counters, its successor can be started."""
    bindings = Bindings(1, {"ssh": WORKER_SLOTS}, next_slot=WORKER_SLOTS + LISTENER_SLOTS)
    fd = memfd.create("test", CAPACITY_BYTES)
    os.pwrite(fd, b"\xff" * bindings.next_slot * 8, 0)
    os.pwrite(fd, b"\0" * 8, (WORKER_SLOTS + ListenerSlot.SESSIONS_CLOSED) * 8)
    assert len(inheritance(fd, bindings)) == bindings.next_slot * 8
    os.close(fd)


def test_restarts_wait_longer_and_longer() -> None:
    """The first restart is immediate; then 0.1 s, doubling up to 5 s; a process that lived long starts afresh."""
    backoff = Backoff()
    delays = [backoff.next_delay_s(0.05) for _ in range(9)]
    assert delays == pytest.approx([0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
    assert backoff.next_delay_s(60.0) == 0
    assert backoff.next_delay_s(0.05) == pytest.approx(0.1)
