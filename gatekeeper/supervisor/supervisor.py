"""The supervisor: opens what strangers connect to, starts whoever serves them, and carries out what signals ask for.

    compile ──► open sockets ──► start the crew ──► serving ──SIGTERM, SIGINT──► draining ──► gone
                                                    │     ▲
                                                    └─────┘ SIGHUP: compile, check, open, change over in all workers

Single-threaded, and it never waits: everything is a callback of the loop.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gatekeeper.errors import GatekeeperError, KernelError, ListenError, SnapshotError
from gatekeeper.kernel import inherit, privileges, steering
from gatekeeper.kernel.notify import Notifier
from gatekeeper.snapshot.bindings import Bindings, SlotsExhausted
from gatekeeper.supervisor import listening, places
from gatekeeper.supervisor.accepted import Accepted, accept, endpoint, endpoints
from gatekeeper.supervisor.change import Change
from gatekeeper.supervisor.compiling import Compilation, Compiled
from gatekeeper.supervisor.crew import Commands, Crew
from gatekeeper.supervisor.enforcing import Enforcer, how_guarded, leftover
from gatekeeper.supervisor.loop import Loop
from gatekeeper.supervisor.standing import Standing

if TYPE_CHECKING:
    from collections.abc import Callable

    from gatekeeper.kernel.judge import Judge
    from gatekeeper.supervisor.listening import Opened
    from gatekeeper.supervisor.log import Log

FINE, REFUSED, CANNOT = 0, 1, 3  # exit codes
MOST_WORKERS = 128  # their descriptors travel in one message
STUCK_AFTER_S = 10.0
NEEDS_RESTART = ("workers", "metrics", "audit", "control", "state", "kernel")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line decides. ``workers`` ``None``: as the file says."""

    path: str
    workers: int | None = None
    drain_timeout_s: float = 300.0
    stuck_after_s: float = STUCK_AFTER_S
    commands: Commands = field(default_factory=Commands)


