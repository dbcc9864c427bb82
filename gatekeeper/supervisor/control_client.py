"""One client of the control socket: its requests, one at a time, and the answers that it has not taken yet."""

from __future__ import annotations

import array
import json
import os
import select
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatekeeper.errors import GatekeeperError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gatekeeper.supervisor.control import Control

VERSION = 1
MOST_REQUEST_BYTES = 1 << 16  # its newline included
MOST_FDS = 4  # with one request
_KERNEL_MOST_FDS = 253  # whatever comes is seen, and closed


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of us clients may use. ``rate_per_s`` and ``burst`` are requests of one user."""

    clients: int = 64
    reserved: int = 8  # further clients, for root and our own user: the others must not lock these out
    rate_per_s: float = 50.0
    burst: float = 100.0
    idle_s: float = 30.0  # without a whole request
    stuck_s: float = 10.0  # with an answer of which nothing is taken
    unsent_bytes: int = 64 << 20  # of one client: about 130,000 sessions ahead of a reader that is slow for a moment
    all_unsent_bytes: int = 128 << 20


class BadRequest(GatekeeperError):
    """The request makes no sense; the message says why. Raised by handlers; the client gets it with code 2."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who sent a request, as the kernel says. ``privileged``: root or our own user."""

    pid: int
    uid: int
    gid: int
    privileged: bool


