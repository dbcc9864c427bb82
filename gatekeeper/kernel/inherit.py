"""Sockets that were opened for us before we started: LISTEN_FDS, LISTEN_FDNAMES (socket activation, descriptor store)."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import MutableMapping

FIRST_FD = 3


@dataclass(slots=True)
class Inherited:
    """One descriptor as it came: ``name`` is the service manager's, ``sock`` belongs to whoever uses it."""

    name: str
    sock: socket.socket

    def describe(self) -> str:
        """Return name and address as people would write them."""
        address = self.sock.getsockname()
        if isinstance(address, tuple):
            host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
            address = f"{host}:{address[1]}"
        kind = "udp" if self.sock.type == socket.SOCK_DGRAM else "tcp"
        return f"{self.name} ({kind} {address})"


def take(environment: MutableMapping[str, str], files: dict[str, int] | None = None) -> list[Inherited]:
    """Return the sockets that were passed to this process, close-on-exec and non-blocking.

    The variables are removed from ``environment``, so that nothing we start takes them for its own. Descriptors that
    are not sockets go into ``files`` by their names; without it they are left alone. Empty when there are none, or
    when they were meant for another process.
    """
    count = environment.pop("LISTEN_FDS", "")
    pid = environment.pop("LISTEN_PID", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if not count.isascii() or not count.isdigit() or pid != str(os.getpid()):
        return []
    found = []
    for index in range(int(count)):
        fd = FIRST_FD + index
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                if files is not None and index < len(names) and names[index] not in files:
                    os.set_inheritable(fd, False)
                    files[names[index]] = fd
                continue
        except OSError:
            break
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        found.append(Inherited(names[index] if index < len(names) and names[index] else f"fd {fd}", sock))
    return found
