"""What people ask of reloads, and what they are told."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from gatekeeper.supervisor.loop import Timer


@dataclass(frozen=True, slots=True)
class Outcome:
    """How what was asked for ended. ``failure``: why not, in one line; ``text``: what the compiler printed, for people.

    ``refused``: the policy itself is to blame. ``result`` is what the control socket answers.
    """

    failure: str | None = None
    text: str = ""
    refused: bool = False
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ask:
    """A reload that somebody wants; ``cause`` is a word of the audit log: signal, command or watch.

    ``confirm_s``: on trial for so long.
    """

    cause: str
    by: int | None = None
    confirm_s: float | None = None
    progress: Callable[[str], None] = lambda _text: None
    answer: Callable[[Outcome], None] = lambda _outcome: None


@dataclass(slots=True)
class Trial:
    """A policy in force that nobody has confirmed yet. ``until`` is Unix time."""

    digest: str
    before: str
    until: float
    timer: Timer


def named(found: set[tuple[str, str, str]]) -> list[dict[str, str]]:
    """Return endpoints, as `installing.listening` has them, as JSON."""
    return [{"listener": name, "protocol": protocol, "address": address} for name, protocol, address in sorted(found)]


def fates(result: dict[str, Any]) -> str:
    """Return what became of live sessions, to be added to a sentence; empty when nothing did."""
    ended = result.get("ended", 0)
    return f"; {ended} {'session' if ended == 1 else 'sessions'} ended that it refuses" if ended else ""


def clock(at: float) -> str:
    """Return a Unix time as a time of the day."""
    return dt.datetime.fromtimestamp(at, dt.UTC).astimezone().strftime("%H:%M:%S")
