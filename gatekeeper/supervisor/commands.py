"""What operators may ask the daemon at its control socket, as far as no other part of the supervisor answers it.

docs/control.md describes the arguments and answers of each request.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from gatekeeper import __version__
from gatekeeper.supervisor import tally
from gatekeeper.supervisor.asking import TooLong
from gatekeeper.supervisor.control import BadRequest
from gatekeeper.supervisor.sessions import FILTERS, MOST_COUNTED, Names, Wanted

if TYPE_CHECKING:
    from gatekeeper.supervisor.bans import Bans
    from gatekeeper.supervisor.control import Control, Request
    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.enforcing import Enforcer
    from gatekeeper.supervisor.standing import Standing
    from gatekeeper.supervisor.worker import Worker

MOST_ROWS = 1 << 20
MOST_CUT_ROWS = 1000  # listed; all that match are cut
MOST_TAILS = 8
PATIENCE_S = 20.0  # with workers that go through their sessions


class Operators:
    """The requests status, policy, sessions, cut and tail. Sessions of guarded listeners, which no worker has, are ``kernel``'s."""

    def __init__(
        self, control: Control, crew: Crew, standing: Standing, kernel: Enforcer | None, bans: Bans, rules_path: str
    ) -> None:
        """Let the control socket know what is answered here."""
        self._names = Names(0, None)
        self._tails = 0
        self._control = control
        self._crew = crew
        self._kernel = kernel
        self._bans = bans
        self._standing = standing
        self._rules_path = os.path.abspath(rules_path)
        control.handlers |= {
            "status": self.status, "policy": self.policy, "sessions": self.sessions, "cut": self.cut, "tail": self.tail,
        }  # fmt: skip

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
            "kernel_others": self._kernel.others if self._kernel is not None else 0,
            "last_reload": {
                "successful": state["last_reload_successful"],
                "at": state["last_reload_timestamp"],
                "error": state["last_reload_error"],
            },
            "bans": len(self._bans),
            "unconfirmed": state["unconfirmed"],
            "last_good": state["last_good"],
            "save_error": state["save_error"],
            "workers": [
                shown | {"serving": worker.child is not None and worker.generation > 0}
                for shown, worker in zip(state["workers"], crew.workers, strict=True)
            ],
            "leaving": state["leaving"],
            "upgrades": {
                "done": state["upgrades"], "failed": state["upgrades_failed"], "error": state["upgrade_error"],
                "taking_over": state["taking_over"],
            },
            "tails": self._tails,
            "clients_dropped": self._control.dropped,
        }
        if policy is not None:
            kernel_fd = self._kernel.attempts.counters_fd if self._kernel is not None else None
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

    def sessions(self, request: Request) -> None:
        """Answer which sessions match, as rows."""
        _allow(request, FILTERS | {"details", "most"})
        most = request.args.get("most", MOST_ROWS)
        if type(most) is not int or not 0 <= most <= MOST_ROWS:
            raise BadRequest(f'"most" is a number of rows up to {MOST_ROWS}')
        self._go_through(request, Wanted.from_args(request.args), most, cut=False)

    def cut(self, request: Request) -> None:
        """End the sessions that match; rows say which."""
        _allow(request, FILTERS | {"all"})
        if request.args.get("all") is not True and not any(request.args.get(name) for name in FILTERS):
            raise BadRequest('this would cut every session: say which, or "all":true')
        self._go_through(request, Wanted.from_args(request.args), MOST_CUT_ROWS, cut=True)

    def _go_through(self, request: Request, wanted: Wanted, most: int, *, cut: bool) -> None:
        """Ask all workers for sessions, then the kernel, pass on what they say, and answer."""
        policy = self._crew.policy
        if policy is None:
            request.fail("there are no sessions yet: the daemon is starting")
            return
        told = unreadable = 0
        asked = time.time()  # one moment for all ages: rows come in many parts

        def tell(rows: list[dict[str, Any]]) -> None:
            nonlocal told
            shown = rows[: most - told]
            told += len(shown)
            if shown:
                request.rows(shown)

        def rows(_worker: Worker, rows: list[Any]) -> None:
            nonlocal unreadable
            names = self._names_in_force()
            found = [names.translate(row, asked) for row in rows]
            unreadable += found.count(None)
            tell([row for row in found if row is not None])

        def done(answers: dict[int, dict[str, Any]], missing: list[int]) -> None:
            key = "ended" if cut else "matched"
            relayed = sum(_bounded(answer.get(key)) for answer in answers.values())

            def over(guarded: int) -> None:
                number = relayed + guarded
                if cut and number:
                    self._control.note(request, f"cut {number} sessions")
                    self._crew.event("cut", ended=number, by=request.peer.uid)
                request.done({key: number, "shown": told, "unreadable": unreadable, "missing_workers": missing, "now": asked})

            if self._kernel is not None and self._kernel.guards():
                self._kernel.sessions.find(wanted, tell, over, cut=cut)
            else:
                over(0)

        order = {"op": "cut" if cut else "sessions", "filter": wanted.to_filter(policy.bindings), "most": most}
        try:
            self._crew.ask(order, rows=rows, done=done, patience_s=PATIENCE_S)
        except TooLong:
            raise BadRequest("these are too many listeners, ports or values for one request: ask for some of them") from None

    def _names_in_force(self) -> Names:
        """Return what the numbers in rows mean, now."""
        policy = self._crew.policy
        if policy is not None and policy.generation != self._names.generation:
            self._names = Names(policy.generation, policy.bindings)
        return self._names

    def tail(self, request: Request) -> None:
        """Let the observer write audit lines to the socket that came along, until its other end is closed."""
        _allow(request, frozenset())
        if len(request.fds) != 1:
            raise BadRequest("a tail takes one descriptor: an end of a pair of unix sockets that keep messages apart (SEQPACKET)")
        observer = self._crew.observer
        if observer is None or observer.child is None:
            request.fail("the observer is being started: try again")
            return
        if self._tails >= MOST_TAILS:
            request.fail(f"{MOST_TAILS} others follow the log already")
            return
        self._tails += 1

        def gone() -> None:
            self._tails -= 1

        request.when_gone = gone
        observer.tail(request.fds[0])
        request.close_fds()  # so that the reader sees its end when the observer is gone
        request.progress("following")

    def _phase(self) -> str:
        if self._standing.stopping:
            return "draining"
        return "serving" if self._standing.serving else "starting"


def _allow(request: Request, known: frozenset[str]) -> None:
    """Refuse arguments that are not known: a filter that is misspelt must not mean every session.

    Raises:
        BadRequest: there are some.
    """
    unknown = sorted(request.args.keys() - known)
    if unknown:
        raise BadRequest(f'{request.op} knows no "{unknown[0][:50]}"; it knows {", ".join(sorted(known)) or "no arguments"}')


def _bounded(number: object) -> int:
    return number if type(number) is int and 0 <= number <= MOST_COUNTED else 0
