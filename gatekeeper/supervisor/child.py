"""Starting a process of ours and talking to it without ever waiting for it."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import signal
import site
import socket
import subprocess
import sys
import termios
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import gatekeeper
from gatekeeper.errors import ChannelClosed
from gatekeeper.kernel.channel import MAX_FDS, Channel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gatekeeper.supervisor.loop import Loop

_RETRY_S = 0.01  # too many descriptors are on their way to somebody: try again soon
_LAST_MOMENTS_S = 5.0  # between closing the channel and being gone
_MOST_MESSAGES = 64  # of one child in one turn
_KEPT = ("PATH", "TZ", "TMPDIR", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "JOURNAL_STREAM", "NO_COLOR")
_KEPT_PREFIXES = ("LC_", "PYTHON", "GATEKEEPER_")


def python(module: str) -> list[str]:
    """Return the command that runs one of our modules; -P keeps the working directory out of the import path."""
    return [sys.executable, "-P", "-m", module]


@dataclass(frozen=True, slots=True)
class Commands:
    """How our processes are started; tests put others in their place."""

    worker: list[str] = field(default_factory=lambda: python("gatekeeper.proxy"))
    observer: list[str] = field(default_factory=lambda: python("gatekeeper.observer"))
    compiler: list[str] = field(default_factory=lambda: python("gatekeeper.supervisor.compile"))


def environment() -> dict[str, str]:
    """Return what children may know of our environment: no credentials, nothing of the service manager's."""
    kept = {
        name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }
    home = str(Path(gatekeeper.__file__).resolve().parents[1])
    if home not in site.getsitepackages():  # a checkout: children must find the very same code
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, (home, kept.get("PYTHONPATH"))))
    return kept


def start(command: Sequence[str], fds: Sequence[int], **options: Any) -> subprocess.Popen[bytes]:
    """Execute ``command`` in a session of its own (a terminal's Ctrl-C is ours to handle) with ``fds`` and stderr.

    Raises:
        OSError: it could not be executed.
    """
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    return subprocess.Popen(
        list(command), pass_fds=tuple(fds), env=environment(), start_new_session=True, **(streams | options)
    )


class Adopted:
    """A child that this process started before it executed the program it runs now: as much of Popen as is needed.

    Its number cannot be anybody else's: until we have reaped it, the kernel keeps it for us.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return how it ended (negative: the signal), or ``None`` while it lives. Reaps it."""
        if self._status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self._status = 0  # never a child of ours
            else:
                self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """Return how it ended.

        Raises:
            subprocess.TimeoutExpired: it has not.
        """
        if self.poll() is None:
            fd = os.pidfd_open(self.pid)
            try:
                select.select([fd], [], [], timeout)
            finally:
                os.close(fd)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired([str(self.pid)], timeout)
        return status


