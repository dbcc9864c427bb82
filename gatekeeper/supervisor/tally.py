"""What the workers and the kernel have counted, summed up by name for people at a terminal.

Prometheus has its own reader (the observer). The numbers are the workers' word: sums may be wrong once somebody has
taken a worker over, but they are numbers, and nothing else depends on them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from gatekeeper.snapshot.counters import End, ListenerSlot, WorkerSlot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gatekeeper.supervisor.accepted import Accepted

_SLOT_BYTES = 8
_FAILURES = ListenerSlot.ENDS + End.BACKEND_FAILED


def tally(workers: Sequence[int | None], kernel: int | None, policy: Accepted) -> dict[str, Any]:
    """Return ``listeners`` (those of the policy in force) and ``verdicts`` (those that were given) with their counts.

    ``workers`` and ``kernel`` are descriptors of counters, ``None`` where there are none.
    """
    counts = _Sum(policy.bindings.next_slot, [fd for fd in workers if fd is not None])
    attempts = _Sum(policy.bindings.next_slot, [] if kernel is None else [kernel])
    verdicts = [
        {
            "listener": key.listener, "action": key.action, "rule": key.rule, "reason": key.reason,
            "count": counts[slot], "kernel_attempts": attempts[slot],
        }
        for key, slot in policy.bindings.verdicts.items()
        if counts[slot] or attempts[slot]
    ]  # fmt: skip
    return {
        "loop_stall_max_s": max((each[WorkerSlot.LOOP_STALL_MAX_US] for each in counts.parts), default=0) / 1e6,
        "listeners": [
            _listener(index, listener, policy, counts, verdicts) for index, listener in enumerate(policy.meta["listeners"])
        ],
        "verdicts": verdicts,
    }


def _listener(
    index: int, listener: dict[str, Any], policy: Accepted, counts: _Sum, verdicts: list[dict[str, Any]]
) -> dict[str, Any]:
    first = policy.bindings.listeners[listener["name"]]
    endpoints = [endpoint for endpoint in policy.meta["endpoints"] if endpoint["listener"] == index]
    given = [verdict for verdict in verdicts if verdict["listener"] == listener["name"]]
    opened, closed = counts[first + ListenerSlot.SESSIONS_OPENED], counts[first + ListenerSlot.SESSIONS_CLOSED]
    return {
        "name": listener["name"],
        "protocol": listener["protocol"],
        "path": "relay" if listener["on_exit"] is None else "guard",
        "addresses": [endpoint["address"] for endpoint in endpoints],
        "backends": list(dict.fromkeys(endpoint["backend"]["text"] for endpoint in endpoints)),
        "sessions": max(opened - closed, 0),
        "opened": opened,
        "bytes_in": counts[first + ListenerSlot.BYTES_IN],
        "bytes_out": counts[first + ListenerSlot.BYTES_OUT],
        "accept_queue": counts[first + ListenerSlot.ACCEPT_QUEUE],
        "accept_overflows": counts[first + ListenerSlot.ACCEPT_OVERFLOWS],
        "backend_failures": counts[first + _FAILURES],
        "allowed": sum(verdict["count"] for verdict in given if verdict["action"] == "allow"),
        "refused": sum(verdict["count"] for verdict in given if verdict["action"] != "allow"),
        "kernel_refused": sum(verdict["kernel_attempts"] for verdict in given),
    }


class _Sum:
    """The slots of several counters, added up when asked for."""

    def __init__(self, slots: int, fds: Sequence[int]) -> None:
        self.parts = [memoryview(os.pread(fd, slots * _SLOT_BYTES, 0)).cast("Q") for fd in fds]

    def __getitem__(self, slot: int) -> int:
        return sum(part[slot] for part in self.parts)
