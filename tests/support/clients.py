"""Clients that see a verdict from outside, from many sources."""

from __future__ import annotations

import fcntl
import ipaddress
import select
import socket
import sys
import termios
from collections.abc import Iterable

from tests.support.network import RemoteNetwork

PATIENCE_S = 15.0


class Sources:
    """Makes client sockets bound to a source address: one of this host, or one of the remote network."""

    def __init__(self, remote: RemoteNetwork | None = None) -> None:
        self._remote = remote

    def make(self, source: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """Return a socket bound to ``source`` and a port of the kernel's choice; the caller owns it."""
        address = ipaddress.ip_address(source)
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        if self._remote is None or address.is_loopback:
            made = socket.socket(family, kind)
        else:
            made = self._remote.make_socket(family, kind)
        made.settimeout(PATIENCE_S)
        if kind == socket.SOCK_STREAM:
            # Only then the kernel may use one port for many destinations, and an earlier run's ports again.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((source, 0))
        return made

    def connect(self, source: str, host: str, port: int) -> socket.socket:
        """Return a TCP connection from ``source``."""
        made = self.make(source)
        try:
            made.connect((host, port))
        except BaseException:
            made.close()
            raise
        return made


    def is_refused(self, source: str, host: str, port: int) -> bool:
        """Whether a connection is reset, while it is made or before it is answered."""
        try:
            with self.connect(source, host, port) as made:
                return ask(made) == b""
        except (ConnectionResetError, BrokenPipeError):
            return True


def ask(connection: socket.socket, words: bytes = b"are you there?") -> bytes:
    """Send ``words`` and return as many bytes of the answer; fewer when it ends before.

    Raises:
        ConnectionError: the connection was reset.
    """
    connection.sendall(words)
    answer = b""
    while len(answer) < len(words) and (part := connection.recv(len(words) - len(answer))):
        answer += part
    return answer


def send_and_end(connection: socket.socket, data: bytes) -> None:
    """Send ``data`` and say that nothing follows."""
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


def has_news(connection: socket.socket) -> bool:
    """Whether bytes, an end or a reset have arrived."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def seen_over_tcp(connection: socket.socket) -> str:
    """Say what an echo client sees on a connection that was judged already.

    ``allow``: the echo. ``reset``: the connection was reset before we said anything. ``silence``: it stood there without
    a word, and nobody was behind it when we spoke. ``end``: a clean end of stream, which no verdict may look like.
    """
    try:
        if has_news(connection):
            return "end" if connection.recv(1) == b"" else "noise"
    except ConnectionResetError:
        return "reset"
    try:
        return "allow" if ask(connection, b"ping") == b"ping" else "end"
    except (ConnectionResetError, BrokenPipeError):
        return "silence"


class Pair:
    """A client and the backend's end of its session, through a gate."""

    def __init__(self, port: int, server: socket.socket) -> None:
        self.client = Sources().connect("127.0.0.1", "127.0.0.1", port)
        self.backend, _peer = server.accept()
        self.backend.settimeout(PATIENCE_S)

    def ends(self, backend_first: bool) -> tuple[socket.socket, socket.socket]:
        """Return (this end, the other end)."""
        return (self.backend, self.client) if backend_first else (self.client, self.backend)

    def close(self) -> None:
        self.client.close()
        self.backend.close()


def unacknowledged(sock: socket.socket) -> int:
    """Return how many bytes the other host has not acknowledged yet (SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def nobody_listens(port: int, host: str = "127.0.0.1") -> bool:
    """Whether the kernel itself refuses connections."""
    with socket.socket() as client:
        client.settimeout(PATIENCE_S)
        return client.connect_ex((host, port)) != 0


def close_all(sockets: Iterable[socket.socket]) -> None:
    """Close many sockets."""
    for each in sockets:
        each.close()
