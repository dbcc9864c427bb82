"""Live sessions of guarded listeners: seen, cut, and judged again. They are other people's sockets; the kernel shows them.

When a session began is not known, only since when nothing has moved: its age is at least that. Nor is known which rule let it
in: rows name the rule that decides now. All of it is done in slices of some milliseconds, because a host may have very
many connections.
"""

from __future__ import annotations

import socket
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gatekeeper.kernel import diag
from gatekeeper.policy.model import Action
from gatekeeper.proxy.events import CONNECTION, RECORD
from gatekeeper.snapshot.counters import End, ListenerSlot
from gatekeeper.snapshot.layout import ACTION_MASK, DETAIL_SHIFT

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from gatekeeper.kernel.bans import Bans
    from gatekeeper.kernel.diag import Connection
    from gatekeeper.snapshot.reader import Snapshot
    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.loop import Loop
    from gatekeeper.supervisor.sessions import Wanted

SLICE_S = 0.005
_STATES = {
    diag.ESTABLISHED: "open", diag.CLOSE_WAIT: "client_closed", diag.FIN_WAIT_1: "backend_closed",
    diag.FIN_WAIT_2: "backend_closed", diag.LAST_ACK: "backend_closed", diag.CLOSING: "backend_closed",
}  # fmt: skip
_HALF_OPEN = {diag.CLOSE_WAIT, diag.FIN_WAIT_1, diag.FIN_WAIT_2}

class View:
    """A policy, as far as it is about TCP connections at guarded listeners."""

    def __init__(self, snapshot: Snapshot, policy: Accepted) -> None:
        self.snapshot = snapshot
        self.policy = policy
        meta = policy.meta
        self.guarded = {index for index, listener in enumerate(meta["listeners"]) if listener["on_exit"] is not None}
        self._places: dict[tuple[bytes, int], int] = {}
        for index, endpoint in enumerate(meta["endpoints"]):
            if endpoint["protocol"] == "tcp" and endpoint["family"]:
                family = socket.AF_INET if endpoint["family"] == 4 else socket.AF_INET6
                self._places[socket.inet_pton(family, endpoint["host"]), endpoint["port"]] = index

    def ports(self) -> list[tuple[int, int]]:
        """Return the ports of guarded endpoints as (first, last)."""
        endpoints = self.policy.meta["endpoints"]
        ports = sorted({port for (_host, port), index in self._places.items() if endpoints[index]["listener"] in self.guarded})
        starts = ports[:1] + [port for before, port in pairwise(ports) if port > before + 1]
        ends = [before for before, port in pairwise(ports) if port > before + 1] + ports[-1:]
        return list(zip(starts, ends, strict=True))

    def place(self, connection: Connection) -> int | None:
        """Return the guarded endpoint that a connection belongs to: the one at its very address, else at the wildcard."""
        local, port = connection.local, connection.local_port
        found = self._places.get((local, port))
        if found is None:
            found = self._places.get((bytes(len(local)), port))
        if found is None or self.policy.meta["endpoints"][found]["listener"] not in self.guarded:
            return None
        return found

    def verdict(self, place: int, connection: Connection) -> tuple[int, int]:
        """Return action and detail that the policy has for a connection; bans are above that."""
        snapshot, remote = self.snapshot, connection.remote
        if len(remote) == 4:
            found = snapshot.lookup_v4(int.from_bytes(remote, "big"))
        else:
            found = snapshot.lookup_v6(int.from_bytes(remote[:8], "big"), int.from_bytes(remote[8:], "big"))
        word = snapshot.verdict(self.policy.meta["endpoints"][place]["row"], found)
        return word & ACTION_MASK, word >> DETAIL_SHIFT


