"""How the service is, in words for people and as the state that the observer shows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gatekeeper.supervisor.handover import Past

if TYPE_CHECKING:
    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.worker import Worker

_MOST_NAMES = 8
_LONGEST_ERROR = 4000  # it travels in messages, to the status page and the audit log


@dataclass(slots=True)
class Standing:
    """Where the service stands. Times are Unix times; ``reload_error`` is ``None`` after a reload that worked.

    ``taking_over``: an upgrade is under way, and the workers of before it serve until the new ones do.
    ``last_good``: the policy in force was read back from the state directory. ``unconfirmed`` is ``None``, or the policy
    on trial: {"policy": digest, "before": digest, "until"}. ``save_failures``: times a policy could not be saved there.
    """

    serving: bool = False
    stopping: bool = False
    started: float = field(default_factory=time.time)
    reloaded: float = field(default_factory=time.time)
    reload_error: str | None = None
    taking_over: bool = False
    restarts: int = 0  # of workers, before the latest upgrade
    upgrades: int = 0
    upgrades_failed: int = 0
    upgrade_error: str | None = None
    last_good: bool = False
    unconfirmed: dict[str, Any] | None = None
    save_failures: int = 0
    save_error: str | None = None

    @classmethod
    def after(cls, past: Past) -> Standing:
        """Return how a service stands that was just upgraded."""
        return cls(
            started=past.started, reloaded=past.reloaded, reload_error=past.reload_error, taking_over=True,
            restarts=past.restarts, upgrades=past.upgrades, upgrades_failed=past.upgrades_failed,
            last_good=past.last_good, save_failures=past.save_failures, save_error=past.save_error,
        )  # fmt: skip

    def past(self, crew: Crew, *, reload_wanted: bool) -> Past:
        """Return what the next program in our place needs for `after`; it is one upgrade further."""
        return Past(
            self.started, self.reloaded, self.reload_error, reload_wanted, self._restarts(crew.workers),
            self.upgrades + 1, self.upgrades_failed, crew.leaving.cut, self.last_good, self.save_failures, self.save_error,
        )  # fmt: skip

    def _restarts(self, workers: list[Worker]) -> int:
        return self.restarts + sum(worker.restarts for worker in workers)

    def note_reload(self, failure: str | None, detail: str) -> None:
        """Remember how a reload ended."""
        if failure is None:
            self.reloaded = time.time()
            self.reload_error = None
            self.last_good = False
        else:
            self.reload_error = f"{failure}: {detail}"[:_LONGEST_ERROR].rstrip(": ")

    def start_with_last_good(self, why: str) -> None:
        """Remember that the rule file is of no use, and that the policy in force is an older one."""
        self.note_reload(why, "")
        self.last_good = True

    def note_saved(self, failure: str | None) -> None:
        """Remember whether the policy in force could be saved."""
        self.save_error = failure
        self.save_failures += failure is not None

    def summary(self, crew: Crew | None) -> str:
        """Return one line for the log and the service manager."""
        if crew is None or crew.policy is None:
            return "starting"
        listeners = [item["name"] for item in crew.policy.meta["listeners"]]
        names = ", ".join(listeners[:_MOST_NAMES]) or "nothing"
        if len(listeners) > _MOST_NAMES:
            names += f" and {len(listeners) - _MOST_NAMES} more"
        workers = "1 worker" if len(crew.workers) == 1 else f"{len(crew.workers)} workers"
        text = f"serving {names} with {workers}, policy {crew.policy.name}"
        if self.last_good:
            return f"{text}, the last good one: the rule file is of no use"
        if self.unconfirmed is not None:
            return f"{text}, not confirmed yet"
        return text if self.reload_error is None else f"{text}; the last reload failed"

    def state(self, crew: Crew | None) -> dict[str, Any]:
        """Return the state as the observer is told it."""
        now = time.monotonic()
        workers = crew.workers if crew is not None else []
        return {
            "ready": self.serving and not self.stopping and crew is not None and bool(crew.those_serving()),
            "draining": self.stopping,
            "taking_over": self.taking_over,
            "workers": [
                {
                    "index": worker.index,
                    "pid": worker.child.pid if worker.child is not None else None,
                    "alive": worker.child is not None,
                    "restarts": worker.restarts,
                    "uptime_s": round(now - worker.child.started, 3) if worker.child is not None else 0.0,
                }
                for worker in workers
            ],
            "restarts_total": self._restarts(workers),
            "leaving": crew.leaving.state(crew.policy.bindings) if crew is not None and crew.policy is not None else [],
            "upgrades": self.upgrades,
            "upgrades_failed": self.upgrades_failed,
            "upgrade_error": self.upgrade_error,
            "last_reload_successful": self.reload_error is None,
            "last_reload_timestamp": self.reloaded,
            "last_reload_error": self.reload_error,
            "last_good": self.last_good,
            "unconfirmed": self.unconfirmed,
            "save_failures_total": self.save_failures,
            "save_error": self.save_error,
            "started": self.started,
        }