class Supervisor:
    """One run of the service."""

    def __init__(self, options: Options, log: Log) -> None:
        self._options = options
        self._log = log
        self._loop = Loop(self._signalled)
        self._notifier = Notifier(os.environ)
        self._inherited = inherit.take(os.environ)
        self._bindings = Bindings()
        self._generation = 0
        self._settings: dict[str, Any] = {}
        self._opener: listening.Opener | None = None
        self._crew: Crew | None = None
        self._cutting = False  # the stop waits for no session any more
        self._policy: Accepted | None = None  # whose sockets are open
        self._compilation: Compilation | None = None
        self._enforcer: Enforcer | None = None
        self._lock: int | None = None
        self._standing = Standing()
        self._reload_wanted = False
        self._closing: list[Opened] = []  # removed by the change under way

    def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        _raise_descriptor_limit()
        privileges.harden()
        with self._loop:
            try:
                if self._notifier.watchdog_interval_s is not None:
                    self._pet_watchdog()
                self._compile(self._first_policy)
                return self._loop.run()
            finally:
                self._close()

    # -- start

    def _compile(self, done: Callable[[Compiled], None]) -> None:
        try:
            self._compilation = Compilation(self._loop, self._options.commands.compiler, self._options.path, done)
        except OSError as err:
            done(Compiled(None, failure=f"the compiler cannot be started: {err}"))

    def _first_policy(self, compiled: Compiled) -> None:
        self._compilation = None
        why = self._tell_problems(compiled)
        if compiled.snapshot_fd is None:
            self._log.error(why)
            self._loop.stop(CANNOT if compiled.failure is not None else REFUSED)
            return
        try:
            self._policy = self._accept(compiled.snapshot_fd)
            self._start(self._policy)
        except (GatekeeperError, SlotsExhausted, OSError) as err:
            self._cannot_start(str(err))

    def _start(self, policy: Accepted) -> None:
        self._settings = settings = policy.meta["settings"]
        if settings["state"] is not None:
            self._lock = places.lock_state(settings["state"])
        size = self._options.workers or settings["workers"] or len(os.sched_getaffinity(0))
        if size > MOST_WORKERS:
            self._log.warning(f"{size} workers are more than {MOST_WORKERS}; starting {MOST_WORKERS}")
            size = MOST_WORKERS
        self._opener = listening.Opener(size, steering.new_key(), self._inherited)
        policy.opened = self._opener.open_all(endpoints(policy.meta), {})
        http = listening.open_http(endpoint(settings["metrics"]), self._inherited) if settings["metrics"] else None
        if self._inherited:
            # Whoever opened them goes on taking connections there, and nobody would serve them.
            names = ", ".join(unused.describe() for unused in self._inherited)
            raise ListenError(f"no listener in {self._options.path} wants the inherited {names}")
        self._enforcer = self._enforce(settings["kernel"], policy)
        identity = privileges.who_to_become()
        crew = Crew(
            self._loop, self._log, self._options.commands, identity, size, self._options.stuck_after_s,
            lambda: self._standing.state(self._crew) | {"kernel": self._enforcer is not None},
        )  # fmt: skip
        crew.serving, crew.gave_up, crew.gone = self._all_serve, self._cannot_start, self._all_gone
        self._crew = crew
        self._bindings = policy.bindings
        crew.start(policy, settings["audit"], http, self._enforcer)
        if identity is not None and identity.name != privileges.ACCOUNTS[0]:
            self._log.info(f"workers run as {identity.name}; an account called {privileges.ACCOUNTS[0]} would be better")

    def _enforce(self, mode: str, policy: Accepted) -> Enforcer | None:
        """Let the kernel refuse, if that is wanted; ``None``: workers do it.

        Raises:
            KernelError: it is required and cannot be had.
        """
        if mode == "off":
            self._warn_of_leftover()
            privileges.give_up(privileges.CAP_BPF)
            return None
        try:
            return Enforcer.begin(self._loop, policy, alone=mode == "require", warn=self._log.warning)
        except KernelError as err:
            if mode == "require":
                raise
            self._log.warning(f"{err}; workers refuse instead")
            self._warn_of_leftover()
            privileges.give_up(privileges.CAP_BPF)
            return None

    def _warn_of_leftover(self) -> None:
        path = leftover()
        if path is not None:
            self._log.warning(f"the policy of an earlier run is still in force in the kernel; to end it, remove {path}")

    def _all_serve(self) -> None:
        self._standing.serving = True
        self._log.info(self._summary())
        self._notifier.ready(self._summary())
        if self._crew is not None:
            self._crew.event("start", pid=os.getpid(), policy=self._digest())
            self._crew.tell_state()
        if self._reload_wanted:
            self._reload()

    def _cannot_start(self, why: str) -> None:
        self._log.error(why)
        self._loop.stop(CANNOT)

    def _accept(self, snapshot_fd: int) -> Accepted:
        self._generation += 1
        return accept(snapshot_fd, self._generation, self._bindings)

    def _tell_problems(self, compiled: Compiled) -> str:
        """Print what the compiler found; return in one line why the file was not accepted."""
        refused = compiled.snapshot_fd is None
        if compiled.text:
            self._log.plain(compiled.text, error=refused)
        if compiled.failure is not None:
            return compiled.failure
        what = "1 problem" if compiled.problems == 1 else f"{compiled.problems} problems"
        return f"{self._options.path} is not a policy that can be applied ({what})"

    # -- signals

    def _signalled(self, number: int) -> None:
        if number == signal.SIGCHLD:
            if self._compilation is not None:
                self._compilation.poll()
            if self._crew is not None:
                self._crew.reap()
        elif number == signal.SIGHUP:
            self._reload_wanted = True
            if self._standing.serving and not self._standing.stopping and self._compilation is None and not self._changing():
                self._reload()
        elif self._standing.stopping or not self._standing.serving:
            self._stop_now()
        else:
            self._stop()

    # -- reload

    def _changing(self) -> bool:
        return self._crew is not None and self._crew.change is not None

    def _reload(self) -> None:
        self._reload_wanted = False
        self._notifier.reloading()
        if self._crew is not None and self._crew.observer is not None:
            try:
                self._crew.observer.reopen_audit()
            except places.PlaceError as err:
                self._log.error(f"{err}; going on with the old one")
        self._compile(self._next_policy)

    def _next_policy(self, compiled: Compiled) -> None:
        self._compilation = None
        crew, opener = self._crew, self._opener
        if crew is None or opener is None or crew.policy is None:
            return
        why = self._tell_problems(compiled)
        if compiled.snapshot_fd is None:
            self._reloaded_or_not(why, compiled.first)
            return
        try:
            new = self._accept(compiled.snapshot_fd)
        except (SnapshotError, SlotsExhausted, OSError) as err:
            self._reloaded_or_not(f"the compiled policy cannot be used: {err}")
            return
        judge = None
        try:
            judge = self._judge(new)
            fresh = opener.open_all(endpoints(new.meta), crew.policy.opened)
        except (KernelError, ListenError) as err:
            if judge is not None and self._enforcer is not None:
                self._enforcer.discard(judge)
            new.close()
            self._reloaded_or_not(str(err))
            return
        self._change_over(crew, opener, new, fresh, judge)

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
        self, crew: Crew, opener: listening.Opener, new: Accepted, fresh: dict[str, Opened], judge: Judge | None
    ) -> None:
        """Put a policy in force whose new endpoints are ``fresh``; when that fails they are closed again.

        ``judge`` is the same policy in the kernel, which follows when all workers have it.
        """
        assert crew.policy is not None
        old = crew.policy
        wanted = {item.key for item in endpoints(new.meta)}
        new.opened = {key: opened for key, opened in (old.opened | fresh).items() if key in wanted}
        self._closing = [opened for key, opened in old.opened.items() if key not in wanted]

        def committing() -> None:
            self._policy = crew.policy = new
            self._bindings = new.bindings
            if crew.observer is not None:
                # Before any worker can speak of what is new in it. What was in the old one keeps its number.
                crew.observer.policy(new)

        def done(failure: str | None) -> None:
            crew.change = None
            (old if failure is None else new).close()
            for opened in self._closing if failure is None else fresh.values():
                opener.close(opened)
            self._closing = []
            if failure is None:
                crew.bring_up_to_date()
            try:
                if judge is not None and self._enforcer is not None:
                    self._enforcer.swap(judge, new) if failure is None else self._enforcer.discard(judge)
            except KernelError as err:
                failure = f"workers have the new policy, the kernel still has the one before: {err}"
            self._reloaded_or_not(failure)

        crew.change = Change(self._loop, new, crew.those_serving(), committing, done)
        crew.change.begin()

    def _reloaded_or_not(self, failure: str | None, detail: str = "") -> None:
        """Tell everybody how a reload ended, and begin the next if one was asked for meanwhile.

        ``detail`` is for those who do not see stderr, where it was printed already.
        """
        crew = self._crew
        if crew is None or crew.policy is None:
            return
        self._standing.note_reload(failure, detail)
        if failure is None:
            self._log.info(f"reloaded: {self._summary()}")
            self._warn_of_settings(crew.policy.meta["settings"])
        else:
            self._log.error(f"{failure}\nreload failed: the policy {crew.policy.name} stays in force")
        crew.event("reload", success=failure is None, error=self._standing.reload_error, policy=self._digest())
        crew.tell_state()
        if not self._standing.stopping:
            self._notifier.ready(self._summary())
            if self._reload_wanted:
                self._reload()

    def _warn_of_settings(self, settings: dict[str, Any]) -> None:
        for name in NEEDS_RESTART:
            if settings.get(name) != self._settings.get(name):
                self._log.warning(f"`{name}` has changed in the file; that takes a restart")

    # -- stop

    def _stop(self) -> None:
        self._standing.stopping = True
        crew = self._crew
        if crew is None or crew.policy is None:
            self._stop_now()
            return
        if self._compilation is not None:
            self._compilation.cancel()
        if crew.change is not None and not crew.change.committed:
            crew.change.abort("the service stops")
        deadline_s = self._options.drain_timeout_s
        self._log.info(f"stopping: sessions have {deadline_s:g} s to end; another signal ends them now")
        self._notifier.stopping("draining")
        crew.event("stop", pid=os.getpid(), policy=self._digest())
        crew.tell_state()
        crew.drain(deadline_s)
        # Workers serve what waits in their queues already. Ours must go, or newcomers would wait for nobody.
        self._close_listeners()
        if self._enforcer is not None and not self._enforcer.guards():
            self._enforcer.detach()

    def _stop_now(self) -> None:
        if self._crew is None or not self._standing.serving:
            self._log.info("stopping")
            self._loop.stop(FINE)
            return
        if self._cutting:
            self._crew.kill()
            return
        self._cutting = True
        self._log.info("stopping now")
        self._crew.drain(0.0)  # not killed: what they end themselves is counted and in the audit log

    def _all_gone(self) -> None:
        cut = self._crew.cut if self._crew is not None else 0
        sessions = "1 session" if cut == 1 else f"{cut} sessions"
        self._log.info("stopped" if not cut else f"stopped; {sessions} had not ended by themselves")
        self._loop.stop(FINE)

    def _close_listeners(self) -> None:
        if self._policy is not None:
            for opened in [*self._policy.opened.values(), *self._closing]:
                opened.close()

    def _close(self) -> None:
        """Leave nothing behind, however far we came."""
        if self._compilation is not None:
            self._compilation.cancel()
        if self._crew is not None:
            self._crew.close()
        self._close_listeners()
        if self._enforcer is not None:
            self._enforcer.close()
        if self._lock is not None:
            os.close(self._lock)
        self._notifier.close()

    # -- saying how it is

    def _digest(self) -> str | None:
        policy = self._crew.policy if self._crew is not None else None
        return policy.meta["digest"] if policy is not None else None

    def _summary(self) -> str:
        return self._standing.summary(self._crew)

    def _pet_watchdog(self) -> None:
        self._notifier.watchdog()
        self._loop.later(self._notifier.watchdog_interval_s or 1.0, self._pet_watchdog)


def _raise_descriptor_limit() -> None:
    """Allow as many open files as we may: every endpoint takes one descriptor for each worker."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
