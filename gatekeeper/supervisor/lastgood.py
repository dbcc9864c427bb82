"""The last good policy, in the state directory: what the service starts with when its rule file is of no use.

    last-good     one line of JSON (format, version, digest, sha256, bytes, saved), then the snapshot
    unconfirmed   one line of JSON (digest): a policy that was put in force on trial, and never confirmed

What is read back decides who gets in, so it must be ours alone, whole, and a sound snapshot. A file is replaced in one
step and survives a loss of power. Disks can stall for seconds and the supervisor must not, so a thread writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatekeeper.errors import GatekeeperError
from gatekeeper.kernel import memfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from gatekeeper.supervisor.loop import Loop

POLICY_FILE, TRIAL_FILE = "last-good", "unconfirmed"
FORMAT, VERSION = "gatekeeper last-good", 1
PATIENCE_S = 10.0  # for the disk; whoever waits goes on then, and the disk may finish in its own time
LAST_MOMENTS_S = 3.0
MOST_HEADER_BYTES = 4096
MOST_BYTES = 1 << 30
_BLOCK_BYTES = 1 << 20


class LastGoodError(GatekeeperError):
    """There is a last good policy, but it cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class LastGood:
    """What was read back. ``snapshot_fd`` is a memfd that the receiver owns, ``saved`` Unix time."""

    snapshot_fd: int
    digest: str
    saved: float


def read(directory: str) -> LastGood | None:
    """Return the last good policy, ``None`` when there is none. That it is a sound snapshot is for `accept` to say.

    Raises:
        LastGoodError: it is there, and must not be used.
    """
    try:
        fd = _open(directory, POLICY_FILE)
    except FileNotFoundError:
        return None
    except OSError as err:
        raise LastGoodError(err.strerror) from err
    with open(fd, "rb") as file:
        header = _header(file.readline(MOST_HEADER_BYTES))
        snapshot_fd = memfd.create("gatekeeper-snapshot")
        try:
            _copy(file, snapshot_fd, header)
        except OSError as err:
            os.close(snapshot_fd)
            raise LastGoodError(f"{err.strerror}") from err
        except BaseException:
            os.close(snapshot_fd)
            raise
        return LastGood(snapshot_fd, header["digest"], float(header["saved"]))


def read_trial(directory: str) -> str | None:
    """Return the digest of the policy that was on trial when the service ended, or that was rolled back."""
    try:
        with open(_open(directory, TRIAL_FILE), "rb") as file:
            digest = json.loads(file.read(MOST_HEADER_BYTES))["digest"]
    except (OSError, LastGoodError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return digest if isinstance(digest, str) else None


def save(directory: str, snapshot_fd: int, digest: str) -> None:
    """Make a snapshot the last good policy, and forget a trial: what is in force now was wanted.

    Raises:
        OSError: it could not be written; the older one is untouched.
    """
    # First, whether there is room for the policy or not: a restart must not take what was confirmed for a trial.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, TRIAL_FILE))
    size = os.fstat(snapshot_fd).st_size
    sha256 = hashlib.sha256()
    for first in range(0, size, _BLOCK_BYTES):
        sha256.update(os.pread(snapshot_fd, _BLOCK_BYTES, first))
    header = {
        "format": FORMAT, "version": VERSION, "digest": digest, "sha256": sha256.hexdigest(),
        "bytes": size, "saved": time.time(),
    }  # fmt: skip

    def fill(fd: int) -> None:
        _write(fd, json.dumps(header).encode() + b"\n")
        for first in range(0, size, _BLOCK_BYTES):
            _write(fd, os.pread(snapshot_fd, _BLOCK_BYTES, first))

    _replace(directory, POLICY_FILE, fill)


def note_trial(directory: str, digest: str) -> None:
    """Remember that a policy is on trial: should the service end meanwhile, it starts with the last good one.

    Raises:
        OSError: it could not be written.
    """
    _replace(directory, TRIAL_FILE, lambda fd: _write(fd, json.dumps({"digest": digest}).encode() + b"\n"))


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


def _open(directory: str, name: str) -> int:
    """Open a file that is ours alone.

    Raises:
        LastGoodError: others may write it, or replace it.
        OSError: it cannot be opened.
    """
    # Not blocking: what stands there may be a pipe that nobody writes to.
    fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _check("it", os.fstat(fd), stat.S_ISREG)
        _check(f"the directory {directory}", os.stat(directory), stat.S_ISDIR)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(what: str, found: os.stat_result, kind: Callable[[int], bool]) -> None:
    if not kind(found.st_mode):
        raise LastGoodError(f"{what} is not what we wrote")
    if found.st_uid not in {0, os.geteuid()}:
        raise LastGoodError(f"{what} belongs to another user (uid {found.st_uid})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise LastGoodError(f"{what} may be written by others (mode {stat.S_IMODE(found.st_mode):o})")


def _header(line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        if header["format"] != FORMAT:
            raise LastGoodError("it is something else")
        if header["version"] != VERSION:
            raise LastGoodError(f"it was written by another version of gatekeeper (format {header['version']!r:.20})")
        sound = isinstance(header["digest"], str) and isinstance(header["sha256"], str)
        sound = sound and type(header["bytes"]) is int and 0 < header["bytes"] <= MOST_BYTES
        sound = sound and type(header["saved"]) in {int, float}
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise LastGoodError("it is damaged") from err
    if not sound:
        raise LastGoodError("it is damaged")
    return dict(header)


def _copy(file: Any, snapshot_fd: int, header: dict[str, Any]) -> None:
    sha256 = hashlib.sha256()
    size = 0
    while size <= header["bytes"] and (block := file.read(_BLOCK_BYTES)):
        size += len(block)
        sha256.update(block)
        _write(snapshot_fd, block)
    if size != header["bytes"] or sha256.hexdigest() != header["sha256"]:
        raise LastGoodError("it is damaged")


def _replace(directory: str, name: str, fill: Callable[[int], None]) -> None:
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


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