class Child:
    """A process with a control channel. Messages that it does not take at once wait here; we never do."""

    def __init__(
        self,
        loop: Loop,
        process: subprocess.Popen[bytes] | Adopted,
        channel: socket.socket,
        started: float,
        on_message: Callable[[dict[str, Any]], None],
    ) -> None:
        """See `start` and `adopt`."""
        self._loop = loop
        self._on_message = on_message
        self._waiting: deque[tuple[dict[str, Any], list[int]]] = deque()
        self._retry = False
        self._process = process
        self.started = started
        channel.setblocking(False)
        self._channel: Channel | None = Channel(channel)
        self._fd = channel.fileno()
        loop.watch(self._fd, self._on_event)

    @classmethod
    def start(cls, loop: Loop, command: Sequence[str], on_message: Callable[[dict[str, Any]], None]) -> Self:
        """Start one; ``--channel FD`` is added to ``command``.

        Raises:
            OSError: it could not be executed.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = start([*command, "--channel", str(theirs.fileno())], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return cls(loop, process, ours, time.monotonic(), on_message)

    @classmethod
    def adopt(
        cls, loop: Loop, pid: int, channel_fd: int, started: float, on_message: Callable[[dict[str, Any]], None]
    ) -> Self:
        """Return one that was started before this program was executed. Takes over ``channel_fd``."""
        return cls(loop, Adopted(pid), socket.socket(fileno=channel_fd), started, on_message)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def channel_fd(self) -> int | None:
        """Our end of the channel, ``None`` once it is closed."""
        return None if self._channel is None else self._fd

    def has_unsent(self) -> bool:
        """Say whether messages wait for the child to take them."""
        return bool(self._waiting)

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one message, at once or as soon as the child takes it. The descriptors stay the caller's."""
        if self._channel is None:
            return
        if self._waiting or not self._try(message, fds):
            copies: list[int] = []
            try:
                # The caller may close its descriptors before the message leaves.
                copies.extend(os.dup(fd) for fd in fds)
            except OSError:
                # No descriptors left. Here too a message would be missed.
                _close(copies)
                self.kill()
                return
            self._waiting.append((message, copies))
            self._watch()

    def send_many(self, message: dict[str, Any], lists: dict[str, list[Any]], fds: Sequence[int]) -> None:
        """Send ``fds`` with the parallel ``lists`` in as many messages as one message's limits ask for."""
        most = MAX_FDS // 2
        for first in range(0, len(fds), most):
            part = slice(first, first + most)
            self.send(message | {name: values[part] for name, values in lists.items()}, fds[part])

    def poll(self) -> int | None:
        """Return how it ended (negative: the signal), or ``None`` while it lives. Reaps it."""
        status = self._process.poll()
        if status is not None and self._channel is not None:
            self._read()  # its last words
            self.hang_up()
        return status

    def unread_bytes(self) -> int:
        """Return how much of what it was sent it has not read."""
        if self._channel is None:
            return 0
        if self._waiting:
            return 1
        size = array.array("i", [0])
        fcntl.ioctl(self._fd, termios.TIOCOUTQ, size)
        return size[0]

    def hang_up(self) -> None:
        """Close the channel, so that a child that lives knows it is no longer needed."""
        if self._channel is not None:
            self._loop.unwatch(self._fd)
            self._channel.close()
            self._channel = None
        for _message, fds in self._waiting:
            _close(fds)
        self._waiting.clear()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it now. It is reaped like any other end."""
        self.signal(signal.SIGKILL)

    def wait(self, patience_s: float) -> None:
        """Wait for its end and reap it: only for the supervisor's own last moments."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        self.hang_up()

    def _on_event(self) -> None:
        self._read()
        self._flush()

    def _read(self) -> None:
        for _ in range(_MOST_MESSAGES):
            if self._channel is None:
                return
            try:
                message, fds = self._channel.receive()
            except BlockingIOError:
                return
            except ChannelClosed:
                # What it owes us now is its end; SIGCHLD tells.
                self.hang_up()
                self._loop.later(_LAST_MOMENTS_S, self.kill)
                return
            except (ValueError, RecursionError):
                self.kill()  # it no longer speaks our language: nobody we know
                return
            _close(fds)
            self._on_message(message)

    def _flush(self) -> None:
        while self._waiting and self._channel is not None:
            message, fds = self._waiting[0]
            if not self._try(message, fds):
                break
            self._waiting.popleft()
            _close(fds)
        if self._channel is not None:
            self._watch()

    def _try(self, message: dict[str, Any], fds: Sequence[int]) -> bool:
        if self._channel is None:
            return True
        try:
            self._channel.send(message, list(fds))
        except BlockingIOError:
            return False
        except ChannelClosed:
            return True  # it is gone; its successor is told everything anew
        except OSError as err:
            if err.errno != errno.ETOOMANYREFS:
                # A child that misses a message must not go on; its successor is told everything.
                self.kill()
                return True
            if not self._retry:
                self._retry = True
                self._loop.later(_RETRY_S, self._try_again)
            return False
        return True

    def _try_again(self) -> None:
        self._retry = False
        self._flush()

    def _watch(self) -> None:
        self._loop.watch(self._fd, self._on_event, write=bool(self._waiting) and not self._retry)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def how_it_ended(status: int) -> str:
    """Return an exit status in words."""
    if status >= 0:
        return f"exited with {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
