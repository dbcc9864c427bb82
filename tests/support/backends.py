"""Small backends of our own, which count what reaches them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 20.0


def echo(connection: socket.socket) -> None:
    """Send back what comes, and then the end of the stream."""
    while data := connection.recv(1 << 16):
        connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


def banner(connection: socket.socket) -> None:
    """Speak first, then echo."""
    connection.sendall(b"hello, who is there?\r\n")
    echo(connection)


class TcpBackend:
    """A listening socket whose connections are each served by ``serve`` in a thread; an error ends that connection only.

    ``address`` is what a rule file takes. ``connections`` counts every connection that the kernel completed.
    """

    def __init__(
        self, serve: Callable[[socket.socket], None] = echo, host: str = "127.0.0.1", path: Path | None = None
    ) -> None:
        if path is not None:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(str(path))
            path.chmod(0o777)
            self._listener.listen(1024)
            self.address = f"unix:{path}"
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, 0), family=family, backlog=1024)
            self.port: int = self._listener.getsockname()[1]
            self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._serve = serve
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _peer = self._listener.accept()
            except OSError:  # closed
                return
            connection.settimeout(PATIENCE_S)
            with self._lock:
                self.connections += 1
                self._open.add(connection)
            thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
            self._threads = [known for known in self._threads if known.is_alive()]
            self._threads.append(thread)
            thread.start()

    def _run(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._serve(connection)
        with self._lock:
            self._open.discard(connection)
            connection.close()

    def close(self) -> None:
        """Stop listening and end all connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._acceptor.join(PATIENCE_S)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class UdpBackend:
    """Answers every datagram with ``answer(datagram)``: a list of datagrams. Counts datagrams and remembers their senders."""

    def __init__(
        self, answer: Callable[[bytes], list[bytes]] = lambda datagram: [datagram], host: str = "127.0.0.1", port: int = 0
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.bind((host, port))
        self.port: int = self._socket.getsockname()[1]
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._answer = answer
        self._closing = False
        self.datagrams = 0
        self.senders: set[Any] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                datagram, sender = self._socket.recvfrom(1 << 16)
            except OSError:  # an ICMP error about an earlier answer, or closed
                if self._closing:
                    return
                continue
            if self._closing:
                return
            self.datagrams += 1
            self.senders.add(sender)
            for reply in self._answer(datagram):
                with contextlib.suppress(OSError):
                    self._socket.sendto(reply, sender)

    def close(self) -> None:
        self._closing = True
        with socket.socket(self._socket.family, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", self._socket.getsockname()[:2])
        self._thread.join(PATIENCE_S)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def reset(connection: socket.socket) -> None:
    """Close with RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_to_end(connection: socket.socket) -> bytes:
    """Return all that comes until the end of the stream."""
    parts = []
    while part := connection.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


class Silent:
    """A listening address that completes no handshake: its queue is full, so the kernel ignores every further SYN.

    `wake` lets them in after all: the kernel's own retries connect within a second or two.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._fillers: list[socket.socket] = []
        while True:
            filler = socket.socket()
            filler.settimeout(0.3)
            self._fillers.append(filler)
            try:
                filler.connect(self._listener.getsockname())
            except TimeoutError:
                return

    def wake(self) -> socket.socket:
        """Return the first connection that is none of our own fillers; the caller owns it."""
        self._listener.settimeout(PATIENCE_S)
        own = {filler.getsockname() for filler in self._fillers}
        while True:
            connection, peer = self._listener.accept()
            if peer not in own:
                connection.settimeout(PATIENCE_S)
                return connection
            connection.close()

    def close(self) -> None:
        for filler in self._fillers:
            filler.close()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
