"""All sessions, one by one: looked for, described, judged again, ended.

All of this is done by chores (see `gatekeeper.proxy.chores`). A session may end before its turn comes, and one that begins
meanwhile is not met: it was judged by the policy and the bans in force.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatekeeper.proxy.chores import GO_ON, WAIT, Chore, Chores
from gatekeeper.proxy.gate import ALLOW, UNIX_PEER, classify, is_banned
from gatekeeper.snapshot.counters import End
from gatekeeper.snapshot.layout import ACTION_MASK

if TYPE_CHECKING:
    from gatekeeper.kernel.channel import Channel
    from gatekeeper.proxy.gate import Session, Shared
    from gatekeeper.snapshot.reader import Snapshot

ROWS_PER_MESSAGE = 200
HALF_OPEN = {"client_closed", "backend_closed", "resetting"}  # one side has left, and the other has not been let go


@dataclass(frozen=True, slots=True)
class Filter:
    """Which sessions are meant; ``None`` means all. Times are seconds, ``sources`` (family, first, last)."""

    slots: frozenset[int] | None
    flows: frozenset[int] | None
    sources: list[tuple[int, int, int]] | None
    states: frozenset[str] | None
    older_s: float | None
    younger_s: float | None
    idle_s: float | None

    @classmethod
    def from_order(cls, wanted: dict[str, Any]) -> Filter:
        """Return the filter of an order."""
        def chosen(key: str) -> frozenset[Any] | None:
            return None if wanted.get(key) is None else frozenset(wanted[key])

        states = chosen("states")
        if wanted.get("stuck"):
            states = frozenset(HALF_OPEN if states is None else HALF_OPEN & states)
        sources = wanted.get("sources")
        return cls(
            chosen("slots"), chosen("flows"),
            None if sources is None else [(family, first, last) for family, first, last in sources],
            states, wanted.get("older_s"), wanted.get("younger_s"), wanted.get("idle_s"),
        )  # fmt: skip

    def matches(self, session: Session, now: float) -> bool:
        """Say whether a session is meant."""
        age_s = now - session.began_s
        return (
            (self.slots is None or session.slot in self.slots)
            and (self.flows is None or session.flow in self.flows)
            and (self.older_s is None or age_s >= self.older_s)
            and (self.younger_s is None or age_s <= self.younger_s)
            and (self.sources is None or self._has_source(session))
            and (self.idle_s is None or session.idle_s(now) >= self.idle_s)
            and (self.states is None or session.state() in self.states)
        )

    def _has_source(self, session: Session) -> bool:
        family, packed, _port = session.source
        address = int.from_bytes(packed, "big")
        assert self.sources is not None
        return any(family == wanted and first <= address <= last for wanted, first, last in self.sources)


def describe(session: Session, shared: Shared, *, details: bool) -> dict[str, Any]:
    """Return one session as the supervisor is told it; ``details`` adds what the kernel knows of its TCP connections."""
    now = shared.loop.now
    family, packed, port = session.source
    to, to_port = session.destination
    moved_in, moved_out = session.moved()
    client, backend = session.tcp_details() if details else (None, None)
    return {
        "flow": session.flow, "endpoint": session.terms.number, "slot": session.slot,
        "family": family, "source": text(packed), "source_port": port,
        "destination": text(to), "destination_port": to_port,
        "began": session.began_s + shared.loop.wall_offset, "idle_s": round(session.idle_s(now), 3),
        "bytes_in": moved_in, "bytes_out": moved_out, "state": session.state(),
        "client": client, "backend": backend,
    }  # fmt: skip


def text(packed: bytes) -> str:
    """Return an address for people; a unix socket has none."""
    if packed == UNIX_PEER:
        return ""
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


class Census:
    """Goes through the sessions of a worker, for itself and for the supervisor, who gets rows and one answer for each query."""

    def __init__(self, shared: Shared, channel: Channel, chores: Chores) -> None:
        self.sweeping = False
        self._shared = shared
        self._channel = channel
        self._chores = chores.queue

    def sweep(self) -> None:
        """Let every session account for what moved, and see whether it idles."""
        self.sweeping = True
        self._chores.append(self._sweep())

    def find(self, order: dict[str, Any], end: End | None = None) -> None:
        """Tell which sessions match, at most ``most`` of them, and how many there are; ``end``: and end them."""
        self._chores.append(self._find(order, end))

    def judge_again(self, query: int, snapshot: Snapshot) -> None:
        """End the sessions that this policy refuses, or a ban. Those of endpoints that it does not have go on."""
        self._chores.append(self._judge_again(query, snapshot))

    def end_banned(self, query: int) -> None:
        """End the sessions of banned sources."""
        self._chores.append(self._end_banned(query))

    def _sweep(self) -> Chore:
        loop = self._shared.loop
        for session in list(self._shared.sessions.values()):
            if session.live():
                try:
                    session.sweep(loop.now)
                except Exception:  # noqa: BLE001 - one session's fault must not end the others
                    loop.give_up(session)
            yield GO_ON
        self.sweeping = False

    def _find(self, order: dict[str, Any], end: End | None) -> Chore:
        shared, query = self._shared, order["query"]
        chosen, details = Filter.from_order(order["filter"]), bool(order["filter"].get("details"))
        rows: list[dict[str, Any]] = []
        matched = 0
        for session in list(shared.sessions.values()):
            if session.live() and chosen.matches(session, shared.loop.now):
                matched += 1
                if matched <= order["most"]:
                    rows.append(describe(session, shared, details=details))
                if end is not None:
                    self._finish(session, end)
                if len(rows) == ROWS_PER_MESSAGE:
                    yield from self._tell({"op": "rows", "query": query, "rows": rows})
                    rows = []
            yield GO_ON
        if rows:
            yield from self._tell({"op": "rows", "query": query, "rows": rows})
        yield from self._tell({"op": "answer", "query": query, "matched" if end is None else "ended": matched})

    def _judge_again(self, query: int, snapshot: Snapshot) -> Chore:
        shared, meta, matrix = self._shared, snapshot.meta, snapshot.matrix
        relayed = [listener["on_exit"] is None for listener in meta["listeners"]]
        rows = {item["key"]: item["row"] * snapshot.classes for item in meta["endpoints"] if relayed[item["listener"]]}
        judged = ended = 0
        for session in list(shared.sessions.values()):
            first = rows.get(session.gate.key)
            if first is not None and session.live():
                judged += 1
                family, packed, _port = session.source
                if matrix[first + classify(snapshot, family, packed)] & ACTION_MASK != ALLOW:
                    ended += self._finish(session, End.REVOKED)
                elif is_banned(shared.bans, family, packed):
                    ended += self._finish(session, End.BANNED)
            yield GO_ON
        yield from self._tell({"op": "answer", "query": query, "judged": judged, "ended": ended})

    def _end_banned(self, query: int) -> Chore:
        shared = self._shared
        ended = 0
        for session in list(shared.sessions.values()) if shared.bans else ():
            family, packed, _port = session.source
            if is_banned(shared.bans, family, packed) and session.live():
                ended += self._finish(session, End.BANNED)
            yield GO_ON
        if query:
            yield from self._tell({"op": "answer", "query": query, "ended": ended})

    def _finish(self, session: Session, end: End) -> bool:
        """End a session, whatever it does."""
        try:
            session.finish(end)
        except Exception:  # noqa: BLE001 - one session's fault must not save the others
            self._shared.loop.give_up(session)
        return True

    def _tell(self, message: dict[str, Any]) -> Chore:
        """Send a message to the supervisor as soon as there is room for it."""
        while True:
            try:
                self._channel.send(message)
            except BlockingIOError:
                yield WAIT
            else:
                return
