"""Readers that follow the log: whole lines in order, and a slow one is told how many it has missed."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable

import pytest

from gatekeeper.observer.tails import MESSAGE_BYTES, MOST_TAILS, MOST_WAITING_BYTES, Outlets

Story = Callable[[Outlets, socket.socket], Awaitable[None]]


def line(number: int, size: int = 100) -> str:
    """Return an audit line."""
    return json.dumps({"number": number, "event_type": "connection", "filling": "x" * size}) + "\n"


def tell(story: Story, buffer_bytes: int = 1 << 16) -> None:
    """Let a story happen in an event loop, with one reader."""

    async def happen() -> None:
        outlets = Outlets(None)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.setblocking(False)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            outlets.add(theirs.detach())
            await story(outlets, ours)
        await asyncio.sleep(0)  # what is still open notices the end
        outlets.put([line(0)])

    asyncio.run(asyncio.wait_for(happen(), 30))


def read(ours: socket.socket) -> list[dict[str, object]]:
    """Return what has arrived."""
    lines: list[dict[str, object]] = []
    while True:
        try:
            data = ours.recv(1 << 20)
        except BlockingIOError:
            return lines
        assert data.endswith(b"\n")
        lines += [json.loads(each) for each in data.splitlines()]


async def read_until(ours: socket.socket, done: Callable[[list[dict[str, object]]], bool]) -> list[dict[str, object]]:
    """Read, and let the loop write, until the lines so far are enough."""
    lines: list[dict[str, object]] = []
    while not done(lines):
        lines += read(ours)
        await asyncio.sleep(0)
    return lines


def test_lines_arrive_whole_and_in_order() -> None:
    """What is put arrives, in messages of whole lines, also when it is more than the socket holds."""

    async def story(outlets: Outlets, ours: socket.socket) -> None:
        sent = 0
        for count in (1, 3, 200, 1, 1000):
            outlets.put([line(number) for number in range(sent, sent + count)])
            sent += count
        lines = await read_until(ours, lambda lines: len(lines) == sent)
        assert [each["number"] for each in lines] == list(range(sent))

    tell(story)


def test_a_line_that_is_longer_than_a_message() -> None:
    """A very long line, as of a reload that failed, is a message of its own."""

    async def story(outlets: Outlets, ours: socket.socket) -> None:
        outlets.put([line(1), line(2, MESSAGE_BYTES), line(3)])
        lines = await read_until(ours, lambda lines: len(lines) == 3)
        assert [each["number"] for each in lines] == [1, 2, 3]

    tell(story, 1 << 18)


def test_a_slow_reader_misses_lines_and_is_told_how_many() -> None:
    """What a reader does not take is kept up to a bound; then every line is either read or counted, and it goes on."""

    async def story(outlets: Outlets, ours: socket.socket) -> None:
        put = 0
        while put * 130 < 3 * MOST_WAITING_BYTES:
            outlets.put([line(number) for number in range(put, put + 100)])
            put += 100
        lines = await read_until(ours, lambda lines: bool(lines) and lines[-1]["event_type"] == "events_lost")
        *kept, lost = lines
        about = lost["gatekeeper"]
        assert isinstance(about, dict)
        assert [each["number"] for each in kept] == list(range(len(kept)))
        assert about["class"] == "tail"
        assert len(kept) + about["count"] == put
        outlets.put([line(put)])
        (last,) = await read_until(ours, bool)
        assert last["number"] == put

    tell(story)


@pytest.mark.parametrize("farewell", ["close", "shutdown", "talk"])
def test_a_reader_that_leaves(farewell: str) -> None:
    """Who hangs up, or says something, is forgotten; the others and the log do not notice."""

    async def story(outlets: Outlets, ours: socket.socket) -> None:
        other, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            other.setblocking(False)
            outlets.add(theirs.detach())
            if farewell == "close":
                ours.close()
            elif farewell == "shutdown":
                ours.shutdown(socket.SHUT_WR)
            else:
                ours.send(b"what?")
            for number in range(3):
                outlets.put([line(number)])
                await asyncio.sleep(0.01)
            assert [each["number"] for each in read(other)] == [0, 1, 2]
            assert len(outlets._tails) == 1

    tell(story)


def test_what_is_no_reader_is_not_kept() -> None:
    """Descriptors that are no unix sockets with messages, and readers beyond a number, are closed."""

    async def story(outlets: Outlets, _ours: socket.socket) -> None:
        stream, other_end = socket.socketpair()
        wrong = [os.open("/dev/null", os.O_RDWR), os.open("/", os.O_PATH), stream.detach(), socket.socket().detach()]
        for fd in wrong:
            outlets.add(fd)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        other_end.close()
        readers = []
        for _ in range(MOST_TAILS):
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            readers.append(mine)
            outlets.add(theirs.detach())
        assert readers[-1].recv(1) == b""  # hung up on
        outlets.put([line(1)])
        for reader in readers:
            reader.close()

    tell(story)
