"""`--watch`: noticing that a file of the policy has changed, however it was changed.

Directories are watched, not files, so that files that are replaced, appear or vanish are seen: editors and `mv` rename,
a ConfigMap swaps a symbolic link (`..data`) in one of the directories on the way. For each file that is

    the directory it lies in         all that happens to its name there
    each directory with a link       all that happens to the link's name
    the directories above            whether they are moved or deleted themselves
    the last directory that exists   whether the next name of the path appears, where a file is missing

Whatever happens, nothing is concluded from it but that it is time to look: after a moment of quiet the file is compiled,
and the compiler's digest says whether anything has changed. Events that were lost mean the same.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import inotify_simple
from inotify_simple import flags

from gatekeeper.errors import GatekeeperError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gatekeeper.supervisor.loop import Loop, Timer

QUIET_S = 0.3  # who writes one file often writes another right after
LONGEST_WAIT_S = 2.0  # when it never gets quiet
CLOCK_STEP_S = 0.05  # of the clock that files are stamped with, at most
MOST_LINKS = 40  # on one path, as in the kernel
MOST_ROUNDS = 5  # until what is watched is what is there

_SELF = flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR
_NAMES = flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO | flags.CLOSE_WRITE | flags.ATTRIB


class WatchError(GatekeeperError):
    """Files cannot be watched; the message says why, and what would help."""


@dataclass(slots=True)
class _Interest:
    """What matters in one directory; without names and patterns, only the directory itself."""

    path: str
    names: set[str] = field(default_factory=set)
    patterns: set[str] = field(default_factory=set)

    @property
    def mask(self) -> int:
        return int(_SELF | _NAMES if self.names or self.patterns else _SELF)

    def matters(self, name: str) -> bool:
        return not name or name in self.names or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)


class Watcher:
    """Calls ``changed`` when a file may have changed. ``path`` is the rule file; the others are told by `follow`."""

    def __init__(self, loop: Loop, path: str, changed: Callable[[], None], warn: Callable[[str], None]) -> None:
        """Begin to watch.

        Raises:
            WatchError: the kernel lets us not.
        """
        self._loop = loop
        self._path = os.path.abspath(path)
        self._changed = changed
        self._warn = warn
        self._warned: set[str] = set()
        self._sought: list[str] = [self._path]
        self._patterns: list[tuple[str, str]] = []
        self._interests: dict[int, _Interest] = {}  # by watch descriptor
        self._newest = 0.0  # when something that we follow was last changed, as far as we know
        self._timer: Timer | None = None
        self._first_event: float | None = None
        try:
            self._inotify = inotify_simple.INotify(nonblocking=True)
        except OSError as err:
            raise WatchError(f"cannot watch files: {err.strerror}; fs.inotify.max_user_instances may be too low") from err
        loop.watch(self._inotify.fileno(), self._read)
        self._settle()

    def follow(self, sought: Iterable[str], patterns: Iterable[tuple[str, str]], since: float) -> None:
        """Watch these files, and those that match (folder, pattern), from now on, beside the rule file.

        What was changed after ``since`` (Unix time), when the compiler began to read, is looked at again.
        """
        self._sought = list(dict.fromkeys([self._path, *map(os.path.abspath, sought)]))
        self._patterns = [(os.path.abspath(folder or "."), pattern) for folder, pattern in patterns]
        before = self._newest
        self._settle()
        if self._newest > max(since - CLOCK_STEP_S, before):
            self._touched()

    def close(self) -> None:
        """Watch nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.unwatch(self._inotify.fileno())
        self._inotify.close()

    # -- events

    def _read(self) -> None:
        for event in self._inotify.read(timeout=0):
            if event.mask & flags.Q_OVERFLOW:
                self._touched()
                continue
            interest = self._interests.get(event.wd)
            if event.mask & flags.IGNORED:
                self._interests.pop(event.wd, None)
            if interest is not None and interest.matters(event.name):
                self._touched()

    def _touched(self) -> None:
        """Look soon; not before it is quiet, but not too late either."""
        now = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        if self._first_event is None:
            self._first_event = now
        delay_s = max(0.0, min(QUIET_S, self._first_event + LONGEST_WAIT_S - now))
        self._timer = self._loop.later(delay_s, self._look)

    def _look(self) -> None:
        self._timer = self._first_event = None
        self._settle()
        self._changed()

    # -- what to watch

    def _settle(self) -> None:
        """Watch what has to be watched now. Directories may change meanwhile, so: until nothing new is found."""
        for _ in range(MOST_ROUNDS):
            known = {(item.path, item.mask) for item in self._interests.values()}
            found = _Survey()
            for path in self._sought:
                found.trace(path)
            for folder, pattern in self._patterns:
                found.trace_pattern(folder, pattern)
            self._newest = max(self._newest, found.newest)
            self._apply(found.merged())
            if known == {(item.path, item.mask) for item in self._interests.values()}:
                return

    def _apply(self, wanted: Iterable[_Interest]) -> None:
        interests: dict[int, _Interest] = {}
        for interest in wanted:
            try:
                interests[self._inotify.add_watch(interest.path, interest.mask)] = interest
            except (FileNotFoundError, NotADirectoryError):
                continue  # it has just gone; the next round sees what is there instead
            except OSError as err:
                self._warn_once(f"cannot watch {interest.path} for changes: {_advice(err)}")
        for watch in self._interests.keys() - interests.keys():
            try:
                self._inotify.rm_watch(watch)
            except OSError:
                continue  # the directory is gone, and the watch with it
        self._interests = interests

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)


