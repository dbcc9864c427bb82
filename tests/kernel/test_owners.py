"""Who holds an address."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from gatekeeper.kernel import owners
from gatekeeper.policy.model import Endpoint, Protocol
from tests.support.ports import free_port


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


def hold(sockets: ExitStack, protocol: Protocol, host: str, port: int) -> socket.socket:
    """Return a socket that has the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
    sock = sockets.enter_context(closing(socket.socket(family, kind)))
    sock.bind((host, port))
    if protocol is Protocol.TCP:
        sock.listen()
    return sock


@pytest.mark.parametrize("protocol", list(Protocol))
@pytest.mark.parametrize(
    ("held", "wanted", "conflict"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("::1", "::1", True),
        ("::1", "::", True),
        ("::", "::1", True),
        ("::", "127.0.0.1", True),  # dual-stack, as Python opens it
        ("127.0.0.1", "::1", False),
    ],
)
def test_overlapping_addresses_conflict(
    sockets: ExitStack, protocol: Protocol, held: str, wanted: str, conflict: bool
) -> None:
    """The process that holds an address, or one that overlaps it, is found by pid and command."""
    port = free_port()
    sock = hold(sockets, protocol, held, port)
    endpoint = Endpoint(protocol, 6 if ":" in wanted else 4, wanted, port)
    owner = owners.owner_of(endpoint)
    if not conflict:
        assert owner is None
        return
    assert owner is not None
    assert (owner.pid, owner.inode) == (os.getpid(), owners.inode_of(sock))
    assert str(owner).startswith(f"pid {os.getpid()} (")
    assert "python" in str(owner)


def test_connections_to_a_listener_are_not_its_owners(sockets: ExitStack) -> None:
    """Only listeners count where there is one; its connections have the same local address."""
    sock = hold(sockets, Protocol.TCP, "127.0.0.1", free_port())
    port = sock.getsockname()[1]
    sockets.enter_context(socket.create_connection(("127.0.0.1", port)))
    sockets.enter_context(sock.accept()[0])
    assert list(owners.conflicting(Endpoint(Protocol.TCP, 4, "127.0.0.1", port))) == [owners.inode_of(sock)]


def test_unix_sockets_have_owners(sockets: ExitStack, folder: Path) -> None:
    """The owner of a unix socket is found by its path."""
    sock = sockets.enter_context(closing(socket.socket(socket.AF_UNIX)))
    sock.bind(str(folder / "s"))
    owner = owners.owner_of(Endpoint(Protocol.TCP, 0, str(folder / "s"), 0))
    assert owner is not None
    assert owner.pid == os.getpid()
    assert owners.owner_of(Endpoint(Protocol.TCP, 0, str(folder / "t"), 0)) is None


def test_an_owner_that_cannot_be_seen_is_described() -> None:
    """Without a pid the message still says whose it is."""
    assert str(owners.Owner(1, 0, None, None)) == "a process of root that we may not look into"
    assert str(owners.Owner(1, 4242424, None, None)) == "a process of uid 4242424 that we may not look into"
    assert str(owners.Owner(1, None, None, None)) == "a process that we may not look into"
    guess = owners.Owner(1, 0, 42, "gatekeeper run", certain=False)
    assert str(guess) == "a process of root that we may not look into, probably pid 42 (gatekeeper run)"
