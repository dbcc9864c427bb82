"""Reload: from the request to an outcome that everybody is told.

    request ──► compile ──► install ──► told: log, audit log, metrics, service manager ──► the next request

One at a time. What is asked for meanwhile comes afterwards, all of it in one reload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gatekeeper.supervisor import places
from gatekeeper.supervisor.compiling import Compilation, Compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gatekeeper.kernel.notify import Notifier
    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.installing import Installer
    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.loop import Loop
    from gatekeeper.supervisor.standing import Standing

NEEDS_RESTART = ("workers", "metrics", "audit", "control", "state", "kernel")


class Compiler:
    """Compiles the rule file of the service, one time at a time."""

    def __init__(self, loop: Loop, log: Log, command: Sequence[str], path: str) -> None:
        self._loop = loop
        self._log = log
        self._command = command
        self._path = path
        self._compilation: Compilation | None = None

    @property
    def busy(self) -> bool:
        """Whether the compiler runs."""
        return self._compilation is not None

    def start(self, done: Callable[[Compiled], None]) -> None:
        """Run the compiler; ``done`` is called with what came out, unless it is cancelled."""

        def compiled(result: Compiled) -> None:
            self._compilation = None
            done(result)

        try:
            self._compilation = Compilation(self._loop, self._command, self._path, compiled)
        except OSError as err:
            done(Compiled(None, failure=f"the compiler cannot be started: {err}"))

    def poll(self) -> None:
        """See whether it has ended. Called on SIGCHLD."""
        if self._compilation is not None:
            self._compilation.poll()

    def cancel(self) -> None:
        """Stop it, if it runs."""
        if self._compilation is not None:
            self._compilation.cancel()

    def tell_problems(self, compiled: Compiled) -> str:
        """Print what the compiler found; return in one line why the file was not accepted."""
        refused = compiled.snapshot_fd is None
        if compiled.text:
            self._log.plain(compiled.text, error=refused)
        if compiled.failure is not None:
            return compiled.failure
        what = "1 problem" if compiled.problems == 1 else f"{compiled.problems} problems"
        return f"{self._path} is not a policy that can be applied ({what})"


class Reloader:
    """Reloads the rule file of a service that serves. ``installer`` puts in force what was compiled."""

    def __init__(
        self, log: Log, compiler: Compiler, installer: Installer, crew: Crew, standing: Standing, notifier: Notifier
    ) -> None:
        self._log = log
        self._compiler = compiler
        self._installer = installer
        self._crew = crew
        self._standing = standing
        self._notifier = notifier
        self.settings: dict[str, Any] = installer.policy.meta["settings"]  # with which the service was started
        self._wanted = False

    @property
    def busy(self) -> bool:
        """Whether a reload is under way."""
        return self._compiler.busy or self._installer.changing

    def request(self) -> None:
        """Reload, now or as soon as the service serves and no other reload is under way."""
        self._wanted = True
        self.go_on()

    def go_on(self) -> None:
        """Begin what was asked for, if it can begin."""
        if self._wanted and self._standing.serving and not self._standing.stopping and not self.busy:
            self._begin()

    def stop(self) -> None:
        """Let go of a reload that can still be let go of: the service stops."""
        self._compiler.cancel()
        self._installer.abort("the service stops")

    def _begin(self) -> None:
        self._wanted = False
        self._notifier.reloading()
        if self._crew.observer is not None:
            try:
                self._crew.observer.reopen_audit()
            except places.PlaceError as err:
                self._log.error(f"{err}; going on with the old one")
        self._compiler.start(self._compiled)

    def _compiled(self, compiled: Compiled) -> None:
        why = self._compiler.tell_problems(compiled)
        if compiled.snapshot_fd is None:
            self._ended(why, compiled.first)
        else:
            self._installer.install(compiled.snapshot_fd, self._ended)

    def _ended(self, failure: str | None, detail: str = "") -> None:
        """Tell everybody how a reload ended, and begin the next if one was asked for meanwhile.

        ``detail`` is for those who do not see stderr, where it was printed already.
        """
        policy = self._installer.policy
        self._standing.note_reload(failure, detail)
        summary = self._standing.summary(self._crew)
        if failure is None:
            self._log.info(f"reloaded: {summary}")
            self._warn_of_settings(policy.meta["settings"])
        else:
            self._log.error(f"{failure}\nreload failed: the policy {policy.name} stays in force")
        self._crew.event("reload", success=failure is None, error=self._standing.reload_error, policy=policy.meta["digest"])
        self._crew.tell_state()
        if not self._standing.stopping:
            self._notifier.ready(summary)
            self.go_on()

    def _warn_of_settings(self, settings: dict[str, Any]) -> None:
        for name in NEEDS_RESTART:
            if settings.get(name) != self.settings.get(name):
                self._log.warning(f"`{name}` has changed in the file; that takes a restart")
