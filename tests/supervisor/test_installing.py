"""A policy is in force everywhere or nowhere, whichever step fails, and a trial ends as it should."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gatekeeper import config
from gatekeeper.errors import KernelError
from gatekeeper.kernel import memfd, steering
from gatekeeper.snapshot.bindings import Bindings
from gatekeeper.snapshot.encode import encode
from gatekeeper.supervisor.accepted import Accepted, accept, endpoints
from gatekeeper.supervisor.installing import Installer, Judged
from gatekeeper.supervisor.listening import Opener
from gatekeeper.supervisor.loop import Loop
from tests.support.clients import nobody_listens
from tests.support.ports import free_port


class Obedient:
    """Stands where a worker stands: it does at once what it is told, unless it ``refuses`` a generation."""

    child: Any = None
    index = 0

    def __init__(self, crew: Any) -> None:
        self.generation = 1
        self.refuses = 0
        self._crew = crew

    def offer(self, policy: Accepted) -> None:
        if policy.generation == self.refuses:
            self._crew.loop.later(0, lambda: self._crew.change.refused(self, "not me"))
        else:
            self._crew.loop.later(0, lambda: self._crew.change.prepared(self))

    def commit(self, policy: Accepted) -> None:
        self._crew.loop.later(0, lambda: self._crew.change.installed(self))

    def abort(self, generation: int) -> None:
        pass


class Kernel:
    """Stands where the enforcer stands; a "program" is the name of the policy that it was loaded for."""

    def __init__(self, policy: Accepted) -> None:
        self.program = policy.name
        self.loaded = {policy.name}
        self.refuses: str | None = None

    def load(self, policy: Accepted) -> str:
        self.loaded.add(policy.name)
        return policy.name

    def swap(self, program: str, policy: Accepted, *, keep: bool = False) -> str:
        if self.refuses == program:
            raise KernelError("the kernel is not in the mood")
        assert program in self.loaded
        before, self.program = self.program, program
        if not keep:
            self.loaded.discard(before)
        return before

    def let_go(self, program: str) -> None:
        self.loaded.discard(program)

    def discard(self, program: str) -> None:
        assert program != self.program
        self.loaded.discard(program)

    def guards(self) -> bool:
        return False


class Stage:
    """An installer with real snapshots and sockets, one obedient worker, and a kernel of our own."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.ports = {name: free_port() for name in ("a", "b", "c")}
        crew: Any = SimpleNamespace(
            loop=loop, change=None, observer=None, policy=None, bring_up_to_date=lambda: None,
            leaving=SimpleNamespace(workers=[], enforce=lambda _policy: None),
        )  # fmt: skip
        self.worker = Obedient(crew)
        crew.workers, crew.those_serving = [self.worker], lambda: [self.worker]
        self.crew = crew
        first = accept(self.snapshot("a", "b"), 1, Bindings())
        opener = Opener(1, steering.new_key(), [])
        first.opened = opener.open_all(endpoints(first.meta), {})
        crew.policy = first
        self.kernel = Kernel(first)
        self.installer = Installer(loop, first, opener, crew, self.kernel)  # type: ignore[arg-type]
        self.first = first.name

    def snapshot(self, *listeners: str, default: str = "allow") -> int:
        """Return a compiled policy with these listeners."""
        lines = "".join(f"  - {{name: {one}, listen: '127.0.0.1:{self.ports[one]}', backend: '127.0.0.1:9'}}\n" for one in listeners)
        loaded = config.load("rules.yaml", f"version: 1\nlisteners:\n{lines}default: {default}\n".encode())
        assert loaded.config is not None, loaded.problems
        fd = memfd.create("test")
        for part in encode(loaded.config):
            os.write(fd, part)
        return fd

    def result(self, begin: Callable[[Callable[[str | None], None]], None]) -> str | None:
        """Let something end and return why it failed."""
        said: list[str | None] = []

        def done(failure: str | None) -> None:
            said.append(failure)
            self.loop.stop(0)

        self.loop._result = None
        limit = self.loop.later(30, lambda: self.loop.stop(1))
        begin(done)
        assert said or self.loop.run() == 0
        limit.cancel()
        (failure,) = said
        return failure

    def install(self, *listeners: str, on_trial: bool = False, default: str = "deny") -> str | None:
        """Install a policy with these listeners."""
        fd = self.snapshot(*listeners, default=default)
        return self.result(lambda done: self.installer.install(fd, done, on_trial=on_trial))

    def listening(self) -> str:
        """Return the listeners whose ports are open."""
        return "".join(name for name, port in self.ports.items() if not nobody_listens(port))

    def is_as_at_first(self) -> bool:
        """Whether everything is as if nothing had happened."""
        return (
            self.installer.policy.name == self.crew.policy.name == self.first
            and self.kernel.program == self.first and self.kernel.loaded == {self.first}
            and self.listening() == "ab" and self.worker.generation == self.crew.policy.generation
            and os.fstat(self.installer.policy.snapshot_fd).st_size > 0
        )  # fmt: skip


