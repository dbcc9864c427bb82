"""The file that the bans outlive the service in: read at the start, written after each change.

A disk may stand still, so a thread writes, one list at a time: what changes meanwhile goes together.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from gatekeeper.supervisor import banlist
from gatekeeper.supervisor.banlist import BanList

if TYPE_CHECKING:
    from collections.abc import Callable

    from gatekeeper.supervisor.disk import Disk
    from gatekeeper.supervisor.log import Log


class BanFile:
    """Keeps ``bans`` in ``directory`` (``None``: nowhere). ``saved``: whether the disk took them the last time."""

    def __init__(self, log: Log, disk: Disk, directory: str | None, bans: BanList) -> None:
        self.saved = directory is not None
        self._log = log
        self._disk = disk
        self._directory = directory
        self._bans = bans
        self._writing = False
        self._waiting: list[Callable[[], None]] = []  # until the list as it is now is saved, or is not

    def save(self, done: Callable[[], None] = lambda: None) -> None:
        """Save the list as it is now; ``done`` is called when the disk has it, or when it cannot be had."""
        if self._directory is None:
            done()
            return
        self._waiting.append(done)
        if not self._writing:
            self._write(self._directory)

    def close(self) -> None:
        """Let the disk have, as its last job, what it does not have yet."""
        if self._directory is not None and self._waiting:
            self._write(self._directory)

    def _write(self, directory: str) -> None:
        waiting, self._waiting = self._waiting, []
        self._writing = True
        text = self._bans.dump()

        def written(failure: str | None) -> None:
            self._writing = False
            if failure is not None and self.saved:
                self._log.error(f"bans cannot be saved in {directory} ({failure}): they end with the service")
            if failure is None and not self.saved:
                self._log.info(f"bans are saved in {directory} again")
            self.saved = failure is None
            for done in waiting:
                done()
            if self._waiting:
                self._write(directory)

        self._disk.run(lambda: banlist.write(directory, text), written)


def take_up(log: Log, directory: str | None, handed_over: str | None = None) -> BanList:
    """Return the bans of before: from ``handed_over`` (`Bans.dump`), else from the file in ``directory``.

    A file that makes no sense is kept under another name, and said to be so; the service starts without bans.
    """
    found = BanList()
    try:
        if handed_over is not None:
            found = BanList.parse(handed_over)
        elif directory is not None:
            found = banlist.read(directory)
    except (banlist.BanFileError, OSError) as err:
        log.error(_set_aside(err, None if handed_over is not None else directory))  # noqa: TRY400 - not logging
    found.expire(time.time())
    return found


def _set_aside(err: Exception, directory: str | None) -> str:
    """Keep what could not be read; return what has happened, in words."""
    if directory is None:
        return f"the bans that were handed over cannot be read, nobody is banned: {err}"
    text = f"{os.path.join(directory, banlist.FILE)} cannot be read, nobody is banned: {err}"
    try:
        banlist.set_aside(directory)
    except OSError as also:
        return f"{text}; it cannot be set aside either: {also.strerror}"
    return f"{text}; it is kept as {banlist.BROKEN}"
