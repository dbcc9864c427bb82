"""What is measured: one entry for each kind of work."""

from __future__ import annotations

import resource
from dataclasses import dataclass, replace

SPARE_FDS = 1200  # of a process: its own, HAProxy's pipes, and the clients that do something


@dataclass(frozen=True, slots=True)
class Scenario:
    """``port`` is the key of `System.ports` that is driven; ``per`` units are one unit of the table, called ``unit``.

    Each system has ``workers`` workers and, besides, ``idle`` open sessions on which nothing happens.
    """

    name: str
    mode: str
    clients: int
    unit: str
    title: str
    size: int = 1
    port: str = "tcp"
    per: float = 1.0
    workers: int = 1
    idle: int = 0

    @property
    def bulk(self) -> bool:
        return self.unit == "GB"


CONNECT = Scenario(
    "connect-close", "connect-close", 32, "connection", "connect, 1 byte there and back, close; 32 at once"
)
TRIPS = Scenario(
    "round-trip-50", "round-trip", 50, "round trip", "64 bytes there and back on 50 open connections", size=64
)
SINGLE = (
    CONNECT,
    replace(TRIPS, name="round-trip-1", clients=1, title="64 bytes there and back on 1 open connection"),
    TRIPS,
    Scenario("bulk-up", "up", 4, "GB", "bulk from client to backend, 4 streams", per=1e9),
    Scenario("bulk-down", "down", 4, "GB", "bulk from backend to client, 4 streams", per=1e9),
    Scenario("bulk-both", "both", 4, "GB", "bulk in both directions at once, 4 streams", per=1e9),
    Scenario("udp-50", "udp", 50, "round trip", "UDP, 64 bytes there and back, 50 clients", size=64, port="udp"),
    Scenario("udp-1000", "udp", 1000, "round trip", "UDP, 64 bytes there and back, 1000 clients", size=64, port="udp"),
    Scenario("refused", "refused", 32, "connection", "refused connections; 32 at once", port="refused"),
)
TWO = tuple(
    replace(each, name=f"{each.name}-2", workers=2, title=f"{each.title}, 2 workers")
    for each in SINGLE
    if each.name in {"connect-close", "round-trip-50", "bulk-down", "udp-50"}
)
OPEN = (10, 100, 1000, 3000, 10_000)
GROWTH = tuple(replace(each, name=f"{each.name}-open-{idle}", idle=idle) for each in (CONNECT, TRIPS) for idle in OPEN)
SCENARIOS = (*SINGLE, *GROWTH, *TWO)

# Measured in ways of their own.
IDLE, FAIRNESS, CALLS, WHERE, LOAD, VERDICT = "idle", "fairness", "syscalls", "where", "load", "verdict"
GROUPS = {"growth": tuple(one.name for one in GROWTH), "workers-2": tuple(one.name for one in TWO)}
# Each system in a network namespace of its own: see `kernel`.
REFUSED_BY_KERNEL = Scenario("kernel-refused", "refused", 32, "connection", "refused before there is a connection; 32 at once", port="refused")
GUARDED = (
    replace(CONNECT, name="guarded-connect", title=f"guarded: {CONNECT.title}"),
    replace(TRIPS, name="guarded-round-trip-1", clients=1, title="guarded: 64 bytes there and back on 1 open connection"),
    replace(TRIPS, name="guarded-round-trip", title=f"guarded: {TRIPS.title}"),
)
KERNEL_TABLE = "kernel-table"
KERNEL = (*(scenario.name for scenario in (REFUSED_BY_KERNEL, *GUARDED)), KERNEL_TABLE)
GROUPS["kernel"] = KERNEL
NAMES = (IDLE, *(scenario.name for scenario in SCENARIOS), FAIRNESS, CALLS, WHERE, LOAD, VERDICT, *KERNEL)


def that_fit(scenario: Scenario) -> Scenario:
    """Return ``scenario`` with as many idle sessions as a process here may have descriptors for, two each."""
    if not scenario.idle:
        return scenario
    idle = min(scenario.idle, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FDS) // 2)
    return replace(scenario, idle=idle, title=f"{scenario.title}, beside {idle:,} idle sessions")
