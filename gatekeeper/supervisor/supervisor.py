"""The supervisor: opens what strangers connect to, starts whoever serves them, and carries out what signals ask for.

    compile ──► open sockets ──► start the crew ──► serving ──SIGTERM, SIGINT──► draining ──► gone
                                                    │     ▲
                                                    └─────┘ SIGHUP, a command, a changed file: reload

Single-threaded, and it never waits: everything is a callback of the loop.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gatekeeper.errors import GatekeeperError, ListenError
from gatekeeper.kernel import inherit, privileges, steering
from gatekeeper.kernel.notify import Notifier
from gatekeeper.snapshot.bindings import SlotsExhausted
from gatekeeper.supervisor import handover, listening, places, rehearsing, upgrading
from gatekeeper.supervisor.accepted import Accepted, endpoint, endpoints
from gatekeeper.supervisor.asks import Ask
from gatekeeper.supervisor.banfile import take_up
from gatekeeper.supervisor.bans import Bans
from gatekeeper.supervisor.child import Commands
from gatekeeper.supervisor.commands import Operators
from gatekeeper.supervisor.compiling import Compiler, Known
from gatekeeper.supervisor.control import Control
from gatekeeper.supervisor.crew import Crew
from gatekeeper.supervisor.disk import Disk
from gatekeeper.supervisor.effect import Effect
from gatekeeper.supervisor.enforcing import Enforcer
from gatekeeper.supervisor.handover import HandoverError
from gatekeeper.supervisor.installing import Installer
from gatekeeper.supervisor.keeping import Keeper
from gatekeeper.supervisor.loop import Loop
from gatekeeper.supervisor.reload_requests import ReloadRequests
from gatekeeper.supervisor.reloading import Reloader
from gatekeeper.supervisor.standing import Standing
from gatekeeper.supervisor.starting import NothingToStartWith, choose, enforce
from gatekeeper.supervisor.succession import Estate, Ground
from gatekeeper.supervisor.upgrading import Upgrader

if TYPE_CHECKING:
    from gatekeeper.supervisor.banlist import BanList
    from gatekeeper.supervisor.compiling import Compiled
    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.watching import Watcher

FINE, REFUSED, CANNOT = 0, 1, 3  # exit codes
MOST_WORKERS = 128  # their descriptors travel in one message
STUCK_AFTER_S = 10.0
KEPT_WHILE_DRAINING_S = 10.0  # by the service manager: newcomers wait for the next start


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line decides. ``workers``, ``control`` and ``state`` ``None``: as the file says."""

    path: str
    workers: int | None = None
    drain_timeout_s: float = 300.0
    control: str | None = None
    state: str | None = None
    watch: bool = False
    stuck_after_s: float = STUCK_AFTER_S
    commands: Commands = field(default_factory=Commands)
    program: list[str] = field(default_factory=upgrading.program_as_started)


