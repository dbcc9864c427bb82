"""Putting another policy in force in all serving workers, or in none.

    begin: every worker is offered the policy ──all prepared──► commit everywhere ──all committed──► done
                       │ one refuses, dies or is late                  │ one dies: its successor gets the new policy
                       ▼                                               │ one is late: killed
               abort everywhere, nothing has changed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gatekeeper.supervisor.log import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.loop import Loop
    from gatekeeper.supervisor.worker import Worker

PATIENCE_S = 30.0  # for each of the two steps


class Change:
    """One attempt. ``committing`` is called when there is no way back, ``done`` once at the end with the reason why not."""

    def __init__(
        self,
        loop: Loop,
        new: Accepted,
        workers: list[Worker],
        committing: Callable[[], None],
        done: Callable[[str | None], None],
    ) -> None:
        self.new = new
        self.committed = False
        self._workers = workers
        self._missing = set(workers)
        self._committing = committing
        self._done = done
        self._loop = loop
        self._timer = loop.later(PATIENCE_S, self._late)

    def begin(self) -> None:
        """Offer the policy to every worker."""
        for worker in self._workers:
            worker.offer(self.new)
        self._go_on()

    def prepared(self, worker: Worker) -> None:
        """Note that a worker could put it in force."""
        if not self.committed:
            self._missing.discard(worker)
            self._go_on()

    def refused(self, worker: Worker, why: str) -> None:
        """Note that a worker could not."""
        if not self.committed and worker in self._workers:
            self.abort(f"worker {worker.index} refused the policy: {printable(why)}")

    def installed(self, worker: Worker) -> None:
        """Note that it is in force in a worker."""
        if self.committed:
            worker.generation = self.new.generation
            self._missing.discard(worker)
            self._go_on()

    def lost(self, worker: Worker) -> None:
        """Note that a worker has ended."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self._missing.discard(worker)
        if self.committed:
            self._go_on()
        else:
            self.abort(f"worker {worker.index} ended while it prepared the policy")

    def abort(self, why: str) -> None:
        """Take everything back. Only before the commit."""
        for worker in self._workers:
            worker.abort(self.new.generation)
        self._finish(why)

    def _go_on(self) -> None:
        if self._missing:
            return
        if self.committed:
            self._finish(None)
            return
        self.committed = True
        self._timer.cancel()
        self._timer = self._loop.later(PATIENCE_S, self._late)
        self._missing = set(self._workers)
        self._committing()
        for worker in self._workers:
            worker.commit(self.new)
        if not self._missing:
            self._finish(None)

    def _late(self) -> None:
        if not self.committed:
            names = ", ".join(str(worker.index) for worker in sorted(self._missing, key=lambda one: one.index))
            self.abort(f"worker {names} did not answer within {PATIENCE_S:g} s")
            return
        for worker in self._missing:
            if worker.child is not None:
                worker.child.kill()

    def _finish(self, why: str | None) -> None:
        self._timer.cancel()
        self._done(why)
