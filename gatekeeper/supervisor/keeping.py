"""Sockets that outlive us: the service manager's descriptor store (FDSTORE=1), and what the next start takes back.

Where the manager has a store (it says so in $FDSTORE), it holds a copy of each listening socket, and a sealed memfd that
tells whose they are. While we are down, clients wait in their queues instead of being refused. At the next start they
are served again, if they still fit: a socket of a listener that is gone, or all of them when the number of workers or
this format has changed, are given up, said so, and opened anew.

A socket is known by its cookie, which the kernel never gives twice: the manager returns them in any order. The program
that steers sources to workers is locked, so the key that it was made with stays in force with the sockets.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gatekeeper.kernel import memfd, steering
from gatekeeper.policy.model import Endpoint, Protocol
from gatekeeper.supervisor.listening import Opened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gatekeeper.kernel.inherit import Inherited
    from gatekeeper.kernel.notify import Notifier
    from gatekeeper.supervisor.log import Log

FORMAT, VERSION = "gatekeeper-kept", 1
STATE_NAME = "gatekeeper-state"
PREFIX = "gatekeeper-socket-"
MOST_STATE_BYTES = 16 << 20
MOST_NAMED = 8
PATIENCE_S = 5.0
_SO_COOKIE = 57


@dataclass(slots=True)
class Kept:
    """What an earlier run left with the manager: endpoint key -> its sockets, and the key that steers to ``shards`` of them."""

    shards: int = 0
    key: steering.Key | None = None
    opened: dict[str, Opened] = field(default_factory=dict)


class Keeper:
    """Keeps the manager's store as the sockets are. Does nothing where there is no store."""

    def __init__(self, notifier: Notifier, log: Log, environment: Mapping[str, str]) -> None:
        self._notifier = notifier
        self._log = log
        self._room = _room(environment)
        self._stored: dict[str, str] = {}  # endpoint key -> name in the store
        self._state: bytes | None = None
        self._full = False

    def take_back(self, inherited: list[Inherited], files: dict[str, int], wanted: Sequence[str], shards: int) -> Kept:
        """Return what is in the store and can still be used, and remove all of it from what came with us.

        ``wanted`` are the keys of the endpoints to open, each for ``shards`` workers. What is of no use is closed,
        and removed from the store.
        """
        ours = [item for item in inherited if item.name.startswith(PREFIX)]
        inherited[:] = [item for item in inherited if not item.name.startswith(PREFIX)]
        state_fd = files.pop(STATE_NAME, None)
        for fd in files.values():  # nobody else gives us any
            os.close(fd)
        kept = Kept()
        if state_fd is not None:
            try:
                kept = _read(state_fd, {_cookie(item.sock): item.sock for item in ours})
            except (ValueError, LookupError, TypeError, OSError, RecursionError) as err:
                self._log.warning(f"what an earlier run has left with the service manager makes no sense: {err!r}")
            os.close(state_fd)
        used = {id(sock) for opened in kept.opened.values() for sock in opened.sockets}
        for item in ours:
            if id(item.sock) not in used:
                self._notifier.forget(item.name)
                item.sock.close()
        self._stored = {key: _name(key) for key in kept.opened}
        if kept.opened and kept.shards != shards:
            self._give_up(kept, list(kept.opened), f"it is for {kept.shards} workers, and there are {shards} now")
        self._give_up(kept, sorted(kept.opened.keys() - set(wanted)), "no listener wants it")
        if len(ours) > sum(len(opened.sockets) for opened in kept.opened.values()):
            self._notifier.wait_until_heard(PATIENCE_S)  # as long as it holds a socket, the address is taken
        if kept.opened:
            self._log.info(f"the sockets of an earlier run are served again ({', '.join(sorted(kept.opened)[:MOST_NAMED])})")
        else:
            kept.key = None
        return kept

    def _give_up(self, kept: Kept, keys: list[str], why: str) -> None:
        for key in keys:
            opened = kept.opened.pop(key)
            self._notifier.forget(self._stored.pop(key))
            opened.close()
            self._log.info(f"the kept socket of {opened.endpoint.address} ({opened.endpoint.protocol}) is closed: {why}")

    def keep(self, opened: Mapping[str, Opened], key: steering.Key, shards: int) -> None:
        """Let the manager hold exactly these sockets, but for those that it gave us itself."""
        if not self._room:
            return
        wanted = {name: one for name, one in opened.items() if one.came_with_us is None}
        if sum(len(one.sockets) for one in wanted.values()) + 1 > self._room:
            if not self._full:
                self._log.warning(
                    f"the service manager keeps {self._room} descriptors, too few for all listening sockets: it keeps none "
                    "(FileDescriptorStoreMax)"
                )
            self._full = True
            self.forget()
            return
        self._full = False
        for gone in self._stored.keys() - wanted.keys():
            self._notifier.forget(self._stored.pop(gone))
        state = _write(wanted, key, shards)
        if state == self._state:
            return
        # The state first: what it does not know of is given up at the next start, what is missing is opened then.
        self._state = state
        fd = memfd.from_bytes("gatekeeper-kept", state)
        try:
            self._notifier.forget(STATE_NAME)
            self._notifier.store(STATE_NAME, [fd])
        finally:
            os.close(fd)
        for name, one in wanted.items():
            self._stored[name] = _name(name)
            self._notifier.store(self._stored[name], [sock.fileno() for sock in one.sockets])

    def keeps(self) -> bool:
        """Say whether the manager holds our sockets."""
        return bool(self._stored)

    def forget(self) -> None:
        """Let the manager close what it holds."""
        for name in self._stored.values():
            self._notifier.forget(name)
        if self._stored or self._state is not None:
            self._notifier.forget(STATE_NAME)
        self._stored, self._state = {}, None


