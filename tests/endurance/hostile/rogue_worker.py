"""A worker that turns on the supervisor: `rogue_worker.py LIVES 0,3,5 --channel FD`.

The first worker adds a byte to LIVES in each of its lives, and misbehaves in the first of them, each time as the next number (an index of
`DEEDS`) says; then it is honest. All other workers are honest from the start.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from gatekeeper.errors import ChannelClosed
from gatekeeper.kernel.channel import Channel
from gatekeeper.proxy.worker import ORDERS, Worker
from gatekeeper.snapshot.counters import CAPACITY

MOST = 2**64 - 1
SENSELESS: list[bytes] = [
    b"[]", b"1", b'"x"', b"null", b"{", b"\xff\xfe", b"[" * 60_000, b'{"op":' + b"[" * 50_000, b'{"op":"drained","sessions":' + b"9" * 5000 + b"}", b"",
]  # fmt: skip
STRANGE: list[dict[str, Any]] = [
    {}, {"op": []}, {"op": {}}, {"op": "ready"}, {"op": "ready", "generation": []}, {"op": "prepared", "generation": None},
    {"op": "prepared", "generation": 10**4000}, {"op": "committed", "generation": -1}, {"op": "committed", "generation": 1.0},
    {"op": "drained", "sessions": 10**4000}, {"op": "drained", "sessions": -(10**4000)}, {"op": "drained", "sessions": [1]}, {"op": "x" * 60_000},
    {"op": "failed", "generation": 1, "error": "a\nb\x1b[31m" * 5000}, {"op": "failed", "generation": 1, "error": {"a": ["b"] * 5000}},
]  # fmt: skip


def with_descriptors(channel: Channel, data: bytes) -> None:
    """Send something senseless with as many descriptors as go along."""
    with contextlib.suppress(OSError):
        socket.send_fds(channel.sock, [data], [0] * 200)


def strange(worker: Worker) -> None:
    """Say what can be read and means nothing, many times, with descriptors."""
    for _ in range(3):
        for message in STRANGE:
            with_descriptors(worker.channel, json.dumps(message).encode())


def poison(worker: Worker) -> None:
    """Leave a successor counters that cannot be counted on, and die."""
    counters = worker.shared.counters
    for slot in range(min(CAPACITY, 4096)):
        counters[slot] = MOST
    os.kill(os.getpid(), signal.SIGKILL)


DEEDS: list[Callable[[Worker], None]] = [
    *(lambda worker, data=data: with_descriptors(worker.channel, data) for data in SENSELESS),
    poison,
    strange,
]  # fmt: skip


def main() -> None:
    """Be a worker, and misbehave once a policy is in force."""
    lives = os.open(sys.argv[1], os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deeds = [DEEDS[int(number)] for number in sys.argv[2].split(",")]
    channel = Channel(socket.socket(fileno=int(sys.argv[sys.argv.index("--channel") + 1])))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    honest = ORDERS["commit"]

    def commit(worker: Worker, order: dict[str, Any], fds: list[int]) -> None:
        honest(worker, order, fds)
        if worker.index == 0:
            life = os.fstat(lives).st_size
            os.write(lives, b".")
            if life < len(deeds):
                deeds[life](worker)

    ORDERS["commit"] = commit
    with contextlib.suppress(ChannelClosed):
        Worker(channel).run()


if __name__ == "__main__":
    main()
