"""Who holds an address: for the message that says it is taken.

What /proc lets us see: the sockets of this network namespace, and the descriptors of processes of our own user (of
every user, for root).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pwd
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gatekeeper.policy.model import Endpoint

_PROC = Path("/proc")
_LONGEST_COMMAND = 80


@dataclass(frozen=True, slots=True)
class Owner:
    """A socket that is in the way. ``pid`` and ``command`` are ``None`` when the process cannot be seen.

    ``uid`` is ``None`` when /proc does not say (unix sockets). ``certain`` is false for a guess: a gatekeeper lets
    nobody of its own user look into it.
    """

    inode: int
    uid: int | None
    pid: int | None
    command: str | None
    certain: bool = True

    def __str__(self) -> str:
        process = f"pid {self.pid} ({self.command})"
        if self.pid is not None and self.certain:
            return process
        text = "a process"
        if self.uid is not None:
            try:
                text += f" of {pwd.getpwuid(self.uid).pw_name}"
            except KeyError:
                text += f" of uid {self.uid}"
        text += " that we may not look into"
        return text if self.pid is None else f"{text}, probably {process}"


def owner_of(endpoint: Endpoint) -> Owner | None:
    """Return who holds the address of ``endpoint``, or one that overlaps it; ``None`` when nobody can be found.

    Of several processes that share the socket the oldest is named: the one that the others were started by.
    """
    sockets = conflicting(endpoint)
    if not sockets:
        return None
    holders = sorted(_holders(set(sockets)))
    if not holders:
        inode, uid = next(iter(sockets.items()))
        guesses = sorted(_supervisors(uid))
        pid = guesses[0][1] if guesses else None
        return Owner(inode, uid, pid, None if pid is None else _command(pid), certain=False)
    _age, pid, inode = holders[0]
    return Owner(inode, sockets[inode], pid, _command(pid))


def conflicting(endpoint: Endpoint) -> dict[int, int | None]:
    """Return inode -> uid of every socket whose address keeps us from binding ``endpoint``.

    Connections count only when nobody listens there: an ephemeral port can be in the way, but those of a listener are
    not the point.
    """
    if endpoint.family == 0:
        return dict.fromkeys(_unix_inodes(endpoint.host))
    wanted = ipaddress.ip_address(endpoint.host)
    rows = [
        (listens, inode, uid)
        for version in (4, 6)
        for address, listens, uid, inode in _inet_rows(endpoint.protocol, version, endpoint.port)
        if _overlap(wanted, address)
    ]
    listening = [row for row in rows if row[0]]
    return {inode: uid for _listens, inode, uid in listening or rows}


def inode_of(sock: socket.socket) -> int:
    """Return the number under which /proc/net lists ``sock``."""
    return os.fstat(sock.fileno()).st_ino


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _overlap(wanted: _Address, held: _Address) -> bool:
    if isinstance(held, ipaddress.IPv6Address) and held.ipv4_mapped is not None:
        held = held.ipv4_mapped
    if wanted.version != held.version:
        # An IPv6 wildcard may hold the IPv4 port as well; /proc does not say, but somebody is in the way.
        return held.version == 6 and held.is_unspecified
    return wanted == held or wanted.is_unspecified or held.is_unspecified


def _inet_rows(protocol: str, version: int, port: int) -> Iterator[tuple[_Address, bool, int, int]]:
    """Yield (address, is a listener, uid, inode) for each socket on a port that a process has open."""
    path = _PROC / "net" / (protocol if version == 4 else f"{protocol}6")
    mark = f":{port:04X} "
    with contextlib.suppress(OSError):
        for line in path.read_text("ascii").splitlines():
            if mark not in line:  # a busy host has very many rows
                continue
            fields = line.split()
            host, _, local_port = fields[1].partition(":")
            if int(local_port, 16) == port and int(fields[9]):
                yield _address(host), fields[3] in {"0A", "07"}, int(fields[7]), int(fields[9])


def _address(text: str) -> _Address:
    """Read an address as /proc/net prints it: 32-bit words in the machine's byte order."""
    words = bytes.fromhex(text)
    if sys.byteorder == "little":
        words = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
    return ipaddress.ip_address(words)


def _unix_inodes(path: str) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for line in (_PROC / "net/unix").read_text(errors="replace").splitlines()[1:]:
            fields = line.split(None, 7)
            if len(fields) == 8 and fields[7] == path:
                yield int(fields[6])


def _holders(inodes: set[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (start time, pid, inode) for each process that has one of the sockets open."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for pid in filter(str.isdigit, os.listdir(_PROC)):
        with contextlib.suppress(OSError):  # it ended, or is not ours to look into
            for fd in os.listdir(_PROC / pid / "fd"):
                inode = wanted.get(os.readlink(_PROC / pid / "fd" / fd))
                if inode is not None:
                    yield _start_time(pid), int(pid), inode
                    break


def _supervisors(uid: int | None) -> Iterator[tuple[int, int]]:
    """Yield (start time, pid) for each other process of a user whose command line is that of `gatekeeper run`."""
    for pid in filter(str.isdigit, os.listdir(_PROC)):
        with contextlib.suppress(OSError):
            user = (_PROC / pid / "status").read_text(errors="replace").partition("\nUid:")[2].split()[0]
            if uid in {None, int(user)} and int(pid) != os.getpid() and "gatekeeper run" in _command(int(pid)):
                yield _start_time(pid), int(pid)


def _start_time(pid: str) -> int:
    fields = (_PROC / pid / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return int(fields[19])


def _command(pid: int) -> str:
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
        text = b" ".join(words).decode(errors="replace").strip()
        text = text or (_PROC / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return "already gone"
    # What other people's processes call themselves must not reach a terminal unfiltered.
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= _LONGEST_COMMAND else text[: _LONGEST_COMMAND - 1] + "…"
