"""The processes of the service: started, kept alive, kept on the policy in force, and let go."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gatekeeper.kernel.channel import MAX_FDS
from gatekeeper.supervisor import child as children
from gatekeeper.supervisor.asking import Questions
from gatekeeper.supervisor.leaving import Leaving
from gatekeeper.supervisor.log import printable
from gatekeeper.supervisor.observing import Observer
from gatekeeper.supervisor.worker import State, Worker

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from gatekeeper.kernel.privileges import Identity
    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.asking import Done, Rows
    from gatekeeper.supervisor.change import Change
    from gatekeeper.supervisor.enforcing import Enforcer
    from gatekeeper.supervisor.handover import State as LeftBehind
    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.loop import Loop

TICK_S = 1.0
STATE_EVERY_TICKS = 10  # the observer learns uptimes this often even when nothing happens
START_PATIENCE_S = 30.0  # for a process to load and turn for the first time
OBSERVER_PATIENCE = 3  # times as long as a worker's, for the observer to read what it was sent
OBSERVER_LEAVES_S = 5.0
KILL_AFTER_S = 5.0  # past the drain deadline
MOST_SESSIONS = 1 << 32  # of one worker; it says so itself
ABSENT_PATIENCE_S = 1.0  # a successor is usually there by then; what arrives meanwhile waits in the kernel's queues
FULL_FOR_S = 10.0  # a worker without room for a sibling's sockets is not asked again before
STARTS_BEFORE_GIVING_UP = 3  # of a worker that never served


@dataclass(frozen=True, slots=True)
class Commands:
    """How our processes are started; tests put others in their place."""

    worker: list[str] = field(default_factory=lambda: children.python("gatekeeper.proxy"))
    observer: list[str] = field(default_factory=lambda: children.python("gatekeeper.observer"))
    compiler: list[str] = field(default_factory=lambda: children.python("gatekeeper.supervisor.compile"))


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
        self._served = False
        self._leaving = False
        self._ticks = 0
        self._last_tick = time.monotonic()
        self._observer_reads = self._last_tick

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
                self.observer.succeed(left.observer)
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
        for worker in self.those_serving():
            if self.policy is not None and worker.generation != self.policy.generation:
                self._offer(worker)

    # -- coming

    def _start_worker(self, worker: Worker) -> None:
        if self._leaving or worker.state is not State.DOWN or self.policy is None:
            return
        try:
            worker.start(len(self.workers), self.policy.bindings, self._heard)
        except OSError as err:
            delay_s = worker.ended()
            self._log.error(f"worker {worker.index} cannot be started ({err}); next attempt in {max(delay_s, 0.1):g} s")
            self._loop.later(max(delay_s, 0.1), lambda: self._start_worker(worker))

    def _start_observer(self) -> None:
        if self._leaving or self.observer is None:
            return
        self._observer_reads = time.monotonic()
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
            self._answered(worker, op, str(message.get("error")))

    def _heard_old(self, worker: Worker, message: dict[str, Any]) -> None:
        if message.get("op") == "drained":
            self.leaving.cut += _sessions_in(message)
        elif message.get("op") in ("rows", "answer"):
            self._questions.heard(worker, message)

    def _answered(self, worker: Worker, op: object, error: str) -> None:
        """Take the next step with a worker that is coming up."""
        assert self.policy is not None
        current = worker.offered == self.policy.generation
        if op == "prepared" and worker.state is State.PREPARING:
            if current:
                worker.state = State.COMMITTING
                worker.commit(self.policy)
            else:
                worker.abort(worker.offered)
                self._offer(worker)
        elif op == "committed" and worker.state is State.COMMITTING:
            worker.state = State.SERVING
            worker.generation = worker.offered
            worker.absent_since = None
            if current:
                self._arrived()
                self._share_shards()
            else:
                self._offer(worker)
        elif op == "failed" and worker.state is State.PREPARING and worker.child is not None:
            if current and worker.generation == self.policy.generation:
                self._cannot_cover(worker, error)
                return
            text = f"worker {worker.index} refused the policy: {printable(error)}"
            if not self._served and not self.leaving.workers:
                self.gave_up(text)
                return
            self._log.error(text)
            worker.child.kill()

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
                self._offer(one)

    def _some_left(self, gone: list[Worker]) -> None:
        """Let everybody know that some of the workers of before an upgrade are gone."""
        for worker in gone:
            self._questions.lost(worker)
        if self.observer is not None:
            self.observer.retired(self.leaving, [worker.index for worker in gone])
        self._acquaint()
        self.tell_state()

    def _share_shards(self) -> None:
        """Let siblings serve the shards of workers that are absent for too long, until these are back.

        A sibling is offered the policy in force once more, with the sockets of those shards beside its own.
        """
        if not self._served or self._leaving or self.change is not None:
            return
        now = time.monotonic()
        covered = {shard: one for one in self.workers for shard in one.covers}
        for worker in self.workers:
            if worker.absent_since is None:
                if worker.index in covered:
                    covered[worker.index].relieve(worker.index)
                    self._log.info(f"worker {worker.index} serves its sources again")
            elif worker.index not in covered and now - worker.absent_since >= ABSENT_PATIENCE_S:
                able = [one for one in self.those_serving() if one.full_until <= now]
                if able:
                    sibling = min(able, key=lambda one: (len(one.covers), one.index))
                    sibling.covers.add(worker.index)
                    self._log.warning(f"worker {sibling.index} serves the sources of worker {worker.index} meanwhile")
                    self._offer(sibling)

    def _cannot_cover(self, worker: Worker, error: str) -> None:
        """Let a worker that has no room for more sockets serve its own, as before."""
        self._log.warning(f"worker {worker.index} cannot serve the sources of others: {printable(error)}")
        worker.abort(worker.offered)
        for shard in sorted(worker.covers):
            worker.relieve(shard)
        worker.state = State.SERVING
        worker.full_until = time.monotonic() + FULL_FOR_S

    def _offer(self, worker: Worker) -> None:
        if self.policy is not None and not self._leaving:
            worker.state = State.PREPARING
            worker.offer(self.policy)

    def _arrived(self) -> None:
        self.tell_state()
        if not self._served and len(self.those_serving()) == len(self.workers):
            self._served = True
            self.serving()

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
            if not self._leaving:
                self._log.warning(f"the observer {children.how_it_ended(status)}; starting another{_in(delay_s)}")
                self._loop.later(delay_s, self._start_observer)
        if self._leaving:
            self._see_off()

    def _worker_ended(self, worker: Worker, status: int) -> None:
        pid = worker.child.pid if worker.child is not None else 0
        delay_s = worker.ended()
        self._questions.lost(worker)
        ended = children.how_it_ended(status)
        if self._leaving:
            if status != 0:
                self._log.warning(f"worker {worker.index} (pid {pid}) {ended} instead of draining")
            return
        if not self._served and not self.leaving.workers and worker.backoff.failures >= STARTS_BEFORE_GIVING_UP:
            self.gave_up(f"worker {worker.index} cannot start: it {ended}")
            return
        worker.restarts += 1
        self._loop.later(ABSENT_PATIENCE_S, self._share_shards)
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
                self._check(worker, now)
            if self.policy is not None:
                self.leaving.check(now, self.policy.bindings, self._stuck_after_s)
            self._share_shards()
        self._check_observer(now, paused=paused)
        self._ticks += 1
        if self._ticks % STATE_EVERY_TICKS == 0:
            self.tell_state()
        self._loop.later(TICK_S, self._tick)

    def _check(self, worker: Worker, now: float) -> None:
        if worker.child is None:
            return
        patience_s = self._stuck_after_s
        if worker.state is not State.SERVING:
            patience_s = max(patience_s, START_PATIENCE_S)
        silent_s = worker.silent_for_s(now)
        if silent_s > patience_s:
            self._log.error(f"worker {worker.index} (pid {worker.child.pid}) is stuck for {silent_s:.0f} s; killing it")
            worker.child.kill()

    def _check_observer(self, now: float, *, paused: bool) -> None:
        child = self.observer.child if self.observer is not None else None
        if child is None or paused or child.unread_bytes() == 0:
            self._observer_reads = now
        elif now - self._observer_reads > OBSERVER_PATIENCE * self._stuck_after_s:
            self._log.error(f"the observer (pid {child.pid}) does not read what it is sent; killing it")
            child.kill()
            self._observer_reads = now

    # -- leaving

    def restless(self) -> str | None:
        """Return what must come to an end before another program may take our place, ``None`` when nothing must."""
        if self.change is not None:
            return "a reload is under way"
        for worker in (*self.workers, *self.leaving.workers):
            if worker.child is not None and worker.child.has_unsent():
                return f"worker {worker.index} does not take its orders"
        return None

    def settle(self) -> None:
        """End those that do not serve yet: the next program in our place could do nothing with them."""
        for worker in self.workers:
            if worker.child is not None and worker.left_behind() is None:
                worker.child.kill()
                worker.child.wait(OBSERVER_LEAVES_S)

    def drain(self, deadline_s: float) -> None:
        """Let sessions end, for at most ``deadline_s``; then ``gone``."""
        self._leaving = True
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
        self._leaving = True
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
