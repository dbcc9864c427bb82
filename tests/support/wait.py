"""Waiting with a deadline: the only place where a test sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.01


def until(question: Callable[[], T], what: str, within_s: float = 15.0) -> T:
    """Ask until the answer is true and return it; an ``AssertionError`` during a question counts as a no.

    Raises:
        AssertionError: the deadline passed; the message says what was awaited and the latest answer.
    """
    deadline = time.monotonic() + within_s
    while True:
        answer: object
        try:
            answer = answered = question()
            if answered:
                return answered
        except AssertionError as err:
            answer = err
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {within_s:g} s in vain: {what} (latest answer: {answer!r})")
        time.sleep(POLL_S)