def descriptors() -> dict[str, str]:
    """Return what every open descriptor is."""
    gc.collect()  # mappings hold theirs until they are gone
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


@pytest.fixture
def stage() -> Iterator[Stage]:
    """A stage of this test's own; no descriptor may be left over."""
    free_port()  # keeps a socket of its own from the first call on
    before = descriptors()
    with Loop(lambda _number: None) as loop:
        stage = Stage(loop)
        yield stage
        stage.installer.close()
        stage.installer.settle()
        stage.installer.policy.close()
    assert descriptors() == before, set(descriptors().items()) ^ set(before.items())


def test_everything_changes(stage: Stage) -> None:
    """Workers, kernel and sockets follow the new policy, and what only the old one needed is gone."""
    assert stage.install("b", "c") is None
    assert stage.listening() == "bc"
    assert stage.kernel.program == stage.installer.policy.name != stage.first
    assert stage.kernel.loaded == {stage.kernel.program}
    assert stage.worker.generation == 2


def test_a_worker_refuses(stage: Stage) -> None:
    """New listeners are closed again, and the program is given up."""
    stage.worker.refuses = 2
    assert "worker 0 refused the policy: not me" in (stage.install("b", "c") or "")
    assert stage.is_as_at_first()
    assert stage.install("b", "c") is None


def test_a_port_is_taken(stage: Stage) -> None:
    """Nothing has changed, and the program is given up."""
    with socket.create_server(("127.0.0.1", stage.ports["c"])):
        assert "we hold the address ourselves" in (stage.install("b", "c") or "")
    assert stage.is_as_at_first()


def test_the_bytes_are_no_policy(stage: Stage) -> None:
    """A compiler that writes nonsense is not believed."""
    failure = stage.result(lambda done: stage.installer.install(memfd.from_bytes("test", b"nonsense" * 100), done))
    assert "the compiled policy cannot be used" in (failure or "")
    assert stage.is_as_at_first()


def test_the_kernel_refuses(stage: Stage) -> None:
    """Workers that have the new policy already get the old one back, with the sockets that were never closed."""
    queue = socket.create_connection(("127.0.0.1", stage.ports["a"]))
    new = accept(stage.snapshot("b", "c", default="deny"), 9, Bindings())
    stage.kernel.refuses = new.name
    new.close()
    assert stage.install("b", "c") == "the kernel is not in the mood"
    assert stage.is_as_at_first()
    assert stage.worker.generation == 3
    # What waited at the listener that would have been closed waits there still.
    connection, _address = stage.installer.policy.opened[f"tcp:127.0.0.1:{stage.ports['a']}"].sockets[0].accept()
    connection.close()
    queue.close()


def test_the_kernel_and_then_a_worker_refuse(stage: Stage) -> None:
    """When there is no way back either, both are said, and what is in force is what is said to be."""
    new = accept(stage.snapshot("b", "c", default="deny"), 9, Bindings())
    stage.kernel.refuses = new.name
    new.close()
    stage.worker.refuses = 3
    failure = stage.install("b", "c") or ""
    assert "workers have the new policy, the kernel still has the one before" in failure
    assert "not me" in failure
    assert stage.installer.policy.name == stage.crew.policy.name != stage.first
    assert stage.kernel.program == stage.first
    assert stage.listening() == "bc"


class Child:
    """A process that can be killed."""

    killed = False

    def kill(self) -> None:
        self.killed = True


