"""The state that one program leaves to the next: taken as it is, or not at all."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from gatekeeper.kernel import memfd
from gatekeeper.supervisor import handover, upgrading
from gatekeeper.supervisor.handover import Fd, HandoverError, OldWorker, OpenEndpoint, Past, State


@pytest.fixture
def state() -> Iterator[State]:
    """A small state whose descriptors are open."""
    with ExitStack() as ends:

        def owned(fd: int) -> Fd:
            ends.callback(os.close, fd)
            return Fd(fd)

        web = ends.enter_context(socket.create_server(("127.0.0.1", 0)))
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        channel, _theirs, events_in, events_out = (ends.enter_context(end) for pair in pairs for end in pair)
        port = web.getsockname()[1]
        yield State(
            writer="0.0", generation=3, snapshot=owned(memfd.create("snapshot")), bindings={"rows": []}, settings={"audit": "off"},
            directory=None, shards=1, key=(1, 2, 3),
            opened=(OpenEndpoint("tcp", 4, "127.0.0.1", port, (Fd(web.fileno()),), False, None, None),),
            spare=(), http=None, audit=None, lock=None, control=None, kernel=None, bans="", retired=None, bygone=(),
            workers=(OldWorker(
                os.getpid(), Fd(channel.fileno()), owned(memfd.create("counters")),
                (Fd(events_in.fileno()), Fd(events_out.fileno())), 1.5, 3, True, None,
            ),),
            observer=None, past=Past(1.0, 2.0, None, False, 0, 1, 0, 0, False, 0, None), drain_timeout_s=300.0,
        )  # fmt: skip


def altered(state: State, change: Callable[[dict[str, Any]], None]) -> int:
    """Return a memfd with the state after a change."""
    fd = handover.write(state)
    document = json.loads(os.pread(fd, 1 << 20, 0))
    os.close(fd)
    change(document)
    return memfd.from_bytes("state", json.dumps(document).encode())


def test_what_is_written_is_read(state: State) -> None:
    """All of it, types included, and no descriptor is passed on by accident."""
    fd = handover.write(state)
    again = handover.read(fd)
    os.close(fd)
    assert again == state
    assert all(isinstance(number, Fd) for number in again.opened[0].sockets)
    assert not any(os.get_inheritable(number) for number in again.descriptors())
    assert len(again.descriptors()) == 6


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another version": (lambda it: it.update(version=2), "has version 2"),
    "something else": (lambda it: it.update(format="x"), "not the state of a gatekeeper"),
    "a key more": (lambda it: it["state"].update(colour="red"), "colour"),
    "a key less": (lambda it: it["state"].pop("shards"), "shards"),
    "a key more inside": (lambda it: it["state"]["past"].update(mood="good"), "state.past"),
    "a text for a number": (lambda it: it["state"].update(generation="3"), "state.generation"),
    "a truth for a number": (lambda it: it["state"].update(generation=True), "state.generation"),
    "standard error": (lambda it: it["state"].update(snapshot=2), "state.snapshot"),
    "a descriptor that is closed": (lambda it: it["state"].update(snapshot=999), "999 did not arrive"),
    "a descriptor twice": (lambda it: it["state"].update(http=it["state"]["opened"][0]["sockets"][0]), "twice"),
    "memory for a socket": (lambda it: it["state"]["opened"][0].update(sockets=[it["state"].pop("snapshot")]), "keys"),
    "a socket missing": (lambda it: it["state"].update(shards=2, opened=[{**it["state"]["opened"][0], "sockets": []}]), "does not fit"),
    "no list": (lambda it: it["state"].update(opened={}), "state.opened"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_anything_else_is_refused(state: State, what: str) -> None:
    """With a message that says what is wrong."""
    change, reason = CHANGES[what]
    fd = altered(state, change)
    with pytest.raises(HandoverError, match=reason):
        handover.read(fd)
    os.close(fd)


def test_only_what_nobody_can_change_is_read() -> None:
    """A state that is not sealed, or is no state, is refused."""
    for fd in (memfd.create("open"), memfd.from_bytes("text", b"hello"), memfd.from_bytes("deep", b"[" * 100000)):
        with pytest.raises(HandoverError):
            handover.read(fd)
        os.close(fd)


@pytest.mark.parametrize("text", ["", "x", "prove:3", "prove:1:x", "-1", "99999", "prove:3:99999", "9" * 400])
def test_a_variable_that_we_did_not_set(text: str) -> None:
    """It is refused, and not passed on."""
    environment = {handover.VARIABLE: text}
    with pytest.raises(HandoverError):
        handover.incoming(environment)
    assert environment == {}


def test_a_program_that_cannot_be_executed_changes_nothing(state: State) -> None:
    """Signals are as they were, and no descriptor is left that children would inherit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    count = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        upgrading.execute(["/no/such/program"], state)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert not any(os.get_inheritable(fd) for fd in state.descriptors())
    assert len(os.listdir("/proc/self/fd")) == count
