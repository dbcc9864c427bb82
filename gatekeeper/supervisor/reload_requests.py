"""What operators may ask about reloads at the control socket: reload, confirm, rollback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gatekeeper.supervisor.asks import Ask, Outcome
from gatekeeper.supervisor.control import BadRequest

if TYPE_CHECKING:
    from gatekeeper.supervisor.control import Request
    from gatekeeper.supervisor.reloading import Reloader

LONGEST_TRIAL_S = 86400.0
REFUSED, CANNOT = 1, 3  # exit codes of the command that asked


class ReloadRequests:
    """Answers when what was asked for is in force everywhere and live sessions have been judged, or has failed."""

    def __init__(self, reloader: Reloader) -> None:
        self._reloader = reloader
        self.handlers = {"reload": self.reload, "confirm": self.confirm, "rollback": self.rollback}

    def reload(self, request: Request) -> None:
        """Reload the rule file; with ``confirm_s`` on trial for so many seconds."""
        confirm_s = request.args.get("confirm_s")
        if confirm_s is not None and not (type(confirm_s) in {int, float} and 1 <= confirm_s <= LONGEST_TRIAL_S):
            raise BadRequest(f'"confirm_s" is a number of seconds from 1 to {LONGEST_TRIAL_S:g}')
        self._reloader.request(
            Ask("command", request.peer.uid, confirm_s, progress=request.progress, answer=lambda how: _answer(request, how))
        )

    def confirm(self, request: Request) -> None:
        """Keep the policy on trial."""
        self._reloader.confirm(request.peer.uid, lambda how: _answer(request, how))

    def rollback(self, request: Request) -> None:
        """Put the policy before the one on trial back."""
        self._reloader.roll_back("command", request.peer.uid, lambda how: _answer(request, how))


def _answer(request: Request, outcome: Outcome) -> None:
    if outcome.failure is None:
        request.done(outcome.result)
    else:
        request.fail("\n".join(filter(None, (outcome.text, outcome.failure))), REFUSED if outcome.refused else CANNOT)
