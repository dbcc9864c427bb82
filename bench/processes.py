"""What processes cost, read from /proc: CPU time in nanoseconds and memory in bytes, of a process and all its descendants."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable

SETTLE_STEP_S = 0.008
SETTLE_LIMIT_S = 0.4


class BenchError(Exception):
    """The comparison cannot be made: the message says why."""


def family(pid: int) -> list[int]:
    """``pid`` and all its living descendants."""
    found = [pid]
    for parent in found:  # grows while it is walked
        try:
            tasks = os.listdir(f"/proc/{parent}/task")
        except FileNotFoundError:
            continue
        for task in tasks:
            try:
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    found.extend(int(child) for child in file.read().split())
            except OSError:  # gone while we looked
                continue
    return found


def cpu_ns(pids: list[int]) -> int:
    """CPU time of all threads of ``pids``, user and system, in nanoseconds; processes that are gone count nothing."""
    total = 0
    for pid in pids:
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                    total += int(file.read().split()[0])
        except OSError:
            continue
    return total


def ticks(pids: list[int]) -> tuple[int, int]:
    """Clock ticks of ``pids`` in user space and in the kernel; exact enough only over seconds."""
    user = kernel = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        user += int(fields[11])
        kernel += int(fields[12])
    return user, kernel


def role(pid: int) -> str:
    """What a process is, in a word: the module that Python runs, or the words of its title that say it; "" when gone."""
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            words = file.read().replace("\0", " ").split()
    except OSError:
        return ""
    if "-m" in words[:-1]:
        module = words[words.index("-m") + 1]
        return {"gatekeeper": "supervisor", "gatekeeper.proxy": "worker", "gatekeeper.observer": "observer"}.get(
            module, module
        )
    return " ".join(words[1:2]) if words and words[0].endswith(":") else os.path.basename(words[0]) if words else ""


def settle(pids: list[int]) -> None:
    """Wait until ``pids`` rest, so that what a turn left behind (closes, audit lines) is paid within it. At most 0.4 s."""
    deadline = time.monotonic() + SETTLE_LIMIT_S
    before = cpu_ns(pids)
    calm = 0
    while calm < 3 and time.monotonic() < deadline:
        time.sleep(SETTLE_STEP_S)
        now = cpu_ns(pids)
        calm = calm + 1 if now - before < 50_000 else 0  # a heartbeat costs less than 50 µs
        before = now


def memory_bytes(pids: list[int]) -> dict[str, int]:
    """Proportional and private memory of ``pids`` together: ``{"pss": bytes, "private": bytes}``."""
    pss = private = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as file:
                rows = [line.split() for line in file]
        except OSError:
            continue
        for row in rows:
            if row[0] == "Pss:":
                pss += int(row[1]) << 10
            elif row[0] in {"Private_Clean:", "Private_Dirty:"}:
                private += int(row[1]) << 10
    return {"pss": pss, "private": private}


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port of 127.0.0.1 that was free a moment ago, below the range from which clients get theirs."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        ephemeral = int(file.read().split()[0])
    lowest = min(20000, max(1024, ephemeral - 12000))
    for port in range(lowest + os.getpid() % 5000, min(ephemeral, 32000)):
        if port in _handed_out:
            continue
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _handed_out.add(port)
        return port
    raise BenchError("no free port on 127.0.0.1")


_handed_out: set[int] = set()


def wait_until(what: str, holds: Callable[[], bool], process: subprocess.Popen[bytes], limit_s: float = 20.0) -> None:
    """Poll until ``holds``; BenchError when ``process`` ends first or the time is over."""
    deadline = time.monotonic() + limit_s
    while not holds():
        if process.poll() is not None:
            raise BenchError(f"{what}: ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not ready after {limit_s:.0f} s")
        time.sleep(0.02)


def echoes(port: int) -> bool:
    """Whether a byte comes back through 127.0.0.1:``port``."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as sock:
            sock.sendall(b"E")
            return sock.recv(1) == b"E"
    except OSError:
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process we started, politely first; its own children end with it."""
    for _ in range(2):  # gatekeeper lets sessions end after the first signal, and ends them at the second
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
    if process.poll() is None:
        process.kill()
        process.wait(5)
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
