"""The proof, from inside: this process is new code that was asked whether it could take over, and does all but that.

It reads the state and the policy, sees that every listener's terms are there, and starts a worker and an observer of
its own, without a socket: the worker must be ready to put the policy in force, the observer must be up. Whatever
fails is said; whatever cannot even be said shows in the exit code.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
from typing import TYPE_CHECKING, Any

from gatekeeper import __version__
from gatekeeper.errors import GatekeeperError
from gatekeeper.kernel import privileges
from gatekeeper.kernel.judge import Common, Judge
from gatekeeper.proxy.gate import Prepared, Terms, ephemeral_ports
from gatekeeper.snapshot.reader import Snapshot
from gatekeeper.supervisor import child as children
from gatekeeper.supervisor import handover
from gatekeeper.supervisor.banlist import BanList
from gatekeeper.supervisor.leaving import Leaving
from gatekeeper.supervisor.log import printable
from gatekeeper.supervisor.loop import Loop
from gatekeeper.supervisor.observing import Observer
from gatekeeper.supervisor.succession import Ground
from gatekeeper.supervisor.worker import State, Worker

if TYPE_CHECKING:
    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.child import Commands
    from gatekeeper.supervisor.log import Log

PATIENCE_S = 40.0  # less than whoever asks has
CAN, CANNOT = 0, 1


def prove(asked: handover.Incoming, commands: Commands, log: Log) -> int:
    """Say whether this code can take over, to whoever asked; return the exit code."""
    assert asked.report is not None
    why: str | None
    try:
        left = handover.read(asked.state)
        policy = Ground.of(left).policy
        BanList.parse(left.bans)
        _see_terms(policy)
        if left.kernel is not None:
            see_program(policy)
        why = _Rehearsal(commands, policy, log).run()
    except Exception as err:  # noqa: BLE001 - whatever it is, it is the answer
        why = str(err) if isinstance(err, GatekeeperError) else f"{type(err).__name__}: {err}"
    report = {"proved": why is None, "error": why, "version": __version__}
    os.write(asked.report, json.dumps(report).encode())
    if why is not None:
        log.error(why)
    return CAN if why is None else CANNOT


def _see_terms(policy: Accepted) -> None:
    """See that a worker of this version finds all it needs in a policy that another version has compiled."""
    snapshot = Snapshot(memoryview(mmap.mmap(policy.snapshot_fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)))
    prepared = Prepared(policy.generation, snapshot, policy.bindings, ephemeral_ports())
    for index in range(len(policy.meta["endpoints"])):
        Terms(prepared, index)


def see_program(policy: Accepted) -> None:
    """See that the kernel takes the program that this version makes of a policy.

    Raises:
        OSError: it does not.
    """
    snapshot = Snapshot(memoryview(mmap.mmap(policy.snapshot_fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)))
    common = Common()
    try:
        Judge(snapshot, policy.bindings.details, policy.bindings.rows, common).close()
    finally:
        common.close()


class _Rehearsal:
    """A worker and an observer that are started, asked, and ended."""

    def __init__(self, commands: Commands, policy: Accepted, log: Log) -> None:
        self._policy = policy
        self._missing = {"worker", "observer"}
        self._why: str | None = None
        self._loop = Loop(self._signalled)
        identity = privileges.who_to_become()
        self._worker = Worker(0, self._loop, commands.worker, identity)
        self._observer = Observer(self._loop, commands.observer, identity, "off", None, None)
        self._observer.is_ready = lambda: self._done("observer")
        self._leaving = Leaving(self._loop, log, 2)

    def run(self) -> str | None:
        """Return what went wrong, ``None`` when nothing did."""
        # The sockets are of no use to a worker that puts nothing in force.
        policy, self._policy.opened = self._policy, {}
        with self._loop:
            try:
                self._loop.later(PATIENCE_S, self._too_late)
                self._worker.start(1, policy.bindings, self._heard)
                self._observer.start([self._worker], self._leaving, policy, {})
                self._loop.run()
            finally:
                for process in (self._worker.child, self._observer.child):
                    if process is not None:
                        process.kill()
                        process.wait(PATIENCE_S)
        return self._why

    def _heard(self, worker: Worker, message: dict[str, Any]) -> None:
        op = message.get("op")
        if op == "ready" and worker.state is State.STARTING:
            worker.became_ready()
            if worker.counters_fd is not None:
                worker.siblings([worker.counters_fd])
            worker.offer(self._policy)
        elif op == "prepared":
            self._done("worker")
        elif op == "failed":
            self._fail(f"a worker refuses the policy in force: {printable(str(message.get('error')))}")

    def _done(self, who: str) -> None:
        self._missing.discard(who)
        if not self._missing:
            self._loop.stop(CAN)

    def _fail(self, why: str) -> None:
        self._why = self._why or why
        self._loop.stop(CANNOT)

    def _signalled(self, number: int) -> None:
        if number != signal.SIGCHLD:
            self._fail("it was told to stop")
            return
        for name, process in (("worker", self._worker.child), ("observer", self._observer.child)):
            status = process.poll() if process is not None else None
            if status is not None:
                self._fail(f"its {name} {children.how_it_ended(status)}")

    def _too_late(self) -> None:
        self._fail(f"its {' and its '.join(sorted(self._missing))} did not get ready within {PATIENCE_S:g} s")