class Supervisor:
    """One run of the service."""

    def __init__(self, options: Options, log: Log) -> None:
        self._options = options
        self._log = log
        self._loop = Loop(self._signalled)
        self._notifier = Notifier(os.environ)
        self._files: dict[str, int] = {}
        self._inherited = inherit.take(os.environ, self._files)
        self._keeper = Keeper(self._notifier, log, os.environ)
        self._standing = Standing()
        self._disk = Disk(self._loop)
        self._compiler = Compiler(self._loop, log, options.commands.compiler, options.path)
        self._policy: Accepted | None = None  # the first; later ones are the installer's
        self._lock: int | None = None
        self._control = Control(self._loop, log)
        self._enforcer: Enforcer | None = None
        self._crew: Crew | None = None
        self._bans: Bans | None = None
        self._installer: Installer | None = None
        self._reloader: Reloader | None = None
        self._upgrader: Upgrader | None = None
        self._watcher: Watcher | None = None
        self._early: Ask | None = None  # a reload that was asked for before there was anything to reload
        self._cutting = False  # the stop waits for no session any more

    def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        _raise_descriptor_limit()
        privileges.harden()
        try:
            left = handover.incoming(os.environ)
        except HandoverError as err:
            self._log.error(str(err))
            return CANNOT
        if left is not None and left.report is not None:
            return rehearsing.prove(left, self._options.commands, self._log)
        with self._loop:
            upgrading.let_signals_in()
            try:
                if self._notifier.watchdog_interval_s is not None:
                    self._pet_watchdog()
                if self._options.watch:
                    self._watch(upgraded=left is not None)
                if left is not None:
                    self._take_over(left.state)
                else:
                    states = self._options.state or "", os.environ.get("STATE_DIRECTORY", "")
                    self._compiler.start(self._compiled, Known(states=states), self._log.status)
                return self._loop.run()
            finally:
                self._close()

    # -- start

    def _watch(self, *, upgraded: bool) -> None:
        from gatekeeper.supervisor import watching  # noqa: PLC0415 - only who asks for it needs inotify

        try:
            self._watcher = watching.Watcher(self._loop, self._options.path, lambda: self._ask("watch"), self._log.warning)
        except watching.WatchError as err:
            if upgraded:
                self._log.error(f"{err}; files are not watched any more")
            else:
                self._cannot_start(str(err))
        else:
            self._compiler.follow = self._watcher.follow

    def _compiled(self, compiled: Compiled) -> None:
        why = self._compiler.tell_problems(compiled)
        try:
            first = choose(compiled, why, self._options.state, os.environ, self._log.warning)
            self._policy = first.policy
            if first.instead is not None:
                self._log.error(f"{first.instead}\nstarting with the last good policy {first.policy.name}")
                self._standing.start_with_last_good(first.instead)
            self._start(first.policy, first.directory)
        except NothingToStartWith as err:
            self._log.error(str(err))
            self._loop.stop(REFUSED if err.refused else CANNOT)
        except (GatekeeperError, SlotsExhausted, OSError) as err:
            self._cannot_start(str(err))

    def _start(self, policy: Accepted, directory: str | None) -> None:
        settings = policy.meta["settings"]
        if directory is not None:
            self._lock = places.lock_state(directory)
        size = self._options.workers or settings["workers"] or len(os.sched_getaffinity(0))
        if size > MOST_WORKERS:
            self._log.warning(f"{size} workers are more than {MOST_WORKERS}; starting {MOST_WORKERS}")
            size = MOST_WORKERS
        wanted = endpoints(policy.meta)
        kept = self._keeper.take_back(self._inherited, self._files, [item.key for item in wanted], size)
        opener = listening.Opener(size, kept.key or steering.new_key(), self._inherited, kept.opened)
        policy.opened = opener.open_all(wanted, {})
        http = listening.open_http(endpoint(settings["metrics"]), self._inherited) if settings["metrics"] else None
        if self._inherited:
            # Whoever opened them goes on taking connections there, and nobody would serve them.
            names = ", ".join(unused.describe() for unused in self._inherited)
            raise ListenError(f"no listener in {self._options.path} wants the inherited {names}")
        banned = take_up(self._log, directory)
        self._enforcer = enforce(settings["kernel"], policy, banned.sources(), self._loop, self._log.warning)
        self._serve(Ground(policy, opener, http, settings, directory), banned)

    def _take_over(self, state_fd: int) -> None:
        """Go on where another program in our place, of this version or another, has left off."""
        try:
            left = handover.read(state_fd)
            os.close(state_fd)
            ground = Ground.of(left)
            self._policy, self._lock = ground.policy, left.lock
            self._standing = Standing.after(left.past)
            if left.past.reload_wanted:
                self._early = Ask("signal")
            elif self._watcher is not None:
                self._early = Ask("watch")  # what has changed meanwhile, and which files to watch
            banned = take_up(self._log, ground.directory, left.bans)
            if left.kernel is not None:
                mode, loop, warn = ground.settings["kernel"], self._loop, self._log.warning
                self._enforcer = enforce(mode, ground.policy, banned.sources(), loop, warn, left.kernel)
            self._serve(ground, banned, left)
        except (GatekeeperError, OSError) as err:
            self._cannot_start(f"cannot take over: {err}")

    def _serve(self, ground: Ground, banned: BanList, left: handover.State | None = None) -> None:
        """Start everybody. ``left``: what an upgrade has left to us."""
        policy, settings = ground.policy, ground.settings
        identity = privileges.who_to_become()
        crew = Crew(
            self._loop, self._log, self._options.commands, identity, ground.opener.shards, self._options.stuck_after_s,
            lambda: self._standing.state(self._crew) | {
                "kernel": self._enforcer is not None,
                "kernel_others": self._enforcer.others if self._enforcer is not None else 0,
                "bans": len(self._bans or ()),
            },
        )  # fmt: skip
        crew.serving, crew.gave_up, crew.gone = self._all_serve, self._cannot_start, self._all_gone
        self._crew = crew
        if self._enforcer is not None:
            self._enforcer.others_changed = crew.tell_state
        self._installer = Installer(self._loop, policy, ground.opener, crew, self._enforcer)
        self._installer.follow = lambda new: self._keeper.keep(new.opened, ground.opener.key, ground.opener.shards)
        effect = Effect(self._log, self._installer, crew, self._standing, self._disk, ground.directory)
        self._reloader = Reloader(
            self._loop, self._log, self._compiler, self._installer, effect, crew, self._standing, self._notifier
        )
        self._reloader.settings = settings
        if self._early is not None:
            self._reloader.request(self._early)
        self._bans = Bans(self._loop, self._log, crew, self._enforcer, self._disk, ground.directory, banned)
        self._bans.begin(handed_over=left is not None)
        self._control.handlers |= self._bans.handlers
        self._control.handlers |= ReloadRequests(self._reloader).handlers
        Operators(self._control, crew, self._standing, self._enforcer, self._bans, self._options.path)
        estate = Estate(
            ground, crew, self._reloader, self._standing, self._bans, self._enforcer, self._control, self._notifier, self._lock
        )
        self._upgrader = Upgrader(self._loop, self._log, self._options.program, estate, self._options.drain_timeout_s, left)
        self._control.handlers["upgrade"] = self._upgrader.asked
        if left is None:
            self._control.begin(self._options.control, settings)
        elif left.control is not None:
            self._control.take_over(left.control.path, left.control.group, socket.socket(fileno=left.control.socket))
        crew.start(policy, settings["audit"], ground.http, self._enforcer, left)
        if identity is not None and identity.name != privileges.ACCOUNTS[0]:
            self._log.info(f"workers run as {identity.name}; an account called {privileges.ACCOUNTS[0]} would be better")

    def _all_serve(self) -> None:
        self._standing.serving = True
        if self._upgrader is not None:
            self._upgrader.all_serve()
        self._log.info(self._summary())
        self._notifier.ready(self._summary())
        if self._crew is not None:
            if not self._standing.upgrades:
                self._crew.event("start", pid=os.getpid(), policy=self._digest())
            self._crew.tell_state()
        if self._installer is not None:
            self._installer.follow(self._installer.policy)
        if self._reloader is not None:
            self._reloader.begin()

    def _cannot_start(self, why: str) -> None:
        self._log.error(why)
        self._loop.stop(CANNOT)

    # -- signals

    def _signalled(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._compiler.poll()
            if self._upgrader is not None:
                self._upgrader.poll()
            if self._crew is not None:
                self._crew.reap()
        elif number == signal.SIGHUP:
            self._ask("signal")
        elif self._standing.stopping or not self._standing.serving:
            self._stop_now()
        else:
            self._stop()

    def _ask(self, cause: str) -> None:
        if self._reloader is not None:
            self._reloader.request(Ask(cause))
        elif self._early is None or self._early.cause == "watch":
            self._early = Ask(cause)

    # -- stop

    def _stop(self) -> None:
        self._standing.stopping = True
        crew = self._crew
        if crew is None or crew.policy is None or self._reloader is None:
            self._stop_now()
            return
        self._reloader.stop()
        if self._upgrader is not None:
            self._upgrader.cancel()
        deadline_s = self._options.drain_timeout_s
        self._log.info(f"stopping: sessions have {deadline_s:g} s to end; another signal ends them now")
        self._notifier.stopping("draining")
        crew.event("stop", pid=os.getpid(), policy=self._digest())
        crew.tell_state()
        crew.drain(deadline_s)
        # Workers serve what waits in their queues already. Ours must go, or newcomers would wait for nobody.
        self._close_listeners()
        if self._keeper.keeps():
            self._loop.later(KEPT_WHILE_DRAINING_S, self._keep_no_longer)
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
        cut = self._crew.cut + self._crew.leaving.cut if self._crew is not None else 0
        sessions = "1 session" if cut == 1 else f"{cut} sessions"
        self._log.info("stopped" if not cut else f"stopped; {sessions} had not ended by themselves")
        self._loop.stop(FINE)

    def _keep_no_longer(self) -> None:
        """Let newcomers be refused: the next start is not near enough to let them wait for it."""
        self._log.info("sessions still go on, so the service manager keeps no sockets: newcomers are refused from now on")
        self._keeper.forget()
        self._close_listeners()

    def _close_listeners(self) -> None:
        if self._installer is not None:
            self._installer.close(keep_files=self._keeper.keeps())
        elif self._policy is not None:
            for opened in self._policy.opened.values():
                opened.close()

    def _close(self) -> None:
        """Leave nothing behind, however far we came."""
        self._compiler.cancel()
        if self._watcher is not None:
            self._watcher.close()
        self._control.close()
        if self._bans is not None:
            self._bans.close()
        self._disk.close()
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
