"""Matching sockets that were opened for us (socket activation) to the endpoints that the rules ask for."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from gatekeeper.errors import ListenError
from gatekeeper.policy.model import Endpoint, Protocol

if TYPE_CHECKING:
    from gatekeeper.kernel.inherit import Inherited
    from gatekeeper.supervisor.listening import Opened

_V4_WILDCARD = "0.0.0.0"
_V6_WILDCARD = "::"


def find(inherited: list[Inherited], endpoint: Endpoint, everything: list[Endpoint]) -> Inherited | None:
    """Return the inherited socket that is bound to ``endpoint``, or ``None``.

    ``everything`` are all endpoints that are wanted: an IPv6 wildcard socket that takes IPv4 too is good only where
    both wildcards are.

    Raises:
        ListenError: there is one, but it cannot serve.
    """
    for item in inherited:
        if not _is_at(item.sock, endpoint):
            continue
        text = f"cannot listen on {endpoint.address} ({endpoint.protocol}) with the inherited {item.describe()}: "
        tcp = endpoint.protocol is Protocol.TCP
        if tcp and not item.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ListenError(text + "it does not listen (Accept=yes is not for us)")
        if takes_ipv4_too(item.sock) and not (tcp and _twin(endpoint) in everything):
            raise ListenError(text + "it takes IPv4 too; set BindIPv6Only=ipv6-only in the socket unit")
        return item
    return None


def covered(endpoint: Endpoint, opened: list[Opened]) -> bool:
    """Say whether an IPv4 wildcard is served by the inherited IPv6 wildcard socket beside it."""
    if endpoint.host != _V4_WILDCARD:
        return False
    twin = Endpoint(endpoint.protocol, 6, _V6_WILDCARD, endpoint.port)
    return any(one.endpoint == twin and takes_ipv4_too(one.sockets[0]) for one in opened)


def takes_ipv4_too(sock: socket.socket) -> bool:
    """Say whether an IPv6 wildcard socket also holds the IPv4 port."""
    return (
        sock.family == socket.AF_INET6
        and sock.getsockname()[0] == _V6_WILDCARD
        and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    )


def _twin(endpoint: Endpoint) -> Endpoint:
    return Endpoint(endpoint.protocol, 4, _V4_WILDCARD, endpoint.port)


def _is_at(sock: socket.socket, endpoint: Endpoint) -> bool:
    kind = socket.SOCK_STREAM if endpoint.protocol is Protocol.TCP else socket.SOCK_DGRAM
    family = {0: socket.AF_UNIX, 4: socket.AF_INET, 6: socket.AF_INET6}[endpoint.family]
    if sock.type != kind or sock.family != family:
        return False
    address = sock.getsockname()
    if endpoint.family == 0:
        return isinstance(address, str) and bool(address) and os.path.abspath(address) == endpoint.host
    return bool(address[:2] == (endpoint.host, endpoint.port))
