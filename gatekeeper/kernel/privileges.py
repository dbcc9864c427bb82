"""Giving up privileges, for good: user, groups, capabilities, and the right to gain any of them back.

`who_to_become` runs in the supervisor and chooses; `drop` and `confine` run in a child, before it touches anything a
stranger has sent. libc's own wrappers are called, so the same code serves every architecture.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import signal
from dataclasses import dataclass

from gatekeeper.kernel import landlock

ACCOUNTS = ("gatekeeper", "nobody")  # the first that exists

CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12
CAP_SYS_PTRACE = 19
CAP_SYS_RESOURCE = 24
CAP_BPF = 39

# What a supervisor that is root makes use of; the rest it gives up. Everything of it that it does not hold is missed
# only where it would have been used.
SUPERVISOR_USES = frozenset({
    CAP_NET_BIND_SERVICE,  # ports below 1024
    CAP_SETUID, CAP_SETGID, CAP_SETPCAP,  # children turn into somebody else and empty their bounding set
    CAP_KILL,  # and can still be ended then
    CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH,  # unix sockets, the audit file, the state; rule files, for the compiler
    CAP_NET_ADMIN,  # receive buffers larger than net.core.rmem_max; the kernel program
    CAP_BPF,  # the kernel program; given up when the rule file does not ask for it
    CAP_SYS_PTRACE,  # to say who has an address
    CAP_SYS_RESOURCE,  # more descriptors on their way to children than one user may have
})  # fmt: skip

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_MOST_CAPABILITIES = 64

_libc = ctypes.CDLL(None, use_errno=True)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@dataclass(frozen=True, slots=True)
class Identity:
    """The user and groups a child runs as."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


def who_to_become() -> Identity | None:
    """Return whom our children should run as, or ``None`` when they must keep what we are.

    ``None``: we are not root, or may not change users here (a container without CAP_SETUID, a user namespace that maps
    root alone), or there is no account to change to.
    """
    held = effective_capabilities()
    if os.geteuid() != 0 or CAP_SETUID not in held or CAP_SETGID not in held or _setgroups_denied():
        return None
    for name in ACCOUNTS:
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        if not (_mapped(account.pw_uid, "uid_map") and _mapped(account.pw_gid, "gid_map")):
            continue
        extra = sorted(group.gr_gid for group in grp.getgrall() if name in group.gr_mem and group.gr_gid)
        groups = tuple(gid for gid in extra if _mapped(gid, "gid_map"))
        return Identity(name, account.pw_uid, account.pw_gid, groups)
    return None


def harden() -> None:
    """Keep only what a supervisor makes use of, and let no process of the same user attach to this one.

    Raises:
        OSError: the kernel refused.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    held = effective_capabilities()
    if CAP_SETPCAP in held:
        _limit_bounding_set(SUPERVISOR_USES)
    if held - SUPERVISOR_USES:
        _keep_only(SUPERVISOR_USES & held)
    # A worker may run as the same user, and a stranger may have taken it over.
    _prctl(_PR_SET_DUMPABLE, 0)


def give_up(capability: int) -> None:
    """Do without one capability from now on.

    Raises:
        OSError: the kernel refused.
    """
    held = effective_capabilities()
    if capability in held:
        if CAP_SETPCAP in held:
            _prctl(_PR_CAPBSET_DROP, capability)
        _keep_only(held - {capability})


def keep_across_exec() -> None:
    """Let the capabilities in force survive an execve by this process, also where it is not root.

    Raises:
        OSError: the kernel refused.
    """
    held = effective_capabilities()
    if not held or os.geteuid() == 0:
        return
    mask = sum(1 << number for number in held)
    _set_capabilities(mask, inheritable=mask)
    for number in held:
        if _libc.prctl(_PR_CAP_AMBIENT, *map(ctypes.c_ulong, (_PR_CAP_AMBIENT_RAISE, number, 0, 0))) != 0:
            raise _error("prctl(PR_CAP_AMBIENT_RAISE)")


def drop(uid: int | None, gid: int | None, groups: list[int] | tuple[int, ...] | None, supervisor_pid: int) -> None:
    """Become ``uid``, ``gid`` and ``groups`` (each ``None``: keep) without any capability, and die with the supervisor.

    Afterwards nothing can be gained back: no_new_privs is set, every capability set is empty, no other process of the
    same user may attach to this one or read its memory, and where the kernel has Landlock this one can write no file,
    execute nothing, and signal nobody.

    Raises:
        OSError: the kernel refused; the caller must not go on.
        SystemExit: the supervisor is already gone.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if CAP_SETPCAP in effective_capabilities():
        _limit_bounding_set(frozenset())
    if groups is not None:
        os.setgroups(groups)
    if gid is not None:
        os.setresgid(gid, gid, gid)
    if uid is not None:
        os.setresuid(uid, uid, uid)
    _keep_only(frozenset())
    landlock.give_up()
    _die_with(supervisor_pid)


