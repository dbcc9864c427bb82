"""Long work in short slices: what concerns every session is done between the turns of the loop, so that nobody waits.

A chore is a generator. It yields after each step; ``WAIT`` says that it cannot go on at the moment.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Iterator

from gatekeeper.proxy.loop import say

Chore = Iterator[bool]

SLICE_S = 0.002  # how long sessions may be kept waiting at a time
WAIT_S = 0.01
GO_ON = False
WAIT = True


class Chores:
    """What is left to do, first come, first served."""

    def __init__(self) -> None:
        self.queue: deque[Chore] = deque()
        self.resume_s = 0.0  # nothing can be done before

    def patience(self, now: float) -> float:
        """Return how long the loop may wait for events meanwhile, in seconds; there must be chores."""
        return max(0.0, self.resume_s - now)

    def go_on(self) -> None:
        """Work for one slice."""
        now = time.monotonic()
        if now < self.resume_s:
            return
        until = now + SLICE_S
        queue = self.queue
        while queue:
            try:
                for state in queue[0]:
                    now = time.monotonic()
                    if state is WAIT:
                        self.resume_s = now + WAIT_S
                        return
                    if now >= until:
                        return
            except Exception:  # noqa: BLE001 - the loop's promise holds here, too
                say(f"a chore failed:\n{traceback.format_exc()}")
            queue.popleft()
