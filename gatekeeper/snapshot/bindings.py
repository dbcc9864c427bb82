"""Which counter belongs to which name: assigned by the supervisor, read by workers and the observer.

Numbers are given out once and kept for the life of the service, so counters and audit records survive reloads and
worker deaths. ``details`` is the only part that belongs to one snapshot: the slot of each of its details, in order.
``rows`` likewise: for each endpoint of the snapshot, in order, its endpoint number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from gatekeeper.snapshot.counters import CAPACITY, LISTENER_SLOTS, WORKER_SLOTS


class SlotsExhausted(Exception):
    """More listener and rule names were seen than the counters can hold; restarting the service forgets old ones."""


@dataclass(frozen=True, slots=True)
class VerdictKey:
    """The labels of one verdict counter. ``rule`` is empty for the default, bans and limits."""

    listener: str
    action: str
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class EndpointKey:
    """What an audit record's endpoint number stands for. ``address`` is text as in `Endpoint.address`."""

    listener: str
    protocol: str
    address: str
    backend: str


@dataclass(slots=True)
class Bindings:
    """The names in force and all that were ever in force."""

    generation: int = 0
    listeners: dict[str, int] = field(default_factory=dict)  # name -> first slot of its block
    verdicts: dict[VerdictKey, int] = field(default_factory=dict)  # key -> slot
    endpoints: dict[EndpointKey, int] = field(default_factory=dict)  # key -> number
    details: list[int] = field(default_factory=list)  # of this snapshot: detail index -> slot
    rows: list[int] = field(default_factory=list)  # of this snapshot: endpoint index -> endpoint number
    next_slot: int = WORKER_SLOTS

    def bind(self, generation: int, meta: dict[str, Any]) -> Bindings:
        """Return the bindings of a new snapshot: every known name keeps its number, new names get new ones.

        ``meta`` is the snapshot's meta section. ``self`` is unchanged, so a failed reload needs no undo.

        Raises:
            SlotsExhausted: the counters are full.
        """
        new = Bindings(
            generation, dict(self.listeners), dict(self.verdicts), dict(self.endpoints), [], [], self.next_slot
        )
        names = [listener["name"] for listener in meta["listeners"]]
        for name in names:
            if name not in new.listeners:
                new.listeners[name] = new._take(LISTENER_SLOTS)
        for listener, rule, action, reason in meta["details"]:
            rule_name = "" if rule is None else meta["rules"][rule]["name"]
            key = VerdictKey(names[listener], action, rule_name, reason)
            slot = new.verdicts.get(key)
            if slot is None:
                slot = new.verdicts[key] = new._take(1)
            new.details.append(slot)
        for endpoint in meta["endpoints"]:
            listener = meta["listeners"][endpoint["listener"]]
            address = EndpointKey(
                listener["name"], listener["protocol"], endpoint["address"], endpoint["backend"]["text"]
            )
            new.rows.append(new.endpoints.setdefault(address, len(new.endpoints)))
        return new

    def _take(self, slots: int) -> int:
        first = self.next_slot
        if first + slots > CAPACITY:
            raise SlotsExhausted(f"no counters left: {CAPACITY} slots are in use")
        self.next_slot = first + slots
        return first

    def to_json(self) -> bytes:
        """Return the bindings as one JSON document."""
        return json.dumps(
            {
                "generation": self.generation,
                "listeners": self.listeners,
                "verdicts": [
                    [slot, key.listener, key.action, key.rule, key.reason] for key, slot in self.verdicts.items()
                ],
                "endpoints": [
                    [number, key.listener, key.protocol, key.address, key.backend]
                    for key, number in self.endpoints.items()
                ],
                "details": self.details,
                "rows": self.rows,
                "next_slot": self.next_slot,
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def numbers_from_json(cls, data: bytes) -> Bindings:
        """Return what workers need of them, the numbers without the labels: a tenth of the time while sessions wait."""
        raw = json.loads(data)
        return cls(raw["generation"], raw["listeners"], details=raw["details"], rows=raw["rows"])

    @classmethod
    def from_json(cls, data: bytes) -> Bindings:
        """Return the bindings that `to_json` wrote."""
        raw = json.loads(data)
        return cls(
            raw["generation"],
            raw["listeners"],
            {VerdictKey(*key): slot for slot, *key in raw["verdicts"]},
            {EndpointKey(*key): number for number, *key in raw["endpoints"]},
            raw["details"],
            raw["rows"],
            raw["next_slot"],
        )
