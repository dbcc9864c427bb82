"""Upgrade: the new code proves, as a child, that it could take over; then it takes our place, and nobody is let go.

    request ──► state written ──► new code in a child: proved ──► nothing under way ──► state written again ──► execve
                                          │                              │                                       │
                                          └─ it fails, hangs or dies ────┴─ it does not come to rest ────────────┴─ refused
                                                              said and counted, nothing has changed
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from gatekeeper import __version__
from gatekeeper.kernel import privileges
from gatekeeper.supervisor import child, handover
from gatekeeper.supervisor.control import BadRequest
from gatekeeper.supervisor.log import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gatekeeper.supervisor.control import Request
    from gatekeeper.supervisor.handover import State
    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.loop import Loop, Timer
    from gatekeeper.supervisor.succession import Estate

PROOF_PATIENCE_S = 60.0
REST_PATIENCE_S = 30.0
LOOK_EVERY_S = 0.05
KEPT_BYTES = 1 << 16  # of what the new code prints
LINES_TOLD = 5
LONGEST_ERROR = 4000  # it travels in messages
LONGEST_DRAIN_S = 30 * 86400
MANAGERS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # not for somebody who only tries
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def program_as_started() -> list[str]:
    """Return the command line of this process, with the interpreter's full path."""
    return [sys.executable, *sys.orig_argv[1:]]


