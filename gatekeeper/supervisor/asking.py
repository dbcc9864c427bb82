"""Questions to all workers at once: one message to each, one answer from each, and rows in between.

A worker talks to strangers, so an answer is only taken from a worker that was asked and has not answered yet, and only
so many rows as were asked for. What is in the rows is for whoever asked to check.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import TYPE_CHECKING, Any

from gatekeeper.kernel.channel import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gatekeeper.supervisor.loop import Loop, Timer
    from gatekeeper.supervisor.worker import Worker

    Rows = Callable[[Worker, list[Any]], None]
    Done = Callable[[dict[int, dict[str, Any]], list[int]], None]

_ROOM_BYTES = 64  # for the number of the query


class TooLong(Exception):
    """The message does not fit in what a worker reads at once."""


class Questions:
    """All questions that are waiting for answers."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        # Not from 1: workers of before an upgrade may still answer what was asked then.
        self._numbers = itertools.count(time.monotonic_ns() // 1_000_000)
        self._open: dict[int, _Question] = {}

    def ask(
        self, workers: Iterable[Worker], message: dict[str, Any], fds: Sequence[int], rows: Rows, done: Done, patience_s: float
    ) -> None:
        """Send a message to these workers.

        ``rows`` is called with a worker and some rows of its answer, again and again. ``done`` is called once, never
        before this returns, with the answers by worker index, and the indexes of those that gave none.

        Raises:
            TooLong: nothing was sent.
        """
        if len(json.dumps(message, separators=(",", ":"))) > MAX_MESSAGE_BYTES - _ROOM_BYTES:
            raise TooLong
        number = next(self._numbers)
        timer = self._loop.later(patience_s, lambda: self._finish(number))
        asked = list(workers)
        self._open[number] = _Question({worker.index for worker in asked}, message.get("most", 0), rows, done, timer)
        for worker in asked:
            if worker.child is not None:
                worker.child.send(message | {"query": number}, fds)
        if not asked:
            self._loop.later(0.0, lambda: self._finish(number))

    def heard(self, worker: Worker, message: dict[str, Any]) -> None:
        """Take rows or an answer of a worker."""
        number = message.get("query")
        question = self._open.get(number) if isinstance(number, int) else None
        if question is None or number is None or worker.index not in question.waiting:
            return
        if message.get("op") == "answer":
            question.answers[worker.index] = message
            self._settle(number, worker)
            return
        rows = message.get("rows")
        if isinstance(rows, list):
            rows = rows[: question.most - question.told.get(worker.index, 0)]
            question.told[worker.index] = question.told.get(worker.index, 0) + len(rows)
            question.rows(worker, rows)

    def lost(self, worker: Worker) -> None:
        """Wait no longer for a worker that has ended."""
        for number in list(self._open):
            self._settle(number, worker)

    def _settle(self, number: int, worker: Worker) -> None:
        question = self._open.get(number)
        if question is not None and worker.index in question.waiting:
            question.waiting.discard(worker.index)
            if not question.waiting:
                self._finish(number)

    def _finish(self, number: int) -> None:
        question = self._open.pop(number, None)
        if question is not None:
            question.timer.cancel()
            question.done(question.answers, sorted(question.asked - question.answers.keys()))


class _Question:
    """One question, and what has come back so far."""

    def __init__(self, asked: set[int], most: int, rows: Rows, done: Done, timer: Timer) -> None:
        self.asked = frozenset(asked)
        self.waiting = asked
        self.most = most  # rows of one worker
        self.rows = rows
        self.done = done
        self.timer = timer
        self.answers: dict[int, dict[str, Any]] = {}
        self.told: dict[int, int] = {}  # rows, by worker