def _room(environment: Mapping[str, str]) -> int:
    text = environment.get("FDSTORE", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _name(key: str) -> str:
    """Return what the manager calls the sockets of an endpoint; its names have no colons and are not long."""
    return PREFIX + hashlib.sha256(key.encode()).hexdigest()[:24]


def _cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), "little")


def _write(opened: Mapping[str, Opened], key: steering.Key, shards: int) -> bytes:
    return json.dumps({
        "format": FORMAT, "version": VERSION, "shards": shards, "key": key,
        "endpoints": [
            {
                "protocol": str(one.endpoint.protocol), "family": one.endpoint.family, "host": one.endpoint.host,
                "port": one.endpoint.port, "shared": one.shared, "unix_file": one.unix_file,
                "cookies": [_cookie(sock) for sock in one.sockets],
            }
            for one in opened.values()
        ],
    }).encode()  # fmt: skip


def _read(fd: int, sockets: dict[int, socket.socket]) -> Kept:
    """Return what a state says, as far as its sockets are there.

    Raises:
        ValueError, LookupError, TypeError, OSError: it is not sound, or of another version.
    """
    size = os.fstat(fd).st_size
    if size > MOST_STATE_BYTES:
        raise ValueError("it is too large")
    state = json.loads(os.pread(fd, size, 0))
    if state["format"] != FORMAT or state["version"] != VERSION:
        raise ValueError(f"version {state['version']!r} of {state['format']!r}")
    first, second, third = map(int, state["key"])
    kept = Kept(int(state["shards"]), (first, second, third))
    for item in state["endpoints"]:
        endpoint = Endpoint(Protocol(item["protocol"]), int(item["family"]), str(item["host"]), int(item["port"]))
        found = [sockets.get(cookie) for cookie in item["cookies"]]
        whole = [sock for sock in found if sock is not None]
        file: Any = item["unix_file"]
        if len(whole) != len(found) or not all(_is_at(sock, endpoint) for sock in whole):
            continue
        if file is not None and not _is_there(endpoint.host, file):
            continue
        kept.opened[endpoint.key] = Opened(endpoint, whole, bool(item["shared"]), file and (int(file[0]), int(file[1])))
    return kept


def _is_at(sock: socket.socket, endpoint: Endpoint) -> bool:
    address: Any = sock.getsockname()
    if endpoint.family == 0:
        return bool(address == endpoint.host)
    return bool(address[:2] == (endpoint.host, endpoint.port))


def _is_there(path: str, file: list[int]) -> bool:
    """Say whether clients still find a unix socket under its name."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return [found.st_dev, found.st_ino] == file
