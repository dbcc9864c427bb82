"""The processes of the service: started, kept alive, kept on the policy in force, and let go."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from gatekeeper.kernel.channel import MAX_FDS
from gatekeeper.supervisor import child as children
from gatekeeper.supervisor.asking import Questions
from gatekeeper.supervisor.leaving import Leaving
from gatekeeper.supervisor.observing import Observer
from gatekeeper.supervisor.offering import ABSENT_PATIENCE_S, Offers
from gatekeeper.supervisor.worker import State, Worker

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from gatekeeper.kernel.privileges import Identity
    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.asking import Done, Rows
    from gatekeeper.supervisor.change import Change
    from gatekeeper.supervisor.child import Commands
    from gatekeeper.supervisor.enforcing import Enforcer
    from gatekeeper.supervisor.handover import State as LeftBehind
    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.loop import Loop

TICK_S = 1.0
STATE_EVERY_TICKS = 10  # the observer learns uptimes this often even when nothing happens
OBSERVER_LEAVES_S = 5.0
KILL_AFTER_S = 5.0  # past the drain deadline
MOST_SESSIONS = 1 << 32  # of one worker; it says so itself
STARTS_BEFORE_GIVING_UP = 3  # of a worker that never served


class Crew:
    """All workers and the observer.

    The supervisor sets ``policy`` (in force) and ``change`` (under way), and is called back: ``serving`` when every
    worker serves for the first time, ``gave_up`` with the reason when they cannot, ``gone`` when all have left.
    """

    def __init__(
        self,
        loop: Loop,
        log: Log,
        commands: Commands,
        identity: Identity | None,
        size: int,
        stuck_after_s: float,
        state: Callable[[], dict[str, Any]],
    ) -> None:
        self.policy: Accepted | None = None
        self.change: Change | None = None
        self.serving: Callable[[], None] = lambda: None
        self.gave_up: Callable[[str], None] = lambda _why: None
        self.gone: Callable[[], None] = lambda: None
        self.served = False  # all of them, once at least
        self.stopping = False
        self.cut = 0  # sessions that workers had to end when they left
        self.bans_fd: int | None = None  # the table in force; set by whoever owns it
        self.workers = [Worker(index, loop, commands.worker, identity) for index in range(size)]
        self.observer: Observer | None = None
        self.leaving = Leaving(loop, log, size + 1)  # row `size` is that of the retired
        self.leaving.changed = self._some_left
        self._loop = loop
        self._log = log
        self._commands = commands
        self._identity = identity
        self._stuck_after_s = stuck_after_s
        self._state = state
        self._questions = Questions(loop)
        self._offers = Offers(log, self)
        self._ticks = 0
        self._last_tick = time.monotonic()

    def start(
        self,
        policy: Accepted,
        audit: str,
        http: socket.socket | None,
        kernel: Enforcer | None,
        left: LeftBehind | None = None,
    ) -> None:
        """Start everybody with this policy; ``kernel`` is what the observer reads like one more worker.

        ``left``: the processes of before an upgrade, who go on until these serve.

        Raises:
            PlaceError: the audit log cannot be written.
            OSError: a process could not be executed.
        """
        self.policy = policy
        self.observer = Observer(
            self._loop, self._commands.observer, self._identity, audit, http, kernel,
            None if left is None else left.audit,
        )
        if left is not None:
            self.leaving.adopt(left, policy.bindings, self._heard_old)
            if left.observer is not None:
                self.observer.succeed(left.observer, self._log.warning)
        self._start_observer()
        for worker in self.workers:
            worker.start(len(self.workers), policy.bindings, self._heard)
        self._loop.later(TICK_S, self._tick)

    def tell_state(self) -> None:
        """Let the observer know how everything is."""
        if self.observer is not None:
            self.observer.state(self._state())

    def event(self, event_type: str, **more: Any) -> None:
        """Let the observer write an event to the audit log."""
        if self.observer is not None:
            self.observer.event({"event_type": event_type, **more})

    def those_serving(self) -> list[Worker]:
        """Return the workers that enforce a policy now."""
        return [worker for worker in self.workers if worker.state is State.SERVING]

    def ask(
        self,
        message: dict[str, Any],
        fds: Sequence[int] = (),
        *,
        rows: Rows = lambda _worker, _rows: None,
        done: Done,
        patience_s: float = 10.0,
    ) -> None:
        """Ask all workers that enforce a policy, those that drain included; see `Questions.ask`.

        Raises:
            TooLong: the message is; nothing was sent.
        """
        # One that is about to enforce its first policy has no sessions, but must not miss a ban.
        coming = message.get("op") == "bans"
        everybody = (*self.workers, *self.leaving.workers)
        asked = [one for one in everybody if one.child is not None and (one.generation or (coming and one.offered))]
        self._questions.ask(asked, message, fds, rows, done, patience_s)

    def bring_up_to_date(self) -> None:
        """Give the policy in force to workers that serve an older one (they arrived while it was being changed)."""
        self._offers.bring_up_to_date()

    def arrived(self) -> None:
        """Note that a worker serves the policy in force."""
        self.tell_state()
        if not self.served and len(self.those_serving()) == len(self.workers):
            self.served = True
            self.serving()

    # -- coming

    def _start_worker(self, worker: Worker) -> None:
        if self.stopping or worker.state is not State.DOWN or self.policy is None:
            return
        try:
            worker.start(len(self.workers), self.policy.bindings, self._heard)
        except OSError as err:
            delay_s = worker.ended()
            self._log.error(f"worker {worker.index} cannot be started ({err}); next attempt in {max(delay_s, 0.1):g} s")
            self._loop.later(max(delay_s, 0.1), lambda: self._start_worker(worker))

    def _start_observer(self) -> None:
        if self.stopping or self.observer is None:
            return
        try:
            self.observer.start(self.workers, self.leaving, self.policy, self._state())
        except OSError as err:
            delay_s = max(self.observer.ended(), 0.1)
            self._log.error(f"the observer cannot be started ({err}); next attempt in {delay_s:g} s")
            self._loop.later(delay_s, self._start_observer)

    def _heard(self, worker: Worker, message: dict[str, Any]) -> None:
        op, generation = message.get("op"), message.get("generation")
        change = self.change
        if op == "ready" and worker.state is State.STARTING:
            worker.became_ready()
            self._introduce(worker)
        elif op in ("rows", "answer"):  # no set: a worker that lies may send what has no hash
            self._questions.heard(worker, message)
        elif op == "drained":
            self.cut += _sessions_in(message)
        elif change is not None and generation == change.new.generation:
            if op == "prepared":
                change.prepared(worker)
            elif op == "committed":
                change.installed(worker)
            elif op == "failed":
                change.refused(worker, str(message.get("error")))
        elif generation == worker.offered and self.policy is not None:
            self._offers.answered(worker, op, str(message.get("error")))

    def _heard_old(self, worker: Worker, message: dict[str, Any]) -> None:
        if message.get("op") == "drained":
            self.leaving.cut += _sessions_in(message)
        elif message.get("op") in ("rows", "answer"):
            self._questions.heard(worker, message)

    def _introduce(self, worker: Worker) -> None:
        """Share a ready worker's counters, and give the policy to those who waited until all counters were known."""
        if self.observer is not None:
            self.observer.counters(worker)
        self._acquaint()

    def _acquaint(self) -> None:
        counters = [one.counters_fd for one in self.workers if one.counters_fd is not None]
        if len(counters) < len(self.workers):
            return
        if self.observer is not None and self.observer.predecessor is not None:
            return  # it would go on to show counters without theirs: numbers that become smaller
        # More than one message carries: then `max_sessions` leaves some of those who are about to go out of account.
        counters = [*counters, *(one.counters_fd for one in self.leaving.workers if one.counters_fd is not None)][:MAX_FDS]
        for one in (*self.workers, *self.leaving.workers):
            if one.state not in {State.DOWN, State.STARTING}:
                one.siblings(counters)
            if one.state is State.READY:
                one.bans(self.bans_fd)
                self._offers.offer(one)

    def _some_left(self, gone: list[Worker]) -> None:
        """Let everybody know that some of the workers of before an upgrade are gone."""
        for worker in gone:
            self._questions.lost(worker)
        if self.observer is not None:
            self.observer.retired(self.leaving, [worker.index for worker in gone])
        self._acquaint()
        self.tell_state()

    # -- watching

    def reap(self) -> None:
        """See who has ended, and start successors. Called on SIGCHLD."""
        if self.policy is not None:
            self.leaving.reap(self.policy.bindings)
        for worker in self.workers:
            status = worker.child.poll() if worker.child is not None else None
            if status is not None:
                self._worker_ended(worker, status)
        observer = self.observer
        if observer is not None and observer.predecessor_left():
            self._acquaint()
        status = observer.child.poll() if observer is not None and observer.child is not None else None
        if observer is not None and status is not None:
            delay_s = observer.ended()
            if not self.stopping:
                self._log.warning(f"the observer {children.how_it_ended(status)}; starting another{_in(delay_s)}")
                self._loop.later(delay_s, self._start_observer)
        if self.stopping:
            self._see_off()

    def _worker_ended(self, worker: Worker, status: int) -> None:
        pid = worker.child.pid if worker.child is not None else 0
        delay_s = worker.ended()
        self._questions.lost(worker)
        ended = children.how_it_ended(status)
        if self.stopping:
            if status != 0:
                self._log.warning(f"worker {worker.index} (pid {pid}) {ended} instead of draining")
            return
        if not self.served and not self.leaving.workers and worker.backoff.failures >= STARTS_BEFORE_GIVING_UP:
            self.gave_up(f"worker {worker.index} cannot start: it {ended}")
            return
        worker.restarts += 1
        self._loop.later(ABSENT_PATIENCE_S, self._offers.share_shards)
        self._log.warning(f"worker {worker.index} (pid {pid}) {ended}; starting another{_in(delay_s)}")
        self._loop.later(delay_s, lambda: self._start_worker(worker))
        if self.change is not None:
            self.change.lost(worker)
        self.event("worker_restart", worker=worker.index, pid=pid, cause=ended)
        self.tell_state()

    def _tick(self) -> None:
        now = time.monotonic()
        paused = now - self._last_tick > 3 * TICK_S
        self._last_tick = now
        # If we did not run, neither did they: a stopped or migrated machine is nobody's fault.
        if not paused:
            for worker in self.workers:
                worker.check(now, self._stuck_after_s, self._log.error)
            if self.policy is not None:
                self.leaving.check(now, self.policy.bindings, self._stuck_after_s)
            self._offers.share_shards()
        if self.observer is not None:
            self.observer.check(now, self._stuck_after_s, self._log.error, paused=paused)
        self._ticks += 1
        if self._ticks % STATE_EVERY_TICKS == 0:
            self.tell_state()
        self._loop.later(TICK_S, self._tick)

    # -- leaving

    def drain(self, deadline_s: float) -> None:
        """Let sessions end, for at most ``deadline_s``; then ``gone``."""
        self.stopping = True
        for worker in self.workers:
            if worker.child is None:
                continue
            if worker.generation:
                worker.drain(deadline_s)
            else:
                worker.child.kill()
        self.leaving.drain(deadline_s)
        self._loop.later(deadline_s + KILL_AFTER_S, self.kill)
        self._see_off()

    def kill(self) -> None:
        """End all workers now."""
        self.stopping = True
        for worker in self.workers:
            if worker.child is not None:
                worker.child.kill()
        self.leaving.kill()
        self._see_off()

    def _see_off(self) -> None:
        """When the last worker has left, let the observer write what is left to write, and leave."""
        if self.leaving.workers or any(worker.child is not None for worker in self.workers):
            return
        child = self.observer.child if self.observer is not None else None
        if child is None:
            self.gone()
            return
        child.hang_up()
        self._loop.later(OBSERVER_LEAVES_S, child.kill)

    def close(self) -> None:
        """Close everything; whoever still lives is ended."""
        survivors = [worker.child for worker in self.workers if worker.child is not None]
        if self.observer is not None:
            survivors += [self.observer.child] if self.observer.child is not None else []
            self.observer.close()
        for child in survivors:
            child.kill()
            child.wait(OBSERVER_LEAVES_S)
        for worker in self.workers:
            worker.close()
        self.leaving.close()


def _sessions_in(message: dict[str, Any]) -> int:
    left = message.get("sessions")
    return min(max(left, 0), MOST_SESSIONS) if isinstance(left, int) else 0


def _in(delay_s: float) -> str:
    return f" in {delay_s:g} s" if delay_s else ""