def confine(supervisor_pid: int) -> None:
    """Keep the user and the right to read files (a rule file may belong to anybody), and give up everything else.

    Where the kernel has Landlock, that includes writing files, executing programs and signalling others.

    Raises:
        OSError: the kernel refused; the caller must not go on.
        SystemExit: the supervisor is already gone.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _keep_only(frozenset({CAP_DAC_READ_SEARCH}) & effective_capabilities())
    landlock.give_up()
    _die_with(supervisor_pid)


def effective_capabilities() -> frozenset[int]:
    """Return the numbers of the capabilities in force in this process."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:"):
                mask = int(line.split()[1], 16)
                return frozenset(number for number in range(_MOST_CAPABILITIES) if mask >> number & 1)
    return frozenset()


def _keep_only(capabilities: frozenset[int]) -> None:
    # Not every sandbox knows ambient capabilities, and capset empties them too (ambient is within inheritable).
    _libc.prctl(_PR_CAP_AMBIENT, *map(ctypes.c_ulong, (_PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)))
    _set_capabilities(sum(1 << number for number in capabilities), inheritable=0)


def _set_capabilities(mask: int, *, inheritable: int) -> None:
    header = _CapabilityHeader(_LINUX_CAPABILITY_VERSION_3, 0)
    words = [(mask >> shift & 0xFFFFFFFF, inheritable >> shift & 0xFFFFFFFF) for shift in (0, 32)]
    data = (_CapabilityData * 2)(*(_CapabilityData(word, word, later) for word, later in words))
    if _libc.capset(ctypes.byref(header), ctypes.byref(data)) != 0:
        raise _error("capset")


def _limit_bounding_set(capabilities: frozenset[int]) -> None:
    for number in range(_MOST_CAPABILITIES):
        if number not in capabilities and _libc.prctl(_PR_CAPBSET_READ, *map(ctypes.c_ulong, (number, 0, 0, 0))) == 1:
            _prctl(_PR_CAPBSET_DROP, number)


def _die_with(supervisor_pid: int) -> None:
    # Both are reset by a change of user, so they come last.
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor_pid:
        raise SystemExit("the supervisor is gone")


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, *map(ctypes.c_ulong, (argument, 0, 0, 0))) != 0:
        raise _error(f"prctl({option}, {argument})")


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def _setgroups_denied() -> bool:
    try:
        with open("/proc/self/setgroups", encoding="ascii") as setting:
            return setting.read().strip() == "deny"
    except OSError:
        return False


def _mapped(number: int, table: str) -> bool:
    """Say whether this user namespace knows the user or group ``number``."""
    try:
        with open(f"/proc/self/{table}", encoding="ascii") as lines:
            spans = [tuple(map(int, line.split())) for line in lines]
    except OSError:
        return True
    return any(first <= number < first + count for first, _outside, count in spans)
