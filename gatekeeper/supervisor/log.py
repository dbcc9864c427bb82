"""What the service says about itself on stderr: one fact a line, for people."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

_LONGEST_LINE = 4000  # a pipe that takes anything takes this much (PIPE_BUF)
_WIPE = "\r\x1b[K"  # of a terminal: the line that the cursor is in
_ERROR, _WARNING, _INFO = 3, 4, 6  # syslog priorities


class Log:
    """Writes lines to ``stream``. Where the journal reads it, each carries its priority."""

    def __init__(self, stream: TextIO | None = None, environment: Mapping[str, str] | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._poll = select.poll()
        self._lost = 0
        self._status = False  # a line stands there that is not to stay
        self._for_journal = _is_journal(self._stream, os.environ if environment is None else environment)

    def info(self, text: str) -> None:
        """Say that something happened as it should."""
        self._write(_INFO, text)

    def warning(self, text: str) -> None:
        """Say that something needs attention; the service goes on."""
        self._write(_WARNING, text)

    def error(self, text: str) -> None:
        """Say that something that was asked for could not be done."""
        self._write(_ERROR, text)

    def plain(self, text: str, *, error: bool) -> None:
        """Write text that has its own layout (problems in rule files)."""
        for line in text.splitlines():
            self._put(_ERROR if error else _WARNING, line)

    def status(self, text: str) -> None:
        """Show a person at a terminal what goes on just now; the next line, or an empty text, takes its place."""
        try:
            if self._stream.isatty() and (text or self._status) and self._takes_more():
                self._status = bool(text)
                width = os.get_terminal_size(self._stream.fileno()).columns or 80
                self._stream.write(f"{_WIPE}{printable(text)[: width - 1]}")
                self._stream.flush()
        except (OSError, ValueError):  # a terminal that is gone, or not a real one
            return

    def _write(self, priority: int, text: str) -> None:
        word = {_ERROR: "error: ", _WARNING: "warning: ", _INFO: ""}[priority]
        for line in text.splitlines():
            self._put(priority, f"gatekeeper: {word}{line}")

    def _put(self, priority: int, line: str) -> None:
        prefix = f"<{priority}>" if self._for_journal else ""
        try:
            if not self._takes_more():
                self._lost += 1
                return
            lost, self._lost = self._lost, 0
            if lost:
                self._stream.write(f"{prefix}gatekeeper: {lost} lines were lost here: nobody read them\n")
            wipe, self._status = _WIPE if self._status else "", False
            self._stream.write(f"{wipe}{prefix}{printable(line, _LONGEST_LINE)}\n")
            self._stream.flush()
        except (OSError, ValueError):
            # Nobody reads us any more (a closed terminal, a pipe that broke). The service matters more.
            return

    def _takes_more(self) -> bool:
        """Say whether a line can be written without waiting for a reader."""
        try:
            self._poll.register(self._stream.fileno(), select.POLLOUT)
        except io.UnsupportedOperation:
            return True
        return bool(self._poll.poll(0))


def printable(text: str, longest: int = 500) -> str:
    """Return text that came from another process as one harmless line."""
    return "".join(char if char.isprintable() or char == "\t" else "?" for char in text[:longest])


def _is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Say whether ``stream`` is the one that JOURNAL_STREAM (device:inode) speaks of."""
    try:
        device, inode = map(int, environment.get("JOURNAL_STREAM", "").split(":"))
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (status.st_dev, status.st_ino) == (device, inode)
