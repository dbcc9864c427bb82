"""A flood of datagrams: ``python -m tests.endurance.hostile.flooding ADDRESS PORT SOURCES PORTS EACH``, at full speed.

It prints how many it sent and how many a second.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator


def flood(address: str, port: int, sources: int, ports: int, each: int) -> Iterator[int]:
    """Send ``each`` datagrams from every port of every source; yield after every port how many were sent so far."""
    sent = 0
    for number in range(sources):
        source = f"127.{1 + (number >> 14)}.{(number >> 7) & 127}.{1 + (number & 127)}"
        for _ in range(ports):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.bind((source, 0))
                for _ in range(each):
                    # Answers to ports that are closed by now come back as errors.
                    with contextlib.suppress(ConnectionRefusedError):
                        sender.sendto(b"noise", (address, port))
                    sent += 1
            yield sent


def main(words: list[str]) -> None:
    """Send all of it."""
    address, *numbers = words
    began, sent = time.monotonic(), 0
    for sent in flood(address, *map(int, numbers)):  # noqa: B007 - the last one is printed
        pass
    print(sent, round(sent / (time.monotonic() - began)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
