"""Putting a compiled policy in force everywhere: sockets, workers, kernel. In all of them, or in none.

    accept ──► load the kernel's program ──► open sockets ──► change over in all workers ──► swap the kernel's program
       │              │                          │                      │
       └──────────────┴───── a step fails: what the steps before it made is taken back, nothing has changed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gatekeeper.errors import KernelError, ListenError, SnapshotError
from gatekeeper.snapshot.bindings import SlotsExhausted
from gatekeeper.supervisor.accepted import Accepted, accept, endpoints
from gatekeeper.supervisor.change import Change
from gatekeeper.supervisor.enforcing import how_guarded

if TYPE_CHECKING:
    from collections.abc import Callable

    from gatekeeper.kernel.judge import Judge
    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.enforcing import Enforcer
    from gatekeeper.supervisor.listening import Opened, Opener
    from gatekeeper.supervisor.loop import Loop


class Installer:
    """Knows whose sockets are open (``policy``) and changes them. ``crew.policy`` is the policy that workers enforce."""

    def __init__(self, loop: Loop, policy: Accepted, opener: Opener, crew: Crew, enforcer: Enforcer | None) -> None:
        self.policy = policy
        self._generation = policy.generation
        self._loop = loop
        self._opener = opener
        self._crew = crew
        self._enforcer = enforcer
        self._closing: list[Opened] = []  # removed by the change under way

    @property
    def changing(self) -> bool:
        """Whether a policy is on its way to the workers."""
        return self._crew.change is not None

    def install(self, snapshot_fd: int, done: Callable[[str | None], None]) -> None:
        """Put a snapshot in force; ``done`` is called with the reason why not, or ``None``. Takes over ``snapshot_fd``."""
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
            if judge is not None and self._enforcer is not None:
                self._enforcer.discard(judge)
            new.close()
            done(str(err))
            return
        self._change_over(new, fresh, judge, done)

    def abort(self, why: str) -> None:
        """Take back what is under way, if that can still be done."""
        change = self._crew.change
        if change is not None and not change.committed:
            change.abort(why)

    def close(self) -> None:
        """Close all listening sockets of ours."""
        for opened in [*self.policy.opened.values(), *self._closing]:
            opened.close()

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

    def _change_over(
        self, new: Accepted, fresh: dict[str, Opened], judge: Judge | None, done: Callable[[str | None], None]
    ) -> None:
        """Put a policy in force whose new endpoints are ``fresh``; when that fails they are closed again.

        ``judge`` is the same policy in the kernel, which follows when all workers have it.
        """
        crew, old = self._crew, self.policy
        wanted = {item.key for item in endpoints(new.meta)}
        new.opened = {key: opened for key, opened in (old.opened | fresh).items() if key in wanted}
        self._closing = [opened for key, opened in old.opened.items() if key not in wanted]

        def committing() -> None:
            self.policy = crew.policy = new
            if crew.observer is not None:
                # Before any worker can speak of what is new in it. What was in the old one keeps its number.
                crew.observer.policy(new)

        def changed(failure: str | None) -> None:
            crew.change = None
            (old if failure is None else new).close()
            for opened in self._closing if failure is None else fresh.values():
                self._opener.close(opened)
            self._closing = []
            if failure is None:
                crew.bring_up_to_date()
            try:
                if judge is not None and self._enforcer is not None:
                    self._enforcer.swap(judge, new) if failure is None else self._enforcer.discard(judge)
            except KernelError as err:
                failure = f"workers have the new policy, the kernel still has the one before: {err}"
            done(failure)

        crew.change = Change(self._loop, new, crew.those_serving(), committing, changed)
        crew.change.begin()
