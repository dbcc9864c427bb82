"""Reload: from the request to an outcome that everybody is told.

    asked ──► compile ──► install ──► live sessions judged again ──► last good policy saved ──► told ──► the next
                             │                      ▲
                             └─ on trial: told ── confirmed in time; otherwise the policy before it is put back

One at a time. What is asked for meanwhile comes afterwards, all of it in one reload.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from gatekeeper.errors import KernelError
from gatekeeper.supervisor import places
from gatekeeper.supervisor.accepted import digest_of
from gatekeeper.supervisor.asks import Ask, Outcome, Trial, clock, fates, named
from gatekeeper.supervisor.compiling import Known
from gatekeeper.supervisor.installing import listening

if TYPE_CHECKING:
    from collections.abc import Callable

    from gatekeeper.kernel.notify import Notifier
    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.compiling import Compiled, Compiler
    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.effect import Effect
    from gatekeeper.supervisor.installing import Installer
    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.loop import Loop, Timer
    from gatekeeper.supervisor.standing import Standing

NEEDS_RESTART = ("workers", "metrics", "audit", "control", "state", "kernel")
PUT_BACK_AGAIN_S = 5.0  # after the policy before a trial could not be put back


class Reloader:
    """Reloads the rule file of a service that serves: ``installer`` puts in force what was compiled, ``effect`` follows."""

    def __init__(
        self, loop: Loop, log: Log, compiler: Compiler, installer: Installer, effect: Effect, crew: Crew,
        standing: Standing, notifier: Notifier,
    ) -> None:  # fmt: skip
        self.trial: Trial | None = None
        self._loop = loop
        self._log = log
        self._compiler = compiler
        self._installer = installer
        self._effect = effect
        self._crew = crew
        self._standing = standing
        self._notifier = notifier
        self.settings: dict[str, Any] = installer.policy.meta["settings"]  # with which the service was started
        self._waiting: deque[Ask] = deque()
        self._asks: list[Ask] = []  # what the reload under way answers
        self._active = False
        self._held = False
        self._put_back_again: Timer | None = None
        self._rolled_back: str | None = None  # digest of the policy that nobody wanted to keep, until another is in force

    @property
    def wanted(self) -> bool:
        """Whether a reload is to begin as soon as it can."""
        return bool(self._waiting)

    def hold(self, *, on: bool) -> None:
        """Begin nothing while an upgrade is about to take place; a signal is remembered meanwhile, a command refused."""
        self._held = on
        if not on:
            self.go_on()

    @property
    def busy(self) -> bool:
        """Whether a reload, a confirmation or a rollback is under way."""
        return self._active

    def request(self, ask: Ask) -> None:
        """Reload, now or as soon as the service serves and nothing else is under way.

        While a policy is on trial nothing is reloaded: a command is refused, a signal remembered.
        """
        trial = self.trial
        if self._standing.stopping:
            ask.answer(Outcome("the service stops"))
            return
        if self._held and ask.cause == "command":
            ask.answer(Outcome("an upgrade is about to take place: try again in a moment"))
            return
        if trial is not None:
            why = f"the policy {trial.digest[:12]} waits to be confirmed until {clock(trial.until)}"
            if ask.cause == "command":
                ask.answer(Outcome(f"{why}: `gatekeeper confirm` or `gatekeeper rollback` comes first"))
                return
            self._log.warning(f"{why}; the file is read again after that")
        self._waiting.append(ask)
        self.go_on()

    def begin(self) -> None:
        """Take up work: the service serves now."""
        if not self._standing.last_good:
            self._effect.save()
        self.go_on()

    def go_on(self) -> None:
        """Begin what was asked for, if it can begin."""
        standing = self._standing
        if self._waiting and not self._held and self.trial is None and standing.serving and not standing.stopping and not self._active:
            self._begin()

    def stop(self) -> None:
        """Let go of what can still be let go of, a policy on trial included: the service stops."""
        self._compiler.cancel()
        self._installer.abort("the service stops")
        if self.trial is not None:
            self._end_trial()
            try:
                self._installer.put_back_kernel()
            except KernelError as err:
                self._log.error(f"the policy that nobody has confirmed stays in force in the kernel: {err}")
        for ask in [*self._asks, *self._waiting]:
            ask.answer(Outcome("the service stops"))
        self._waiting.clear()

    # -- the steps of a reload

    def _begin(self) -> None:
        self._asks = [self._waiting.popleft()]
        while self._asks[0].confirm_s is None and self._waiting and self._waiting[0].confirm_s is None:
            self._asks.append(self._waiting.popleft())
        self._active = True
        self._notifier.reloading()
        if self._crew.observer is not None:
            try:
                self._crew.observer.reopen_audit()
            except places.PlaceError as err:
                self._log.error(f"{err}; going on with the old one")
        self._say("compiling")
        self._compiler.start(self._compiled, Known(self._installer.policy.snapshot_fd), self._say)

    def _compiled(self, compiled: Compiled) -> None:
        digest = digest_of(compiled.snapshot_fd) if compiled.snapshot_fd is not None else None
        if compiled.snapshot_fd is not None and self._needless(digest):
            os.close(compiled.snapshot_fd)
            self._over()
            return
        why, confirm_s = self._compiler.tell_problems(compiled), self._asks[0].confirm_s
        if compiled.snapshot_fd is None:
            self._ended(Outcome(why, compiled.text, refused=compiled.failure is None), compiled.first)
        elif confirm_s is not None and digest is not None:
            snapshot_fd = compiled.snapshot_fd
            self._effect.note_trial(digest, lambda failure: self._install(snapshot_fd, failure))
        elif compiled.unchanged and self._standing.reload_error is None:
            os.close(compiled.snapshot_fd)
            self._take_effect(self._installer.policy, listening(self._installer.policy))
        else:
            self._install(compiled.snapshot_fd)

    def _needless(self, digest: str | None) -> bool:
        """Whether nothing has to happen, since nothing has changed and nobody insists.

        A signal does not insist on a policy that was rolled back: it may come from the rotation of logs at night.
        """
        causes = {ask.cause for ask in self._asks}
        if "command" in causes:
            return False
        if digest is not None and digest == self._rolled_back:
            self._log.warning("the file still holds the policy that was rolled back; only `gatekeeper reload` applies it again")
            return True
        unchanged = digest == self._installer.policy.meta["digest"] and self._standing.reload_error is None
        return causes == {"watch"} and unchanged

    def _install(self, snapshot_fd: int, not_noted: str | None = None) -> None:
        """Put a snapshot in force; ``not_noted``: why the disk does not know that it is on trial."""
        if self._standing.stopping:  # while the disk took its time: nothing may be opened any more
            os.close(snapshot_fd)
            self._over(Outcome("the service stops"))
            return
        before, confirm_s = self._installer.policy, self._asks[0].confirm_s
        endpoints = listening(before)
        self._say("changing over")

        def installed(failure: str | None) -> None:
            if failure is not None:
                self._ended(Outcome(failure))
                return
            if confirm_s is None:
                self._take_effect(before, endpoints)
            else:
                self._start_trial(confirm_s, before)
                self._ended(Outcome(result=self._result(before, endpoints) | {"save_error": not_noted}))

        self._installer.install(snapshot_fd, installed, on_trial=confirm_s is not None)

    def _take_effect(self, before: Accepted, endpoints: set[tuple[str, str, str]]) -> None:
        """Let the policy in force reach live sessions and the disk. ``before`` was in force before the reload, at ``endpoints``."""
        result = self._result(before, endpoints)
        self._say("judging live sessions")
        self._effect.take(lambda more: self._ended(Outcome(result=result | more)))

    def _result(self, before: Accepted, endpoints: set[tuple[str, str, str]]) -> dict[str, Any]:
        """Return what the control socket answers."""
        policy = self._installer.policy
        return {
            "changed": policy.meta["digest"] != before.meta["digest"],
            "policy": policy.meta["digest"], "before": before.meta["digest"], "judged": 0, "ended": 0,
            "listeners_opened": named(listening(policy) - endpoints),
            "listeners_closed": named(endpoints - listening(policy)),
            "confirm_within_s": self._asks[0].confirm_s,
        }  # fmt: skip

    def _ended(self, outcome: Outcome, detail: str = "") -> None:
        """Tell everybody how a reload ended, and begin the next if one was asked for meanwhile.

        ``detail`` is for those who do not see stderr, where it was printed already.
        """
        policy, failure = self._installer.policy, outcome.failure
        self._standing.note_reload(failure, detail)
        if failure is None:
            self._rolled_back = None
            self._log.info(f"reloaded: {self._standing.summary(self._crew)}{fates(outcome.result)}")
            self._warn_of_settings(policy.meta["settings"])
            if self.trial is not None:
                self._log.warning(f"goes back to {self.trial.before[:12]} at {clock(self.trial.until)}, unless confirmed")
        else:
            self._log.error(f"{failure}\nreload failed: the policy {policy.name} stays in force")
        ask = self._asks[0]
        result = {key: outcome.result.get(key) for key in ("before", "judged", "ended", "confirm_within_s")}
        self._crew.event(
            "reload", success=failure is None, error=self._standing.reload_error, policy=policy.meta["digest"],
            **result, cause=ask.cause, by=ask.by,
        )  # fmt: skip
        self._over(outcome)

    def _over(self, outcome: Outcome | None = None) -> None:
        """Answer everybody who waits for what was under way, and go on."""
        asks, self._asks, self._active = self._asks, [], False
        self._crew.tell_state()
        for ask in asks:
            ask.answer(outcome or Outcome())
        if not self._standing.stopping:
            self._notifier.ready(self._standing.summary(self._crew))
            self.go_on()

    # -- trials

    def _start_trial(self, confirm_s: float, before: Accepted) -> None:
        digest = self._installer.policy.meta["digest"]
        timer = self._loop.later(confirm_s, lambda: self.roll_back("deadline"))
        self.trial = Trial(digest, before.meta["digest"], time.time() + confirm_s, timer)
        self._standing.unconfirmed = {"policy": digest, "before": before.meta["digest"], "until": self.trial.until}

    def _end_trial(self) -> None:
        for timer in (self.trial.timer if self.trial is not None else None, self._put_back_again):
            if timer is not None:
                timer.cancel()
        self.trial = self._put_back_again = self._standing.unconfirmed = None

    def confirm(self, by: int | None, answer: Callable[[Outcome], None]) -> None:
        """Keep the policy on trial: now live sessions are judged by it, and it becomes the last good one."""
        trial = self.trial
        if trial is None or self._active:
            answer(Outcome("no policy waits to be confirmed" if trial is None else "another change is under way"))
            return
        self._active = True
        self._end_trial()
        self._installer.settle()

        def done(result: dict[str, Any]) -> None:
            policy = self._installer.policy
            self._log.info(f"confirmed: the policy {policy.name}{fates(result)}")
            self._crew.event(
                "confirm", policy=policy.meta["digest"], before=trial.before,
                judged=result["judged"], ended=result["ended"], by=by,
            )  # fmt: skip
            answer(Outcome(result={"policy": policy.meta["digest"], "before": trial.before} | result))
            self._over()

        self._effect.take(done)

    def roll_back(self, cause: str, by: int | None = None, answer: Callable[[Outcome], None] = lambda _outcome: None) -> None:
        """Put the policy back that was in force before the one on trial; ``cause`` is deadline or command."""
        trial = self.trial
        if trial is None or self._active:
            answer(Outcome("no policy waits to be confirmed" if trial is None else "another change is under way"))
            return
        self._active = True
        trial.timer.cancel()

        def done(failure: str | None) -> None:
            name = self._installer.policy.name
            if self._installer.spare is not None:
                self._log.error(f"{failure}\nthe policy {name} on trial could not be rolled back; trying again")
                self._put_back_again = self._loop.later(PUT_BACK_AGAIN_S, lambda: self.roll_back(cause, by))
                answer(Outcome(failure))
                self._over()
                return
            self._end_trial()
            why = "was not confirmed in time" if cause == "deadline" else "was rolled back"
            error = f"the policy {trial.digest[:12]} {why}; {name} is in force again"
            self._standing.note_reload(error, failure or "")
            self._log.warning(error)
            if failure is not None:
                self._log.error(failure)
            self._crew.event(
                "rollback", policy=trial.before, before=trial.digest, cause=cause, by=by, error=failure
            )
            self._rolled_back = trial.digest
            answer(Outcome(failure, result={"policy": trial.before, "before": trial.digest}))
            self._over()

        self._installer.put_back(done)

    # -- saying how it is

    def _say(self, text: str) -> None:
        for ask in self._asks if text else ():
            ask.progress(text)

    def _warn_of_settings(self, settings: dict[str, Any]) -> None:
        for name in NEEDS_RESTART:
            if settings.get(name) != self.settings.get(name):
                self._log.warning(f"`{name}` has changed in the file; that takes a restart")
