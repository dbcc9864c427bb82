"""A worker that obeys, except where its first argument says otherwise. It serves nobody.

    fine             obey
    refuse:G         refuse generation G
    die:G            end when generation G is to be prepared
    mute:G           never answer when generation G is to be prepared
    crash            end at once
    stuck:FILE       stop turning once committed, unless FILE existed at the start; make it
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import time

from gatekeeper.errors import ChannelClosed
from gatekeeper.kernel import privileges
from gatekeeper.kernel.channel import Channel
from gatekeeper.snapshot.counters import CAPACITY_BYTES, WorkerSlot


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
