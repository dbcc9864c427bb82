"""The bans that operators made: which sources, until when, why and by whom; and the file that outlives the service.

The file is JSON with one ban a line, written as a whole: whoever reads it, after a crash at any moment, finds all bans of
one moment. Times are Unix times.
"""

from __future__ import annotations

import heapq
import json
import os
import socket
import stat
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatekeeper.errors import GatekeeperError
from gatekeeper.policy.ranges import BITS, AddressSet, format_source
from gatekeeper.supervisor import disk
from gatekeeper.supervisor.log import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FILE = "bans.json"
BROKEN = "bans.json.broken"
VERSION = 1
MOST_BANS = 500_000
LONGEST_REASON = 200  # characters
_MOST_BYTES = 1 << 28
_WIDE = {4: 1 << 24, 6: 1 << 112}  # addresses of an IPv4 /8 and an IPv6 /16
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

Source = tuple[int, int, int]  # family, first address, last address


class BanFileError(GatekeeperError):
    """The file is there, and is not what we wrote."""


@dataclass(frozen=True, slots=True)
class Ban:
    """One ban. ``until`` ``None``: until it is lifted; ``by`` is the uid of whoever made it."""

    source: Source
    until: float | None
    reason: str
    by: int
    since: float

    @property
    def text(self) -> str:
        """The source as people write it."""
        return format_range(*self.source)

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {"source": self.text, "until": self.until, "reason": self.reason, "by": self.by, "since": self.since}


class BanList:
    """All bans, at most one for each distinct source; sources may overlap."""

    def __init__(self) -> None:
        self._bans: dict[Source, Ban] = {}  # the latest last
        self._lines: dict[Source, str] = {}  # in the file, as far as they were made
        self._covered = AddressSet.EMPTY  # by all bans but the latest
        self._latest: list[Source] | None = []  # not in ``_covered`` yet; ``None``: that is of no use any more
        self._ends: list[tuple[float, Source]] = []  # a heap; an item whose ban has changed meanwhile means nothing

    def __len__(self) -> int:
        return len(self._bans)

    def __iter__(self) -> Iterator[Ban]:
        return iter(self._bans.values())

    def sources(self) -> Iterable[Source]:
        """Return the banned sources; they may overlap."""
        return self._bans.keys()

    def has_room(self, sources: Iterable[Source]) -> bool:
        """Say whether bans of all these can be added."""
        return len(self._bans) + sum(source not in self._bans for source in sources) <= MOST_BANS

    def add(self, ban: Ban) -> Ban | None:
        """Add a ban; return the one of exactly the same source that it replaces."""
        before = self._bans.pop(ban.source, None)
        self._lines.pop(ban.source, None)
        self._bans[ban.source] = ban
        if self._latest is not None:
            self._latest.append(ban.source)
        if ban.until is not None:
            heapq.heappush(self._ends, (ban.until, ban.source))
        return before

    def lift(self, sources: Iterable[Source]) -> tuple[list[Ban], list[Ban]]:
        """Remove all bans that lie inside ``sources``; return them, and those that still cover a part of it."""
        wanted = _set_of(sources)
        removed, remaining = [], []
        for ban in self._bans.values():
            family, first, last = ban.source
            bounds = wanted.of_family(family).bounds
            before, behind = bisect_right(bounds, first), bisect_right(bounds, last)
            if before & 1 and before == behind:
                removed.append(ban)
            elif before & 1 or before != behind:
                remaining.append(ban)
        self._forget(removed)
        return removed, remaining

    def expire(self, now: float) -> list[Ban]:
        """Remove and return the bans whose time is over."""
        over = []
        while self._ends and self._ends[0][0] <= now:
            until, source = heapq.heappop(self._ends)
            ban = self._bans.get(source)
            if ban is not None and ban.until == until:
                over.append(ban)
                self._forget([ban])
        return over

    def covered(self) -> AddressSet:
        """Return all banned addresses; soon, when bans were only added since the last call."""
        if self._latest is None:
            self._covered = _set_of(self._bans)
        elif self._latest:
            self._covered |= _set_of(self._latest)
        self._latest = []
        return self._covered

    def _forget(self, bans: Iterable[Ban]) -> None:
        for ban in bans:
            del self._bans[ban.source]
            self._lines.pop(ban.source, None)
            self._latest = None  # what else bans the same addresses is known only by looking at all

    def next_end(self) -> float | None:
        """Return when the next ban ends, ``None`` when none does; sometimes a moment at which nothing happens."""
        return self._ends[0][0] if self._ends else None

    def touching(self, source: Source) -> Iterator[Ban]:
        """Yield the bans that cover at least a part of ``source``."""
        family, first, last = source
        return (
            ban for ban in self._bans.values()
            if ban.source[0] == family and ban.source[1] <= last and first <= ban.source[2]
        )  # fmt: skip

    def dump(self) -> str:
        """Return the list as the text of its file."""
        lines = self._lines
        for source, ban in self._bans.items():
            if source not in lines:
                lines[source] = json.dumps([*_ends(*source), ban.until, ban.reason, ban.by, ban.since])
        text = ",\n".join(map(lines.__getitem__, self._bans))
        return f'{{"version": {VERSION}, "fields": ["first", "last", "until", "reason", "by", "since"], "bans": [\n{text}\n]}}\n'

    @classmethod
    def parse(cls, text: str) -> BanList:
        """Return the list that `dump` wrote.

        Raises:
            BanFileError: it did not write this.
        """
        found = cls()
        try:
            raw = json.loads(text)
            if raw["version"] != VERSION:
                raise BanFileError(f"it is of version {printable(repr(raw['version']))}, this gatekeeper reads {VERSION}")
            for item in raw["bans"]:
                found.add(_ban(*item))
        except (ValueError, LookupError, TypeError, RecursionError) as err:
            raise BanFileError(f"it is no list of bans: {printable(str(err))}") from err
        if len(found) > MOST_BANS:
            raise BanFileError(f"it has more than {MOST_BANS} bans")
        return found


