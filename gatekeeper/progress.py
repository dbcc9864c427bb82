"""How far a long load is, for whoever waits for it.

Whoever loads says what it is at, as often as it likes: that costs no more than an assignment. A thread looks at it from
time to time and tells people, but nothing at all within the first second.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

FIRST_S = 1.0
STEP_S = 0.2

Tell = Callable[[str, int, int], None]  # what is being done now; bytes of it that are done, and in all (0: not known)


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


class Watch:
    """A `Tell` while it is entered. ``show`` is called from a thread with a line of text, and with "" when it is over."""

    def __init__(self, show: Callable[[str], None], first_s: float = FIRST_S, step_s: float = STEP_S) -> None:
        self._show = show
        self._first_s = first_s
        self._step_s = step_s
        self._at = ("", 0, 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        self._at = what, done, total

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        shown = ""
        wait_s = self._first_s
        while not self._over.wait(wait_s):
            text = describe(*self._at)
            if text != shown:
                shown = text
                self._show(text)
            wait_s = self._step_s
        if shown:
            self._show("")


def describe(what: str, done: int, total: int) -> str:
    """Return in one line, for people, how far it is."""
    line = "".join(char if char.isprintable() else "?" for char in what)
    return f"{line}: {done / 1e6:.1f} of {total / 1e6:.1f} MB" if total else line
