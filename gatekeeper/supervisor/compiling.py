"""Running the compiler: from the path of a rule file to a sealed snapshot, or the reason why not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatekeeper.kernel import memfd
from gatekeeper.supervisor import child

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.loop import Loop

PATIENCE_S = 120.0
LONGEST_REPORT_BYTES = 16 << 20
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came out. ``snapshot_fd`` is ``None`` when the file was not accepted; else the receiver owns it.

    ``text`` are the problems for people, ``problems`` their number, ``first`` the first of them in one line. ``failure``: the compiler could not do its work at
    all; ``unreadable``: because the rule file cannot be read. ``sought`` and ``patterns`` are the files it depends on,
    ``state`` the state directory that it names; see `compile`.
    """

    snapshot_fd: int | None
    text: str = ""
    problems: int = 0
    first: str = ""
    failure: str | None = None
    unreadable: bool = False
    sought: tuple[str, ...] = ()
    patterns: tuple[tuple[str, str], ...] = ()
    state: str | None = None


class Compilation:
    """One compiler process; ``done`` is called once, from the loop. Owns the memfd until then."""

    def __init__(
        self, loop: Loop, command: Sequence[str], path: str, done: Callable[[Compiled], None],
        patience_s: float = PATIENCE_S,
    ) -> None:  # fmt: skip
        """Start it.

        Raises:
            OSError: no memory, no descriptors, or the interpreter is gone.
        """
        self._loop = loop
        self._path = path
        self._done: Callable[[Compiled], None] | None = done
        self._report = bytearray()
        self._patience_s = patience_s
        self._late = False
        self._ended = False
        self._snapshot_fd = memfd.create("gatekeeper-snapshot")
        try:
            self._pipe, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            os.close(self._snapshot_fd)
            raise
        os.set_blocking(theirs, True)
        try:
            self._process = child.start(
                [*command, path, "--snapshot", str(self._snapshot_fd), "--report", str(theirs),
                 "--supervisor", str(os.getpid())],
                [self._snapshot_fd, theirs],
            )  # fmt: skip
        except OSError:
            os.close(self._pipe)
            os.close(self._snapshot_fd)
            raise
        finally:
            os.close(theirs)
        self._timer = loop.later(patience_s, self._too_late)
        loop.watch(self._pipe, self._read)

    def cancel(self) -> None:
        """Stop it; ``done`` is not called any more."""
        self._done = None
        self._process.kill()

    def poll(self) -> bool:
        """Reap the process; say whether it has ended. Its report is complete then, and ``done`` is called."""
        status = None if self._ended else self._process.poll()
        if status is None:
            return self._ended
        self._ended = True
        self._read()
        self._loop.unwatch(self._pipe)
        os.close(self._pipe)
        self._timer.cancel()
        result = self._result(status)
        if result.snapshot_fd is None or self._done is None:
            os.close(self._snapshot_fd)
        if self._done is not None:
            self._done(result)
        return True

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._pipe, _BLOCK_BYTES):
                self._report += block
                if len(self._report) > LONGEST_REPORT_BYTES:
                    self._process.kill()
                    break
            else:
                self._loop.unwatch(self._pipe)

    def _too_late(self) -> None:
        self._late = True
        self._process.kill()

    def _result(self, status: int) -> Compiled:
        if self._late:
            return Compiled(None, failure=f"compiling {self._path} took longer than {self._patience_s:g} s")
        if status == -signal.SIGKILL:
            return Compiled(None, failure=f"the compiler of {self._path} was killed (out of memory?)")
        try:
            report: dict[str, Any] = json.loads(self._report)
            problems, text, failure = report["problems"], report["text"], report["failure"]
            accepted, unreadable = bool(report["accepted"]), bool(report["unreadable"])
            sought = tuple(str(path) for path in report["sought"])
            patterns = tuple((str(folder), str(pattern)) for folder, pattern in report["patterns"])
            first = next((_in_one_line(item) for item in problems if item["severity"] == "error"), "")
        except (ValueError, KeyError, TypeError, RecursionError):
            ended = child.how_it_ended(status)
            return Compiled(None, failure=f"the compiler of {self._path} {ended} without a report")
        return Compiled(
            self._snapshot_fd if accepted else None, str(text), len(problems), first, failure, unreadable,
            sought, patterns, report["state"],
        )  # fmt: skip


class Compiler:
    """Compiles the rule file of the service, one time at a time. ``follow`` is told what it was compiled from, and when."""

    def __init__(self, loop: Loop, log: Log, command: Sequence[str], path: str) -> None:
        self._loop = loop
        self._log = log
        self._command = command
        self._path = path
        self._compilation: Compilation | None = None
        self.follow: Callable[[Sequence[str], Sequence[tuple[str, str]], float], None] | None = None

    @property
    def busy(self) -> bool:
        """Whether the compiler runs."""
        return self._compilation is not None

    def start(self, done: Callable[[Compiled], None]) -> None:
        """Run the compiler; ``done`` is called with what came out, unless it is cancelled."""
        began = time.time()

        def compiled(result: Compiled) -> None:
            self._compilation = None
            if self.follow is not None and result.sought:
                self.follow(result.sought, result.patterns, began)
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


def _in_one_line(problem: dict[str, Any]) -> str:
    return f"{problem['file']}:{problem['line']}:{problem['column']}: {problem['message']}"
