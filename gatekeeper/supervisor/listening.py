"""Opening the sockets that strangers connect to. The supervisor owns them for as long as the listener exists.

Each IP endpoint gets one socket per worker in one SO_REUSEPORT group, created in order and never closed one by one:
closing a member would renumber the group and lose its queue. Before a group is opened the address is bound once
without SO_REUSEPORT, so that somebody who is there already, even a leftover of our own, is an error and not a silent
share. Unix sockets, and descriptors that were inherited, are single and shared by the workers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gatekeeper.errors import ListenError
from gatekeeper.kernel import owners, steering
from gatekeeper.policy.model import Endpoint, Protocol
from gatekeeper.supervisor import adopting

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gatekeeper.kernel.inherit import Inherited

BACKLOG = 4096  # the kernel lowers it to net.core.somaxconn
MOST_FAILURES = 20  # that are told of one attempt: a port range that cannot be opened may be thousands of addresses wide
UDP_RECEIVE_BYTES = 4 << 20
KEEPALIVE_IDLE_S = 60
KEEPALIVE_INTERVAL_S = 15
KEEPALIVE_PROBES = 4

_SO_RCVBUFFORCE = 33
_IP_PKTINFO = 8
_WILDCARDS = {"0.0.0.0", "::"}
_ADVICE = {
    errno.EADDRNOTAVAIL: "this host has no such address",
    errno.EMFILE: "too many open files: raise LimitNOFILE or `ulimit -n`",
    errno.ENOENT: "the directory does not exist",
    errno.EACCES: "permission denied",
}
_LOW_PORT = (
    "permission denied: ports below 1024 need root or CAP_NET_BIND_SERVICE "
    "(systemd: AmbientCapabilities=CAP_NET_BIND_SERVICE, or socket activation), "
    "or a lower net.ipv4.ip_unprivileged_port_start"
)


@dataclass(slots=True)
class Opened:
    """The sockets of one endpoint.

    ``unix_file`` is (device, inode) of the socket file that we made; ``came_with_us`` the inherited socket it is.
    """

    endpoint: Endpoint
    sockets: list[socket.socket]
    shared: bool = False
    unix_file: tuple[int, int] | None = None
    came_with_us: Inherited | None = None

    def for_worker(self, index: int) -> socket.socket | None:
        """Return the socket that worker ``index`` serves; ``None``: another worker serves this endpoint alone."""
        if self.shared:
            return self.sockets[0]
        return self.sockets[index] if index < len(self.sockets) else None

    def close(self, *, keep_file: bool = False) -> None:
        """Close our copies and remove the socket file; workers that still have theirs go on until they close them."""
        for sock in self.sockets:
            sock.close()
        if self.unix_file is not None and not keep_file:
            with contextlib.suppress(OSError):
                # Somebody else's by now? Then it is not ours to remove.
                found = os.stat(self.endpoint.host)
                if (found.st_dev, found.st_ino) == self.unix_file:
                    os.unlink(self.endpoint.host)


@dataclass(slots=True)
class Opener:
    """Opens endpoints for ``shards`` workers. ``inherited`` shrinks as its sockets find their endpoints."""

    shards: int
    key: steering.Key
    inherited: list[Inherited]
    kept: dict[str, Opened] = field(default_factory=dict)  # open already, since an earlier run

    def open_all(self, wanted: Iterable[Endpoint], existing: Mapping[str, Opened]) -> dict[str, Opened]:
        """Return what had to be opened so that every wanted endpoint is open, by key: all of it or nothing.

        ``existing`` is open already and stays untouched. An IPv4 wildcard whose IPv6 twin came as one inherited socket
        for both families needs no socket of its own and is left out.

        Raises:
            ListenError: with one line for every endpoint that could not be opened, up to `MOST_FAILURES`.
        """
        endpoints = {endpoint.key: endpoint for endpoint in wanted}
        everything = [*endpoints.values(), *(item.endpoint for item in existing.values())]
        new: dict[str, Opened] = {}
        failures = []
        # Sockets that came with us first: what they cover must not be bound again.
        for endpoint in sorted(endpoints.values(), key=lambda one: one.family != 6):
            if endpoint.key in existing or adopting.covered(endpoint, [*new.values(), *existing.values()]):
                continue
            try:
                new[endpoint.key] = self._open(endpoint, everything, [*new.values(), *existing.values()])
            except ListenError as err:
                failures.append(str(err))
                if len(failures) == MOST_FAILURES:
                    failures.append("(the rest was not tried)")
                    break
        if failures:
            for opened in new.values():
                self.close(opened)
            raise ListenError("\n".join(failures))
        return {key: new[key] for key in endpoints if key in new}

    def close(self, opened: Opened) -> None:
        """Close an endpoint that is no longer wanted; an inherited socket is kept, for it can be wanted again."""
        if opened.came_with_us is None:
            opened.close()
        else:
            self.inherited.append(opened.came_with_us)

    def _open(self, endpoint: Endpoint, everything: list[Endpoint], ours: list[Opened]) -> Opened:
        kept = self.kept.pop(endpoint.key, None)
        if kept is not None:
            return kept
        came_with_us = adopting.find(self.inherited, endpoint, everything)
        if came_with_us is not None:
            self.inherited.remove(came_with_us)
            _set_options(came_with_us.sock, endpoint)
            # Datagrams of one client must stay with one worker, and without a group nobody would see to that.
            alone = endpoint.protocol is Protocol.UDP
            return Opened(endpoint, [came_with_us.sock], shared=not alone, came_with_us=came_with_us)
        try:
            if endpoint.family == 0:
                return _open_unix(endpoint)
            return Opened(endpoint, self._open_group(endpoint, everything, ours))
        except OSError as err:
            raise ListenError(_explain(endpoint, err)) from err

    def _open_group(self, endpoint: Endpoint, everything: list[Endpoint], ours: list[Opened]) -> list[socket.socket]:
        share = self.shards > 1 or any(_overlap(endpoint, other) for other in everything)
        sockets: list[socket.socket] = []
        try:
            try:
                sockets.append(bind(endpoint, share=False))
            except OSError as err:
                if err.errno != errno.EADDRINUSE or not _share_ours(endpoint, ours):
                    raise
            if share:
                while sockets:
                    sockets.pop().close()
                sockets = []
                for _ in range(self.shards):
                    sockets.append(bind(endpoint, share=True))
                    _start(sockets[-1], endpoint)
                    if len(sockets) == 1 and self.shards > 1:
                        # Before the second member exists: a source has its owner from the moment the group is whole.
                        # Not before the first one listens: listen(2) would fail beside an overlapping group.
                        steering.attach(sockets[0], self.key, self.shards)
                    steering.lock(sockets[-1])
            else:
                _start(sockets[0], endpoint)
                steering.lock(sockets[0])
        except OSError:
            for sock in sockets:
                sock.close()
            raise
        return sockets


def bind(endpoint: Endpoint, *, share: bool) -> socket.socket:
    """Return a non-blocking socket bound to an IP endpoint, not listening yet. ``share`` sets SO_REUSEPORT.

    Raises:
        OSError: as bind(2).
    """
    tcp = endpoint.protocol is Protocol.TCP
    family = socket.AF_INET6 if endpoint.family == 6 else socket.AF_INET
    sock = socket.socket(family, (socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if tcp:
            # Connections of an earlier run that wait in TIME_WAIT are not an owner. UDP must not have this: there it
            # would let us share the port with anybody who asks for the same.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((endpoint.host, endpoint.port))
    except OSError:
        sock.close()
        raise
    return sock


def open_http(endpoint: Endpoint, inherited: list[Inherited]) -> socket.socket:
    """Return a listening socket for the observer.

    Raises:
        ListenError: the address could not be opened.
    """
    came_with_us = adopting.find(inherited, endpoint, [endpoint])
    if came_with_us is not None:
        inherited.remove(came_with_us)
        return came_with_us.sock
    try:
        sock = bind(endpoint, share=False)
        sock.listen(BACKLOG)
    except OSError as err:
        raise ListenError(f"metrics: {_explain(endpoint, err)}") from err
    return sock


def _start(sock: socket.socket, endpoint: Endpoint) -> None:
    _set_options(sock, endpoint)
    if endpoint.protocol is Protocol.TCP:
        sock.listen(BACKLOG)


def _set_options(sock: socket.socket, endpoint: Endpoint) -> None:
    """Set what accepted sockets inherit, once, and what a datagram socket needs."""
    if endpoint.family == 0:
        return
    if endpoint.protocol is Protocol.TCP:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        # No TCP_USER_TIMEOUT: it would also end sessions whose reader is alive and keeps its window closed.
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, UDP_RECEIVE_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_RECEIVE_BYTES)  # as far as net.core.rmem_max lets us
    if endpoint.host in _WILDCARDS:
        # Replies must leave from the address that was asked; elsewhere there is only one.
        if endpoint.family == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


def _open_unix(endpoint: Endpoint) -> Opened:
    path = endpoint.host
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _remove_stale(endpoint)
        mask = os.umask(0o117)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        made = os.stat(path)
        sock.listen(BACKLOG)
    except (OSError, ListenError):
        sock.close()
        raise
    return Opened(endpoint, [sock], shared=True, unix_file=(made.st_dev, made.st_ino))


def _remove_stale(endpoint: Endpoint) -> None:
    """Remove a socket file that nobody listens at.

    Raises:
        ListenError: somebody does, or it is not a socket.
    """
    path = endpoint.host
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ListenError(f"cannot listen on {endpoint.address}: the path exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        result = probe.connect_ex(path)
    if result == errno.ECONNREFUSED:
        os.unlink(path)
    elif result != errno.ENOENT:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _overlap(one: Endpoint, other: Endpoint) -> bool:
    """Say whether one of two different endpoints is the wildcard that covers the other."""
    return (
        (one.protocol, one.family, one.port) == (other.protocol, other.family, other.port)
        and one.host != other.host
        and not _WILDCARDS.isdisjoint((one.host, other.host))
    )


def _share_ours(endpoint: Endpoint, ours: list[Opened]) -> bool:
    """Say whether all that keeps us from binding ``endpoint`` are overlapping endpoints of our own; let them share then."""
    mine = {owners.inode_of(sock): sock for opened in ours if opened.endpoint.family for sock in opened.sockets}
    holders = owners.conflicting(endpoint)
    if not holders or not holders.keys() <= mine.keys():
        return False
    for inode in holders:
        mine[inode].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return True


def _explain(endpoint: Endpoint, err: OSError) -> str:
    text = f"cannot listen on {endpoint.address} ({endpoint.protocol}): "
    if err.errno == errno.EADDRINUSE:
        owner = owners.owner_of(endpoint)
        if owner is None:
            return text + "the address is in use"
        if owner.pid == os.getpid():
            return text + "we hold the address ourselves"
        return f"{text}the address is in use by {owner}"
    if err.errno == errno.EACCES and 0 < endpoint.port < 1024:
        return text + _LOW_PORT
    return text + (_ADVICE.get(err.errno or 0) or err.strerror or str(err))
