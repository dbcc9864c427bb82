"""The observer as the supervisor sees it: told everything, relied on for nothing."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from gatekeeper.supervisor import places
from gatekeeper.supervisor.child import Child
from gatekeeper.supervisor.handover import Fd, OldObserver
from gatekeeper.supervisor.worker import Backoff

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from gatekeeper.kernel.privileges import Identity
    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.enforcing import Enforcer
    from gatekeeper.supervisor.leaving import Leaving
    from gatekeeper.supervisor.loop import Loop
    from gatekeeper.supervisor.worker import Worker

PREDECESSOR_PATIENCE_S = 5.0  # for the observer of before an upgrade, to be needed no more and to be gone then
PATIENCE = 3  # times as long as a worker's, for the observer to read what it was sent
_MOST_EVENTS = 100  # kept for an observer that is being replaced


class Observer:
    """Keeps an observer process running and up to date. Owns the audit descriptor and the HTTP socket."""

    def __init__(
        self,
        loop: Loop,
        command: Sequence[str],
        identity: Identity | None,
        audit: str,
        http: socket.socket | None,
        kernel: Enforcer | None,
        audit_fd: int | None = None,
    ) -> None:
        """Open the audit log, unless it is open: ``audit_fd``.

        Raises:
            PlaceError: the audit log cannot be written.
        """
        self.child: Child | None = None
        self._loop = loop
        self._command = command
        self._identity = identity
        self._audit = audit
        self._audit_fd = places.open_audit(audit) if audit_fd is None else audit_fd
        self._http = http
        self._kernel = kernel
        self._unheard: list[dict[str, Any]] = []
        self._backoff = Backoff()
        self._reads = time.monotonic()  # when it was last seen to have read all that it was sent
        self._warn: Callable[[str], None] = lambda _text: None
        self.is_ready: Callable[[], None] = lambda: None
        self.predecessor: Child | None = None  # of before an upgrade: it reads what is reported until this one does

    @property
    def audit_fd(self) -> int | None:
        """Where audit lines go."""
        return self._audit_fd

    @property
    def http_fd(self) -> int | None:
        """Where scrapes come in."""
        return None if self._http is None else self._http.fileno()

    def left_behind(self) -> OldObserver | None:
        """Return what another program in our place needs to take leave of the process that is here."""
        child = self.child
        if child is None or child.channel_fd is None:
            return None
        return OldObserver(child.pid, Fd(child.channel_fd), child.started)

    def succeed(self, old: OldObserver, warn: Callable[[str], None]) -> None:
        """Take over the observer of before an upgrade, until there is another; it is not waited for for long."""
        self._warn = warn
        self.predecessor = Child.adopt(self._loop, old.pid, old.channel, old.started, lambda _message: None)
        self._loop.later(PREDECESSOR_PATIENCE_S, self._dismiss)

    def predecessor_left(self) -> bool:
        """Say whether the observer of before the upgrade has just been seen to end."""
        if self.predecessor is None or self.predecessor.poll() is None:
            return False
        self.predecessor = None
        return True

    def _dismiss(self) -> None:
        if self.predecessor is not None:
            self.predecessor.hang_up()
            self._loop.later(PREDECESSOR_PATIENCE_S, self._insist)

    def _insist(self) -> None:
        if self.predecessor is not None:
            self._warn(f"the observer of before the upgrade (pid {self.predecessor.pid}) does not leave; killing it")
            self.predecessor.kill()

    def _heard(self, message: dict[str, Any]) -> None:
        if message.get("op") == "ready":
            self._dismiss()
            self.is_ready()

    def start(self, workers: list[Worker], leaving: Leaving, policy: Accepted | None, state: dict[str, Any]) -> None:
        """Start a process and tell it everything that its predecessor knew.

        Raises:
            OSError: it could not be executed.
        """
        self._reads = time.monotonic()
        self.child = Child.start(self._loop, self._command, self._heard)
        fds = [] if self._audit_fd is None else [self._audit_fd]
        if self._http is not None:
            fds.append(self._http.fileno())
        identity, kernel = self._identity, self._kernel
        self.child.send(
            {
                "op": "start", "workers": len(workers), "supervisor_pid": os.getpid(),
                "uid": identity and identity.uid, "gid": identity and identity.gid,
                "groups": identity and list(identity.groups),
                "audit": places.audit_kind(self._audit), "metrics": self._http is not None,
                "kernel": kernel is not None,
            },
            fds + ([] if kernel is None else [kernel.attempts.events_out.fileno()]) + [worker.observer_fd for worker in workers],
        )  # fmt: skip
        if kernel is not None:
            self._tell({"op": "kernel"}, [kernel.attempts.counters_fd])
        for worker in workers:
            self.counters(worker)
        for worker in leaving.workers:
            if worker.counters_fd is not None:
                self._tell({"op": "leaving", "worker": worker.index}, [worker.counters_fd, worker.observer_fd])
        self.retired(leaving, [])
        if policy is not None:
            self.policy(policy)
        self.state(state)
        unheard, self._unheard = self._unheard, []
        for event in unheard:
            self.event(event)

    def counters(self, worker: Worker) -> None:
        """Tell it where to read the counters of a worker."""
        if worker.counters_fd is not None:
            self._tell({"op": "counters", "worker": worker.index}, [worker.counters_fd])

    def retired(self, leaving: Leaving, rows: list[int]) -> None:
        """Tell it that these workers are gone and where to read what they counted, they and those before them."""
        if leaving.retired_fd is not None:
            self._tell({"op": "retired", "workers": rows}, [leaving.retired_fd])

    def policy(self, policy: Accepted) -> None:
        """Tell it which policy is in force."""
        if self.child is None:
            return
        try:
            with policy.fds() as fds:
                self._tell({"op": "policy", "generation": policy.generation}, fds)
        except OSError:
            self.child.kill()  # out of descriptors or memory: its successor is told

    def state(self, state: dict[str, Any]) -> None:
        """Tell it how the service is."""
        self._tell({"op": "state", "state": state})

    def event(self, event: dict[str, Any]) -> None:
        """Let it write an event of the service to the audit log, now or once there is an observer again."""
        if self.child is None:
            self._unheard = [*self._unheard[1 - _MOST_EVENTS :], event]
        self._tell({"op": "event", "event": event})

    def tail(self, fd: int) -> None:
        """Let it write audit lines to this socket, too."""
        self._tell({"op": "tail"}, [fd])

    def reopen_audit(self) -> None:
        """Open the audit file anew, as log rotation asks for.

        Raises:
            PlaceError: it cannot be opened; the old one stays in use.
        """
        if places.audit_kind(self._audit) != "file":
            return
        fresh = places.open_audit(self._audit)
        if self._audit_fd is not None:
            os.close(self._audit_fd)
        self._audit_fd = fresh
        if fresh is not None:
            self._tell({"op": "audit"}, [fresh])

    def check(self, now: float, stuck_after_s: float, error: Callable[[str], None], *, paused: bool) -> None:
        """End a process that does not read. Called once a second. ``paused``: we did not run, so neither did it."""
        child = self.child
        if child is None or paused or child.unread_bytes() == 0:
            self._reads = now
        elif now - self._reads > PATIENCE * stuck_after_s:
            error(f"the observer (pid {child.pid}) does not read what it is sent; killing it")
            child.kill()
            self._reads = now

    def ended(self) -> float:
        """Forget a process that has ended; return how long to wait before the next one is started."""
        lived_s = time.monotonic() - self.child.started if self.child is not None else 0.0
        self.child = None
        return self._backoff.next_delay_s(lived_s)

    def close(self) -> None:
        """Close what was kept for observers to come."""
        if self._audit_fd is not None:
            os.close(self._audit_fd)
            self._audit_fd = None
        if self._http is not None:
            self._http.close()
        if self.predecessor is not None:
            self.predecessor.kill()
            self.predecessor.wait(PREDECESSOR_PATIENCE_S)
            self.predecessor = None

    def _tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        if self.child is not None:
            self.child.send(message, fds)
