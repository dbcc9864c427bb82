"""Telling the service manager how we are: the sd_notify protocol, one datagram a message."""

from __future__ import annotations

import array
import os
import select
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PATIENCE_MS = 100


class Notifier:
    """Sends states to the socket in NOTIFY_SOCKET; without one, every call does nothing. Owns its socket."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID from ``environment``."""
        self._socket: socket.socket | None = None
        self._poll = select.poll()
        self.watchdog_interval_s = _watchdog_interval_s(environment)
        address = environment.get("NOTIFY_SOCKET", "")
        if address.startswith(("/", "@")):
            self._address = "\0" + address[1:] if address.startswith("@") else address
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            self._poll.register(self._socket, select.POLLOUT)

    def ready(self, status: str) -> None:
        """Say that the service is up, or that a reload has ended."""
        self._send(f"READY=1\nSTATUS={_one_line(status)}")

    def status(self, status: str) -> None:
        """Say in one line what the service is doing."""
        self._send(f"STATUS={_one_line(status)}")

    def reloading(self) -> None:
        """Say that a reload has begun; `ready` must follow, whatever becomes of it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        """Say that the service is on its way down."""
        self._send(f"STOPPING=1\nSTATUS={_one_line(status)}")

    def watchdog(self) -> None:
        """Say that we are alive; due every ``watchdog_interval_s``."""
        self._send("WATCHDOG=1")

    def store(self, name: str, fds: Sequence[int]) -> None:
        """Give copies of descriptors to the manager's store; they come back at the next start, under this name.

        The manager is not to watch them: a UDP socket that was told of an error would be dropped.
        """
        self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fds)

    def forget(self, name: str) -> None:
        """Let the manager close what it stored under a name."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def wait_until_heard(self, patience_s: float) -> bool:
        """Wait until the manager has acted on everything that it was told; say whether it has. Blocks: for the start only."""
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            self._send("BARRIER=1", [theirs])
        finally:
            os.close(theirs)
        poll = select.poll()
        poll.register(ours, 0)  # the end of the pipe: the manager has closed its copy
        try:
            return self._socket is not None and bool(poll.poll(patience_s * 1000))
        finally:
            os.close(ours)

    def close(self) -> None:
        """Close the socket; later calls do nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str, fds: Sequence[int] = ()) -> None:
        if self._socket is None:
            return
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            try:
                self._socket.sendmsg([text.encode()], rights, 0, self._address)
            except BlockingIOError:
                # Its queue holds a few messages only, and it is busy at the start of the machine.
                self._poll.poll(PATIENCE_MS)
                self._socket.sendmsg([text.encode()], rights, 0, self._address)
        except OSError:
            # The manager is gone or slow. It will notice by itself, and the service must not stop for it.
            return


def _watchdog_interval_s(environment: Mapping[str, str]) -> float | None:
    """Return how often the watchdog wants to hear from us (half of its patience), or ``None``."""
    try:
        limit_us = int(environment.get("WATCHDOG_USEC", "0"))
        pid = int(environment.get("WATCHDOG_PID", "0"))
    except ValueError:
        return None
    if limit_us <= 0 or pid not in {0, os.getpid()}:
        return None
    return limit_us / 2_000_000


def _one_line(text: str) -> str:
    return " ".join(text.split())