class GuardedSessions:
    """``told`` gets records for the audit log; ``counters`` are the kernel's; ``warn`` says why nothing can be seen or ended."""

    def __init__(
        self, loop: Loop, bans: Bans, counters: memoryview, told: Callable[[list[bytes]], None], warn: Callable[[str], None]
    ) -> None:
        self._loop = loop
        self._bans = bans
        self._counters = counters
        self._told = told
        self._warn = warn
        self._view: View | None = None
        self._before: View | None = None
        self._closed = False
        self._warned: set[str] = set()

    def follow(self, snapshot: Snapshot, policy: Accepted) -> None:
        """Go by this policy from now on."""
        view = View(snapshot, policy)
        self._before, self._view = self._view, view

    def find(
        self, wanted: Wanted, rows: Callable[[list[dict[str, Any]]], None], done: Callable[[int], None], *, cut: bool = False
    ) -> None:
        """Tell of sessions that are wanted, and how many there are in the end; ``cut``: and end them."""
        self._run(self._find(wanted, rows, cut=cut), done)

    def judge_again(self, done: Callable[[int, int], None]) -> None:
        """End the sessions that the policy in force refuses, or a ban; ``done`` is told how many were judged and ended."""
        judged = 0

        def refused(view: View, place: int, connection: Connection) -> End | None:
            nonlocal judged
            judged += 1
            if view.verdict(place, connection)[0] != Action.ALLOW:
                return End.REVOKED
            return self._banned(connection)

        def over(ended: int) -> None:
            self._before = None
            done(judged, ended)

        self._run(self._end(refused), over)

    def end_banned(self, done: Callable[[int], None]) -> None:
        """End the sessions of banned sources; ``done`` is told how many, now or later."""
        if self._bans:
            self._run(self._end(lambda _view, _place, connection: self._banned(connection)), done)
        else:
            done(0)

    def close(self) -> None:
        """Begin no slice any more; what is under way is not told of."""
        self._closed = True

    # -- slices

    def _run(self, chore: Generator[None, None, int], done: Callable[[int], None]) -> None:
        def go_on() -> None:
            if self._closed:
                chore.close()
                return
            until = time.monotonic() + SLICE_S
            try:
                while time.monotonic() < until:
                    next(chore)
            except StopIteration as over:
                done(over.value)
                return
            except OSError as err:
                self._say(f"connections at guarded listeners cannot be seen: {err.strerror}")
                done(0)
                return
            self._loop.later(0, go_on)

        self._loop.later(0, go_on)

    def _connections(self, view: View) -> Generator[list[tuple[int, Connection]]]:
        ports = view.ports()
        if ports:
            for part in diag.connections(ports):
                places = ((view.place(connection), connection) for connection in part)
                yield [(place, connection) for place, connection in places if place is not None]

    def _find(
        self, wanted: Wanted, rows: Callable[[list[dict[str, Any]]], None], *, cut: bool
    ) -> Generator[None, None, int]:
        view, matched = self._view, 0
        if view is None or wanted.younger_s is not None:
            return 0  # any of them may be older
        for part in self._connections(view):
            found = []
            for place, connection in part:
                row = _row(view, place, connection, details=wanted.details)
                meant = row is not None and _matches(wanted, row, connection)
                if row is not None and meant and (not cut or self._destroy(view, place, connection, End.CUT)):
                    found.append(row)
            matched += len(found)
            rows(found)
            yield
        return matched

    def _end(self, why: Callable[[View, int, Connection], End | None]) -> Generator[None, None, int]:
        view, ended = self._view, 0
        if view is None:
            return 0
        for part in self._connections(view):
            for place, connection in part:
                end = why(view, place, connection)
                if end is not None:
                    ended += self._destroy(view, place, connection, end)
            yield
        return ended

    # -- one session

    def _banned(self, connection: Connection) -> End | None:
        source = connection.family, int.from_bytes(connection.remote, "big")
        return End.BANNED if source in self._bans else None

    def _destroy(self, view: View, place: int, connection: Connection, end: End) -> bool:
        """End a session, count it and tell of it; say whether it ended."""
        try:
            if not diag.destroy(connection):
                return False
        except OSError as err:
            self._say(f"sessions of guarded listeners cannot be ended: {err.strerror}")
            return False
        listener = view.policy.meta["listeners"][view.policy.meta["endpoints"][place]["listener"]]["name"]
        self._counters[view.policy.bindings.listeners[listener] + ListenerSlot.ENDS + end] += 1
        slot, number = self._admitted(view, place, connection)
        info = connection.info
        self._told([RECORD.pack(
            CONNECTION, end, connection.family, slot, number, connection.remote_port, connection.local_port,
            connection.cookie, time.time(), 0.0, info.bytes_in if info else 0, info.bytes_out if info else 0,
            connection.remote.ljust(16, b"\0"), connection.local.ljust(16, b"\0"),
        )])  # fmt: skip
        return True

    def _admitted(self, view: View, place: int, connection: Connection) -> tuple[int, int]:
        """Return slot and endpoint number of the verdict that has let a session in, as far as that can be known."""
        for one in (self._before, view):
            there = None if one is None else one.place(connection)
            if one is not None and there is not None:
                action, detail = one.verdict(there, connection)
                if action == Action.ALLOW:
                    return one.policy.bindings.details[detail], one.policy.bindings.rows[there]
        bindings = view.policy.bindings
        return bindings.details[view.verdict(place, connection)[1]], bindings.rows[place]

    def _say(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)


def _row(view: View, place: int, connection: Connection, *, details: bool) -> dict[str, Any] | None:
    """Return a session in words, as relayed ones are told; ``None`` while its handshake goes on."""
    info = connection.info
    if info is None:
        return None
    tcp = {"rtt_us": info.rtt_us, "retransmits": info.retransmits, "unsent": info.unsent, "unacked": info.unacked}
    meta = view.policy.meta
    endpoint = meta["endpoints"][place]
    _listener, rule, _action, reason = meta["details"][view.verdict(place, connection)[1]]
    family = socket.AF_INET if connection.family == 4 else socket.AF_INET6
    return {
        "flow_id": connection.cookie,
        "path": "guard",
        "listener": meta["listeners"][endpoint["listener"]]["name"],
        "rule": "" if rule is None else meta["rules"][rule]["name"],
        "reason": reason,
        "proto": "TCP",
        "src_ip": socket.inet_ntop(family, connection.remote), "src_port": connection.remote_port,
        "dest_ip": socket.inet_ntop(family, connection.local), "dest_port": connection.local_port,
        "endpoint": endpoint["address"],
        "backend": endpoint["backend"]["text"],
        "state": _STATES.get(connection.state, "open"),
        "began": round(time.time() - info.idle_s, 3), "age_s": info.idle_s, "idle_s": info.idle_s,
        "bytes_in": info.bytes_in, "bytes_out": info.bytes_out,
        "client_tcp": tcp if details else None, "backend_tcp": None,
        "inode": connection.inode,
    }  # fmt: skip


def _matches(wanted: Wanted, row: dict[str, Any], connection: Connection) -> bool:
    address = int.from_bytes(connection.remote, "big")
    return (
        (wanted.listeners is None or row["listener"] in wanted.listeners)
        and (wanted.rules is None or row["rule"] in wanted.rules)
        and (wanted.flows is None or row["flow_id"] in wanted.flows)
        and (wanted.states is None or row["state"] in wanted.states)
        and (wanted.idle_s is None or row["idle_s"] >= wanted.idle_s)
        and (wanted.older_s is None or row["age_s"] >= wanted.older_s)
        and (not wanted.stuck or connection.state in _HALF_OPEN)
        and (
            wanted.sources is None
            or any(family == connection.family and first <= address <= last for family, first, last in wanted.sources)
        )
    )
