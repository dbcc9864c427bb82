"""Where the control socket is, and how its file is made without giving anybody else a way in.

The file says who may connect (0600, or 0660 and a group), so it has its mode before it accepts anybody. What is there
already stays unless it is a socket of ours that nobody listens at any more: never a live one, never another kind of
file, never somebody else's.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gatekeeper.errors import GatekeeperError

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "control.sock"
SYSTEM_FOLDER = "/run/gatekeeper"
LONGEST_PATH = 107  # bytes, of sockaddr_un
BACKLOG = 128


class ControlError(GatekeeperError):
    """The control socket cannot be opened; the message names it and the cause."""


@dataclass(frozen=True, slots=True)
class Place:
    """A path, and the group whose members may connect (``None``: the owner and root alone).

    ``wanted``: somebody asked for it, so that it is an error when it cannot be had.
    """

    path: str
    group: str | None = None
    wanted: bool = True


def choose(option: str | None, setting: str | None, group: str | None, environment: Mapping[str, str]) -> Place | None:
    """Return where the socket is to be, ``None`` when there shall be none.

    ``option`` is the command line's and stands above the rule file's ``setting``; both are a path, ``off`` or ``None``.
    Without either it is in the folder that the service manager made for us, in /run/gatekeeper, or in the user's
    runtime directory.
    """
    path = option or setting
    if path == "off":
        return None
    if path is not None:
        return Place(os.path.abspath(path), group)
    folder = environment.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if not folder and os.geteuid() == 0:
        folder = SYSTEM_FOLDER
    if not folder and environment.get("XDG_RUNTIME_DIR"):
        folder = os.path.join(environment["XDG_RUNTIME_DIR"], "gatekeeper")
    return Place(os.path.join(folder, NAME), group, wanted=group is not None) if folder else None


def group_id(name: str) -> int:
    """Return the number of a group.

    Raises:
        ControlError: there is none of this name.
    """
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as err:
        raise ControlError(f'there is no group "{name}", which `control` names: create it, or name another') from err


def listen(path: str, gid: int | None) -> socket.socket:
    """Return a socket that listens at ``path`` and does not block; members of ``gid`` may connect too.

    Raises:
        ControlError: it cannot be had; nothing was changed that was there before.
    """
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ControlError(f"the path of the control socket is longer than {LONGEST_PATH} bytes: {path}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _prepare_folder(os.path.dirname(path))
        os.fchmod(sock.fileno(), 0o600)  # the file is born with this mode
        try:
            sock.bind(path)
        except OSError as err:
            if err.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(path)
        try:
            if gid is not None:
                _give_to_group(path, gid)
            os.chmod(path, 0o600 if gid is None else 0o660)
            sock.listen(BACKLOG)
        except OSError:
            os.unlink(path)
            raise
    except OSError as err:
        sock.close()
        raise ControlError(f"cannot open the control socket {path}: {err.strerror}") from err
    except BaseException:
        sock.close()
        raise
    return sock


def _give_to_group(path: str, gid: int) -> None:
    """Give a file of ours to a group: one that we are in, or that we may become. Held by tests/e2e/test_plan.py.

    Raises:
        OSError: neither.
    """
    if os.lstat(path).st_gid == gid:
        return  # nothing to ask for: where the hardened units take chown away, the service's own group works
    try:
        os.chown(path, -1, gid, follow_symlinks=False)
    except PermissionError:
        # root without CAP_CHOWN, which the service has given up; but CAP_SETGID it needs for its children.
        before = os.getegid()
        os.setegid(gid)
        try:
            os.chown(path, -1, gid, follow_symlinks=False)
        finally:
            os.setegid(before)


def remove(path: str, identity: tuple[int, int] | None) -> None:
    """Remove the file of a socket, unless another has taken its place (``identity`` is device and inode)."""
    with contextlib.suppress(OSError):
        if identity == identity_of(path):
            os.unlink(path)


def identity_of(path: str) -> tuple[int, int] | None:
    """Return device and inode of a file, ``None`` when there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _prepare_folder(folder: str) -> None:
    """Make the folder if only it is missing, and refuse one in which others could replace our socket by theirs."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o755)
    status = os.stat(folder)
    if status.st_mode & 0o002 and not status.st_mode & stat.S_ISVTX:
        raise ControlError(f"everybody may write in {folder}, so anybody could put another control socket there: choose another place")


def _remove_stale(path: str) -> None:
    status = os.lstat(path)
    if not stat.S_ISSOCK(status.st_mode):
        raise ControlError(f"{path} is there already and is no socket: remove it, or choose another place for the control socket")
    if status.st_uid != os.geteuid():
        raise ControlError(f"the socket {path} belongs to another user (uid {status.st_uid}): remove it, or choose another place")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # Whatever the answer is, unless nobody listens there any more, the socket is in use.
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise ControlError(f"the control socket {path} is in use: another gatekeeper runs with it")
    if identity_of(path) == (status.st_dev, status.st_ino):
        os.unlink(path)
