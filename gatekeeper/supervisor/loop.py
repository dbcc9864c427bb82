"""The supervisor's turn: descriptors, timers and signals, one thing at a time."""

from __future__ import annotations

import heapq
import itertools
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_HARMLESS = (signal.SIGUSR1, signal.SIGUSR2)  # others reopen logs or drain at these: a habit must not close every port


class Timer:
    """A call that is due later; `cancel` forgets it."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Do not call. Harmless when it was called already."""
        self.call = None


class Loop:
    """Calls back when a descriptor is ready, a timer is due, or a signal has come. Signal handlers only queue."""

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._result: int | None = None
        self._previous: dict[int, Any] = {}
        self._wake_read, self._wake_write = socket.socketpair()

    def __enter__(self) -> Self:
        """Take over the signals."""
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, lambda _number, _frame: None)
        for number in _HARMLESS:
            self._previous[number] = signal.signal(number, signal.SIG_IGN)
        self.watch(self._wake_read.fileno(), self._take_signals)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._epoll.close()
        self._wake_read.close()
        self._wake_write.close()

    def watch(self, fd: int, callback: Callable[[], None], *, read: bool = True, write: bool = False) -> None:
        """Call back whenever ``fd`` can be read (or, with ``write``, also written). Replaces an earlier call.

        With neither, it calls back when the other side has hung up, and again until `unwatch`.
        """
        events = (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write else 0)
        if fd in self._callbacks:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``; to be called before it is closed."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Call once, ``delay_s`` from now."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), timer))
        return timer

    def stop(self, result: int) -> None:
        """Let `run` return ``result`` at the end of this turn; the first call counts."""
        if self._result is None:
            self._result = result

    def run(self) -> int:
        """Turn until `stop`."""
        while self._result is None:
            callbacks = [(fd, self._callbacks[fd]) for fd, _events in self._epoll.poll(self._patience_s())]
            for fd, callback in callbacks:
                # An earlier callback of this turn may have closed it, and even opened another in its place.
                if self._callbacks.get(fd) is callback:
                    callback()
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                timer = heapq.heappop(self._timers)[2]
                if timer.call is not None:
                    timer.call()
        return self._result

    def _patience_s(self) -> float | None:
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _take_signals(self) -> None:
        try:
            numbers = self._wake_read.recv(4096)
        except BlockingIOError:
            return
        for number in dict.fromkeys(numbers):
            for _ in range(numbers.count(number) if number in {signal.SIGTERM, signal.SIGINT} else 1):
                self._on_signal(number)
