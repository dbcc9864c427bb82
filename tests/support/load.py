"""A steady stream of short sessions, and what became of each."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from tests.support.clients import Sources, ask
from tests.support.wait import until

CLIENTS = 4


class Load:
    """While the context is open, clients connect to an echo service, ask, check the answer and close, again and again.

    ``done`` counts sessions that went well, ``failures`` holds a sentence for each that did not.
    """

    def __init__(self, host: str, port: int, sources: list[str]) -> None:
        self._host, self._port, self._sources = host, port, sources
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.done = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(CLIENTS)]

    def _run(self, number: int) -> None:
        turn = number
        while not self._stopping.is_set():
            source = self._sources[turn % len(self._sources)]
            turn += CLIENTS
            try:
                with Sources().connect(source, self._host, self._port) as client:
                    answer = ask(client, words := f"session {turn}".encode())
                    problem = None if answer == words else f"{source} got {answer!r}"
            except OSError as err:
                problem = f"{source}: {err!r}"
            with self._lock:
                if problem is None:
                    self.done += 1
                else:
                    self.failures.append(problem)

    def wait_for_more(self, sessions: int = 50) -> None:
        """Return when that many more sessions have gone well."""
        goal = self.done + sessions
        until(lambda: self.done >= goal, f"{sessions} more sessions (failures: {self.failures[:3]})")

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
