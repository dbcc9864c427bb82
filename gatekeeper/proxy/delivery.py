"""What is left to do for a TCP session one of whose legs was reset.

A reset must travel, or a stream that was cut would look complete; but not before the data ahead of it has been
acknowledged, because a reset discards what is still on its way.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gatekeeper.proxy.loop import WRITE
from gatekeeper.proxy.parting import is_gone, unread
from gatekeeper.proxy.relay import CHUNK_BYTES, SPLICE_FLAGS, Leg
from gatekeeper.snapshot.counters import End

if TYPE_CHECKING:
    from gatekeeper.proxy.session import TcpSession

DELIVERY_ROUNDS = 64  # chunks moved in one turn


class Delivery:
    """The last duty of a session one of whose legs was reset: bring over what had arrived before, then reset the other.

    While nothing moves it waits as long as for anybody who reads after the other side has ended. A reader that takes
    its time shows only now and then: the kernel opens a full window when half of the buffer is free again.
    """

    __slots__ = ("alive", "dead", "deadline_s", "end", "patience_s", "read_all", "session", "unacknowledged", "waiting")

    def __init__(self, session: TcpSession, dead: Leg) -> None:
        self.session = session
        self.dead = dead
        self.alive = dead.other
        self.end = End.CLIENT_RESET if dead is session.client else End.BACKEND_RESET
        self.patience_s = session.terms.half_close_timeout_s
        self.deadline_s = session.gate.shared.loop.now + self.patience_s
        self.read_all = False
        self.waiting = False  # registered for WRITE
        self.unacknowledged = -1

    def ready(self, _mask: int) -> None:
        """The living leg can take more."""
        self.step()

    def step(self) -> None:
        """Write what the living leg takes; once it has everything, wait for its acknowledgement."""
        dead = self.dead
        for _ in range(DELIVERY_ROUNDS):
            if not dead.blocked():
                try:
                    dead.pending = os.read(dead.fd, CHUNK_BYTES) or None
                except OSError:  # the reset itself, once everything before it was read
                    dead.pending = None
                if dead.pending is None:
                    self.read_all = True
                    self.wait(for_room=False)
                    self.check(self.session.gate.shared.loop.now)
                    return
                dead.received += len(dead.pending)
            try:
                if not self.write():
                    break
            except BlockingIOError:
                break
            except OSError:  # it is gone too
                self.session.finish(self.end)
                return
        self.wait(for_room=True)

    def write(self) -> bool:
        """Write once; say whether all that waited went. Raises what the write raises."""
        dead = self.dead
        if dead.pipe is not None:
            dead.piped -= os.splice(dead.pipe.read_fd, self.alive.fd, dead.piped, flags=SPLICE_FLAGS)
            if not dead.piped:
                self.session.pipes.give_back(dead.pipe)
                dead.pipe = None
        elif dead.pending is not None:
            dead.pending = dead.pending[os.write(self.alive.fd, dead.pending) :] or None
        self.deadline_s = self.session.gate.shared.loop.now + self.patience_s
        return not dead.blocked()

    def wait(self, *, for_room: bool) -> None:
        """Watch the living leg for room, or not at all."""
        if for_room != self.waiting:
            loop = self.session.gate.shared.loop
            self.waiting = for_room
            if for_room:
                loop.watch(self.alive.fd, WRITE, self)
            else:
                loop.unwatch(self.alive.fd)

    def check(self, now: float) -> None:
        """See `gate.Due.check`."""
        if self.read_all:
            left = unread(self.alive)
            if left == 0 or is_gone(self.alive):
                self.session.finish(self.end)
                return
            if left != self.unacknowledged:
                self.unacknowledged = left
                self.deadline_s = now + self.patience_s
        if now >= self.deadline_s:
            self.session.finish(self.end)

    def fail(self) -> None:
        """See `Failing.fail`."""
        self.session.fail()