def is_wide(source: Source) -> bool:
    """Say whether a source is so large (an IPv4 network shorter than /8, IPv6 than /16) that a slip is more likely than intent."""
    family, first, last = source
    return last - first >= _WIDE[family]


def format_range(family: int, first: int, last: int) -> str:
    """Return an inclusive range as an address, a network or ``first-last``."""
    size = last - first + 1
    if size == 1:
        return format_source(family, first)
    if size & (size - 1) == 0 and first % size == 0:
        return f"{format_source(family, first)}/{BITS[family] + 1 - size.bit_length()}"
    return f"{format_source(family, first)}-{format_source(family, last)}"


def clean_reason(text: str) -> str:
    """Return a reason as one harmless line of bounded length."""
    return printable(text, LONGEST_REASON).strip()


def read(directory: str) -> BanList:
    """Return the bans kept in ``directory``; without a file there are none.

    Raises:
        BanFileError: the file is not what we wrote.
        OSError: it cannot be read.
    """
    try:
        # Not blocking: what stands there may be a pipe that nobody writes to.
        fd = os.open(os.path.join(directory, FILE), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return BanList()
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BanFileError("it is not a regular file")
        if status.st_size > _MOST_BYTES:
            raise BanFileError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        try:
            return BanList.parse(file.read(_MOST_BYTES).decode())
        except UnicodeDecodeError as err:
            raise BanFileError("it is not text") from err


def set_aside(directory: str) -> None:
    """Keep a file that could not be read under another name.

    Raises:
        OSError: it cannot be renamed.
    """
    os.replace(os.path.join(directory, FILE), os.path.join(directory, BROKEN))


def write(directory: str, text: str) -> None:
    """Replace the file in ``directory`` in one step; when this returns, it survives a loss of power.

    Raises:
        OSError: it could not be written; the old one is untouched.
    """
    disk.replace(directory, FILE, lambda fd: disk.write_all(fd, text.encode()))


def _set_of(sources: Iterable[Source]) -> AddressSet:
    pairs: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
    for family, first, last in sources:
        pairs[family].append((first, last))
    return AddressSet.of(pairs[4], pairs[6])


def _ends(family: int, first: int, last: int) -> tuple[str, str]:
    """Return both ends of a range as text, as fast as it goes."""
    kind, size = _FAMILIES[family], BITS[family] // 8
    return socket.inet_ntop(kind, first.to_bytes(size, "big")), socket.inet_ntop(kind, last.to_bytes(size, "big"))


def _ban(first: str, last: str, until: Any, reason: Any, by: Any, since: Any) -> Ban:
    """Return a ban of the file.

    Raises:
        ValueError: it makes no sense.
        TypeError: so does this.
    """
    family = 6 if ":" in first else 4
    try:
        low, high = (int.from_bytes(socket.inet_pton(_FAMILIES[family], end), "big") for end in (first, last))
    except OSError as err:
        raise ValueError(f"{first!r} to {last!r}") from err
    if low > high or (family == 6 and low >> 32 == 0xFFFF):
        raise ValueError(f"{first} to {last}")
    times = (since,) if until is None else (since, until)
    if not all(isinstance(time, int | float) and 0 <= time < 1 << 40 for time in times) or type(by) is not int:
        raise ValueError(f"the times of {first}")
    if not 0 <= by < 1 << 32 or not isinstance(reason, str):
        raise ValueError(f"who or why of {first}")
    return Ban((family, low, high), until, clean_reason(reason), by, since)
