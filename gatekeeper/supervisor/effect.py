"""What follows once a policy is in force for good: it reaches live sessions, and the next start of the service."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from gatekeeper.supervisor import lastgood
from gatekeeper.supervisor.installing import Judged

if TYPE_CHECKING:
    from collections.abc import Callable

    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.disk import Disk
    from gatekeeper.supervisor.installing import Installer
    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.standing import Standing


class Effect:
    """Works on the policy that is in force when it is asked to. ``directory`` ``None``: no last good policy is kept."""

    def __init__(
        self, log: Log, installer: Installer, crew: Crew, standing: Standing, disk: Disk, directory: str | None
    ) -> None:
        self._log = log
        self._installer = installer
        self._crew = crew
        self._standing = standing
        self._disk = disk
        self._directory = directory

    def take(self, done: Callable[[dict[str, Any]], None]) -> None:
        """Judge live sessions again, unless the policy says not to, and save it; ``done`` gets what became of that.

        {"judged", "ended": sessions, "not_judged_by": workers that did not answer and were ended,
        "saved": bool, "save_error": why not, if it should have been}
        """

        def judged(found: Judged) -> None:
            for index in found.missing:
                self._log.error(f"worker {index} did not say whether it has ended the sessions that are now refused; killing it")
            result = {"judged": found.judged, "ended": found.ended, "not_judged_by": list(found.missing)}
            self.save(lambda failure: done(result | self._saved(failure)))

        if self._installer.policy.meta["settings"]["on_reload"] == "keep":
            judged(Judged())
        else:
            self._installer.judge_again(judged)

    def _saved(self, failure: str | None) -> dict[str, Any]:
        return {"saved": failure is None and self._directory is not None, "save_error": failure}

    def save(self, done: Callable[[str | None], None] = lambda _failure: None) -> None:
        """Make the policy in force the last good one; ``done`` is called with the reason why not, or ``None``."""
        policy, directory = self._installer.policy, self._directory
        if directory is None:
            done(None)
            return
        digest = policy.meta["digest"]

        def saved(failure: str | None) -> None:
            self._standing.note_saved(failure)
            if failure is not None:
                self._log.error(f"the policy {digest[:12]} is in force, but could not be saved in {directory}: {failure}")
                self._crew.tell_state()
            done(failure)

        try:
            copy = os.dup(policy.snapshot_fd)  # the policy may be replaced while the disk is busy
        except OSError as err:
            saved(err.strerror)
            return

        def job() -> None:
            try:
                lastgood.save(directory, copy, digest)
            finally:
                os.close(copy)

        self._disk.run(job, saved)

    def note_trial(self, digest: str, done: Callable[[str | None], None]) -> None:
        """See to it that a restart before a policy is confirmed does not start with it.

        ``done`` is called with the reason why it would, or ``None``: the trial begins in any case.
        """
        directory = self._directory
        if directory is None:
            done(None)
            return

        def noted(failure: str | None) -> None:
            if failure is not None:
                self._log.warning(f"a restart before the policy is confirmed would start with it: {directory}: {failure}")
            done(failure)

        self._disk.run(lambda: lastgood.note_trial(directory, digest), noted)
