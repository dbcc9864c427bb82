"""A worker (or an observer) that a stranger has taken over: `taken_over.py worker|observer REPORT --channel FD`.

It is started by a real supervisor and does everything the real one does, but keeps every descriptor it was ever sent. Once a policy
is in force it tries to reach whatever it should not reach, twice: as it is, and from a user namespace of its own, where it is root.
REPORT (opened while files may still be made) gets one JSON object: attack -> what the kernel said, "" when the attack worked.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gatekeeper.errors import ChannelClosed
from gatekeeper.kernel import privileges, steering
from gatekeeper.kernel.channel import Channel
from gatekeeper.proxy.worker import ORDERS, Worker

PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
PROCESS_VM_READV, PIDFD_OPEN, PIDFD_GETFD = 310, 434, 438  # the first on x86-64; the others everywhere
CLONE_NEWUSER = 0x10000000
SO_LOCK_FILTER, SO_ATTACH_FILTER = 44, 26
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2
FALLOC_PUNCH_A_HOLE = 3

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Behave until a policy is in force, then attack."""
    role, path = sys.argv[1], sys.argv[2]
    report = os.open(f"{path}.{role}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    channel = Channel(socket.socket(fileno=int(sys.argv[sys.argv.index("--channel") + 1])))
    rules = str(Path(path).with_name("rules.yaml"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if role == "worker":
        as_worker(channel, report, rules)
    else:
        with contextlib.suppress(ChannelClosed):
            as_observer(channel, report, rules)


def as_worker(channel: Channel, report: int, rules: str) -> None:
    """Be a real worker; the first of them turns on the others when it has put a policy in force."""
    kept: dict[str, list[int]] = {}

    def keeping(op: str) -> Callable[[Worker, dict[str, Any], list[int]], None]:
        real = ORDERS[op]

        def obey(worker: Worker, order: dict[str, Any], fds: list[int]) -> None:
            kept.setdefault(op, []).extend(os.dup(fd) for fd in fds)
            real(worker, order, fds)
            if op == "commit" and worker.index == 0 and "done" not in kept:
                kept["done"] = []
                snapshot, bindings = kept["prepare"][:2]
                attacks = Attacks(snapshot, bindings, kept["siblings"][-1:], rules)
                attacks.sockets = [sock for sock in map(duplicate, kept["listen"]) if sock.family == socket.AF_INET]
                attacks.run(report)

        return obey

    for op in list(ORDERS):
        ORDERS[op] = keeping(op)
    with contextlib.suppress(ChannelClosed):
        Worker(channel).run()


def as_observer(channel: Channel, report: int, rules: str) -> None:
    """Be prepared exactly like an observer, take what it is sent, and attack."""
    start, _fds = channel.receive()
    privileges.drop(start["uid"], start["gid"], start["groups"], start["supervisor_pid"])
    channel.send({"op": "ready"})
    counters: dict[int, int] = {}
    attacked = False
    while True:
        message, fds = channel.receive()
        if message["op"] == "counters":
            counters[message["worker"]] = fds[0]
        elif message["op"] == "policy":
            snapshot, bindings = fds
        elif message["op"] == "event" and message["event"]["event_type"] == "start" and not attacked:
            attacked = True
            Attacks(snapshot=snapshot, bindings=bindings, counters=list(counters.values()), rules=rules).run(report)


def duplicate(fd: int) -> socket.socket:
    """Return a socket object for a copy of a descriptor."""
    return socket.socket(fileno=os.dup(fd))


class Attacks:
    """All attempts. Each method is one: it returns when it worked and raises OSError when it did not."""

    def __init__(self, snapshot: int, bindings: int, counters: list[int], rules: str) -> None:
        self.memories = {"snapshot": snapshot, "bindings": bindings} | {f"counters{number}": fd for number, fd in enumerate(counters)}
        self.rules = rules
        self.sockets: list[socket.socket] = []

    def run(self, report: int) -> None:
        """Try everything, and again from a namespace of our own if there is to be one."""
        said = {"landlock": str(libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1)))}
        said |= self.try_all("")
        said["capabilities"] = ",".join(map(str, sorted(privileges.effective_capabilities())))
        if libc.unshare(CLONE_NEWUSER) == 0:
            said |= self.try_all("as root of a namespace: ")
        os.write(report, json.dumps(said).encode())

    def try_all(self, where: str) -> dict[str, str]:
        """Return attack -> what the kernel said."""
        attempts: dict[str, Callable[[], Any]] = {
            "setuid": lambda: os.setuid(0 if os.getuid() else 1),
            "setgroups": lambda: os.setgroups([os.getgid() + 1]),
            "read root's file": lambda: os.open("/etc/shadow", os.O_RDONLY),
            "read the rules": lambda: os.open(self.rules, os.O_RDONLY),
            "write the rules": lambda: os.open(self.rules, os.O_WRONLY),
            "replace the rules": lambda: os.rename(self.rules, f"{self.rules}.old"),
            "make a file": lambda: os.open(f"{self.rules}.new", os.O_WRONLY | os.O_CREAT),
            "execute": lambda: os.posix_spawn("/bin/true", ["true"], {}),
            "low port": lambda: socket.socket().bind(("127.0.0.1", 81)),
        }
        if not where:  # in a namespace of one's own these say nothing
            attempts |= {
                "raise capabilities": lambda: privileges._keep_only(frozenset({privileges.CAP_NET_BIND_SERVICE})),
                "raise ambient": lambda: checked(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 10, 0, 0)),
            }
        for name, fd in self.memories.items():
            attempts |= {f"{what} {name}": partial(way, fd) for what, way in WRITING.items()}
        for name, pid in others().items():
            attempts |= {f"{what} {name}": partial(way, pid) for what, way in REACHING.items()}
        for number, sock in enumerate(self.sockets):
            attempts |= {f"{what} socket{number}": partial(way, sock) for what, way in STEERING.items()}
        return {where + name: what_happens(attempt) for name, attempt in attempts.items()}


