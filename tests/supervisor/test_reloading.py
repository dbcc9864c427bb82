"""Requests for reloads: each is answered once, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gatekeeper.cli import daemon
from gatekeeper.cli.daemon import Refused, Unreachable
from tests.supervisor.service import Service, listener, rules, stand_in
from tests.support.ports import free_port
from tests.support.process import children, command_line
from tests.support.wait import until

Start = Callable[..., Service]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Start a service whose workers are stand-ins of one kind."""
    services: list[Service] = []

    def run(mode: str = "fine", **options: Any) -> Service:
        text = rules(listener(free_port(), 9))
        services.append(Service(folder, text, worker=stand_in(mode), workers=1, **options))
        return services[-1].ready()

    yield run
    for service in services:
        service.stop()


class Asking:
    """A client that asks in a thread; ``answer`` is what it was told."""

    def __init__(self, service: Service, op: str, **args: Any) -> None:
        self._arguments = (str(service.control_path), op, args)
        self.answer: str | dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        path, op, args = self._arguments
        try:
            with daemon.connect(path) as asked:
                self.answer = asked.ask(op, **args).result
        except (Refused, Unreachable) as err:
            self.answer = err.message

    def result(self) -> str | dict[str, Any]:
        """Return the answer once it is there."""
        self._thread.join(30)
        assert self.answer is not None
        return self.answer


def ask(service: Service, op: str, **args: Any) -> str | dict[str, Any]:
    """Return the answer to one request."""
    return Asking(service, op, **args).result()


def compilers(service: Service) -> list[int]:
    """Return the compilers that run."""
    return [pid for pid in children(service.pid) if "supervisor.compile" in command_line(pid)]


def test_requests_that_come_meanwhile_share_one_reload(start: Start) -> None:
    """Three clients and two signals while the compiler stands still: one more reload answers them all."""
    service = start()
    first = Asking(service, "reload")
    (compiler,) = until(lambda: compilers(service), "it compiles")
    os.kill(compiler, signal.SIGSTOP)
    others = [Asking(service, "reload") for _ in range(3)]
    for _ in range(2):
        service.signal(signal.SIGHUP)
    ask(service, "status")  # so it has read the others' requests, too, which came before
    os.kill(compiler, signal.SIGCONT)
    answers = [one.result() for one in (first, *others)]
    assert all(isinstance(answer, dict) and answer["changed"] is False for answer in answers)
    service.says("reloaded", times=2)
    assert ask(service, "status")["generation"] <= 4  # type: ignore[index, operator]


def test_a_rollback_that_a_worker_refuses_is_tried_again(start: Start) -> None:
    """The first attempt changes nothing and says why; a later one works by itself."""
    service = start("refuse:3")
    before = ask(service, "status")["policy"]  # type: ignore[index]
    service.write(rules(listener(free_port(), 9)))
    on_trial = ask(service, "reload", confirm_s=3600)
    assert isinstance(on_trial, dict)
    answer = ask(service, "rollback")
    assert "worker 0 refused the policy" in str(answer)
    assert ask(service, "status")["policy"] == on_trial["policy"]  # type: ignore[index]
    service.says("could not be rolled back; trying again")
    until(lambda: ask(service, "status")["policy"] == before, "it went back by itself")  # type: ignore[index]
    assert "no policy waits to be confirmed" in str(ask(service, "confirm"))


@pytest.mark.parametrize("seconds", [0, -1, 1e9, "60", True, [60]])
def test_how_long_a_trial_may_be(start: Start, seconds: object) -> None:
    """From a second to a day."""
    service = start()
    assert "a number of seconds from 1 to 86400" in str(ask(service, "reload", confirm_s=seconds))


def test_a_service_that_stops_answers_everybody(start: Start) -> None:
    """Who waits for a reload, and who asks for one now, is told that the service stops."""
    service = start()
    first = Asking(service, "reload")
    (compiler,) = until(lambda: compilers(service), "it compiles")
    os.kill(compiler, signal.SIGSTOP)
    second = Asking(service, "reload", confirm_s=60)
    ask(service, "status")
    service.signal(signal.SIGTERM)
    assert (first.result(), second.result()) == ("the service stops", "the service stops")
    assert service.wait(20) == 0


def test_the_command(start: Start, folder: Path) -> None:
    """What people see: what was opened, closed and decided, and the compiler's words when the rules are refused."""
    service = start()
    port = free_port()

    def gatekeeper(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gatekeeper", *argv, "--control", str(service.control_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, env=os.environ)

    service.write(rules(listener(port, 9, "other")))
    done = gatekeeper("reload", "--confirm", "1h")
    assert (done.returncode, done.stderr) == (0, "")
    first, opened, closed, trial = done.stdout.splitlines()
    assert first.endswith("is in force")
    assert (opened, closed.startswith("closed web (tcp 127.0.0.1:")) == (f"opened other (tcp 127.0.0.1:{port})", True)
    assert trial.startswith("on trial: `gatekeeper confirm` within 3600 s keeps it, otherwise ")
    done = gatekeeper("confirm")
    assert (done.returncode, done.stdout.endswith("stays in force\n")) == (0, True)
    service.write(rules(listener(port, 9, "other"), more="nonsense: 1\n"))
    done = gatekeeper("reload")
    assert (done.returncode, done.stdout) == (1, "")
    assert 'unknown key "nonsense"' in done.stderr
    assert "is not a policy that can be applied (1 problem)" in done.stderr
    service.rules.unlink()
    done = gatekeeper("reload")
    assert (done.returncode, "No such file or directory" in done.stderr) == (3, True)
    assert gatekeeper("reload", "--confirm", "soon").returncode == 2
