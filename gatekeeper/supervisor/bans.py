"""Bans: made, lifted and listed by operators, kept on disk, and put in force in all workers and the kernel.

    ban, unban, or time runs out ──► the list changes ──► (a moment) ──► file, workers, kernel ──► answer

What comes within that moment goes together: the table is made anew for each change, so it is published at most four times
a second, and less often when it is so large that making it takes long. A command is answered when the workers have it and
the disk has, or has not; a disk that stands still keeps nobody from being refused.
"""

from __future__ import annotations

import datetime as dt
import os
import time
from typing import TYPE_CHECKING, Any

from gatekeeper.config.addresses import parse_source
from gatekeeper.errors import KernelError
from gatekeeper.kernel import memfd
from gatekeeper.snapshot import bans as table
from gatekeeper.supervisor import banlist
from gatekeeper.supervisor.banfile import BanFile
from gatekeeper.supervisor.banlist import Ban, BanList, Source, format_range
from gatekeeper.supervisor.control import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gatekeeper.supervisor.control import Request
    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.disk import Disk
    from gatekeeper.supervisor.enforcing import Enforcer
    from gatekeeper.supervisor.log import Log
    from gatekeeper.supervisor.loop import Loop, Timer
    from gatekeeper.supervisor.worker import Worker

PUBLISH_EVERY_S = 0.25
RETRY_S = 2.0  # when there was no memory or no descriptor
PUBLISH_SHARE = 4  # at most a quarter of our time goes into publishing,
LONGEST_PAUSE_S = 2.0  # unless that would keep a ban waiting: the first table of very many takes far longer than the next
LOOK_EVERY_S = 30.0  # the clock that bans end by can be set
MOST_ROWS = 5000  # in one answer
MOST_IN_MESSAGE = 500
MOST_IN_EVENT = 200  # sources in one line of the audit log
MOST_NAMED = 4  # sources in one line for people
LONGEST_S = 10 * 366 * 86400
MOST_ENDED = 1 << 32  # sessions; workers say so themselves


