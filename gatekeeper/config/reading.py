"""Opening the files that a policy consists of, and refusing those that must not be one.

What is read is a policy, so whoever may write it decides who gets in: a file that its group or others may write is
refused. Nothing here waits: a pipe that nobody writes to, or a device that never ends, must not hold up a reload.
"""

from __future__ import annotations

import os
import stat

from gatekeeper.config.words import brief

SIZE_MOST_BYTES = 4 << 20  # of a YAML file; a list may be as large as memory allows

_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Refused(Exception):
    """A file cannot or must not be read; the message says why."""


def open_file(path: str) -> int:
    """Return a descriptor of a rule file or list file, which is the caller's.

    Raises:
        Refused: it cannot or must not be read.
    """
    try:
        fd = os.open(path, _OPEN_FLAGS)
    except (OSError, ValueError) as err:
        raise Refused(f"cannot read {brief(path)}: {getattr(err, 'strerror', None) or err}") from err
    try:
        _check(path, os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read(path: str) -> bytes:
    """Return what is in a rule file; one byte more than is allowed shows that it is too large.

    Raises:
        Refused: it cannot or must not be read.
    """
    with open(open_file(path), "rb", buffering=0) as file:
        try:
            return file.read(SIZE_MOST_BYTES + 1) or b""
        except OSError as err:
            raise Refused(f"cannot read {brief(path)}: {err.strerror}") from err


def check_readable(path: str) -> None:
    """Check that a list file may be read, without reading it.

    Raises:
        Refused: it cannot or must not be read.
    """
    os.close(open_file(path))


def writable_by(mode: int) -> str:
    """Return who beside the owner may write a file of this mode, "" when nobody may."""
    return "everybody" if mode & stat.S_IWOTH else "its group" if mode & stat.S_IWGRP else ""


def _check(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise Refused(f"{brief(path)} is not a regular file")
    if who := writable_by(mode):
        raise Refused(f"{brief(path)} may be written by {who}, who could let anybody in: chmod go-w {brief(path)}")
