"""What is kept in the state directory is written here: whole files, in one step, and not by the supervisor's only thread.

Disks can stall for seconds, and the supervisor must not.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from gatekeeper.supervisor.loop import Loop

PATIENCE_S = 10.0  # whoever waits goes on then, and the disk may finish in its own time
LAST_MOMENTS_S = 3.0


class Disk:
    """Runs what may take long, one job at a time in the order of `run`, and calls back from the loop."""

    def __init__(self, loop: Loop, patience_s: float = PATIENCE_S) -> None:
        self._loop = loop
        self._patience_s = patience_s
        self._last: threading.Thread | None = None

    def run(self, job: Callable[[], None], done: Callable[[str | None], None]) -> None:
        """Run ``job``; ``done`` gets ``None``, or why it could not be done: an error, or no answer in time.

        A job that is late goes on. One that never ends keeps those after it from beginning, and us from nothing.
        """
        before, failure = self._last, ["it did not end as it should"]

        def work() -> None:
            if before is not None:
                before.join()
            try:
                job()
                failure.clear()
            except OSError as err:
                failure[:] = [err.strerror or str(err)]
            finally:
                os.eventfd_write(wake, 1)

        def ended() -> None:
            self._loop.unwatch(wake)
            os.close(wake)
            if timer.call is not None:
                timer.cancel()
                done(failure[0] if failure else None)

        def late() -> None:
            timer.cancel()
            done(f"the disk did not answer within {self._patience_s:g} s")

        try:
            wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as err:
            done(err.strerror)
            return
        thread = threading.Thread(target=work, name="disk", daemon=True)
        try:
            thread.start()
        except RuntimeError as err:
            os.close(wake)
            done(str(err))
            return
        self._last = thread
        timer = self._loop.later(self._patience_s, late)
        self._loop.watch(wake, ended)

    def close(self) -> None:
        """Give what is being written a moment: only for the supervisor's own last moments."""
        if self._last is not None:
            self._last.join(LAST_MOMENTS_S)


def replace(directory: str, name: str, fill: Callable[[int], None]) -> None:
    """Replace a file of ours in one step by what ``fill`` writes; when this returns, it survives a loss of power.

    Raises:
        OSError: it could not be written; the old one is untouched.
    """
    path = os.path.join(directory, name)
    fresh = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)  # of a run that was killed while it wrote
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fill(fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_all(fd: int, data: bytes) -> None:
    """Write all of it.

    Raises:
        OSError: some of it could not be written.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
