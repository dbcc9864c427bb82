"""What operators may ask the daemon at its control socket, as far as no other part of the supervisor answers it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from gatekeeper import __version__
from gatekeeper.supervisor import tally

if TYPE_CHECKING:
    from gatekeeper.supervisor.control import Control, Request
    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.enforcing import Enforcer
    from gatekeeper.supervisor.standing import Standing


class Operators:
    """The requests status and policy. They answer at once, whatever else is going on."""

    def __init__(self, control: Control, crew: Crew, standing: Standing, kernel: Enforcer | None, rules_path: str) -> None:
        """Let the control socket know what is answered here."""
        self._control = control
        self._crew = crew
        self._kernel = kernel
        self._standing = standing
        self._rules_path = os.path.abspath(rules_path)
        control.handlers |= {"status": self.status, "policy": self.policy}

    def status(self, request: Request) -> None:
        """Answer how the service is, with what was counted."""
        crew, policy = self._crew, self._crew.policy
        state = self._standing.state(crew)
        result: dict[str, Any] = {
            "version": __version__,
            "pid": os.getpid(),
            "state": self._phase(),
            "started": state["started"],
            "uptime_s": round(time.time() - state["started"], 3),
            "clock_s": time.monotonic(),
            "rules": self._rules_path,
            "policy": policy.meta["digest"] if policy is not None else None,
            "generation": policy.generation if policy is not None else 0,
            "kernel": self._kernel is not None,
            "last_reload": {
                "successful": state["last_reload_successful"],
                "at": state["last_reload_timestamp"],
                "error": state["last_reload_error"],
            },
            "workers": state["workers"],
            "leaving": state["leaving"],
            "upgrades": {
                "done": state["upgrades"], "failed": state["upgrades_failed"], "error": state["upgrade_error"],
                "taking_over": state["taking_over"],
            },
            "clients_dropped": self._control.dropped,
        }
        if policy is not None:
            kernel_fd = self._kernel.counters_fd if self._kernel is not None else None
            result |= tally.tally(
                [*(worker.counters_fd for worker in crew.workers), *crew.leaving.counters()], kernel_fd, policy
            )
        request.done(result)

    def policy(self, request: Request) -> None:
        """Answer which policy is in force, with the sealed snapshot itself."""
        policy = self._crew.policy
        if policy is None:
            request.fail("there is no policy yet: the daemon is starting")
            return
        request.done(
            {
                "generation": policy.generation, "digest": policy.meta["digest"],
                "path": self._rules_path, "files": policy.meta["files"],
            },
            [policy.snapshot_fd],
        )  # fmt: skip

    def _phase(self) -> str:
        if self._standing.stopping:
            return "draining"
        return "serving" if self._standing.serving else "starting"
