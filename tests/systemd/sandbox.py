"""Run a command under the restrictions of a unit that need no service manager: ``sandbox.py UNIT COMMAND...``.

Put in force, as systemd would: SystemCallFilter (its groups resolved by systemd-analyze), RestrictAddressFamilies,
MemoryDenyWriteExecute, NoNewPrivileges and UMask. User and capabilities are the caller's (setpriv); what needs mounts
(ProtectSystem and the like) is left out.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

SCMP_ACT_ALLOW = 0x7FFF0000
SCMP_ACT_ERRNO = 0x00050000
SCMP_CMP_EQ = 4
PR_SET_NO_NEW_PRIVS, PR_SET_MDWE = 38, 65
UNKNOWN_CALL = -1  # this architecture has no such system call
FAMILIES = {name: int(getattr(socket, name)) for name in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK")}


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def values(unit: Path, key: str) -> list[str]:
    """Return every value of a key, in order."""
    return [line.partition("=")[2] for line in unit.read_text().splitlines() if line.startswith(f"{key}=")]


def calls_of(group: str) -> set[str]:
    """Return the system calls of a group such as @system-service, inner groups included."""
    done = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter", group], capture_output=True, text=True, check=True
    )
    found: set[str] = set()
    for line in done.stdout.splitlines()[1:]:
        word = line.strip()
        if word.startswith("@"):
            found |= calls_of(word)
        elif word and not word.startswith("#"):
            found.add(word)
    return found


def allowed_calls(unit: Path) -> set[str]:
    """Return what SystemCallFilter leaves: the lines are applied in order, "~" takes away."""
    allowed = calls_of("@default")  # systemd always allows these
    for line in values(unit, "SystemCallFilter"):
        named: set[str] = set()
        for word in line.removeprefix("~").split():
            named |= calls_of(word) if word.startswith("@") else {word}
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed | {"execve"}


def load_filter(unit: Path) -> None:
    """Put the system call filter in force."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(SCMP_ACT_ERRNO | errno.EPERM))
    families = [FAMILIES[name] for name in values(unit, "RestrictAddressFamilies")[0].split()]
    for name in sorted(allowed_calls(unit)):
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == UNKNOWN_CALL:
            continue
        if name == "socket":
            for family in families:
                only = Comparison(0, SCMP_CMP_EQ, family, 0)
                assert library.seccomp_rule_add_array(context, SCMP_ACT_ALLOW, number, 1, ctypes.byref(only)) == 0
        else:
            assert library.seccomp_rule_add(context, SCMP_ACT_ALLOW, number, 0) == 0
    assert library.seccomp_load(context) == 0


def main() -> None:
    """Restrict this process and become the command."""
    unit, command = Path(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    os.umask(int(values(unit, "UMask")[0], 8))
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    load_filter(unit)
    # Since Linux 6.3 the kernel itself denies what systemd filters for MemoryDenyWriteExecute; older ones refuse the call.
    libc.prctl(PR_SET_MDWE, 1, 0, 0, 0)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
