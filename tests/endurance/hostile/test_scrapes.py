"""A scrape of a very large policy is a matter of milliseconds, and of the observer alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.gate import Gate
from tests.support.ports import free_ports

SCRAPE_S = 0.05
TRIES = 5


def cpu_s(pid: int) -> float:
    """Return the CPU time that all threads of a process have used, in seconds."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


@pytest.mark.timeout(300)
def test_a_scrape_of_a_large_policy_is_quick(run_gate: Callable[..., Gate], long: bool) -> None:
    """Twenty thousand samples take less than 50 ms of the observer's time, once their names are known.

    Of its time and not of the clock's: this machine may be busy with other work.
    """
    listeners, rules = (20, 900) if long else (5, 100)
    port = free_ports(listeners)
    doors = "".join(
        f"  - {{name: door-{number}, listen: '127.0.0.1:{port + number}', backend: '127.0.0.1:9'}}\n" for number in range(listeners)
    )
    lines = "".join(
        f"  - {{name: rule-{number}, action: allow, from: 10.{number >> 8}.{number & 255}.0/24}}\n" for number in range(rules)
    )
    gate = run_gate(f"listeners:\n{doors}default: deny\nrules:\n{lines}")
    samples = len(gate.scrape().samples)
    observer = gate.observer_pid()
    took = []
    for _ in range(TRIES):
        began_s, used_s = time.monotonic(), cpu_s(observer)
        gate.get("/metrics")
        took.append((cpu_s(observer) - used_s, time.monotonic() - began_s))
    best_s, best_wall_s = (min(each[index] for each in took) for index in (0, 1))
    print(f"{samples} samples: {best_s * 1e3:.1f} ms of CPU, {best_wall_s * 1e3:.1f} ms by the clock, best of {TRIES}")
    assert best_s < SCRAPE_S
