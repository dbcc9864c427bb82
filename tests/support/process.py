"""Programs that a test starts: their output is kept for failures, and they are ended by their own pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support import need
from tests.support.wait import until

RUNNING: list[Process] = []  # what a failing test shows the output of
STOP_S = 10.0


class ProcessEnded(Exception):
    """A program that a test relies on is no longer running."""


class Process:
    """A running program. Its stdout and stderr go to one file. Use it as a context manager, or call `stop`."""

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        name: str,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """Start ``prefix`` + ``argv`` in ``folder``; a prefix (setpriv, prlimit, ip netns exec) must exec, not fork."""
        self.name = name
        self.folder = folder
        self.output_path = folder / f"{name}.log"
        with self.output_path.open("ab") as output:
            self._child = subprocess.Popen(
                [*_leash(), *prefix, *argv],
                cwd=folder,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal is the test runner's to handle
            )
        RUNNING.append(self)

    @property
    def pid(self) -> int:
        return self._child.pid

    def output(self) -> str:
        """Return all it has printed so far."""
        return self.output_path.read_text(errors="replace")

    def exit_code(self) -> int | None:
        """Return its exit code, ``-n`` when signal n ended it, ``None`` while it runs."""
        return self._child.poll()

    def assert_alive(self) -> None:
        """Say with its output why it ended, when it has.

        Raises:
            ProcessEnded: it is no longer running. Not an ``AssertionError``, so that no wait goes on asking.
        """
        if self.exit_code() is not None:
            raise ProcessEnded(f"{self.name} exited with {self.exit_code()}:\n{self.output()}")

    def wait_for_port(self, port: int, host: str = "127.0.0.1") -> None:
        """Return when it accepts connections on ``port``."""

        def answers() -> bool:
            self.assert_alive()
            try:
                socket.create_connection((host, port), timeout=1).close()
            except OSError:
                return False
            return True

        until(answers, f"{self.name} listens on {host}:{port}", within_s=20)

    def signal(self, number: signal.Signals) -> None:
        """Send one signal to the program itself."""
        self._child.send_signal(number)

    def wait(self, within_s: float = STOP_S) -> int:
        """Return the exit code once it has ended by itself."""
        return self._child.wait(within_s)

    def stop(self) -> int:
        """End it: SIGTERM, after a while SIGKILL. Return the exit code; stopping again changes nothing."""
        if self in RUNNING:
            RUNNING.remove(self)
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
        return self._child.wait(STOP_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _leash() -> list[str]:
    """Return a prefix that makes a program end when the test run is killed and can end nothing any more itself."""
    setpriv = need.find("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def children(pid: int) -> list[int]:
    """Return the pids of a process's living children."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def command_line(pid: int) -> str:
    """Return the command line of a process, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in {"Z", "X"}
