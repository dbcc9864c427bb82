"""Pipes for `splice`, pooled. A pipe is either empty and in the pool, or belongs to one direction of one session."""

from __future__ import annotations

import fcntl
import os
from typing import NamedTuple

PIPE_BYTES = 1 << 18
SMALLEST_BYTES = 1 << 16  # past 64 MiB of pipes per user the kernel hands out smaller ones, which are not worth it
MOST = 256  # 64 MiB, which is what one user's pipes may hold before the kernel hands out small ones
POOLED = 16  # kept for reuse; more are made while more are needed at once


class Pipe(NamedTuple):
    """Both ends of a pipe, and how many bytes it holds at most."""

    read_fd: int
    write_fd: int
    size: int


class PipePool:
    """Hands out empty pipes and takes them back. There are never more than ``most``: sessions need descriptors, too."""

    def __init__(self) -> None:
        self.most = 0
        self.made = 0
        self._free: list[Pipe] = []

    def take(self) -> Pipe | None:
        """Return an empty pipe, or ``None`` when there is none to be had: then copy instead."""
        if self._free:
            return self._free.pop()
        if self.made >= self.most:
            return None
        try:
            read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # no descriptors left: copying needs none
            return None
        try:
            size = fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:  # the user's share is used up; see what we were given
            size = fcntl.fcntl(write_fd, fcntl.F_GETPIPE_SZ)
        pipe = Pipe(read_fd, write_fd, size)
        self.made += 1
        if size < SMALLEST_BYTES:
            self.discard(pipe)
            return None
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """Take back a pipe that is empty: all bytes that went in have come out."""
        if len(self._free) < POOLED:
            self._free.append(pipe)
        else:
            self.discard(pipe)

    def discard(self, pipe: Pipe) -> None:
        """Close a pipe that may still hold bytes."""
        self.made -= 1
        os.close(pipe.read_fd)
        os.close(pipe.write_fd)