class Request:
    """One request, to be answered once by `done` or `fail`, now or later. ``fds`` are closed after the answer."""

    def __init__(self, client: Client, op: str, args: dict[str, Any], fds: list[int]) -> None:
        self.op = op
        self.args = args
        self.peer = client.peer
        self.fds = fds
        self.gone = False  # nobody waits for the answer any more, or it was given
        self.when_gone: Callable[[], None] = lambda: None
        self._client = client

    def rows(self, rows: list[Any]) -> None:
        """Send a part of the answer."""
        self._say({"rows": rows})

    def progress(self, text: str) -> None:
        """Tell people how far it is."""
        self._say({"progress": text})

    def done(self, result: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Answer that it was done. ``fds`` arrive as copies and stay the caller's."""
        self._say({"ok": True, "result": result}, fds, last=True)

    def fail(self, text: str, code: int = 3) -> None:
        """Answer that it was not done; ``code`` is the exit code of the command that asked."""
        self._say({"ok": False, "error": text, "code": code}, last=True)

    def _say(self, message: dict[str, Any], fds: Sequence[int] = (), *, last: bool = False) -> None:
        if not self.gone:
            if last:
                self._client.answered()
            self._client.send(message, fds)

    def close_fds(self) -> None:
        """Close the descriptors that came along, before the answer."""
        close_foreign(self.fds)
        self.fds = []

    def close(self) -> None:
        """Note that nobody waits any more."""
        if not self.gone:
            self.gone = True
            self.close_fds()
            self.when_gone()


class Client:
    """One connection. Reads no further than the request that is being answered."""

    def __init__(self, control: Control, sock: socket.socket, peer: Peer) -> None:
        self.peer = peer
        self._control = control
        self._sock = sock
        self._received = bytearray()
        self._fds: list[int] = []
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self.unsent_bytes = 0
        self._request: Request | None = None
        self._progressed = time.monotonic()
        self._advancing = False
        self._paused = False  # it asks too often
        self._leaving = False  # hang up once all is sent
        self._closed = False
        self._watch()

    def answered(self) -> None:
        """Note that the request was answered, and go on with the next soon."""
        if self._request is not None:
            request, self._request = self._request, None
            request.close()
        if not self._advancing:
            self._control.loop.later(0.0, self._advance)

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one message, or keep it until the client takes it, or drop the client that takes too little."""
        if self._closed:
            return
        data = encode(message)
        try:
            self._unsent.append((memoryview(data), [os.dup(fd) for fd in fds]))
        except OSError:
            self.drop()
            return
        self.unsent_bytes += len(data)
        self._flush()
        if self.unsent_bytes > self._control.limits.unsent_bytes:
            self.drop()
        elif self._unsent:
            self._control.make_room()
        self._watch()

    def check(self, now: float) -> None:
        """Hang up when nothing has happened for too long."""
        silent_s = now - self._progressed
        if self._unsent:
            if silent_s > self._control.limits.stuck_s:
                self.drop()
        elif self._request is None and not self._paused and silent_s > self._control.limits.idle_s:
            self.close()

    def close(self) -> None:
        """Hang up."""
        if self._closed:
            return
        self._closed = True
        self._control.clients.discard(self)
        self._control.loop.unwatch(self._sock.fileno())
        self._sock.close()
        close_foreign(self._fds)
        for _data, fds in self._unsent:
            _close(fds)
        self._unsent.clear()
        self.unsent_bytes = 0
        if self._request is not None:
            request, self._request = self._request, None
            request.close()

    def drop(self) -> None:
        """Hang up on a client that went past a bound."""
        self._control.dropped += 1
        self.close()

    def _wants_more(self) -> bool:
        return self._request is None and not (self._unsent or self._paused or self._leaving)

    def _watch(self) -> None:
        if not self._closed:
            self._control.loop.watch(
                self._sock.fileno(), self._on_event, read=self._wants_more(), write=bool(self._unsent)
            )

    def _on_event(self) -> None:
        if self._unsent:
            self._flush()
        self._advance()  # with what has arrived already: behind it there may be the end
        if self._closed:
            return
        if self._wants_more():
            self._read()
            self._advance()
        elif not self._unsent and _hung_up(self._sock):
            self.close()

    def _read(self) -> None:
        try:
            # One byte more than a request may have, so that a longer one is told from a full one.
            data, ancillary, _flags, _address = self._sock.recvmsg(
                MOST_REQUEST_BYTES + 1 - len(self._received), socket.CMSG_SPACE(_KERNEL_MOST_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.extend(memoryview(payload[: len(payload) // 4 * 4]).cast("i"))
        if len(self._fds) > MOST_FDS:
            self.drop()
            return
        if not data:
            self.close()
            return
        self._received += data

    def _advance(self) -> None:
        """Begin with the next request, if there is one and nothing of earlier answers is left to send."""
        if self._advancing:
            return
        self._advancing = True
        while not self._closed and self._wants_more():
            end = self._received.find(b"\n")
            if end < 0 and len(self._received) <= MOST_REQUEST_BYTES:
                break
            if not 0 <= end < MOST_REQUEST_BYTES:
                self._control.dropped += 1
                self._leaving = True  # where the next request begins is unknown
                self.send({"ok": False, "error": f"a request may have {MOST_REQUEST_BYTES} bytes", "code": 2})
                break
            wait_s = self._control.wait_s(self.peer.uid)
            if wait_s:
                self._paused = True
                self._control.loop.later(wait_s, self._resume)
                break
            line = bytes(self._received[:end])
            del self._received[: end + 1]
            self._progressed = time.monotonic()
            self._begin(line)
        self._advancing = False
        if self._leaving and not self._unsent:
            self.close()
        self._watch()

    def _begin(self, line: bytes) -> None:
        fds, self._fds = self._fds, []
        try:
            message = _decode(line)
        except (ValueError, RecursionError) as err:
            close_foreign(fds)
            self.send({"ok": False, "error": f"the request is not a JSON object: {err}", "code": 2})
            return
        refusal, code = None, 2
        version, op = message.pop("v", None), message.pop("op", None)
        if type(version) is not int or version != VERSION:
            refusal, code = f'this daemon speaks version {VERSION} of the protocol: send "v":{VERSION}', 3
        elif not isinstance(op, str):
            refusal = 'a request names what it wants, like "op":"status"'
        if refusal is not None or not isinstance(op, str):
            close_foreign(fds)
            self.send({"ok": False, "error": refusal, "code": code})
            return
        self._request = Request(self, op, message, fds)
        self._control.handle(self._request)

    def _resume(self) -> None:
        self._paused = False
        if not self._closed:
            self._advance()

    def _flush(self) -> None:
        while self._unsent and not self._closed:
            data, fds = self._unsent[0]
            try:
                if fds:
                    rights = array.array("i", fds)
                    sent = self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                else:
                    sent = self._sock.send(data)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            _close(fds)
            self._progressed = time.monotonic()
            self.unsent_bytes -= sent
            if sent < len(data):
                self._unsent[0] = data[sent:], []
                return
            self._unsent.popleft()


def encode(message: dict[str, Any]) -> bytes:
    """Return a message as the client reads it: one line."""
    return json.dumps({"v": VERSION, **message}, separators=(",", ":")).encode() + b"\n"


def close_foreign(fds: Sequence[int]) -> None:
    """Close descriptors that somebody else sent. Whatever they are, closing them may take long: that is for a thread."""
    if fds:
        threading.Thread(target=_close, args=(tuple(fds),), name="close", daemon=True).start()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _decode(line: bytes) -> dict[str, Any]:
    message = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(message, dict):
        raise ValueError("it is something else")  # noqa: TRY004 - the caller handles one error
    return message


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))