class Bans:
    """The list, its file in ``directory`` (``None``: it lives as long as we do), and its way to those who refuse.

    Owns ``crew.bans_fd``, the table that workers are given when they start.
    """

    def __init__(
        self, loop: Loop, log: Log, crew: Crew, kernel: Enforcer | None, disk: Disk, directory: str | None, found: BanList
    ) -> None:
        """``found``: what `take_up` has found, which the kernel has been told already."""
        self._loop = loop
        self._log = log
        self._crew = crew
        self._kernel = kernel
        self._list = found
        self._file = BanFile(log, disk, directory, found)
        self._not_before = 0.0  # when the table may be made again
        self._due: Timer | None = None
        self._look: Timer | None = None
        self._waiting: list[tuple[Request, dict[str, Any]]] = []
        self.handlers = {"ban": self.ban, "unban": self.unban, "bans": self.tell}

    def __len__(self) -> int:
        return len(self._list)

    def begin(self, *, handed_over: bool = False) -> None:
        """Put the bans of before in force, before any worker starts. Those handed over may be newer than the file.

        Raises:
            OSError: no memory, or no descriptor.
        """
        if len(self._list):
            self._log.info(f"{_count(len(self._list))} in force")
            self._hand_out(self._make())
        if handed_over:
            self._file.save()
        self._watch_time()

    def dump(self) -> str:
        """Return all bans as text, for `take_up` in a process that takes over."""
        return self._list.dump()

    def close(self) -> None:
        """Begin to save what is not saved yet."""
        if self._due is not None:
            self._file.save()
        self._file.close()
        for timer in (self._due, self._look):
            if timer is not None:
                timer.cancel()
        self._hand_out(None)

    # -- commands

    def ban(self, request: Request) -> None:
        """Ban ``sources`` for ``for_s`` seconds (``null``: until they are let in again). Rows: the bans that were replaced.

        ``force`` takes networks that are larger than anybody is likely to mean; ``more``: further requests follow at once,
        so this one is not worth waiting for.
        """
        sources = _sources(request)
        for_s, reason, force = request.args.get("for_s"), request.args.get("reason", ""), request.args.get("force", False)
        if for_s is not None and not (type(for_s) in {int, float} and 0 < for_s <= LONGEST_S):
            raise BadRequest('"for_s" is a number of seconds, more than 0, or null')
        if not isinstance(reason, str):
            raise BadRequest('"reason" is a text')
        wide = [format_range(*source) for source in sources if banlist.is_wide(source)]
        if wide and force is not True:
            raise BadRequest(f"{', '.join(wide[:MOST_NAMED])} is a large part of everybody; if that is meant, use --force")
        if not self._list.has_room(sources):
            request.fail(f"there can be {banlist.MOST_BANS} bans; ban networks instead of addresses")
            return
        now = time.time()
        until = None if for_s is None else now + for_s
        reason = banlist.clean_reason(reason)
        made = [Ban(source, until, reason, request.peer.uid, now) for source in sources]
        replaced = [before for before in map(self._list.add, made) if before is not None]
        self._report("ban", made, until=_moment(until), reason=reason, by=request.peer.uid)
        why = f": {reason}" if reason else ""
        self._log.info(f"banned {_named(made)} {_until(until)} (uid {request.peer.uid}{why})")
        _send(request, replaced)
        self._answer_later(request, {"banned": len(made), "replaced": len(replaced), "until": until})

    def unban(self, request: Request) -> None:
        """Lift all bans inside ``sources``. Rows: those, and (``"remains": true``) those that still cover a part of it."""
        removed, remaining = self._list.lift(_sources(request))
        if removed:
            self._report("unban", removed, cause="lifted", by=request.peer.uid)
            self._log.info(f"no longer banned: {_named(removed)} (uid {request.peer.uid})")
        _send(request, removed)
        _send(request, remaining, remains=True)
        result = {"removed": len(removed), "remaining": len(remaining)}
        if removed or self._due is not None:  # or what an earlier request has changed is not in force yet
            self._answer_later(request, result)
        else:
            request.done(result | {"kept": self._file.saved})

    def tell(self, request: Request) -> None:
        """Send the bans, oldest first: all, or those that touch ``source``; ``skip`` as many and send the ``MOST_ROWS`` that follow.

        ``next`` in the answer is what to skip for the rest, ``null`` when there is no more.
        """
        skip = request.args.get("skip", 0)
        if type(skip) is not int or skip < 0:
            raise BadRequest('"skip" is a number')
        text = request.args.get("source")
        found = list(self._list if text is None else self._list.touching(_parse(text)))
        _send(request, found[skip : skip + MOST_ROWS])
        behind = skip + MOST_ROWS
        request.done({"bans": len(found), "next": behind if behind < len(found) else None, "kept": self._file.saved})

    # -- in force

    def _answer_later(self, request: Request, result: dict[str, Any]) -> None:
        if request.args.get("more") is True:
            request.done(result)
        else:
            self._waiting.append((request, result))
        self._publish_soon()

    def _publish_soon(self) -> None:
        if self._due is None:
            self._due = self._loop.later(max(0.0, self._not_before - time.monotonic()), self._publish)

    def _publish(self) -> None:
        """Put the list in force, and save it."""
        self._due = None
        waiting, self._waiting = self._waiting, []
        began = time.monotonic()
        try:
            data = self._make()
            self._hand_out(data)
        except (OSError, MemoryError) as err:
            self._file.save()
            self._log.error(f"the latest bans are not in force yet: {err}")
            for request, _result in waiting:
                request.fail(f"it is not in force yet, and will be tried again: {err}")
            self._not_before = time.monotonic() + RETRY_S
            self._publish_soon()
            return
        self._spread(waiting)
        now = time.monotonic()
        self._not_before = now + max(PUBLISH_EVERY_S, min(PUBLISH_SHARE * (now - began), LONGEST_PAUSE_S))
        self._crew.tell_state()
        self._watch_time()

    def _spread(self, waiting: list[tuple[Request, dict[str, Any]]]) -> None:
        """Let workers, kernel and disk have the list; answer those who wait when all of them have said how it went."""
        outcome: dict[str, Any] = {"ended": 0, "missing": 0, "kept": False, "kernel": self._kernel is not None}
        parties = 3  # that are still at it: the workers, the kernel, the disk

        def over(ended: int) -> None:
            nonlocal parties
            parties -= 1
            outcome["ended"] += ended
            if parties == 0:
                for request, result in waiting:
                    request.done(result | outcome)

        def done(answers: dict[int, dict[str, Any]], missing: list[int]) -> None:
            outcome["missing"] = len(missing)
            over(sum(_bounded(answer.get("ended")) for answer in answers.values()))

        def kept() -> None:
            outcome["kept"] = self._file.saved
            over(0)

        if self._kernel is None or not self._tell_kernel(self._kernel, over):
            outcome["kernel"] = False
            over(0)
        assert self._crew.bans_fd is not None
        self._crew.ask({"op": "bans"}, (self._crew.bans_fd,), rows=_no_rows, done=done)
        for worker in self._crew.workers:
            if worker.offered and not worker.generation:  # it was given the table before, and is about to serve
                worker.bans(self._crew.bans_fd)
        self._file.save(kept)

    def _make(self) -> bytes:
        data = table.pack(self._list.covered())
        table.Bans(data).validate()  # here and not in each worker, whose sessions would wait for it
        return data

    def _hand_out(self, data: bytes | None) -> None:
        """Let workers that start from now on have this table."""
        fresh = None if data is None else memfd.from_bytes("gatekeeper-bans", data)
        before, self._crew.bans_fd = self._crew.bans_fd, fresh
        if before is not None:
            os.close(before)

    def _tell_kernel(self, kernel: Enforcer, done: Callable[[int], None]) -> bool:
        """Let the kernel refuse the banned, too; say whether it does."""
        try:
            kernel.ban(self._list.sources(), done)
        except KernelError as err:
            self._log.error(f"the kernel does not know the latest bans, workers do: {err}")
            return False
        return True

    def _watch_time(self) -> None:
        """Wake up when the next ban ends."""
        if self._look is not None:
            self._look.cancel()
        end = self._list.next_end()
        self._look = None if end is None else self._loop.later(min(max(0.0, end - time.time()), LOOK_EVERY_S), self._expire)

    def _expire(self) -> None:
        over = self._list.expire(time.time())
        if over:
            self._report("unban", over, cause="expired", by=None)
            self._log.info(f"no longer banned: {_named(over)} (time is up)")
            self._publish_soon()
        self._watch_time()

    def _report(self, event_type: str, bans: Sequence[Ban], **more: Any) -> None:
        """Let the audit log have it, in as many lines as it takes."""
        for first in range(0, len(bans), MOST_IN_EVENT):
            self._crew.event(event_type, sources=[ban.text for ban in bans[first : first + MOST_IN_EVENT]], **more)


