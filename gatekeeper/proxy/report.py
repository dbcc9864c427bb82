"""From worker to observer: batches of event records, and the budget that keeps a flood of refusals out of the log.

Nothing here ever blocks or grows: what does not fit is counted and left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gatekeeper.proxy.events import CONNECTION, MAX_RECORDS, RECORD, REFUSAL, SUPPRESSED
from gatekeeper.snapshot.counters import End, WorkerSlot

if TYPE_CHECKING:
    import socket

    from gatekeeper.proxy.accounts import Ended
    from gatekeeper.proxy.loop import Loop

# A rule's refusals reach the audit log one by one up to this; beyond it they are counted. Per verdict and worker.
REFUSALS_PER_S = 10
REFUSALS_BURST = 50

FLUSH_S = 0.1  # records wait at most this long, so that one system call carries many
NO_ADDRESS = bytes(16)


class Reporter:
    """Collects the events of one worker. Owns ``channel`` (SOCK_SEQPACKET, the observer at the other end)."""

    def __init__(self, loop: Loop, counters: memoryview, channel: socket.socket, worker: int, workers: int) -> None:
        self.loop = loop
        self.counters = counters
        self.channel = channel
        channel.setblocking(False)
        self.batch: list[bytes] = []
        self.sessions_in_batch = 0
        self.flush_due_s = 0.0
        self.budgets: dict[int, int] = {}  # slot -> refusals that may still be reported; missing: the whole burst
        self.suppressed: dict[tuple[int, int], int] = {}  # (slot, endpoint) -> refusals left out
        # 53 bits, because JSON readers keep no more; unique across restarts that are a second apart
        self.next_flow_id = (int(loop.wall_offset + loop.now) << 22) + worker
        self.flow_step = workers

    def flow_id(self) -> int:
        """Return a number that no other session of this service has."""
        self.next_flow_id = flow = self.next_flow_id + self.flow_step
        return flow

    def connection(self, session: Ended, moved_in: int, moved_out: int, end: int) -> None:
        """Report a session that ended; ``end`` as in `events.RECORD`."""
        family, address, port = session.source
        loop, began_s = self.loop, session.began_s
        self.sessions_in_batch += 1
        self._add(
            RECORD.pack(
                CONNECTION, end, family, session.slot, session.terms.number, port, session.destination[1], session.flow,
                began_s + loop.wall_offset, loop.now - began_s, moved_in, moved_out, address, session.destination[0],
            )
        )  # fmt: skip

    def affords(self, slot: int, endpoint: int) -> bool:
        """Say whether a refusal is to be reported, and take it from the budget of its verdict; else count it as left out."""
        left = self.budgets.get(slot, REFUSALS_BURST)
        if left:
            self.budgets[slot] = left - 1
            return True
        key = (slot, endpoint)
        self.suppressed[key] = self.suppressed.get(key, 0) + 1
        return False

    def refusal(self, slot: int, endpoint: int, source: tuple[int, bytes, int], destination: tuple[bytes, int]) -> None:
        """Report a refusal."""
        family, address, port = source
        self._add(
            RECORD.pack(
                REFUSAL, End.REFUSED, family, slot, endpoint, port, destination[1], self.flow_id(),
                self.loop.now + self.loop.wall_offset, 0.0, 0, 0, address, destination[0],
            )
        )  # fmt: skip

    def _add(self, record: bytes) -> None:
        batch = self.batch
        if not batch:
            self.flush_due_s = self.loop.now + FLUSH_S
        batch.append(record)
        if len(batch) >= MAX_RECORDS:
            self.flush()

    def renew_budgets(self) -> None:
        """Once a second: report how many refusals were left out, and fill the budgets up."""
        self.budgets = {
            slot: left + REFUSALS_PER_S for slot, left in self.budgets.items() if left + REFUSALS_PER_S < REFUSALS_BURST
        }
        now = self.loop.now + self.loop.wall_offset
        suppressed, self.suppressed = self.suppressed, {}
        for (slot, endpoint), count in suppressed.items():
            self.counters[WorkerSlot.REFUSALS_SUPPRESSED] += count
            self._add(
                RECORD.pack(
                    SUPPRESSED, End.REFUSED, 0, slot, endpoint, 0, 0, 0, now, 0.0, count, 0, NO_ADDRESS, NO_ADDRESS
                )
            )

    def flush(self) -> None:
        """Send the batch; an observer that does not read costs records, never time."""
        batch, sessions = self.batch, self.sessions_in_batch
        self.batch, self.sessions_in_batch = [], 0
        if not batch:
            return
        try:
            self.channel.send(b"".join(batch))
        except OSError:  # it does not read, or it is being replaced
            self.counters[WorkerSlot.EVENTS_LOST_CONNECTION] += sessions
            self.counters[WorkerSlot.EVENTS_LOST_REFUSAL] += len(batch) - sessions
