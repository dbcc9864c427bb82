"""System calls of each system for one connection, as strace counts them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.native import Generator
from bench.peers import System
from bench.processes import BenchError, stop

CONNECTIONS = 3000
ATTACH_LIMIT_S = 10.0


def system_calls(
    systems: Sequence[System], program: str, directory: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Count what `connect-close` asks of the kernel; return the record for the document.

    ``systems[name]`` is ``{"calls": calls per connection, "failed": those of them that failed, "by_name": {call: per connection}}``, of all
    processes of the system. strace slows everybody down, so that more connections wait when a process wakes up: counts are a little
    lower than in full flow.

    Raises:
        BenchError: strace is missing or may not attach.
    """
    if shutil.which("strace") is None:
        raise BenchError("strace is not installed")
    figures = {}
    for system in systems:
        if system.process:
            progress(f"system calls of {system.name}")
            figures[system.name] = _count(system, program, os.path.join(directory, f"{system.name}.strace"))
    title = f"system calls for one connection (connect, 1 byte there and back, close; 32 at once; {CONNECTIONS:,} connections)"
    return {"name": "syscalls", "title": title, "systems": figures}


def _count(system: System, program: str, path: str) -> dict[str, Any]:
    generator = Generator(program, "connect-close", system.ports["tcp"], 32)
    generator.turn(10, 200)  # what the first ones cost is not what one costs
    attach = [word for pid in system.pids() for word in ("-p", str(pid))]
    tracer = subprocess.Popen(
        ["strace", "-f", "-c", "-o", path, *attach], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + ATTACH_LIMIT_S
        while not all(_traced(pid) for pid in system.pids()):
            if tracer.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"strace cannot attach to {system.name}")
            time.sleep(0.02)
        done = generator.turn(30, CONNECTIONS).units
        tracer.send_signal(signal.SIGINT)
        tracer.wait(20)
    finally:
        generator.close()
        stop(tracer)
    with open(path) as file:
        return per_connection(file.read(), done)


def _traced(pid: int) -> bool:
    with open(f"/proc/{pid}/status") as file:
        return any(line.split()[1] != "0" for line in file if line.startswith("TracerPid:"))


def per_connection(table: str, connections: int) -> dict[str, Any]:
    """Return what the summary ``table`` of strace says, by connection."""
    calls: dict[str, float] = {}
    failed = 0
    for line in table.splitlines():
        fields = line.split()
        # % time, seconds, usecs/call, calls, [errors], syscall
        if len(fields) in {5, 6} and fields[3].isdigit() and fields[-1] != "total":
            calls[fields[-1]] = int(fields[3]) / connections
            failed += int(fields[4]) if len(fields) == 6 else 0
    by_name = {name: count for name, count in sorted(calls.items(), key=lambda each: -each[1]) if count >= 0.005}
    return {"calls": sum(calls.values()), "failed": failed / connections, "by_name": by_name}
