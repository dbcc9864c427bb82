"""What the service opens beside its listeners: the audit log and the state directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from typing import TYPE_CHECKING

from gatekeeper.errors import GatekeeperError

if TYPE_CHECKING:
    from collections.abc import Mapping

JOURNAL_SOCKET = "/run/systemd/journal/socket"
LOCK_FILE = "lock"


class PlaceError(GatekeeperError):
    """The audit log or the state directory cannot be used; the message names it and the cause."""


def open_audit(setting: str) -> int | None:
    """Return a descriptor that audit lines are written to, or ``None`` when they are off. The caller closes it.

    ``journald`` is a datagram socket connected to the journal's native one; a file is opened for appending.

    Raises:
        PlaceError: it cannot be opened.
    """
    if setting == "off":
        return None
    try:
        if setting == "stdout":
            return fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
        if setting == "journald":
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
                journal.connect(JOURNAL_SOCKET)
                return journal.detach()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        return os.open(setting, flags, 0o640)
    except OSError as err:
        place = {"journald": "the journal", "stdout": "standard output"}.get(setting, setting)
        raise PlaceError(f"cannot write the audit log to {place}: {err.strerror}") from err


def audit_kind(setting: str) -> str:
    """Return the word the observer knows: ``stdout``, ``journald``, ``file`` or ``off``."""
    return setting if setting in {"stdout", "journald", "off"} else "file"


def state_directory(option: str | None, setting: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the state directory: as the command line says, else the rule file, else the service manager; ``None``: none."""
    given = option or setting or environment.get("STATE_DIRECTORY", "").split(":")[0]
    return os.path.abspath(given) if given else None


def lock_state(directory: str) -> int:
    """Take the state directory for this process, making it if need be; return the lock, held until it is closed.

    Raises:
        PlaceError: another process has it, or it cannot be written.
    """
    path = os.path.join(directory, LOCK_FILE)
    try:
        os.makedirs(directory, mode=0o750, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except OSError as err:
        raise PlaceError(f"cannot use the state directory {directory}: {err.strerror}") from err
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as err:
        if err.errno not in {errno.EAGAIN, errno.EACCES}:
            os.close(fd)
            raise PlaceError(f"cannot use the state directory {directory}: {err.strerror}") from err
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise PlaceError(
            f"the state directory {directory} is in use by another gatekeeper, pid {owner or 'unknown'}"
        ) from err
    return fd
