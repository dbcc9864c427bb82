"""A worker that obeys, except where its first argument says otherwise. It serves nobody.

    fine             obey
    refuse:G         refuse generation G
    die:G            end when generation G is to be prepared
    mute:G           never answer when generation G is to be prepared
    crash            end at once
    lie:HOW          answer questions about sessions with rows that are garbage (garbage), with more rows than were asked
                     for, answers for other questions, and several answers (flood), by ending (end), or not at all (mute)
    stuck:FILE       stop turning once committed, unless FILE existed at the start; make it
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import time
from typing import Any

from gatekeeper.errors import ChannelClosed
from gatekeeper.kernel import privileges
from gatekeeper.kernel.channel import Channel
from gatekeeper.snapshot.counters import CAPACITY_BYTES, WorkerSlot

ROW: dict[str, Any] = {
    "flow": 7, "endpoint": 0, "slot": 0, "family": 4, "source": "198.51.100.7", "source_port": 50000,
    "destination": "127.0.0.1", "destination_port": 80, "began": 1.8e9, "idle_s": 1.5, "bytes_in": 1, "bytes_out": 2,
    "state": "open", "client": None, "backend": None,
}  # fmt: skip
WRONG: list[dict[str, Any]] = [
    {"flow": -1}, {"flow": 1 << 80}, {"flow": "7"}, {"flow": True}, {"flow": 7.0}, {"endpoint": 99}, {"endpoint": None},
    {"endpoint": [0]}, {"slot": 1 << 40}, {"slot": "x"}, {"source": "198.51.100.7\n"}, {"source": 7}, {"source": "x" * 9999},
    {"source": ""}, {"source": "::1%lo"}, {"source_port": 65536}, {"source_port": None}, {"began": float("nan")},
    {"began": float("inf")}, {"began": -1}, {"began": 1e300}, {"began": "now"}, {"idle_s": None}, {"bytes_in": -1},
    {"bytes_out": 1 << 63}, {"state": "fine"}, {"state": []}, {"state": None}, {"destination": "\x1b[2J"},
]  # fmt: skip
GARBAGE: list[Any] = [17, None, "row", [], {}, {"flow": 1}, *(ROW | wrong for wrong in WRONG)]


def lies(how: str, query: int) -> list[dict[str, Any]]:
    """Return the messages of a worker that somebody has taken over."""
    if how == "garbage":
        return [
            {"op": "rows", "query": query, "rows": GARBAGE},
            {"op": "rows", "query": query, "rows": {"a": 1}},
            {"op": "rows", "query": query},
            {"op": "rows", "query": [query], "rows": [ROW]},
            {"op": "rows", "query": str(query), "rows": [ROW]},
            {"op": "answer", "query": None},
            {"op": "answer", "query": query, "matched": "many", "ended": -5},
        ]
    if how == "flood":
        rows = {"op": "rows", "query": query, "rows": GARBAGE * 5}
        return [
            *({"op": "answer", "query": other, "matched": 1} for other in range(query + 1, query + 100)),
            *([rows] * 50),
            {"op": "answer", "query": query, "matched": 1 << 90, "ended": 1 << 90},
            {"op": "answer", "query": query, "matched": 3, "ended": 3},
            rows,
        ]
    return []


def main() -> int:
    """Obey until told to drain."""
    mode, _, detail = sys.argv[1].partition(":")
    channel = Channel(socket.socket(fileno=int(sys.argv[sys.argv.index("--channel") + 1])))
    channel.sock.settimeout(0.1)
    counters: memoryview | None = None
    if mode == "crash":
        return 4
    if mode == "stuck":
        # While files may still be made.
        try:
            os.close(os.open(detail, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            mode = "fine"
    while True:
        if counters is not None:
            counters[WorkerSlot.HEARTBEAT_MS] = int(time.monotonic() * 1000)
        try:
            order, fds = channel.receive()
        except TimeoutError:
            continue
        generation = order.get("generation")
        at_it = detail == str(generation)
        if order["op"] == "start":
            privileges.drop(order["uid"], order["gid"], order["groups"], order["supervisor_pid"])
            counters = memoryview(mmap.mmap(fds[0], CAPACITY_BYTES)).cast("B").cast("Q")
            channel.send({"op": "ready"})
        elif order["op"] == "prepare":
            if mode == "die" and at_it:
                return 5
            if mode == "refuse" and at_it:
                channel.send({"op": "failed", "generation": generation, "error": "I do not\nlike it"})
            elif not (mode == "mute" and at_it):
                channel.send({"op": "prepared", "generation": generation})
        elif order["op"] == "commit":
            channel.send({"op": "committed", "generation": generation})
            while mode == "stuck":
                time.sleep(60)
        elif order["op"] in {"sessions", "cut"} and mode == "lie":
            if detail == "end":
                return 6
            for message in lies(detail, order["query"]):
                channel.send(message)
        elif order.get("query"):
            channel.send({"op": "answer", "query": order["query"], "judged": 0, "ended": 0})
        elif order["op"] == "drain":
            channel.send({"op": "drained", "sessions": 0})
            return 0
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ChannelClosed:
        sys.exit(1)
