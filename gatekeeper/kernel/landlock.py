"""Landlock: a process gives up what even its own user may do, whoever takes it over later.

Same-user processes may signal each other and write each other's files; capabilities have no say in that. What is left
here is reading files and using descriptors. Kernels without Landlock, and older ones, take away as much as they can.
"""

from __future__ import annotations

import ctypes
import os
import struct

_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # the same on every architecture
_GET_VERSION = 1

# linux/landlock.h, by the version of the interface that brought it.
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILES = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14}  # all of version 1; REFER; TRUNCATE
_BIND_TCP = {4: 1 << 0}
_SCOPES = {6: 1 << 0 | 1 << 1}  # abstract unix sockets, signals: only to our own kind

_libc = ctypes.CDLL(None, use_errno=True)


def give_up() -> bool:
    """Give up writing, making, removing and executing files, binding TCP ports, and reaching others' processes.

    Descriptors that are open already go on as before, and other processes can do to this one what they could. Needs
    no_new_privs. Returns whether the kernel knows Landlock.

    Raises:
        OSError: it does, and refused.
    """
    version = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_GET_VERSION))
    if version < 1:  # not built in, switched off, or a sandbox that does not know it
        return False
    files = _known(_FILES, version) & ~(_READ_FILE | _READ_DIR)
    # An older kernel takes a longer structure as long as what it does not know is zero.
    attributes = struct.pack("=QQQ", files, _known(_BIND_TCP, version), _known(_SCOPES, version))
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    if ruleset < 0:
        raise _error("landlock_create_ruleset")
    try:
        # No rule is added: nothing of it is allowed anywhere.
        if _libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0)) != 0:
            raise _error("landlock_restrict_self")
    finally:
        os.close(ruleset)
    return True


def _known(rights: dict[int, int], version: int) -> int:
    return sum(bits for since, bits in rights.items() if since <= version)


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
