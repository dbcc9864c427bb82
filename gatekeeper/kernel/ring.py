"""Reading a BPF ring buffer: what the program reports, in order, without a system call."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

_BUSY, _DISCARDED = 1 << 31, 1 << 30  # in the length of a record
_HEADER_BYTES = 8


class Ring:
    """The consumer's side. ``fileno`` becomes readable when there is something; it is the map's and not owned."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Map it.

        Raises:
            OSError: the kernel refused.
        """
        self._fd = fd
        self._size = size_bytes
        page = mmap.PAGESIZE
        self._consumer = mmap.mmap(fd, page)
        # The producer's position, then the data twice, so that a record never wraps around.
        self._producer = mmap.mmap(fd, page + 2 * size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._read_to = memoryview(self._consumer).cast("Q")
        self._data = memoryview(self._producer)
        self._written_to = self._data[:8].cast("Q")

    def fileno(self) -> int:
        return self._fd

    def read(self) -> Iterator[memoryview]:
        """Yield the records that are there, each valid until the next is asked for."""
        at, page = self._read_to[0], mmap.PAGESIZE
        while at < self._written_to[0]:
            here = page + at % self._size
            length = int.from_bytes(self._data[here : here + 4], "little")
            if length & _BUSY:
                return
            start = here + _HEADER_BYTES
            if not length & _DISCARDED:
                yield self._data[start : start + length]
            at += _HEADER_BYTES + (length & ~_DISCARDED) + 7 & ~7
            self._read_to[0] = at

    def close(self) -> None:
        """Unmap it."""
        self._written_to.release()
        self._data.release()
        self._read_to.release()
        self._producer.close()
        self._consumer.close()
