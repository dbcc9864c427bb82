"""Which live sessions a reload would end: the daemon's rule, applied beforehand.

Kept the same as `gatekeeper.proxy.census`, `gatekeeper.proxy.udp` and, for guarded listeners,
`gatekeeper.supervisor.guarded` do it. Held by tests/e2e/test_plan.py.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

from gatekeeper.policy.model import Action
from gatekeeper.policy.ranges import LOW64, normalize
from gatekeeper.snapshot.layout import ACTION_MASK, DETAIL_SHIFT, LOCAL_CLASS
from gatekeeper.snapshot.reader import Snapshot


@dataclass(frozen=True, slots=True)
class Fate:
    """How a session, as the daemon lists it, would end, and what the candidate says of its source.

    ``end`` is ``revoked``, or ``removed``: a flow whose socket goes, which no verdict is asked about (``action`` ``None``).
    ``rule`` ``None`` is the default.
    """

    session: dict[str, Any]
    end: str
    action: str | None = None
    rule: str | None = None

    def as_document(self) -> dict[str, Any]:
        """Return it as `plan --json` writes it."""
        return self.session | {"end": self.end, "after": {"action": self.action, "rule": self.rule}}


class Candidate:
    """A snapshot that is not in force, as sessions would meet it."""

    def __init__(self, snapshot: Snapshot) -> None:
        meta = snapshot.meta
        self._snapshot = snapshot
        self._keeps = meta["settings"]["on_reload"] == "keep"
        self._relayed: dict[str, int] = {}  # socket -> row
        self._listening: dict[tuple[int, int, int], tuple[int, bool]] = {}  # family, address, port -> row, guarded
        for item in meta["endpoints"]:
            is_guarded = meta["listeners"][item["listener"]]["on_exit"] is not None
            if not is_guarded:
                self._relayed[item["key"]] = item["row"]
            if item["protocol"] == "tcp" and item["family"]:
                place = item["family"], int(ipaddress.ip_address(item["host"])), item["port"]
                self._listening[place] = item["row"], is_guarded

    def fate(self, session: dict[str, Any]) -> Fate | None:
        """Return how a live session would end; ``None``: it goes on.

        A TCP session needs no listener any more, so one whose listener is closed goes on; a flow of UDP does.
        """
        row = self._row(session)
        if row is None:
            is_flow = session["proto"] == "UDP" and session["path"] == "relay"
            return Fate(session, "removed") if is_flow else None
        if self._keeps:
            return None
        word = self._snapshot.verdict(row, self._class_of(session["src_ip"]))
        if word & ACTION_MASK == Action.ALLOW:
            return None
        _, rule, action, _ = self._snapshot.meta["details"][word >> DETAIL_SHIFT]
        return Fate(session, "revoked", action, None if rule is None else self._snapshot.meta["rules"][rule]["name"])

    def _row(self, session: dict[str, Any]) -> int | None:
        """Return the row that judges a session: by its socket, or, where the service has the socket, by its address."""
        if session["path"] == "relay":
            return self._relayed.get(f"{session['proto'].lower()}:{session['endpoint']}")
        address = ipaddress.ip_address(session["dest_ip"])
        own = self._listening.get((address.version, int(address), session["dest_port"]))
        found = own or self._listening.get((address.version, 0, session["dest_port"]))
        return found[0] if found is not None and found[1] else None

    def _class_of(self, source: str | None) -> int:
        if source is None:
            return LOCAL_CLASS
        found = ipaddress.ip_address(source)
        family, address = normalize(found.version, int(found))
        if family == 4:
            return self._snapshot.lookup_v4(address)
        return self._snapshot.lookup_v6(address >> 64, address & LOW64)
