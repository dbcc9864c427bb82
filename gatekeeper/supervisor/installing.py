"""Putting a compiled policy in force everywhere: sockets, workers, kernel. In all of them, or in none.

    accept ──► load the kernel's program ──► open sockets ──► change over in all workers ──► swap the kernel's program
       │              │                          │                      │                          │
       └──────────────┴──── a step fails: what the steps before it did is taken back, nothing has changed

A policy can be put in force on trial: the one before it stays ready, with its program, until the trial has ended.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatekeeper.errors import KernelError, ListenError, SnapshotError
from gatekeeper.snapshot.bindings import SlotsExhausted
from gatekeeper.supervisor.accepted import Accepted, accept, endpoints, how_guarded
from gatekeeper.supervisor.change import PATIENCE_S, Change

if TYPE_CHECKING:
    from collections.abc import Callable

    from gatekeeper.kernel.judge import Judge
    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.enforcing import Enforcer
    from gatekeeper.supervisor.listening import Opened, Opener
    from gatekeeper.supervisor.loop import Loop
    from gatekeeper.supervisor.worker import Worker

REJUDGE_PATIENCE_S = 30.0
BEHIND_S = 0.05  # until workers that came up during the change are looked at again
MOST_COUNTED = 1 << 32  # sessions; workers say so themselves


@dataclass(frozen=True, slots=True)
class Judged:
    """How live sessions fared: how many were judged again and ended; ``missing``: workers that did not answer in time.

    Those are ended, and all their sessions with them: some of these may be sessions that the policy refuses.
    """

    judged: int = 0
    ended: int = 0
    missing: tuple[int, ...] = ()


class Installer:
    """Knows whose sockets are open (``policy``) and changes them. ``crew.policy`` is the policy that workers enforce."""

    def __init__(self, loop: Loop, policy: Accepted, opener: Opener, crew: Crew, enforcer: Enforcer | None) -> None:
        self.policy = policy
        self._generation = policy.generation
        self._loop = loop
        self._opener = opener
        self._crew = crew
        self._enforcer = enforcer
        self._spare: tuple[Accepted, Judge | None] | None = None  # what a trial goes back to
        self.follow: Callable[[Accepted], None] = lambda _policy: None  # called with each policy that comes in force
        self._involved: list[Accepted] = []  # in the change under way

    @property
    def changing(self) -> bool:
        """Whether a policy is on its way to the workers."""
        return self._crew.change is not None

    @property
    def spare(self) -> Accepted | None:
        """The policy that a trial goes back to, ``None`` when there is no trial."""
        return self._spare[0] if self._spare is not None else None

    def install(self, snapshot_fd: int, done: Callable[[str | None], None], *, on_trial: bool = False) -> None:
        """Put a snapshot in force; ``done`` is called with the reason why not, or ``None``. Takes over ``snapshot_fd``.

        ``on_trial``: what is in force now can be put back, by `put_back`, until `settle`.
        """
        self._generation += 1
        try:
            new = accept(snapshot_fd, self._generation, self.policy.bindings)
        except (SnapshotError, SlotsExhausted, OSError) as err:
            done(f"the compiled policy cannot be used: {err}")
            return
        judge = None
        try:
            judge = self._judge(new)
            fresh = self._opener.open_all(endpoints(new.meta), self.policy.opened)
        except (KernelError, ListenError) as err:
            self._give_up(new, judge)
            done(str(err))
            return
        old = self.policy
        new.opened = _wanted(new, old.opened | fresh)

        def changed(failure: str | None) -> None:
            if failure is not None:
                self._leave(new, old)
                self._give_up(new, judge)
                done(failure)
                return
            try:
                before = self._swap(judge, new, keep=on_trial)
            except KernelError as err:
                why = str(err)
                if judge is not None and self._enforcer is not None:
                    self._enforcer.discard(judge)
                self._return_to(old, lambda failed: done(why if failed is None else _half(why, failed)))
                return
            self._leave(old, new)
            if on_trial:
                self._spare = old, before
            else:
                old.close()
            done(None)

        self._change(new, changed)

    def put_back(self, done: Callable[[str | None], None]) -> None:
        """End a trial: put the policy before it back in force, and open again what the trial had closed.

        ``done`` is called with ``None``, or with what is not as it was: an address that somebody else has by now is
        left out, rather than leaving everything as it is.
        """
        assert self._spare is not None
        (old, _judge), trial = self._spare, self.policy
        try:
            again = self._again(old)
        except OSError as err:
            done(f"{err.strerror}")
            return
        again.opened, failures = self._open_again(again)

        def changed(failure: str | None) -> None:
            if failure is not None:
                self._leave(again, trial)
                again.close()
                done(failure)
                return
            try:
                # Asked only now: a service that stops has put the kernel's part back itself.
                self._swap(self._spare[1] if self._spare is not None else None, again)
            except KernelError as err:
                failures.append(f"workers have it, the kernel still has the policy on trial: {err}")
            self._leave(trial, again)
            self._spare = None
            old.close()
            trial.close()
            done("\n".join(failures) or None)

        self._change(again, changed)

    def put_back_kernel(self) -> None:
        """End a trial where it would outlive us: in the kernel. For a service that stops.

        Raises:
            KernelError: the policy on trial stays in force there.
        """
        if self._spare is not None:
            old, judge = self._spare
            self._spare = old, None
            self._swap(judge, old)

    def settle(self) -> None:
        """End a trial: the policy in force stays, the one before it is given up."""
        if self._spare is not None:
            old, judge = self._spare
            self._spare = None
            if judge is not None and self._enforcer is not None:
                self._enforcer.let_go(judge)
            old.close()

    def judge_again(self, done: Callable[[Judged], None], patience_s: float = PATIENCE_S) -> None:
        """Let all live sessions be judged by the policy in force, and end those that it refuses."""
        generation = self.policy.generation
        behind = {worker.index for worker in self._crew.workers if worker.generation not in {0, generation}}
        if behind and patience_s > 0:
            # They came up during the change, with the policy before, and are on their way to this one.
            self._loop.later(BEHIND_S, lambda: self.judge_again(done, patience_s - BEHIND_S))
            return
        asked = {worker.index: worker.child for worker in self._everybody()}

        def answered(answers: dict[int, dict[str, Any]], missing: list[int]) -> None:
            judged, ended = (sum(_count(answer.get(key)) for answer in answers.values()) for key in ("judged", "ended"))
            # The sessions of a worker that has ended have ended, too.
            now = {worker.index: worker.child for worker in self._everybody()}
            silent = {index for index in missing if index in now and now[index] is asked.get(index)}
            late = tuple(sorted(behind | silent))
            for child in map(now.get, late):
                if child is not None:
                    child.kill()

            def over(guarded: int, cut: int) -> None:
                done(Judged(judged + guarded, ended + cut, late))

            if self._enforcer is not None and self._enforcer.guards():
                self._enforcer.rejudge(over)
            else:
                over(0, 0)

        order = {"op": "rejudge", "generation": generation}
        self._crew.ask(order, rows=lambda _worker, _rows: None, done=answered, patience_s=REJUDGE_PATIENCE_S)

    def abort(self, why: str) -> None:
        """Take back what is under way, if that can still be done."""
        change = self._crew.change
        if change is not None and not change.committed:
            change.abort(why)

    def close(self, *, keep_files: bool = False) -> None:
        """Close all listening sockets of ours. ``keep_files``: somebody else holds them, and clients are to find him."""
        for policy in (self.policy, *self._involved):
            for opened in policy.opened.values():
                opened.close(keep_file=keep_files)

    # -- the steps

    def _judge(self, new: Accepted) -> Judge | None:
        """Return the next policy as the kernel will enforce it, ``None`` when it does not.

        Raises:
            KernelError: the kernel must, and cannot.
        """
        if self._enforcer is not None:
            return self._enforcer.load(new)
        if how_guarded(new):
            raise KernelError("a listener is guarded now, and the kernel does not refuse for us yet: that takes a restart")
        return None

    def _swap(self, judge: Judge | None, policy: Accepted, *, keep: bool = False) -> Judge | None:
        """Let the kernel follow the workers; return the program before.

        Raises:
            KernelError: it still has the one before.
        """
        return self._enforcer.swap(judge, policy, keep=keep) if judge is not None and self._enforcer is not None else None

    def _change(self, new: Accepted, done: Callable[[str | None], None]) -> None:
        """Put a policy in force in all workers, or in none. Its sockets are open; closing others is up to ``done``."""
        crew = self._crew
        self._involved = [self.policy, new]

        def committing() -> None:
            self.policy = crew.policy = new
            if crew.observer is not None:
                # Before any worker can speak of what is new in it. What was in the old one keeps its number.
                crew.observer.policy(new)
            crew.leaving.enforce(new)
            self.follow(new)

        def changed(failure: str | None) -> None:
            crew.change = None
            self._involved = []
            if failure is None:
                crew.bring_up_to_date()
            done(failure)

        crew.change = Change(self._loop, new, crew.those_serving(), committing, changed)
        crew.change.begin()

    def _return_to(self, old: Accepted, done: Callable[[str | None], None]) -> None:
        """Put the policy back that was in force a moment ago, and whose sockets are still open."""
        new = self.policy
        try:
            again = self._again(old)
        except OSError as err:
            self._leave(old, new)
            old.close()
            done(f"{err.strerror}")
            return

        def changed(failure: str | None) -> None:
            left, kept = (new, again) if failure is None else (again, new)
            self._leave(left, kept)
            left.close()
            old.close()
            done(failure)

        self._change(again, changed)

    def _again(self, old: Accepted) -> Accepted:
        """Return an earlier policy as a new generation. Names that came after it keep their counters.

        Raises:
            OSError: no descriptors.
        """
        self._generation += 1
        bindings = self.policy.bindings.bind(self._generation, old.meta)
        fd = os.dup(old.snapshot_fd)
        return Accepted(self._generation, old.meta, bindings, bindings.to_json(), fd, _wanted(old, old.opened))

    def _open_again(self, policy: Accepted) -> tuple[dict[str, Opened], list[str]]:
        """Return the sockets of an earlier policy, those that were closed opened anew, and why some could not be."""
        have = _wanted(policy, self.policy.opened)
        missing = [item for item in endpoints(policy.meta) if item.key not in have]
        try:
            return have | self._opener.open_all(missing, self.policy.opened), []
        except ListenError:
            failures = []
        for item in sorted(missing, key=lambda one: one.family != 6):
            try:
                have |= self._opener.open_all([item], self.policy.opened | have)
            except ListenError as err:
                failures.append(str(err))
        return have, failures

    def _everybody(self) -> list[Worker]:
        """Return the workers that have sessions, those included that only serve theirs to the end."""
        return [*self._crew.workers, *self._crew.leaving.workers]

    def _leave(self, left: Accepted, kept: Accepted) -> None:
        """Close the sockets of a policy that another has no use for."""
        for key, opened in left.opened.items():
            if kept.opened.get(key) is not opened:
                self._opener.close(opened)

    def _give_up(self, new: Accepted, judge: Judge | None) -> None:
        if judge is not None and self._enforcer is not None:
            self._enforcer.discard(judge)
        new.close()


def listening(policy: Accepted) -> set[tuple[str, str, str]]:
    """Return (listener, protocol, address) of all endpoints that a policy listens at, or guards."""
    listeners = policy.meta["listeners"]
    return {
        (listeners[item["listener"]]["name"], item["protocol"], item["address"]) for item in policy.meta["endpoints"]
    }


def _wanted(policy: Accepted, opened: dict[str, Opened]) -> dict[str, Opened]:
    wanted = {item.key for item in endpoints(policy.meta)}
    return {key: one for key, one in opened.items() if key in wanted}


def _half(why: str, failed: str) -> str:
    return f"workers have the new policy, the kernel still has the one before: {why}; going back failed too: {failed}"


def _count(value: object) -> int:
    """Return a number that a worker has said, within reason."""
    return min(max(value, 0), MOST_COUNTED) if isinstance(value, int) else 0
