"""Asking the running daemon: the client's side of the control socket.

    with daemon.connect(control) as gate:
        answer = gate.ask("status")

What goes wrong is raised as click errors, so that a command that lets them pass ends with the right exit code.
"""

from __future__ import annotations

import array
import errno
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import click

from gatekeeper.cli.terminal import CANNOT, CannotDo

VERSION = 1
VARIABLE = "GATEKEEPER_CONTROL"
CONNECT_S = 5
PATIENCE_S = 30.0
MOST_FDS = 16
CHUNK_BYTES = 1 << 18

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Unreachable(CannotDo):
    """There is no daemon at the control socket, or it went away before it answered."""


class Refused(click.ClickException):
    """The daemon did not do it; the message is its own, and so is the exit code."""

    exit_code = CANNOT

    def __init__(self, message: str, code: int = CANNOT) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]  # click declares it for the class, and reads it from the instance


@dataclass(slots=True)
class Answer:
    """What the daemon answered. ``fds`` belong to whoever asked."""

    result: dict[str, Any]
    fds: list[int] = field(default_factory=list)


class Daemon:
    """A connection to the daemon, for several requests one after the other. Owns its socket."""

    def __init__(self, sock: socket.socket, path: str) -> None:
        self.path = path
        self._socket = sock
        self._received = bytearray()
        self._fds: list[int] = []

    def ask(
        self,
        op: str,
        rows: Callable[[list[Any]], None] | None = None,
        progress: Callable[[str], None] | None = None,
        fds: Sequence[int] = (),
        **args: Any,
    ) -> Answer:
        """Send one request and return its answer; parts of it are given to ``rows`` and ``progress`` as they come.

        ``args`` that are ``None`` are left out.

        Raises:
            Refused: the daemon said no.
            Unreachable: it is gone, or said nothing for longer than our patience.
        """
        try:
            self._send(_encode(op, args), fds)
            for message in self._messages():
                if "ok" in message:
                    return self._answer(message)
                if rows is not None and isinstance(message.get("rows"), list):
                    rows(message["rows"])
                elif progress is not None and "progress" in message:
                    progress(str(message["progress"]))
        except OSError as err:
            raise self._lost(err) from err
        raise self._lost()

    def begin(self, op: str, fds: Sequence[int] = (), **args: Any) -> None:
        """Send a request whose answer comes only at its end, and return once the daemon has begun with it.

        Raises:
            Refused: the daemon said no.
            Unreachable: it is gone, or said nothing for longer than our patience.
        """
        try:
            self._send(_encode(op, args), fds)
            message = next(self._messages(), None)
        except OSError as err:
            raise self._lost(err) from err
        if message is None:
            raise self._lost()
        if "ok" in message:
            self._answer(message)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
        self._close_fds()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _lost(self, err: OSError | None = None) -> Unreachable:
        if isinstance(err, TimeoutError):
            return Unreachable(f"the daemon at {self.path} does not answer")
        return Unreachable(f"the daemon at {self.path} hung up before it answered")

    def _answer(self, message: dict[str, Any]) -> Answer:
        fds, self._fds = self._fds, []
        answer = Answer(message.get("result") or {}, fds)
        if message["ok"] is True:
            return answer
        for fd in fds:
            os.close(fd)
        code = message.get("code")
        raise Refused(str(message.get("error")), code if code in {1, 2, 3} else CANNOT)

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        try:
            if fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                data = data[self._socket.sendmsg([data], rights) :]
            self._socket.sendall(data)
        except BrokenPipeError:
            pass  # what it said before it hung up tells why

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            end = self._received.find(b"\n")
            if end >= 0:
                line = bytes(self._received[:end])
                del self._received[: end + 1]
                yield self._decode(line)
            elif not self._read():
                return

    def _read(self) -> bool:
        """Take what has arrived; say whether there was anything before the end."""
        searched = len(self._received)
        while self._received.find(b"\n", searched) < 0:
            searched = len(self._received)
            data, ancillary, _flags, _address = self._socket.recvmsg(
                CHUNK_BYTES, socket.CMSG_SPACE(MOST_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._fds.extend(memoryview(payload[: len(payload) // 4 * 4]).cast("i"))
            if not data:
                return False
            self._received += data
        return True

    def _decode(self, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise Unreachable(f"what answers at {self.path} does not speak our language: is it gatekeeper?")
        return message

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def connect(path: str | None, patience_s: float | None = PATIENCE_S) -> Daemon:
    """Return a connection to the daemon at ``path``, or where it is by default.

    ``patience_s`` is how long it may say nothing while we wait for an answer; ``None``: for ever.

    Raises:
        Unreachable: nobody serves there, or we may not connect; the message says what to do.
    """
    if path == "off":
        raise Unreachable(f"the control socket is off (--control or {VARIABLE})")
    places = [path] if path else default_places()
    for place in places:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Not settimeout: then a full queue of the daemon would be an error at once.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", CONNECT_S, 0))
        try:
            sock.connect(place)
        except OSError as err:
            sock.close()
            if err.errno in {errno.ENOENT, errno.ECONNREFUSED} and place != places[-1]:
                continue
            raise Unreachable(_why(err, places, place)) from err
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 0))
        sock.settimeout(patience_s)
        return Daemon(sock, place)
    raise Unreachable(_why(FileNotFoundError(errno.ENOENT, ""), places, ""))


def default_places() -> list[str]:
    """Return where a daemon's control socket may be, in the order in which they are tried."""
    places = ["/run/gatekeeper/control.sock"]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.geteuid() != 0:
        places.insert(0, os.path.join(runtime, "gatekeeper", "control.sock"))
    return places


def control_option(command: Decorated) -> Decorated:
    """Give a command the option ``--control``."""
    return click.option(
        "--control", envvar=VARIABLE, metavar="PATH", help=f"The daemon's control socket; also {VARIABLE}.  [default: {default_places()[0]}]"
    )(command)


def _encode(op: str, args: dict[str, Any]) -> bytes:
    request = {"v": VERSION, "op": op} | {key: value for key, value in args.items() if value is not None}
    return json.dumps(request, separators=(",", ":")).encode() + b"\n"


def _why(err: OSError, places: list[str], place: str) -> str:
    if err.errno in {errno.ENOENT, errno.ECONNREFUSED}:
        return f"no daemon answers at {' or '.join(places)}: is it running? (--control or {VARIABLE} say where)"
    if err.errno in {errno.EACCES, errno.EPERM}:
        return f"you may not connect to {place}: become root, or a member of the group that `control` names"
    if err.errno == errno.EAGAIN:
        return f"the daemon at {place} does not answer"
    return f"cannot connect to {place}: {err.strerror or err}"
