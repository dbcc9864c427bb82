"""What is measured: one entry for each kind of work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scenario:
    """``port`` is the key of `System.ports` that is driven; ``per`` units are one unit of the table, called ``unit``."""

    name: str
    mode: str
    clients: int
    unit: str
    title: str
    size: int = 1
    port: str = "tcp"
    per: float = 1.0

    @property
    def bulk(self) -> bool:
        return self.unit == "GB"


SCENARIOS = (
    Scenario("connect-close", "connect-close", 32, "connection", "connect, 1 byte there and back, close; 32 at once"),
    Scenario("round-trip-1", "round-trip", 1, "round trip", "64 bytes there and back on 1 open connection", size=64),
    Scenario(
        "round-trip-50", "round-trip", 50, "round trip", "64 bytes there and back on 50 open connections", size=64
    ),
    Scenario("bulk-up", "up", 4, "GB", "bulk from client to backend, 4 streams", per=1e9),
    Scenario("bulk-down", "down", 4, "GB", "bulk from backend to client, 4 streams", per=1e9),
    Scenario("bulk-both", "both", 4, "GB", "bulk in both directions at once, 4 streams", per=1e9),
    Scenario("udp-50", "udp", 50, "round trip", "UDP, 64 bytes there and back, 50 clients", size=64, port="udp"),
    Scenario("udp-1000", "udp", 1000, "round trip", "UDP, 64 bytes there and back, 1000 clients", size=64, port="udp"),
    Scenario("refused", "refused", 32, "connection", "refused connections; 32 at once", port="refused"),
)
IDLE = "idle"
NAMES = (IDLE, *(scenario.name for scenario in SCENARIOS))
