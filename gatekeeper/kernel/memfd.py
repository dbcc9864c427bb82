"""Memory that is handed from process to process as a descriptor, sealed against whoever must not change it."""

from __future__ import annotations

import fcntl
import os

_F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; Python's fcntl has no name for it

_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def create(name: str, size_bytes: int = 0) -> int:
    """Return a new memfd that can be sealed; sparse: only pages that are written to exist. The caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if size_bytes:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED_SIZE)
    return fd


def from_bytes(name: str, data: bytes) -> int:
    """Return a memfd that holds ``data`` and that nobody can change any more. The caller closes it."""
    fd = create(name)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    seal(fd)
    return fd


def seal(fd: int) -> None:
    """Let nobody change the contents any more, ourselves included.

    Raises:
        OSError: somebody still has a writable mapping.
    """
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | _FIXED_SIZE | fcntl.F_SEAL_SEAL)


def seal_against_new_writers(fd: int) -> None:
    """Let only those write who have mapped the memory writable already.

    Raises:
        OSError: the kernel is older than 5.1.
    """
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
