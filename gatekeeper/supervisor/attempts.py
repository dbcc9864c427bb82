"""What programs in the kernel count and report about those who attempt to connect, passed on to the observer.

To the observer the kernel looks like one more worker: it has counters in shared memory and a socket for events.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from typing import TYPE_CHECKING

from gatekeeper.kernel import lookup, memfd
from gatekeeper.proxy.events import MAX_RECORDS, RECORD, REFUSAL, SUPPRESSED
from gatekeeper.snapshot.counters import CAPACITY_BYTES, End, WorkerSlot

if TYPE_CHECKING:
    from gatekeeper.kernel.judge import Former, Judge
    from gatekeeper.kernel.ring import Ring
    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.handover import Kernel

NO_ADDRESS = bytes(16)


class Attempts:
    """Owns ``counters_fd`` (``counters`` are its slots) and both ends of the events (``events_out`` for the observer)."""

    def __init__(self, left: Kernel | None = None) -> None:
        """``left``: what a predecessor in our place left behind; its numbers go on, and its counters are closed."""
        # The flow id given last. Workers' flow ids begin twice as high.
        self.flow = int(time.time()) << 21 if left is None else left.flow
        self.counters_fd = memfd.create("gatekeeper-kernel", CAPACITY_BYTES)
        self._memory = mmap.mmap(self.counters_fd, CAPACITY_BYTES)
        memfd.seal_against_new_writers(self.counters_fd)
        if left is not None:
            _go_on_counting(self._memory, left.counters)
            os.close(left.counters)
        self.counters = memoryview(self._memory).cast("Q")
        self.events_out, self._events_in = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._events_in.setblocking(False)

    def count(self, judge: Judge | Former, policy: Accepted) -> None:
        """Add what a program has counted since the last time; what was refused without a report is said in one record."""
        records = []
        now = time.time()
        for detail, (attempts, reported) in judge.news().items():
            slot = judge.slots[detail]
            self.counters[slot] += attempts
            listener, _rule, action, _reason = policy.meta["details"][detail]
            left_out = attempts - reported
            if action != "allow" and left_out > 0:
                self.counters[WorkerSlot.REFUSALS_SUPPRESSED] += left_out
                number = next(
                    number for endpoint, number in zip(policy.meta["endpoints"], policy.bindings.rows, strict=True)
                    if endpoint["listener"] == listener and endpoint["family"]
                )  # fmt: skip
                records.append(RECORD.pack(
                    SUPPRESSED, End.REFUSED, 0, slot, number, 0, 0, 0, now, 0.0, left_out, 0, NO_ADDRESS, NO_ADDRESS
                ))  # fmt: skip
        self.tell(records)

    def hear(self, ring: Ring) -> None:
        """Pass on what programs report in this ring."""
        since_boot_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        records = []
        for report in ring.read():
            at_ns, slot, number, port, to_port, family, _protocol, source, target = lookup.REPORT.unpack(report)
            self.flow += 1
            records.append(RECORD.pack(
                REFUSAL, End.REFUSED, 4 if family == socket.AF_INET else 6, slot, number, socket.ntohs(port), to_port,
                self.flow, at_ns / 1e9 + since_boot_s, 0.0, 0, 0, source, target,
            ))  # fmt: skip
        self.tell(records)

    def tell(self, records: list[bytes]) -> None:
        """Let the observer have these records, or count them as lost."""
        for first in range(0, len(records), MAX_RECORDS):
            batch = records[first : first + MAX_RECORDS]
            try:
                self._events_in.send(b"".join(batch))
            except OSError:  # the observer does not read, or it is being replaced
                self.counters[WorkerSlot.EVENTS_LOST_REFUSAL] += len(batch)

    def close(self) -> None:
        """Close all of it; nothing is counted or told any more."""
        self.counters.release()
        self._memory.close()
        os.close(self.counters_fd)
        self._events_in.close()
        self.events_out.close()


def _go_on_counting(memory: mmap.mmap, before: int) -> None:
    """Start from what a predecessor has counted, without touching pages where nothing was."""
    for at in range(0, CAPACITY_BYTES, mmap.PAGESIZE):
        page = os.pread(before, mmap.PAGESIZE, at)
        if any(page):
            memory[at : at + len(page)] = page