class TestLiveSessions:
    """Judged again by all workers that may have any."""

    afterwards: dict[str, Any] = {}  # noqa: RUF012 - what has become of the worker when its answer is due

    def judge(self, stage: Stage, answers: dict[int, Any], missing: list[int]) -> Judged:
        """Return what is said when the workers answer so."""
        found: list[Judged] = []

        def ask(order: dict[str, Any], *, done: Callable[..., None], **_more: Any) -> None:
            assert order == {"op": "rejudge", "generation": stage.installer.policy.generation}
            stage.worker.child = self.afterwards.get("child", stage.worker.child)
            done(answers, missing)

        def begin(done: Callable[[str | None], None]) -> None:
            def judged(how: Judged) -> None:
                found.append(how)
                done(None)

            stage.installer.judge_again(judged, patience_s=0.1)

        stage.crew.ask = ask
        stage.result(begin)
        return found[0]

    def test_their_answers_are_added_up(self, stage: Stage) -> None:
        """Numbers that no worker can mean are not believed."""
        answers = {0: {"judged": 7, "ended": 2}, 1: {"judged": 1, "ended": 1 << 80}, 2: {"judged": "many", "ended": -3}}
        assert self.judge(stage, answers, []) == Judged(8, 2 + (1 << 32))

    def test_a_worker_that_does_not_answer_is_ended(self, stage: Stage) -> None:
        """Its sessions may be those that the policy refuses. One that has ended by itself has none any more."""
        stage.worker.child = child = Child()
        assert self.judge(stage, {}, [0]) == Judged(0, 0, (0,))
        assert child.killed
        self.afterwards = {"child": None}
        assert self.judge(stage, {}, [0, 7]) == Judged()

    def test_a_worker_that_is_behind_is_waited_for(self, stage: Stage) -> None:
        """One that came up with the policy before must have this one first; if it never does, it is ended."""
        assert stage.install("b") is None
        stage.worker.child = child = Child()
        stage.worker.generation = 1
        stage.loop.later(0.02, lambda: setattr(stage.worker, "generation", 2))
        assert self.judge(stage, {0: {"judged": 1, "ended": 0}}, []) == Judged(1)
        stage.worker.generation = 1
        assert self.judge(stage, {0: {"judged": 1, "ended": 0}}, []) == Judged(1, 0, (0,))
        assert child.killed


class TestTrials:
    """In force, with a way back."""

    def test_settled(self, stage: Stage) -> None:
        """What was kept for the way back is given up."""
        assert stage.install("b", "c", on_trial=True) is None
        assert stage.installer.spare is not None
        assert stage.kernel.loaded == {stage.first, stage.kernel.program}
        stage.installer.settle()
        assert stage.installer.spare is None
        assert stage.kernel.loaded == {stage.installer.policy.name}

    def test_put_back(self, stage: Stage) -> None:
        """All is as it was, the listener that had been closed included; the trial's own is closed."""
        assert stage.install("b", "c", on_trial=True) is None
        assert stage.listening() == "bc"
        assert stage.result(stage.installer.put_back) is None
        assert stage.is_as_at_first()
        assert stage.installer.spare is None

    def test_a_worker_refuses_to_go_back(self, stage: Stage) -> None:
        """The trial goes on, and can be ended later."""
        assert stage.install("b", "c", on_trial=True) is None
        stage.worker.refuses = 3
        assert "not me" in (stage.result(stage.installer.put_back) or "")
        assert stage.installer.spare is not None
        assert stage.listening() == "bc"
        assert stage.result(stage.installer.put_back) is None
        assert stage.is_as_at_first()

    def test_the_kernel_refuses_to_go_back(self, stage: Stage) -> None:
        """Workers go back all the same, and it is said."""
        assert stage.install("b", "c", on_trial=True) is None
        stage.kernel.refuses = stage.first
        assert "the kernel still has the policy on trial" in (stage.result(stage.installer.put_back) or "")
        assert stage.installer.policy.name == stage.first
        assert stage.listening() == "ab"

    def test_a_port_was_taken_meanwhile(self, stage: Stage) -> None:
        """Going back matters more than one listener."""
        assert stage.install("c", on_trial=True) is None
        with socket.create_server(("127.0.0.1", stage.ports["a"])):
            failure = stage.result(stage.installer.put_back) or ""
        assert failure.count("we hold the address ourselves") == 1
        assert stage.installer.policy.name == stage.first
        assert stage.listening() == "b"
        assert stage.install("a", "b", default="allow") is None
        assert stage.listening() == "ab"

    def test_the_service_stops_meanwhile(self, stage: Stage) -> None:
        """The kernel, which may outlive the service, goes back at once; a change under way does not undo that."""
        assert stage.install("b", "c", on_trial=True) is None
        stage.installer.put_back_kernel()
        assert stage.kernel.program == stage.first
        assert stage.result(stage.installer.put_back) is None
        assert stage.kernel.program == stage.first
