"""The workers of before an upgrade: they go on with the sessions they have, accept no more, and leave.

Nobody succeeds them. What they counted is added to one block of counters, that of the retired, so that no number ever
becomes smaller; to the observer each is a further row of counters, beside those of the workers that serve now.
"""

from __future__ import annotations

import os
import time
from operator import add
from typing import TYPE_CHECKING, Any

from gatekeeper.kernel import memfd
from gatekeeper.snapshot.counters import CAPACITY_BYTES
from gatekeeper.supervisor import child as children
from gatekeeper.supervisor.handover import Fd
from gatekeeper.supervisor.worker import Worker, inheritance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gatekeeper.snapshot.bindings import Bindings
    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.handover import OldWorker, State
    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.loop import Loop

KILL_AFTER_S = 5.0  # past the deadline
TELL_EVERY_S = 30.0
_SLOT_BYTES = 8


class Leaving:
    """All that are on their way out. Owns ``retired_fd``, the counters of those who are gone (``None``: nobody is).

    The crew sets ``changed``: these have gone, and what they counted is in the block of the retired now.
    """

    def __init__(self, loop: Loop, log: Log, first_row: int) -> None:
        """``first_row``: the smallest number that no worker and not the block of the retired has."""
        self.workers: list[Worker] = []
        self.retired_fd: int | None = None
        self.cut = 0  # sessions that had to be ended
        self.changed: Callable[[list[Worker]], None] = lambda _gone: None
        self._loop = loop
        self._log = log
        self._next_row = first_row
        self._deadlines: dict[int, float | None] = {}  # by row
        self._next_word = 0.0

    def adopt(self, left: State, bindings: Bindings, on_message: Callable[[Worker, dict[str, Any]], None]) -> None:
        """Take over the processes of before the upgrade. One that never served has nothing to finish and is ended."""
        self.retired_fd = left.retired
        self.cut = left.past.cut
        if left.bygone:
            self._retire(left.bygone, bindings)
            for fd in left.bygone:
                os.close(fd)
        for item in left.workers:
            worker = Worker.adopt(self._next_row, self._loop, item, on_message)
            self._next_row += 1
            self.workers.append(worker)
            self._deadlines[worker.index] = item.deadline
            if not item.serving and item.deadline is None and worker.child is not None:
                worker.child.kill()

    def left_behind(self) -> list[OldWorker]:
        """Return what the next program in our place needs to adopt them once more."""
        items = (worker.left_behind(self._deadlines[worker.index]) for worker in self.workers)
        return [item for item in items if item is not None]

    # -- their last days

    def enforce(self, policy: Accepted) -> None:
        """Let them judge what they have by a newer policy.

        It is put in force without asking first: one whose code cannot read it ends, and its sessions with it. That is
        rare, and the other way out would be to leave sessions alone that the policy refuses.
        """
        for worker in self.workers:
            worker.offer(policy, sockets=False)
            worker.commit(policy)
            worker.generation = policy.generation

    def drain(self, deadline_s: float) -> None:
        """Let those who still accept stop, and all of them leave within ``deadline_s`` from now."""
        deadline = time.monotonic() + deadline_s
        for worker in self.workers:
            theirs = self._deadlines[worker.index]
            if theirs is None or deadline < theirs:
                self._deadlines[worker.index] = deadline
                worker.drain(deadline_s, handover=True)
        self._next_word = time.monotonic() + TELL_EVERY_S

    def kill(self) -> None:
        """End all of them now."""
        for worker in self.workers:
            if worker.child is not None:
                worker.child.kill()

    def reap(self, bindings: Bindings) -> None:
        """See who has gone, and keep what they counted."""
        gone = []
        for worker in self.workers:
            status = worker.child.poll() if worker.child is not None else 0
            if status is not None:
                gone.append(worker)
                if status != 0 and self._deadlines[worker.index] is not None:
                    self._log.warning(f"an old worker (pid {_pid(worker)}) {children.how_it_ended(status)} instead of draining")
        if gone:
            self._retire((worker.counters_fd for worker in gone if worker.counters_fd is not None), bindings)
            self.workers = [worker for worker in self.workers if worker not in gone]
            self.changed(gone)
            for worker in gone:
                worker.close()
            if not self.workers:
                ended = f"; {self.cut} of their sessions had not ended by themselves" if self.cut else ""
                self._log.info(f"all workers of before the upgrade have left{ended}")

    def _retire(self, counters: Iterable[int], bindings: Bindings) -> None:
        """Add what was counted there to the block of the retired, which is a new one then: nobody sees half of it."""
        slots = [0] * bindings.next_slot
        old = self.retired_fd
        if old is not None:
            slots = list(map(add, slots, _slots(os.pread(old, bindings.next_slot * _SLOT_BYTES, 0))))
        for fd in counters:
            slots = list(map(add, slots, _slots(inheritance(fd, bindings))))
        fd = memfd.create("gatekeeper-counters-retired", CAPACITY_BYTES)
        os.pwrite(fd, b"".join(value.to_bytes(_SLOT_BYTES, "little") for value in slots), 0)
        memfd.seal_against_new_writers(fd)
        self.retired_fd = fd
        if old is not None:
            os.close(old)

    def check(self, now: float, bindings: Bindings, stuck_after_s: float) -> None:
        """End who is stuck or past its deadline; say now and then how many sessions are left. Called once a second."""
        for worker in self.workers:
            deadline = self._deadlines[worker.index]
            if worker.child is None:
                continue
            silent_s = worker.silent_for_s(now)
            if silent_s > stuck_after_s:
                self._log.error(f"an old worker (pid {worker.child.pid}) is stuck for {silent_s:.0f} s; killing it")
                worker.child.kill()
            elif deadline is not None and now > deadline + KILL_AFTER_S:
                self._log.error(f"an old worker (pid {worker.child.pid}) does not leave; killing it")
                worker.child.kill()
        if self.workers and self._next_word and now >= self._next_word:
            self._next_word = now + TELL_EVERY_S
            self._log.info(self.summary(now, bindings))

    # -- saying how it is

    def summary(self, now: float, bindings: Bindings) -> str:
        """Return one line about them."""
        sessions = sum(worker.sessions(bindings) for worker in self.workers)
        most_s = max((deadline - now for deadline in self._deadlines.values() if deadline is not None), default=0.0)
        workers = "1 old worker" if len(self.workers) == 1 else f"{len(self.workers)} old workers"
        what = "1 session" if sessions == 1 else f"{sessions} sessions"
        return f"{workers} of before the upgrade with {what}, for at most {max(most_s, 0.0):.0f} s more"

    def state(self, bindings: Bindings) -> list[dict[str, Any]]:
        """Return each as ``{"pid", "row", "sessions", "leaves_within_s"}``; ``None`` there: it still accepts."""
        now = time.monotonic()
        found = []
        for worker in self.workers:
            deadline = self._deadlines[worker.index]
            found.append({
                "pid": _pid(worker), "row": worker.index, "sessions": worker.sessions(bindings),
                "leaves_within_s": None if deadline is None else round(max(deadline - now, 0.0), 1),
            })  # fmt: skip
        return found

    def counters(self) -> list[int | None]:
        """Return where all that was counted before the upgrade can be read."""
        return [self.retired_fd, *(worker.counters_fd for worker in self.workers)]

    def retired(self) -> Fd | None:
        """Return the block of the retired as it is handed over."""
        return None if self.retired_fd is None else Fd(self.retired_fd)

    def close(self) -> None:
        """End and forget all of them."""
        self.kill()
        for worker in self.workers:
            if worker.child is not None:
                worker.child.wait(KILL_AFTER_S)
            worker.close()
        self.workers = []
        if self.retired_fd is not None:
            os.close(self.retired_fd)
            self.retired_fd = None


def _pid(worker: Worker) -> int:
    return worker.child.pid if worker.child is not None else 0


def _slots(data: bytes) -> memoryview:
    return memoryview(data).cast("Q")
