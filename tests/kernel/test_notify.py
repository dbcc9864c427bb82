"""What the service manager hears."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gatekeeper.kernel.notify import Notifier


@pytest.mark.parametrize(
    ("say", "expected"),
    [
        (lambda n: n.ready("serving\nssh"), "READY=1\nSTATUS=serving ssh"),
        (lambda n: n.status("one"), "STATUS=one"),
        (lambda n: n.stopping("draining"), "STOPPING=1\nSTATUS=draining"),
        (lambda n: n.watchdog(), "WATCHDOG=1"),
    ],
)
def test_states_are_sent(folder: Path, say: Callable[[Notifier], None], expected: str) -> None:
    """Each state is one datagram in the words of sd_notify; a status cannot smuggle in another line."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(5)
        manager.bind(str(folder / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(folder / "notify")})
        say(notifier)
        assert manager.recv(1000).decode() == expected
        notifier.close()


def test_reloading_carries_the_time() -> None:
    """RELOADING=1 says when on the monotonic clock, which Type=notify-reload insists on; abstract addresses work."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(5)
        manager.bind(f"\0gatekeeper-test-{os.getpid()}")
        notifier = Notifier({"NOTIFY_SOCKET": f"@gatekeeper-test-{os.getpid()}"})
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        notifier.reloading()
        first, second = manager.recv(1000).decode().split("\n")
        assert first == "RELOADING=1"
        assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        notifier.close()


@pytest.mark.parametrize("address", [None, "", "relative", "/nowhere/at/all"])
def test_no_manager_is_no_problem(address: str | None) -> None:
    """Without a manager, or with one that is gone, nothing is said and nothing fails."""
    notifier = Notifier({} if address is None else {"NOTIFY_SOCKET": address})
    notifier.ready("fine")
    notifier.close()
    notifier.ready("after the end")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),  # meant for another process
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_asks(environment: dict[str, str], expected: float | None) -> None:
    """The interval is half of the watchdog's patience, and only what is meant for us counts."""
    assert Notifier(environment).watchdog_interval_s == expected
