"""Who is offered the policy in force: workers that come up, that serve an older one, or that stand in for a sibling."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gatekeeper.supervisor.log import printable
from gatekeeper.supervisor.worker import State

if TYPE_CHECKING:
    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.worker import Worker

ABSENT_PATIENCE_S = 1.0  # a successor is usually there by then; what arrives meanwhile waits in the kernel's queues
FULL_FOR_S = 10.0  # a worker without room for a sibling's sockets is not asked again before


class Offers:
    """The crew's offers outside of a change, and the answers to them. What a change offers is in change.py."""

    def __init__(self, log: Log, crew: Crew) -> None:
        self._log = log
        self._crew = crew

    def offer(self, worker: Worker) -> None:
        """Offer the policy in force, with the sockets that the worker lacks."""
        if self._crew.policy is not None and not self._crew.stopping:
            worker.state = State.PREPARING
            worker.offer(self._crew.policy)

    def bring_up_to_date(self) -> None:
        """Give the policy in force to workers that serve an older one (they arrived while it was being changed)."""
        for worker in self._crew.those_serving():
            if self._crew.policy is not None and worker.generation != self._crew.policy.generation:
                self.offer(worker)

    def answered(self, worker: Worker, op: object, error: str) -> None:
        """Take the next step with a worker that is coming up."""
        assert self._crew.policy is not None
        current = worker.offered == self._crew.policy.generation
        if op == "prepared" and worker.state is State.PREPARING:
            if current:
                worker.state = State.COMMITTING
                worker.commit(self._crew.policy)
            else:
                worker.abort(worker.offered)
                self.offer(worker)
        elif op == "committed" and worker.state is State.COMMITTING:
            worker.state = State.SERVING
            worker.generation = worker.offered
            worker.absent_since = None
            if current:
                self._crew.arrived()
                self.share_shards()
            else:
                self.offer(worker)
        elif op == "failed" and worker.state is State.PREPARING and worker.child is not None:
            if current and worker.generation == self._crew.policy.generation:
                self._cannot_cover(worker, error)
                return
            text = f"worker {worker.index} refused the policy: {printable(error)}"
            if not self._crew.served and not self._crew.leaving.workers:
                self._crew.gave_up(text)
                return
            self._log.error(text)
            worker.child.kill()

    def share_shards(self) -> None:
        """Let siblings serve the shards of workers that are absent for too long, until these are back.

        A sibling is offered the policy in force once more, with the sockets of those shards beside its own.
        """
        if not self._crew.served or self._crew.stopping or self._crew.change is not None:
            return
        now = time.monotonic()
        covered = {shard: one for one in self._crew.workers for shard in one.covers}
        for worker in self._crew.workers:
            if worker.absent_since is None:
                if worker.index in covered:
                    covered[worker.index].relieve(worker.index)
                    self._log.info(f"worker {worker.index} serves its sources again")
            elif worker.index not in covered and now - worker.absent_since >= ABSENT_PATIENCE_S:
                able = [one for one in self._crew.those_serving() if one.full_until <= now]
                if able:
                    sibling = min(able, key=lambda one: (len(one.covers), one.index))
                    sibling.covers.add(worker.index)
                    self._log.warning(f"worker {sibling.index} serves the sources of worker {worker.index} meanwhile")
                    self.offer(sibling)

    def _cannot_cover(self, worker: Worker, error: str) -> None:
        """Let a worker that has no room for more sockets serve its own, as before."""
        self._log.warning(f"worker {worker.index} cannot serve the sources of others: {printable(error)}")
        worker.abort(worker.offered)
        for shard in sorted(worker.covers):
            worker.relieve(shard)
        worker.state = State.SERVING
        worker.full_until = time.monotonic() + FULL_FOR_S
