"""What a program counts: attempts and reports for each verdict, one pair for each CPU, in an array that is mapped."""

from __future__ import annotations

import mmap
import os

PAIR_BYTES = 16  # attempts, and of those reported


class Counts:
    """A reader that remembers how far it has read. Owns ``fd``.

    ``counted`` is what an earlier reader had read; it says how large the array is.
    """

    def __init__(self, fd: int, details: int, cpus: int, counted: bytes | None = None) -> None:
        """Map the array. ``fd`` is the caller's when this fails.

        Raises:
            OSError: it cannot be mapped.
        """
        self.fd = fd
        self.counted = bytes(details * cpus * PAIR_BYTES) if counted is None else counted
        self.cpus = cpus
        self._memory = mmap.mmap(fd, len(self.counted), mmap.MAP_SHARED, mmap.PROT_READ)

    def news(self) -> dict[int, tuple[int, int]]:
        """Return what happened since the last call: detail -> (attempts, of those reported)."""
        now = bytes(self._memory)
        if now == self.counted:
            return {}
        before, self.counted = memoryview(self.counted).cast("Q").tolist(), now
        after = memoryview(now).cast("Q").tolist()
        width = 2 * self.cpus
        found = {}
        for detail, first in enumerate(range(0, len(after), width)):
            last = first + width
            if after[first:last] != before[first:last]:
                attempts = sum(after[first:last:2]) - sum(before[first:last:2])
                reported = sum(after[first + 1 : last : 2]) - sum(before[first + 1 : last : 2])
                found[detail] = attempts, reported
        return found

    def close(self) -> None:
        """Unmap and close it."""
        self._memory.close()
        os.close(self.fd)
