"""After all kinds of faults the books agree: what was accepted, what moved, what ended, to the byte."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.backends import Silent
from tests.support.faults import NAME_BYTES, Outcome, Peer, Plan, Stage, Then
from tests.support.gate import Gate
from tests.support.ports import free_port

REFUSED_SOURCE = "127.9.9.9"
DOORS = ("echoing", "resetting", "gone", "hole", "deaf")


def plan_for(number: int, *, client: bool) -> Plan:
    """Return what peer ``number`` does: sizes, chunks, stalls and ends of every kind."""
    chance = random.Random(2 * number + client)
    return Plan(
        sends=NAME_BYTES + int(10 ** chance.uniform(0, 5.5)),
        slices=(1, 1 << chance.randrange(10, 18)),
        latency_s=chance.choice((0.0, 0.0, 0.1)),
        stalls=0.01,
        then=chance.choice((Then.END, Then.END, Then.RESET)),
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_books_agree_after_mixed_faults(run_gate: Callable[..., Gate], long: bool, workers: int) -> None:
    """Accepted = allowed + refused + errors; sessions opened = ended; bytes in the log = bytes in the metrics = bytes the peers saw."""
    count = 5000 if long else 300
    ports = {door: free_port() for door in DOORS}
    with Stage() as stage, Silent() as hole:
        echoing = stage.listen(lambda number: plan_for(number, client=False))
        backends = {
            "echoing": echoing.address,
            "resetting": stage.listen(Plan(then=Then.RESET)).address,
            "gone": f"127.0.0.1:{free_port()}",
            "hole": hole.address,
            "deaf": stage.listen(Plan(reads=False, then=Then.STAY, receive_buffer=4096)).address,
        }
        listeners = "".join(
            f"  - {{name: {door}, listen: '127.0.0.1:{ports[door]}', backend: '{backends[door]}', connect_timeout: 1s, "
            f"idle_timeout: {(patience := '1s' if door == 'deaf' else '30s')}, half_close_timeout: {patience}}}\n"
            for door in DOORS
        )
        gate = run_gate(
            f"listeners:\n{listeners}default: deny\nrules:\n"
            f"  - {{name: not-you, action: deny, from: {REFUSED_SOURCE}}}\n  - {{name: all-others, action: allow}}\n",
            workers=workers,
        )
        doors: list[tuple[str, Peer]] = []
        refused = 0
        for number in range(count):
            door = DOORS[0] if number % 10 < 6 else DOORS[number % 5]
            turned_away = number % 40 in {9, 19, 29}
            own = f"127.0.{number // 250}.{1 + number % 250}"
            source = REFUSED_SOURCE if turned_away else own
            try:
                peer = stage.connect(("127.0.0.1", ports[door]), plan_for(number, client=True), number, source)
            except ConnectionResetError:  # the refusal, or the backend's, was faster than `connect`
                assert turned_away or door in {"resetting", "gone"}
            else:
                doors.append((REFUSED_SOURCE if turned_away else door, peer))
            refused += turned_away
        stage.wait(within_s=200 if long else 50, peers=[peer for _, peer in doors])
        stage.wait(within_s=200 if long else 50, peers=echoing.peers)  # some read on after their client has gone
        gate.wait_for_value(0, "gatekeeper_sessions")
        events = {
            event["src_ip"]: event["gatekeeper"]
            for event in gate.wait_for_audit(count - refused, "connection")
        }
        scrape = gate.scrape()

        allowed = scrape.value("gatekeeper_connections_total", action="allow")
        denied = scrape.value("gatekeeper_connections_total", action="deny")
        errors = scrape.value("gatekeeper_accept_errors_total")
        assert (allowed + errors, denied) == (count - refused, refused)
        assert scrape.value("gatekeeper_session_ends_total") == allowed == len(events)
        told = Counter(event["end"] for event in events.values())
        for end, number in told.items():
            assert scrape.value("gatekeeper_session_ends_total", end=end) == number
        for direction in ("in", "out"):
            total = sum(event[f"bytes_{direction}"] for event in events.values())
            assert scrape.value("gatekeeper_session_bytes_total", direction=direction) == total

        behind = {peer.number: peer for peer in echoing.peers}
        for door, client in doors:
            if door == "echoing":
                agree(client, behind.get(client.number), events[client.local[0]])
        print(f"{count} clients: {dict(told)}, {refused} refused")


def agree(client: Peer, backend: Peer | None, event: dict[str, Any]) -> None:
    """Hold a session's audit record against what both sides counted.

    Whoever did not reset and was not reset in mid-sentence saw exactly what is in the record; nobody ever saw a wrong byte,
    and of what the kernel had acknowledged before a reset nothing is missing, unless the other side had reset too.
    """
    whom = (client.number, client.outcome, backend and backend.outcome, event)
    assert client.wrong_at is None, whom
    if backend is None:  # it was reset before it had said its name
        assert client.outcome is not Outcome.FINISHED, whom
        return
    assert backend.wrong_at is None, whom
    if client.outcome is Outcome.FINISHED:
        assert event["end"] == "finished", whom
        assert event["bytes_in"] == client.sent == backend.received, whom
        assert event["bytes_out"] == backend.sent == client.received, whom
    elif client.outcome is Outcome.RESET_BY_US and backend.outcome is Outcome.RESET:
        assert event["end"] == "client_reset", whom
        assert client.acknowledged <= event["bytes_in"] == backend.received <= client.sent, whom
    elif client.outcome is Outcome.RESET and backend.outcome is Outcome.RESET_BY_US:
        assert event["end"] == "backend_reset", whom
        assert backend.acknowledged <= event["bytes_out"] == client.received <= backend.sent, whom
