"""The event loop of a worker: epoll, dispatch by descriptor, one coarse clock.

Level-triggered, without the `selectors` module: it cost 28 % more CPU per connection and hides flags that are needed here.
A turn handles what happened to sessions first and lets listeners accept afterwards, so that a client which closes
and connects again at once never meets its own old session.

When very many things happen at once, ends stand back: thousands of sessions that end together take the better part of
a second, and whoever goes on must not queue behind them.
"""

from __future__ import annotations

import select
import sys
import time
import traceback
from os import close
from typing import Protocol

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
GONE = select.EPOLLERR | select.EPOLLHUP
ENDS = GONE | select.EPOLLRDHUP

EVENTS_PER_TURN = 256
CROWD = 64  # events in one turn from which on ends stand back
ENDS_SLICE_S = 0.002  # how long others may be kept waiting by ends that stood back
TICK_S = 0.05  # how often the worker looks at what is due: dials, resets that wait for their data, records to be sent
IDLE_TICK_S = 0.5  # the same while nothing is; a worker must show a heartbeat every second


class Failing(Protocol):
    """Whoever can be given up."""

    def fail(self) -> None:
        """Release everything after an unexpected error, and touch nobody else."""


class Handler(Failing, Protocol):
    """Whoever watches a descriptor."""

    def ready(self, mask: int) -> None:
        """Deal with what epoll reported."""


class Acceptor(Failing, Protocol):
    """A listener whose turn comes after the sessions'."""

    def accept(self) -> None:
        """Take a bounded number of new connections or datagrams."""


class Sender(Failing, Protocol):
    """Who has collected what is to leave together."""

    def send(self) -> None:
        """Send it, and be `Loop.outgoing` no more."""


class Loop:
    """Descriptors, their handlers, and the time of the current turn (``now``: monotonic; ``wall``: Unix time, seconds)."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.handlers: dict[int, Handler] = {}
        self.acceptors: list[Acceptor] = []
        self.ends: dict[int, tuple[Handler | None, int]] = {}  # descriptor -> its handler and mask, which stand back
        self.outgoing: Sender | None = None  # who is to send before the loop waits again
        self.closing: list[int] = []  # descriptors of sessions that have ended; the list owns them
        self.longest_turn_s = 0.0
        self.turns = 0
        self.now = time.monotonic()
        self.wall_offset = time.time() - self.now

    def watch(self, fd: int, mask: int, handler: Handler) -> None:
        """Call ``handler.ready`` whenever ``fd`` is ready for ``mask``. The caller keeps owning ``fd``."""
        self.handlers[fd] = handler
        self.epoll.register(fd, mask)

    def unwatch(self, fd: int) -> None:
        """Stop watching ``fd``; must come before it is closed or handed over if others hold copies of it."""
        if self.handlers.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def turn(self, timeout_s: float) -> float:
        """Wait for events once, at most ``timeout_s`` seconds, and handle them; return the time, ``now``."""
        if self.closing:
            self.close_ended()
        events = self.epoll.poll(0 if self.ends else timeout_s, EVENTS_PER_TURN)
        self.now = begun = time.monotonic()
        get = self.handlers.get
        if len(events) > CROWD or self.ends:
            events = self.put_off_ends(events)
        for fd, mask in events:
            handler = get(fd)
            if handler is None:  # closed earlier in this very turn
                continue
            try:
                handler.ready(mask)
            except Exception:  # noqa: BLE001 - one session's fault must not end the others; this is the one place
                self.give_up(handler)
        if self.ends:
            self.handle_ends()
        if self.outgoing is not None:
            self.send(self.outgoing)
        if self.closing:  # before anybody is accepted, who needs descriptors
            self.close_ended()
        if self.acceptors:
            ready, self.acceptors = self.acceptors, []
            for acceptor in ready:
                try:
                    acceptor.accept()
                except Exception:  # noqa: BLE001 - as above
                    self.give_up(acceptor)
        self.turns += 1
        took = time.monotonic() - begun
        if took > self.longest_turn_s:
            self.longest_turn_s = took
        return begun

    def send(self, sender: Sender) -> None:
        """Let what was collected in this turn leave."""
        try:
            sender.send()
        except Exception:  # noqa: BLE001 - as in `turn`
            self.outgoing = None
            self.give_up(sender)

    def close_ended(self) -> None:
        """Close the descriptors of all sessions that have ended: together, because that is cheaper than one by one.

        After bytecode of ours the kernel's code has to be fetched again; in a row it stays in the cache.
        """
        closing, self.closing = self.closing, []
        for fd in closing:
            try:
                close(fd)
            except OSError:  # closed it is all the same
                continue

    def put_off_ends(self, events: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Let ends stand back and return the other events."""
        others = []
        for event in events:
            fd, mask = event
            if mask & ENDS:
                handler, before = self.handlers.get(fd), self.ends.get(fd)
                self.ends[fd] = (handler, mask if before is None or before[0] is not handler else before[1] | mask)
            else:
                others.append(event)
        return others

    def handle_ends(self) -> None:
        """Handle for a moment what stood back, first come, first served. Who has ended meanwhile is left alone."""
        ends, get = self.ends, self.handlers.get
        until = time.monotonic() + ENDS_SLICE_S
        while ends and time.monotonic() < until:
            fd = next(iter(ends))
            handler, mask = ends.pop(fd)
            if handler is None or get(fd) is not handler:
                continue
            try:
                handler.ready(mask)
            except Exception:  # noqa: BLE001 - as above
                self.give_up(handler)

    def give_up(self, handler: Failing) -> None:
        """Log the exception being handled and end only the handler it came from."""
        say(f"error in {type(handler).__name__}, which is ended:\n{traceback.format_exc()}")
        try:
            handler.fail()
        except Exception:  # noqa: BLE001 - nothing is left to release it with
            say(f"could not be released:\n{traceback.format_exc()}")


def say(text: str) -> None:
    """Write a line to the service log."""
    sys.stderr.write(f"worker: {text}\n")
    sys.stderr.flush()
