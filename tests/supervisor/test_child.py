"""Starting a process of ours and talking to it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gatekeeper.supervisor import child as children
from gatekeeper.supervisor.child import Child
from gatekeeper.supervisor.loop import Loop

PREAMBLE = """
import array, json, os, socket, sys
from gatekeeper.kernel.channel import Channel
channel = Channel(socket.socket(fileno=int(sys.argv[sys.argv.index("--channel") + 1])))
"""


class Driver:
    """A loop that turns until a condition holds, and the messages that came meanwhile."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.messages: list[dict[str, Any]] = []
        self.children: list[Child] = []

    def start(self, script: str) -> Child:
        """Start a child that runs ``script`` with a ``channel``."""
        child = Child.start(self.loop, [sys.executable, "-c", PREAMBLE + script], self.messages.append)
        self.children.append(child)
        return child

    def until(self, condition: Callable[[], bool], within_s: float = 20.0) -> None:
        """Turn the loop until ``condition``."""
        deadline = time.monotonic() + within_s

        def look() -> None:
            if condition() or time.monotonic() > deadline:
                self.loop.stop(0)
            else:
                self.loop.later(0.01, look)

        self.loop._result = None
        look()
        self.loop.run()
        assert condition()


@pytest.fixture
def driver() -> Iterator[Driver]:
    """A loop of this test's own."""
    with Loop(lambda _number: None) as loop:
        made = Driver(loop)
        yield made
        for child in made.children:
            child.kill()
            child.wait(10)


def test_messages_go_both_ways(driver: Driver) -> None:
    """A message and its descriptors arrive, and the answer comes back; its end is reported with its status."""
    child = driver.start("message, fds = channel.receive(); os.write(fds[0], b'hi'); channel.send(message); sys.exit(7)")
    read, write = os.pipe()
    child.send({"op": "hello"}, [write])
    os.close(write)
    driver.until(lambda: child.poll() is not None)
    assert driver.messages == [{"op": "hello"}]
    assert os.read(read, 10) == b"hi"
    os.close(read)
    assert child.poll() == 7


def test_a_reader_that_is_slow_loses_nothing(driver: Driver) -> None:
    """What a child does not take at once waits, in order and with its descriptors, even when ours are closed already."""
    child = driver.start("""
_message, (go,) = channel.receive()
os.read(go, 1)
for count in range(600):
    message, (fd,) = channel.receive()
    assert message["number"] == count, message
    os.write(fd, b".")
    os.close(fd)
channel.send({"count": count + 1})
""")
    go_read, go_write = os.pipe()
    dots_read, dots_write = os.pipe()
    child.send({"op": "wait"}, [go_read])
    for number in range(600):
        mine = os.dup(dots_write)
        child.send({"op": "item", "number": number, "text": "x" * 500}, [mine])
        os.close(mine)
    assert child.unread_bytes() > 0
    os.write(go_write, b"!")
    os.close(dots_write)
    driver.until(lambda: bool(driver.messages))
    assert driver.messages == [{"count": 600}]
    assert os.read(dots_read, 5000) == b"." * 600
    assert child.unread_bytes() == 0
    for fd in (go_read, go_write, dots_read):
        os.close(fd)


def test_nonsense_is_the_end(driver: Driver) -> None:
    """A child that no longer speaks our language is killed: it may be somebody else by now."""
    for nonsense in ("b'not json'", "b'[1,2]'", "b'[' * 100000", "b'\\xff'"):
        child = driver.start(f"channel.sock.send({nonsense}); channel.receive()")
        driver.until(lambda child=child: child.poll() is not None)  # type: ignore[misc]
        assert child.poll() == -signal.SIGKILL
    assert driver.messages == []


def test_descriptors_that_nobody_asked_for_are_closed(driver: Driver) -> None:
    """A child cannot fill our descriptor table."""
    child = driver.start("for _ in range(20): channel.send({}, [0] * 100)")
    before = len(os.listdir("/proc/self/fd"))
    driver.until(lambda: child.poll() is not None)
    assert len(driver.messages) == 20
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_child_gets_nothing_but_its_channel(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one descriptor beside the standard ones, and no word of our environment that it does not need."""
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    child = driver.start("channel.send({'fds': sorted(map(int, os.listdir('/proc/self/fd'))), 'env': sorted(os.environ)})")
    driver.until(lambda: child.poll() is not None)
    (message,) = driver.messages
    assert len(message["fds"]) == 5  # the fifth is the one that lists them
    assert not {"SECRET_TOKEN", "NOTIFY_SOCKET", "HOME", "USER"} & set(message["env"])


def test_a_program_that_is_not_there(driver: Driver) -> None:
    """A command that cannot be executed is an OSError, and leaves no descriptor behind."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        Child.start(driver.loop, ["/nowhere/at/all"], driver.messages.append)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("status", "expected"), [(0, "exited with 0"), (3, "exited with 3"), (-9, "was killed by SIGKILL"), (-63, "was killed by signal 63")]
)
def test_ends_in_words(status: int, expected: str) -> None:
    """An exit status reads as people say it."""
    assert children.how_it_ended(status) == expected
