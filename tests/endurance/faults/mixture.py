"""Clients at a steady rate, of whom some are refused and some reset, and what each of them saw."""

from __future__ import annotations

import errno
import random
import threading
import time
from types import TracebackType
from typing import Self

from tests.support.backends import reset
from tests.support.clients import Sources, ask

CLIENTS = 4
DENIED = 0.1  # of all sessions, from a source that no rule allows
RESETS = 0.1  # of all sessions, ended by a reset of the client
LARGEST_BYTES = 50_000


class Mixture:
    """While the context is open, clients connect to an echo service, ``rate`` times a second or as often as they can.

    ``connected`` counts connections that the kernel made, ``turned_away`` those it refused: nobody listened.
    ``right`` counts whole answers, ``cut`` sessions that ended before (a fault, or a deny), ``wrong`` must stay empty.
    """

    def __init__(self, port: int, rate: float | None, allowed: list[str], denied: list[str], seed: int) -> None:
        self._port, self._rate, self._allowed, self._denied, self._seed = port, rate, allowed, denied, seed
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.connected = self.turned_away = self.right = self.cut = 0
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(CLIENTS)]

    def _run(self, number: int) -> None:
        chance = random.Random(self._seed * CLIENTS + number)
        began = time.monotonic()
        turns = 0
        while not self._stopping.is_set():
            if self._rate is not None:
                due = began + turns * CLIENTS / self._rate
                if self._stopping.wait(max(0.0, due - time.monotonic())):
                    return
            turns += 1
            try:
                self._session(chance)
            except AssertionError as err:
                with self._lock:
                    self.wrong.append(str(err))

    def _session(self, chance: random.Random) -> None:
        denied = chance.random() < DENIED
        source = chance.choice(self._denied if denied else self._allowed)
        words = chance.randbytes(int(LARGEST_BYTES ** chance.random()))
        try:
            client = Sources().connect(source, "127.0.0.1", self._port)
        except OSError as err:
            # A reset that arrives before we look means that the connection was made, judged and refused.
            self._count(connected=err.errno == errno.ECONNRESET, turned_away=err.errno != errno.ECONNRESET)
            return
        with client:
            self._count(connected=True)
            try:
                answer = ask(client, words)
            except OSError:
                self._count(cut=True)
                return
            whole = len(answer) == len(words)
            assert answer == words[: len(answer)], f"{source} got what it had not sent"
            assert not (denied and answer), f"{source} was let in"
            self._count(right=whole, cut=not whole)
            if chance.random() < RESETS:
                reset(client)

    def _count(self, **what: bool) -> None:
        with self._lock:
            for name, yes in what.items():
                setattr(self, name, getattr(self, name) + yes)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