def _sources(request: Request) -> list[Source]:
    texts = request.args.get("sources")
    if not isinstance(texts, list) or not texts:
        raise BadRequest('"sources" is a list of addresses, networks or ranges')
    return list(dict.fromkeys(map(_parse, texts)))


def _parse(text: object) -> Source:
    if not isinstance(text, str):
        raise BadRequest("a source is a text: an address, a network or a range")
    try:
        return parse_source(text)
    except ValueError as err:
        raise BadRequest(str(err)) from err


def _send(request: Request, bans: list[Ban], **more: Any) -> None:
    for first in range(0, len(bans), MOST_IN_MESSAGE):
        request.rows([ban.as_json() | more for ban in bans[first : first + MOST_IN_MESSAGE]])


def _no_rows(_worker: Worker, _rows: list[Any]) -> None:
    """Bans have no rows."""


def _bounded(ended: object) -> int:
    return min(max(ended, 0), MOST_ENDED) if type(ended) is int else 0


def _named(bans: Sequence[Ban]) -> str:
    shown = ", ".join(ban.text for ban in bans[:MOST_NAMED])
    return shown if len(bans) <= MOST_NAMED else f"{shown} and {len(bans) - MOST_NAMED} more"


def _count(number: int) -> str:
    return "1 ban is" if number == 1 else f"{number} bans are"


def _moment(until: float | None) -> str | None:
    """Return a time as the audit log writes it."""
    return None if until is None else dt.datetime.fromtimestamp(until, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _until(until: float | None) -> str:
    return "until further notice" if until is None else f"until {_moment(until)}"