class Proof:
    """The new code in a child. ``done`` is called once, with what is wrong or ``None``, and its version."""

    def __init__(
        self, loop: Loop, program: Sequence[str], state: State, done: Callable[[str | None, str], None],
        patience_s: float = PROOF_PATIENCE_S,
    ) -> None:  # fmt: skip
        """Start it with copies of all that is handed over.

        Raises:
            OSError: it cannot be executed, or there are no descriptors.
        """
        self._loop = loop
        self._done = done
        self._patience_s = patience_s
        self._late = False
        self._said = {"report": b"", "output": b""}
        with contextlib.ExitStack() as ends:
            state_fd = handover.write(state)
            ends.callback(os.close, state_fd)
            report, report_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            ends.callback(os.close, report_end)
            output, output_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            ends.callback(os.close, output_end)
            self._pipes = {"report": report, "output": output}
            os.set_blocking(report_end, True)
            os.set_blocking(output_end, True)
            environment = {name: value for name, value in os.environ.items() if name not in MANAGERS}
            environment[handover.VARIABLE] = f"prove:{state_fd}:{report_end}"
            try:
                privileges.keep_across_exec()
                self._process = subprocess.Popen(
                    list(program), env=environment, pass_fds=(state_fd, report_end, *state.descriptors()),
                    stdin=subprocess.DEVNULL, stdout=output_end, stderr=output_end, start_new_session=True,
                )  # fmt: skip
            except OSError:
                os.close(report)
                os.close(output)
                raise
        for name, fd in self._pipes.items():
            loop.watch(fd, lambda name=name: self._read(name))  # type: ignore[misc]
        self._timer = loop.later(patience_s, self._too_late)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def poll(self) -> bool:
        """See whether it has ended; ``done`` is called then. Called on SIGCHLD."""
        status = self._process.poll()
        if status is None:
            return False
        self._timer.cancel()
        for name, fd in self._pipes.items():
            self._read(name)
            self._loop.unwatch(fd)
            os.close(fd)
        self._done(*self._result(status))
        return True

    def cancel(self) -> None:
        """End it; ``done`` is not called any more."""
        self._done = lambda _why, _version: None
        self._process.kill()

    def _read(self, name: str) -> None:
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._pipes[name], KEPT_BYTES):
                self._said[name] = (self._said[name] + block)[-KEPT_BYTES:]
            self._loop.unwatch(self._pipes[name])

    def _too_late(self) -> None:
        self._late = True
        self._process.kill()

    def _result(self, status: int) -> tuple[str | None, str]:
        if self._late:
            return self._told(f"it did not come to a result within {self._patience_s:g} s"), ""
        try:
            report = json.loads(self._said["report"])
            proved, error, version = report["proved"] is True, str(report["error"]), str(report["version"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return self._told(f"it {child.how_it_ended(status)} without a result"), ""
        if not proved or status != 0:
            return printable(error, 2000), version
        return None, version

    def _told(self, why: str) -> str:
        """Return ``why`` with the end of what it printed."""
        lines = self._said["output"].decode(errors="replace").split("\n")
        last = [printable(line) for line in lines if line.strip()][-LINES_TOLD:]
        return "\n".join([why + (":" if last else ""), *(f"  {line}" for line in last)])


class Upgrader:
    """Answers the request upgrade, and carries out one at a time.

    ``left``: we are the new program ourselves, and this is what the one before us left.
    """

    def __init__(
        self, loop: Loop, log: Log, program: Sequence[str], estate: Estate, drain_timeout_s: float, left: State | None
    ) -> None:
        self._loop = loop
        self._log = log
        self._program = list(program)
        self._estate = estate
        self._drain_timeout_s = drain_timeout_s
        self._left = left
        self._proof: Proof | None = None
        self._waiting: Timer | None = None
        self._request: Request | None = None

    # -- the new program's part

    def all_serve(self) -> None:
        """Let the workers of before an upgrade go: the new ones serve."""
        left, self._left = self._left, None
        if left is None:
            return
        crew = self._estate.crew
        self._estate.standing.taking_over = False
        crew.leaving.drain(left.drain_timeout_s)
        self._log.info(f"upgraded from {left.writer} to {__version__}")
        if crew.leaving.workers and crew.policy is not None:
            self._log.info(crew.leaving.summary(time.monotonic(), crew.policy.bindings))
        self._tell(left.writer, __version__, None)

    # -- the old program's part

    def asked(self, request: Request) -> None:
        """Begin. The last answer is sent right before the new code takes over."""
        drain_s = request.args.get("drain_s", self._drain_timeout_s)
        if type(drain_s) not in {int, float} or not 0 <= drain_s <= LONGEST_DRAIN_S:
            raise BadRequest(f"drain_s is a number of seconds, at most {LONGEST_DRAIN_S}")
        standing = self._estate.standing
        if not standing.serving or standing.stopping:
            request.fail("the service does not serve: it starts or stops")
        elif self._proof is not None or self._waiting is not None:
            request.fail("an upgrade is under way already")
        elif self._estate.reloader.trial is not None:
            request.fail("a policy waits to be confirmed: `gatekeeper confirm` or `gatekeeper rollback` comes first")
        else:
            self._begin(request, float(drain_s))

    def _begin(self, request: Request, drain_s: float) -> None:
        self._request = request
        try:
            self._proof = proof = Proof(
                self._loop, self._program, self._estate.capture(drain_s),
                lambda why, version: self._proved(why, version, drain_s),
            )  # fmt: skip
        except OSError as err:
            self._fail(f"the new code cannot be started: {err}")
            return
        self._log.info(f"upgrade: the new code proves in a child (pid {proof.pid}) that it can take over")
        request.progress(f"the new code proves in a child (pid {proof.pid}) that it can take over")

    def poll(self) -> None:
        """See whether the child has ended. Called on SIGCHLD."""
        if self._proof is not None:
            self._proof.poll()

    def cancel(self) -> None:
        """Let go of what is under way: the service stops."""
        if self._proof is not None:
            self._proof.cancel()
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _proved(self, why: str | None, version: str, drain_s: float) -> None:
        self._proof = None
        if why is not None:
            self._fail(f"the new code cannot take over: {why}")
            return
        if self._request is not None:
            self._request.progress(f"gatekeeper {version} can take over")
        self._estate.reloader.hold(on=True)
        self._wait_for_rest(version, drain_s, REST_PATIENCE_S)

    def _wait_for_rest(self, version: str, drain_s: float, patience_s: float) -> None:
        self._waiting = None
        why = self._estate.restless()
        if why is None:
            self._take_place(version, drain_s)
        elif patience_s <= 0:
            self._fail(f"the service does not come to rest: {why}")
        else:
            again = patience_s - LOOK_EVERY_S
            self._waiting = self._loop.later(LOOK_EVERY_S, lambda: self._wait_for_rest(version, drain_s, again))

    def _take_place(self, version: str, drain_s: float) -> None:
        self._log.info(f"upgrade: gatekeeper {version} takes over")
        standing = self._estate.standing
        try:
            self._estate.settle()
            state = self._estate.capture(drain_s)
            if self._request is not None:
                self._request.done({
                    "before": __version__, "version": version,
                    "upgrades": standing.upgrades, "upgrades_failed": standing.upgrades_failed,
                })  # fmt: skip
            self._estate.notifier.reloading()
            execute(self._program, state)
        except OSError as err:
            self._estate.notifier.ready(standing.summary(self._estate.crew))
            self._fail(f"the new code cannot be executed: {err}")

    def _fail(self, why: str) -> None:
        """Tell everybody that nothing has changed, and why."""
        standing, request = self._estate.standing, self._request
        self._estate.reloader.hold(on=False)
        self._log.error(f"{why}\nupgrade failed: nothing has changed")
        standing.upgrades_failed += 1
        standing.upgrade_error = why[:LONGEST_ERROR]
        self._tell(__version__, None, why)
        self._request = None
        if request is not None:
            request.fail(why, 1)

    def _tell(self, before: str, version: str | None, error: str | None) -> None:
        crew = self._estate.crew
        policy = None if crew.policy is None else crew.policy.meta["digest"]
        crew.event("upgrade", success=error is None, error=error, version=version, before=before, policy=policy)
        crew.tell_state()


def execute(program: Sequence[str], state: State) -> None:
    """Execute ``program`` in our place, with ``state``. Returns only by an exception, and then nothing has changed.

    Signals that come meanwhile wait for the new program's handlers; see `let_signals_in`.

    Raises:
        OSError: it could not be executed.
    """
    state_fd = handover.write(state)
    kept = [state_fd, *state.descriptors()]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for fd in kept:
            os.set_inheritable(fd, True)
        privileges.keep_across_exec()
        os.execve(program[0], list(program), {**os.environ, handover.VARIABLE: str(state_fd)})  # noqa: S606 - our own program
    finally:
        for fd in kept:
            os.set_inheritable(fd, False)
        os.close(state_fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_signals_in() -> None:
    """Take delivery of the signals that came while one program took another's place."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
