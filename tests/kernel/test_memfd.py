"""Memory that others cannot change."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from gatekeeper.kernel import memfd


@pytest.fixture
def sealed() -> Iterator[int]:
    """A memfd that was filled and sealed."""
    fd = memfd.from_bytes("test", b"policy" * 1000)
    yield fd
    os.close(fd)


def test_sealed_contents_stay(sealed: int) -> None:
    """A sealed memfd can be read and mapped privately; every way to change it fails."""
    assert os.pread(sealed, 6, 0) == b"policy"
    for attempt in (
        lambda: os.pwrite(sealed, b"x", 0),
        lambda: os.ftruncate(sealed, 1),
        lambda: os.ftruncate(sealed, 1 << 20),
        lambda: mmap.mmap(sealed, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    ):
        with pytest.raises(PermissionError):
            attempt()
    with mmap.mmap(sealed, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        assert mapped[:6] == b"policy"


def test_a_writer_excludes_a_seal() -> None:
    """Memory that somebody has mapped writable cannot be passed off as unchangeable."""
    fd = memfd.create("test", 4096)
    with mmap.mmap(fd, 4096), pytest.raises(OSError, match="busy"):
        memfd.seal(fd)
    os.close(fd)


def test_only_the_first_writer_writes() -> None:
    """Once sealed against new writers, the mapping that exists still writes, and no other can be made."""
    fd = memfd.create("test", 4096)
    with mmap.mmap(fd, 4096) as first:
        memfd.seal_against_new_writers(fd)
        first[0:5] = b"count"
        assert os.pread(fd, 5, 0) == b"count"
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with mmap.mmap(fd, 4096, prot=mmap.PROT_READ) as reader:
            assert reader[0:5] == b"count"
    os.close(fd)
