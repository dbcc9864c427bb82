"""The last good policy, in the state directory: what the service starts with when its rule file is of no use.

    last-good     one line of JSON (format, version, digest, sha256, bytes, saved), then the snapshot
    unconfirmed   one line of JSON (digest): a policy that was put in force on trial, and never confirmed

What is read back decides who gets in, so it must be ours alone, whole, and a sound snapshot.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatekeeper.errors import GatekeeperError
from gatekeeper.kernel import memfd
from gatekeeper.supervisor import disk

if TYPE_CHECKING:
    from collections.abc import Callable

POLICY_FILE, TRIAL_FILE = "last-good", "unconfirmed"
FORMAT, VERSION = "gatekeeper last-good", 1
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
        disk.write_all(fd, json.dumps(header).encode() + b"\n")
        for first in range(0, size, _BLOCK_BYTES):
            disk.write_all(fd, os.pread(snapshot_fd, _BLOCK_BYTES, first))

    disk.replace(directory, POLICY_FILE, fill)


def note_trial(directory: str, digest: str) -> None:
    """Remember that a policy is on trial: should the service end meanwhile, it starts with the last good one.

    Raises:
        OSError: it could not be written.
    """
    disk.replace(directory, TRIAL_FILE, lambda fd: disk.write_all(fd, json.dumps({"digest": digest}).encode() + b"\n"))


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
        disk.write_all(snapshot_fd, block)
    if size != header["bytes"] or sha256.hexdigest() != header["sha256"]:
        raise LastGoodError("it is damaged")
