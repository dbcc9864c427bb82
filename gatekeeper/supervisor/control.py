"""The control socket: requests of operators as JSON lines, one at a time for each client, and their answers.

    request   {"v":1,"op":"status", ...}                 at most 64 KiB, with a newline
    answer    {"v":1,"rows":[...]}  {"v":1,"progress":"..."}    any number of them, then exactly one of
              {"v":1,"ok":true,"result":{...}}  {"v":1,"ok":false,"error":"...","code":1|2|3}

A client may be broken or hostile although it may connect: nothing here waits for it, what it may send, hold open and
leave unread is bounded, and a client that goes past a bound is the only one that notices. Which requests there are is
not known here: every part of the supervisor registers its own in `Control.handlers`.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import time
import traceback
from typing import TYPE_CHECKING, Any

from gatekeeper.supervisor import control_place
from gatekeeper.supervisor.control_client import BadRequest, Client, Limits, Peer, Request, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.loop import Loop

__all__ = ["BadRequest", "Control", "Limits", "Peer", "Request"]

ACCEPT_PAUSE_S = 1.0  # while descriptors are exhausted the socket stays readable, and the loop would spin
MOST_ACCEPTS = 16  # in one turn
MOST_BUCKETS = 1000
LOOK_EVERY_S = 1.0  # whether the socket's file is still there

_PEERCRED = struct.Struct("iII")
_USUAL = Limits()
_SO_PEERGROUPS = 59  # asm-generic/socket.h; Python's socket has no name for it


class Control:
    """The server. Without `open` it serves nobody."""

    def __init__(self, loop: Loop, log: Log, limits: Limits = _USUAL) -> None:
        self.handlers: dict[str, Callable[[Request], None]] = {}
        self.path: str | None = None
        self.place: control_place.Place | None = None
        self.dropped = 0  # clients that went past a bound
        self.limits = limits
        self.loop = loop
        self._log = log
        self.clients: set[Client] = set()
        self._socket: socket.socket | None = None
        self._gid: int | None = None
        self._identity: tuple[int, int] | None = None
        self._buckets: dict[int, tuple[float, float]] = {}  # uid -> requests it may send at once, as of when
        self._sweeping = False
        self._looking = False
        self._unreachable = False  # which was said

    def open(self, place: control_place.Place, listening: socket.socket | None = None) -> None:
        """Serve at a place; ``listening`` is a socket that listens there already and is taken over.

        Raises:
            ControlError: it cannot be had.
        """
        self._gid = control_place.group_id(place.group) if place.group is not None else None
        self._socket = listening or control_place.listen(place.path, self._gid)
        self._socket.setblocking(False)
        self.path, self.place = place.path, place
        self._identity = control_place.identity_of(place.path)
        self.loop.watch(self._socket.fileno(), self._accept)
        if not self._looking:
            self._looking = True
            self.loop.later(LOOK_EVERY_S, self._look)

    def begin(self, option: str | None, settings: Mapping[str, Any]) -> None:
        """Serve where the command line (``option``) or the rule file's settings say, or at the default place.

        Raises:
            ControlError: it was asked for and cannot be had. The default that cannot be had is a warning.
        """
        wanted = settings["control"]
        place = control_place.choose(option, wanted["socket"], wanted["group"], os.environ)
        if place is not None:
            try:
                self.open(place)
            except control_place.ControlError as err:
                if place.wanted:
                    raise
                self._log.warning(f"{err}; commands such as `gatekeeper status` will find nobody")

    def take_over(self, path: str, group: str | None, listening: socket.socket) -> None:
        """Go on at a socket of before an upgrade; without it when that cannot be, which is a warning."""
        try:
            self.open(control_place.Place(path, group), listening)
        except control_place.ControlError as err:
            listening.close()
            self._log.warning(f"{err}; nobody can command this daemon")

    def fileno(self) -> int | None:
        """Return the descriptor of the listening socket, ``None`` when there is none."""
        return self._socket.fileno() if self._socket is not None else None

    def close(self) -> None:
        """Hang up on everybody and remove the socket's file."""
        for client in list(self.clients):
            client.close()
        if self._socket is not None and self.path is not None:
            self.loop.unwatch(self._socket.fileno())
            control_place.remove(self.path, self._identity)
            self._socket.close()
            self._socket = None

    def handle(self, request: Request) -> None:
        """Let the handler of a request begin."""
        handler = self.handlers.get(request.op)
        if handler is None:
            request.fail(f'this daemon knows no "{request.op[:100]}"; it knows {", ".join(sorted(self.handlers))}')
            return
        try:
            handler(request)
        except BadRequest as err:
            request.fail(str(err), 2)
        except Exception:  # noqa: BLE001 - one request's turn: the service goes on, whatever an operator asked for
            self._log.plain(traceback.format_exc(), error=True)
            request.fail(f"{request.op} failed: the daemon's log says why")

    def note(self, request: Request, what: str) -> None:
        """Let the service log say who has done what."""
        self._log.info(f"uid {request.peer.uid} (pid {request.peer.pid}) {what}")

    def make_room(self) -> None:
        """Drop whoever has most to read, while all together keep too much of our memory."""
        while sum(client.unsent_bytes for client in self.clients) > self.limits.all_unsent_bytes:
            max(self.clients, key=lambda client: client.unsent_bytes).drop()

    def wait_s(self, uid: int) -> float:
        """Take one request from what a user may send; return how long it must wait for that."""
        now, rate_per_s, burst = time.monotonic(), self.limits.rate_per_s, self.limits.burst
        if len(self._buckets) > MOST_BUCKETS:
            self._buckets = {who: have for who, have in self._buckets.items() if now - have[1] < burst / rate_per_s}
        tokens, since = self._buckets.get(uid, (burst, now))
        tokens = min(burst, tokens + (now - since) * rate_per_s)
        if tokens < 1.0:
            return (1.0 - tokens) / rate_per_s
        self._buckets[uid] = tokens - 1.0, now
        return 0.0

    def _look(self) -> None:
        """Open the socket anew when its file is gone, since somebody has cleared the folder: nobody would reach us again."""
        if self._socket is None or self.place is None:
            return
        self.loop.later(LOOK_EVERY_S, self._look)
        if control_place.identity_of(self.place.path) is not None:
            return
        old = self._socket
        try:
            self.open(self.place)
        except control_place.ControlError as err:
            if not self._unreachable:
                self._unreachable = True
                self._log.error(f"the control socket's file is gone, and nobody can command this daemon: {err}")
            return
        self.loop.unwatch(old.fileno())
        old.close()
        self._unreachable = False
        self._log.warning(f"the control socket's file was gone; {self.place.path} is open again")

    def _accept(self) -> None:
        for _ in range(MOST_ACCEPTS):
            if self._socket is None:
                return
            try:
                sock, _address = self._socket.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue
            except OSError:
                self.loop.unwatch(self._socket.fileno())
                self.loop.later(ACCEPT_PAUSE_S, self._accept_again)
                return
            self._welcome(sock)

    def _accept_again(self) -> None:
        if self._socket is not None:
            self.loop.watch(self._socket.fileno(), self._accept)

    def _welcome(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            peer = self._peer_of(sock)
        except OSError:
            sock.close()
            return
        refusal = None
        if peer is None:
            refusal = "you may not: only root, the daemon's own user and members of the group that `control` names may"
        elif len(self.clients) >= self.limits.clients + (self.limits.reserved if peer.privileged else 0):
            refusal = "too many clients of the control socket"
            self.dropped += 1
        if peer is None or refusal is not None:
            with sock, contextlib.suppress(OSError):
                sock.send(encode({"ok": False, "error": refusal, "code": 3}))
            return
        self.clients.add(Client(self, sock, peer))
        if not self._sweeping:
            self._sweeping = True
            self.loop.later(1.0, self._sweep)

    def _peer_of(self, sock: socket.socket) -> Peer | None:
        pid, uid, gid = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        if uid in {0, os.geteuid()}:
            return Peer(pid, uid, gid, privileged=True)
        groups = array.array("I", [gid])
        with contextlib.suppress(OSError):  # more than 256
            groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024))
        return Peer(pid, uid, gid, privileged=False) if self._gid is not None and self._gid in groups else None

    def _sweep(self) -> None:
        now = time.monotonic()
        for client in list(self.clients):
            client.check(now)
        self._sweeping = bool(self.clients)
        if self._sweeping:
            self.loop.later(1.0, self._sweep)
