"""Workers that do not do as they are told: the service keeps what it has, says why, and tries again."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.supervisor.service import Service, listener, rules, stand_in
from tests.support.ports import free_port
from tests.support.process import children, is_running
from tests.support.wait import until

Start = Callable[..., Service]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Start a service whose workers are stand-ins of one kind."""
    services: list[Service] = []

    def run(mode: str, **options: Any) -> Service:
        text = rules(listener(free_port(), 9))
        services.append(Service(folder, text, worker=stand_in(mode), **options))
        return services[-1]

    yield run
    for service in services:
        service.stop()


def listens(port: int) -> bool:
    """Say whether the kernel takes connections there."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("refuse:2", r"worker \d refused the policy: I do not\?like it"),
        ("die:2", r"worker \d ended while it prepared the policy"),
    ],
)
def test_a_policy_that_workers_do_not_take(start: Start, mode: str, why: str) -> None:
    """One worker that cannot take a policy keeps it from all; new listeners are closed again; the next reload works."""
    service = start(mode, workers=2).ready()
    port = free_port()
    text = rules(listener(port, 9))
    service.reload(text)
    service.says(why)
    service.says("reload failed: the policy [0-9a-f]{12} stays in force")
    until(lambda: not listens(port), "the new listener is closed again")
    until(lambda: len(service.workers()) == 2, "both workers live")
    service.reload(text)
    service.says("reloaded")
    assert listens(port)


def test_workers_that_cannot_start(start: Start) -> None:
    """When workers die at once, the start is given up with exit code 3 and the reason."""
    service = start("crash", workers=2)
    assert service.wait(30) == 3
    assert "cannot start: it exited with 4" in service.output()


def test_workers_that_refuse_the_first_policy(start: Start) -> None:
    """When workers refuse the policy at the start, it is given up with exit code 3 and their reason."""
    service = start("refuse:1")
    assert service.wait(30) == 3
    assert re.search(r"worker \d refused the policy: I do not\?like it", service.output())


def test_a_stuck_worker_is_replaced(start: Start, folder: Path) -> None:
    """A worker whose loop no longer turns is killed and replaced."""
    service = start(f"stuck:{folder}/was-stuck", stuck_after_s=0.5, workers=1).ready()
    (before,) = service.workers()
    service.says(r"worker 0 \(pid \d+\) is stuck for \d+ s; killing it")
    until(lambda: service.workers() not in ([before], []), "there is a successor")
    assert not is_running(before)


def test_an_observer_that_crashes(start: Start) -> None:
    """An observer that dies again and again is started less and less often, and nobody else notices."""
    service = start("fine", observer=["false"]).ready()
    workers = service.workers()
    service.says("the observer exited with 1; starting another in 0.4 s")
    assert service.workers() == workers
    assert len(children(service.pid)) <= 2


def test_a_stuck_worker_does_not_hold_up_the_stop(start: Start, folder: Path) -> None:
    """A worker that is stuck while it should drain is killed, long before the deadline."""
    service = start(f"stuck:{folder}/was-stuck", stuck_after_s=2.0, workers=1, drain_timeout_s=300.0).ready()
    service.signal(signal.SIGTERM)
    assert service.wait(30) == 0
    assert "instead of draining" in service.output()


def test_an_observer_that_does_not_read(start: Start) -> None:
    """An observer that is stopped is killed and replaced once it has not read for a while."""
    service = start("fine", stuck_after_s=0.5, workers=1).ready()
    (worker,) = service.workers()
    (observer,) = set(children(service.pid)) - {worker}
    os.kill(observer, signal.SIGSTOP)
    service.reload()  # it is told
    service.says(rf"the observer \(pid {observer}\) does not read what it is sent; killing it")
    service.says("the observer was killed by SIGKILL; starting another")
    until(lambda: set(children(service.pid)) - {worker, observer}, "there is another observer")
    until(lambda: service.workers() == [worker], "the worker is the same")  # a process that is not executed yet looks like us