def what_happens(attempt: Callable[[], Any]) -> str:
    """Return "" when it worked, else the kernel's answer."""
    try:
        attempt()
    except OSError as err:
        return err.strerror or str(err)
    return ""


def checked(result: int) -> int:
    """Return a system call's result, or raise its error."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def others() -> dict[str, int]:
    """Return the pids of the supervisor and of all its other children."""
    supervisor = os.getppid()
    found = {"the supervisor": supervisor}
    for folder in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{folder}/status").read_text()
            if f"\nPPid:\t{supervisor}\n" in status and int(folder) != os.getpid():
                found[f"child{len(found)}"] = int(folder)
    return found


# ---------------------------------------------------------------------- ways to write what is sealed


def by_mapping(fd: int) -> None:
    """Map it writable and shared."""
    mmap.mmap(fd, 8, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)[0:8] = bytes(8)


def by_mprotect(fd: int) -> None:
    """Map it for reading, and change one's mind."""
    libc.mmap.restype = ctypes.c_void_p
    where = libc.mmap(None, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    checked(libc.mprotect(ctypes.c_void_p(where), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE))


def by_reopening(fd: int) -> None:
    """Open it again for writing, by way of /proc."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    os.pwrite(again, bytes(8), 0)


def by_punching(fd: int) -> None:
    """Make its pages disappear."""
    checked(libc.fallocate(fd, FALLOC_PUNCH_A_HOLE, ctypes.c_long(0), ctypes.c_long(mmap.PAGESIZE)))


WRITING: dict[str, Callable[[int], Any]] = {
    "map": by_mapping,
    "mprotect": by_mprotect,
    "pwrite": lambda fd: os.pwrite(fd, bytes(8), 0),
    "write": lambda fd: os.write(fd, bytes(8)),
    "splice into": lambda fd: os.sendfile(fd, fd, 0, 8),
    "reopen": by_reopening,
    "shrink": lambda fd: os.ftruncate(fd, 0),
    "grow": lambda fd: os.ftruncate(fd, 1 << 30),
    "punch": by_punching,
    "seal": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
}


# ---------------------------------------------------------------------- ways to reach another process


def take_descriptor(pid: int) -> None:
    """Take one of its descriptors."""
    pidfd = checked(libc.syscall(PIDFD_OPEN, pid, 0))
    checked(libc.syscall(PIDFD_GETFD, pidfd, 3, 0))


def read_memory(pid: int) -> None:
    """Read its memory."""
    if os.uname().machine != "x86_64":
        raise PermissionError("not tried")
    buffer = ctypes.create_string_buffer(16)
    vector = array.array("Q", [ctypes.addressof(buffer), 16])
    at = ctypes.c_void_p(vector.buffer_info()[0])
    checked(libc.syscall(PROCESS_VM_READV, pid, at, 1, at, 1, 0))


REACHING: dict[str, Callable[[int], Any]] = {
    "attach to": lambda pid: checked(libc.ptrace(PTRACE_ATTACH, pid, None, None)),
    "seize": lambda pid: checked(libc.ptrace(PTRACE_SEIZE, pid, None, None)),
    "take a descriptor of": take_descriptor,
    "read the memory of": read_memory,
    "open the memory of": lambda pid: os.open(f"/proc/{pid}/mem", os.O_RDWR),
    "follow the descriptors of": lambda pid: os.stat(f"/proc/{pid}/fd/0"),
    "signal": lambda pid: os.kill(pid, 0),
}

# ---------------------------------------------------------------------- ways to draw other workers' sources to oneself


def join(sock: socket.socket) -> None:
    """Put another socket into the group."""
    with socket.socket(sock.family, sock.type) as another:
        another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        another.bind(sock.getsockname())
        another.listen()


STEERING: dict[str, Callable[[socket.socket], Any]] = {
    "steer": lambda sock: steering.attach(sock, (1, 2, 3), 1),
    "filter": lambda sock: sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(16)),
    "unlock": lambda sock: sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 0),
    "join": join,
}

if __name__ == "__main__":
    main()
