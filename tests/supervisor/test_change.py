"""All workers change over, or none: who answers what, and when, in every order that matters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gatekeeper.snapshot.bindings import Bindings
from gatekeeper.supervisor import change as module
from gatekeeper.supervisor.accepted import Accepted
from gatekeeper.supervisor.change import Change
from gatekeeper.supervisor.loop import Loop

NEW = Accepted(2, {}, Bindings(), b"", -1, {})


class Recorder:
    """Stands where a worker stands and writes down what it is told; it has no process."""

    child = None

    def __init__(self, index: int, log: list[str]) -> None:
        self.index = index
        self.generation = 1
        self._log = log

    def offer(self, policy: Accepted) -> None:
        self._log.append(f"offer {policy.generation} to {self.index}")

    def commit(self, policy: Accepted) -> None:
        self._log.append(f"commit {policy.generation} in {self.index}")

    def abort(self, generation: int) -> None:
        self._log.append(f"abort {generation} in {self.index}")


class Attempt:
    """A change with its log."""

    def __init__(self, loop: Loop, workers: int) -> None:
        self.log: list[str] = []
        self.loop = loop
        self.workers: list[Any] = [Recorder(index, self.log) for index in range(workers)]
        self.change = Change(
            loop, NEW, list(self.workers), lambda: self.log.append("committing"), lambda why: self.log.append(f"done: {why}")
        )
        self.change.begin()

    def news(self) -> list[str]:
        """Return what happened since the last call."""
        news = list(self.log)
        self.log.clear()
        return news


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop of this test's own."""
    with Loop(lambda _number: None) as made:
        yield made


def test_all_prepare_then_all_commit(loop: Loop) -> None:
    """Nobody commits before everybody has prepared; it is done when everybody has committed."""
    attempt = Attempt(loop, 2)
    one, two = attempt.workers
    assert attempt.news() == ["offer 2 to 0", "offer 2 to 1"]
    attempt.change.prepared(two)
    attempt.change.prepared(two)
    assert attempt.news() == []
    attempt.change.prepared(one)
    assert attempt.news() == ["committing", "commit 2 in 0", "commit 2 in 1"]
    attempt.change.installed(one)
    assert attempt.news() == []
    attempt.change.installed(two)
    assert attempt.news() == ["done: None"]
    assert (one.generation, two.generation) == (2, 2)


def test_one_refuses(loop: Loop) -> None:
    """One refusal takes the offer back everywhere, and nothing was committed."""
    attempt = Attempt(loop, 2)
    one, two = attempt.workers
    attempt.change.prepared(one)
    attempt.news()
    attempt.change.refused(two, "no\nway")
    assert attempt.news() == [
        "abort 2 in 0", "abort 2 in 1", "done: worker 1 refused the policy: no?way"
    ]  # fmt: skip


def test_one_dies_before_the_commit(loop: Loop) -> None:
    """A death while the policy is prepared takes the offer back from the living."""
    attempt = Attempt(loop, 2)
    attempt.news()
    attempt.change.lost(attempt.workers[0])
    assert attempt.news() == ["abort 2 in 1", "done: worker 0 ended while it prepared the policy"]


def test_one_dies_after_the_commit(loop: Loop) -> None:
    """A death after the decision changes nothing: the successor gets the new policy."""
    attempt = Attempt(loop, 2)
    one, two = attempt.workers
    attempt.change.prepared(one)
    attempt.change.prepared(two)
    attempt.change.installed(one)
    attempt.news()
    attempt.change.lost(two)
    assert attempt.news() == ["done: None"]


def test_without_workers(loop: Loop) -> None:
    """When no worker serves, the policy is in force at once: perhaps it is what lets them start again."""
    assert Attempt(loop, 0).news() == ["committing", "done: None"]


def test_one_is_late(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that does not answer in time is named, and the offer is taken back."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    attempt = Attempt(loop, 2)
    attempt.change.prepared(attempt.workers[0])
    loop.later(0.2, lambda: loop.stop(0))
    loop.run()
    assert attempt.news()[-1] == "done: worker 1 did not answer within 0.05 s"


def test_strangers_do_not_count(loop: Loop) -> None:
    """A worker that was not asked, because it came later, neither completes nor spoils a change."""
    attempt = Attempt(loop, 1)
    stranger: Any = Recorder(7, attempt.log)
    attempt.news()
    attempt.change.prepared(stranger)
    attempt.change.refused(stranger, "no")
    attempt.change.lost(stranger)
    assert attempt.news() == []
