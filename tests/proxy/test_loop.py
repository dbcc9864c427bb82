"""The event loop: who comes first when very many things happen at once."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from gatekeeper.proxy.loop import CROWD, Loop
from gatekeeper.proxy.relay import EDGE

MANY = 5 * CROWD


class Watcher:
    """Notes in ``seen`` that its descriptor was reported, reads, and at the end closes."""

    def __init__(self, loop: Loop, sock: socket.socket, name: object, seen: list[object]) -> None:
        self.loop, self.sock, self.name, self.seen = loop, sock, name, seen
        loop.watch(sock.fileno(), EDGE, self)

    def ready(self, _mask: int) -> None:
        """It is our turn."""
        self.seen.append(self.name)
        if not self.sock.recv(100):
            self.leave()

    def leave(self) -> None:
        """Close, as sessions do."""
        self.loop.unwatch(self.sock.fileno())
        self.sock.close()

    def fail(self) -> None:
        """Nothing here may fail."""
        raise AssertionError(self.name)


Pairs = list[tuple[socket.socket, socket.socket]]


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    """Connected sockets, (theirs, ours)."""
    made = [socket.socketpair() for _ in range(MANY + 1)]
    yield made
    for pair in made:
        for sock in pair:
            sock.close()


def test_whoever_goes_on_is_not_kept_waiting_by_a_crowd_that_ends(pairs: Pairs) -> None:
    """What others say is heard before a crowd has ended, though it came last; and then the crowd ends, each exactly once."""
    loop, seen = Loop(), list[object]()
    for number, (_theirs, ours) in enumerate(pairs):
        Watcher(loop, ours, number, seen)
    for theirs, _ours in pairs[:-1]:
        theirs.close()
    pairs[-1][0].send(b"hello")
    turns = 0
    while len(seen) < MANY + 1:
        loop.turn(0)
        turns += 1
        assert turns < 10 * MANY
    assert seen.index(MANY) < MANY, "it came before the last of the crowd, behind whom it had queued"
    assert len(seen) == MANY + 1
    assert set(seen) == set(range(MANY + 1))
    assert not loop.ends


def test_whoever_has_a_descriptor_now_does_not_hear_of_its_former_owner(pairs: Pairs) -> None:
    """An end that stands back is forgotten when its descriptor has gone to somebody else meanwhile."""
    loop, seen = Loop(), list[object]()
    watchers = [Watcher(loop, ours, number, seen) for number, (_theirs, ours) in enumerate(pairs)]
    for theirs, _ours in pairs[:-1]:
        theirs.close()
    loop.ends.update({each.sock.fileno(): (each, EDGE) for each in watchers[:-1]})  # as a turn leaves it
    fd = watchers[0].sock.fileno()
    watchers[0].leave()
    theirs, ours = socket.socketpair()
    try:
        successor = ours if ours.fileno() == fd else theirs
        assert successor.fileno() == fd
        Watcher(loop, successor, "successor", seen)
        while loop.ends:
            loop.turn(0)
        assert "successor" not in seen
    finally:
        theirs.close()
        ours.close()
