"""What the observer says about itself on stderr: one fact a line, and never at the price of standing still."""

from __future__ import annotations

import logging
import os
import select
from typing import TextIO

MOST_BYTES = 4096  # a pipe that is ready takes this much at once (PIPE_BUF)


def say(text: str, stream: TextIO | None = None) -> None:
    """Write ``gatekeeper: observer: text`` to stderr, unless its reader stands still: then it is left out."""
    try:
        fd = 2 if stream is None else stream.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if poll.poll(0):
            line = f"gatekeeper: observer: {text}".encode("utf-8", "backslashreplace")
            os.write(fd, line[: MOST_BYTES - 1] + b"\n")
    except OSError:
        return  # nobody reads us; the audit log and the metrics matter more


class Handler(logging.Handler):
    """Lets libraries speak through `say`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, with its traceback when there is one."""
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - a broken log call of a library must not end a request
            text = f"unprintable log record of {record.name}"
        say(text)


def take_over_logging() -> None:
    """Send what libraries log as errors to stderr; what strangers can provoke (warnings about requests) is left out."""
    logging.basicConfig(level=logging.ERROR, handlers=[Handler()], force=True)
