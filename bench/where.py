"""Where a system spends the CPU of one connection: in its own code, and in which system calls, as perf samples it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.native import Generator
from bench.peers import System
from bench.processes import BenchError, stop
from bench.scenarios import CONNECT
from bench.turns import View, spread, take_turn

SAMPLES_A_SECOND = 4999
SECONDS = 4.0
TURNS = 7
KINDS = {
    "receive": ("read", "readv", "recvfrom", "recvmsg"),
    "send": ("write", "writev", "sendto", "sendmsg"),
    "close": ("close",),
    "connect": ("connect",),
    "shutdown": ("shutdown",),
    "socket": ("socket",),
    "accept": ("accept4", "accept"),
    "epoll": ("epoll_ctl", "epoll_wait", "epoll_pwait"),
    "options": ("setsockopt", "getsockopt", "getsockname", "fcntl", "ioctl"),
}
OWN, OTHER = "own code", "other"
KIND_OF = {call: kind for kind, calls in KINDS.items() for call in calls}
COLUMNS = (OWN, *KINDS, OTHER)
ENTRY = re.compile(r"\b(?:__x64_sys_|__arm64_sys_|__sys_|ksys_|do_)(\w+)")
KERNEL = ("entry_SYSCALL", "do_syscall", "sysvec", "asm_", "ret_from", "el0")


def where_it_goes(
    systems: Sequence[System], program: str, directory: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Sample each system during `connect-close`; return the record for the document.

    ``systems[name]`` is ``{"cpu_us": per connection without perf, "shares": {one of COLUMNS: 0 to 1}, "samples": how many}``.

    Raises:
        BenchError: perf is missing or may not record.
    """
    if shutil.which("perf") is None:
        raise BenchError("perf is not installed (Debian package linux-perf)")
    figures = {}
    for system in systems:
        if system.process:
            progress(f"profile of {system.name}")
            figures[system.name] = _sample(system, program, os.path.join(directory, f"{system.name}.perf"))
    return {"name": "where", "title": "CPU of one connection by what is being done, µs (perf)", "systems": figures}


def _sample(system: System, program: str, path: str) -> dict[str, Any]:
    generator = Generator(program, CONNECT.mode, system.ports["tcp"], CONNECT.clients)
    pids = ",".join(str(pid) for pid in system.pids())
    view = View(system.name, system, system.ports["tcp"])
    try:
        costs = [turn.cpu_us for _ in range(TURNS) if (turn := take_turn(view, generator, CONNECT, 0.2))]
        command = ["perf", "record", "-g", "-F", str(SAMPLES_A_SECOND), "-e", "cpu-clock", "-o", path, "-p", pids]
        recorder = subprocess.Popen(
            [*command, "--", "sleep", str(SECONDS)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            generator.turn(SECONDS)
            recorder.wait(30)
        finally:
            stop(recorder)
    finally:
        generator.close()
    told = subprocess.run(
        ["perf", "script", "-i", path, "-F", "comm,ip,sym"],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    counts = count_kinds(told.stdout.splitlines())
    total = sum(counts.values())
    if not total or not costs:
        raise BenchError(f"perf recorded nothing of {system.name}")
    shares = {kind: counts[kind] / total for kind in COLUMNS}
    return {"cpu_us": spread(costs)["median"], "shares": shares, "samples": total}


def count_kinds(lines: Iterable[str]) -> Counter[str]:
    """Samples by kind: in the output of perf script each is a block of lines, the innermost function first."""
    counts: Counter[str] = Counter()
    stack: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            stack.append(line)
            continue
        if len(stack) > 1:
            counts[_kind(stack)] += 1
        stack = []
    return counts


def _kind(stack: list[str]) -> str:
    for line in reversed(stack):  # from the outermost: a system call does the network's work on its way
        for entry in ENTRY.findall(line):
            if entry in KIND_OF:
                return KIND_OF[entry]
    return OTHER if any(word in line for line in stack for word in KERNEL) else OWN
