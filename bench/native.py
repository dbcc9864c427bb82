"""The load generator and the echo backend: compiled from the C files here, started, and driven turn by turn."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from bench.processes import BenchError, free_port, stop

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES = ("load.c", "backend.c", "clients.c", "datagrams.c", "strangers.c")


def compile_load(directory: str) -> str:
    """Compile into ``directory`` and return the program's path."""
    program = os.path.join(directory, "load")
    command = ["gcc", "-O2", "-o", program, *(os.path.join(HERE, source) for source in SOURCES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as err:
        raise BenchError("gcc is missing: the load generator is compiled on the spot") from err
    if done.returncode:
        raise BenchError(f"gcc failed:\n{done.stderr}")
    return program


class Backend:
    """An echo backend on its own ports: one for each system, so that none inherits another's TIME_WAIT sockets.

    Like a service's, its ports lie below the range from which clients get theirs.
    """

    def __init__(self, program: str) -> None:
        for last in (False, False, True):
            self.tcp = free_port()
            self.udp = free_port(socket.SOCK_DGRAM)
            command = [program, "backend", "127.0.0.1", str(self.tcp), str(self.udp)]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
            try:
                _line(self.process, "backend")
                return
            except BenchError:  # somebody else took one of the ports in between
                if last:
                    raise

    def close(self) -> None:
        stop(self.process)


@dataclass(frozen=True, slots=True)
class Result:
    """What one turn did. ``units`` are connections, round trips, datagrams or bytes; ``lost`` never came back."""

    units: int
    seconds: float
    p50_us: float
    p99_us: float
    lost: int
    errors: int


class Generator:
    """A load generator; its connections are open from here to ``close``."""

    def __init__(self, program: str, mode: str, port: int, clients: int, size: int = 1) -> None:
        command = [program, mode, f"127.0.0.1:{port}", str(clients), str(size)]
        self.what = f"load generator {mode} with {clients} clients"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        _line(self.process, self.what)

    def turn(self, seconds: float, max_units: int = 1 << 62) -> Result:
        """Drive for ``seconds`` and return once everything under way has ended."""
        self.begin(seconds, max_units)
        return self.end()

    def begin(self, seconds: float, max_units: int = 1 << 62) -> None:
        """Begin a turn; ``end`` waits for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds} {max_units}\n".encode())
        self.process.stdin.flush()

    def end(self) -> Result:
        """Return what the turn did that was begun."""
        fields: dict[str, Any] = json.loads(_line(self.process, self.what))
        return Result(**fields)

    def close(self) -> None:
        """Close all its connections, and wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            print(f"bench: {self.what}: does not end by itself", file=sys.stderr)
        stop(self.process)


def _line(process: subprocess.Popen[bytes], what: str) -> bytes:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchError(f"{what}: ended with exit code {process.wait(5)}")
    return line