class _Survey:
    """The directories that matter to some paths, as the file system is now. ``newest``: the latest change of status."""

    def __init__(self) -> None:
        self.newest = 0.0
        self._interests: dict[str, _Interest] = {}

    def trace(self, path: str) -> str | None:
        """Follow a path to its end; return where that is, ``None`` when something is missing on the way."""
        here, rest, links = "/", [part for part in path.split("/") if part], 0
        while rest:
            name = rest.pop(0)
            if name == "..":
                here = os.path.dirname(here)
                continue
            full = os.path.join(here, name)
            try:
                status = os.lstat(full)
            except OSError:
                self._at(here).names.add(name)
                return None
            if stat.S_ISLNK(status.st_mode):
                self._at(here).names.add(name)
                self.newest = max(self.newest, status.st_ctime)
                links += 1
                if links > MOST_LINKS:
                    return None
                target = os.readlink(full)
                here = "/" if target.startswith("/") else here
                rest[:0] = [part for part in target.split("/") if part not in {"", "."}]
            elif stat.S_ISDIR(status.st_mode):
                self._at(full)
                here = full
            else:
                self._at(here).names.add(name)
                self.newest = max(self.newest, status.st_ctime)
                return None if rest else full
        return here

    def trace_pattern(self, folder: str, pattern: str) -> None:
        """Follow a pattern to all directories in which a name may match."""
        folders = ["/" if pattern.startswith("/") else folder]
        *steps, last = [part for part in pattern.split("/") if part not in {"", "."}] or [pattern]
        for step in steps:
            below = []
            for one in folders:
                if not glob.has_magic(step):
                    below.append(os.path.join(one, step))
                elif (there := self._into(one)) is not None:
                    self._at(there).patterns.add(step)
                    below += sorted(glob.glob(os.path.join(glob.escape(there), step, "")))
            folders = below
        for one in folders:
            there = self._into(one)
            if there is not None:
                self._at(there).patterns.add(last)
                self.newest = max(self.newest, os.stat(there).st_ctime)

    def merged(self) -> list[_Interest]:
        """Return what was found; a directory that was reached by several paths once."""
        merged: dict[tuple[int, int], _Interest] = {}
        for interest in self._interests.values():
            try:
                status = os.stat(interest.path)
            except OSError:
                continue
            one = merged.setdefault((status.st_dev, status.st_ino), interest)
            one.names |= interest.names
            one.patterns |= interest.patterns
        return list(merged.values())

    def _into(self, folder: str) -> str | None:
        there = self.trace(folder)
        return there if there is not None and os.path.isdir(there) else None

    def _at(self, folder: str) -> _Interest:
        return self._interests.setdefault(folder, _Interest(folder))


def _advice(err: OSError) -> str:
    if err.errno == errno.ENOSPC:
        return "too many are watched already: raise fs.inotify.max_user_watches"
    return err.strerror or str(err)
