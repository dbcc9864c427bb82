"""The audit log: what a line says, and that nothing a worker sends can break one."""

from __future__ import annotations

import json
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatekeeper.observer.audit import MAX_MESSAGE_BYTES, Renderer, service_event
from gatekeeper.proxy.events import CAUSE_SHIFT, CONNECTION, RECORD, REFUSAL, SUPPRESSED
from gatekeeper.snapshot.bindings import Bindings, EndpointKey, VerdictKey
from gatekeeper.snapshot.counters import Cause, End
from tests.observer.stage import Stage, make_meta, on_stage
from tests.support.wait import until

SLOT = 200
NASTY = 'unix:/run/"a\\b\n{"event_type":"forged"}\x00\x1b[31m%s{0}\u2028\udcff.sock'


@pytest.fixture
def stage(folder: Path) -> Iterator[Stage]:
    """An observer that writes to a file."""
    with on_stage(folder) as running:
        yield running


def renderer(address: str = "0.0.0.0:80", backend: str = "127.0.0.1:8080") -> Renderer:
    """Return a renderer that knows one verdict and one endpoint."""
    made = Renderer()
    made.rename(
        Bindings(
            verdicts={VerdictKey("web", "allow", "office", "rule"): SLOT},
            endpoints={EndpointKey("web", "tcp", address, backend): 0},
        )
    )
    return made


def record(kind: int = CONNECTION, end: int = End.FINISHED, family: int = 4, slot: int = SLOT, endpoint: int = 0,
           start: float = 1750000000.25, duration: float = 1.5, bytes_in: int = 10) -> bytes:  # fmt: skip
    """Return one record."""
    source = socket.inet_aton("198.51.100.7")
    return RECORD.pack(kind, end, family, slot, endpoint, 40000, 80, 7, start, duration, bytes_in, 20, source, source)


def test_a_connection_tells_everything_about_itself(stage: Stage) -> None:
    """A session that ended is one line with who, where, which rule, how much, how long and why it ended."""
    stage.report(stage.record())
    assert stage.wait_for_lines(1) == [{
        "timestamp": "2025-06-15T15:06:41.750000Z", "event_type": "connection", "flow_id": 7,
        "src_ip": "198.51.100.7", "src_port": 40000, "dest_ip": "192.0.2.1", "dest_port": 8000, "proto": "TCP",
        "gatekeeper": {
            "listener": "web", "action": "allow", "rule": "office", "reason": "rule", "peer_ip": "198.51.100.7",
            "backend": "127.0.0.1:8080", "bytes_in": 10, "bytes_out": 20, "duration_s": 1.5, "end": "finished",
            "enforced_by": "worker",
        },
    }]  # fmt: skip


def test_ipv6_and_the_default(stage: Stage) -> None:
    """IPv6 addresses are written as usual; a refusal by the default has an empty rule, like its metric."""
    source = socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    slot = stage.slot(action="deny", rule="", reason="default")
    stage.report(stage.record(REFUSAL, family=6, source=source, destination=source, slot=slot, end=End.REFUSED, duration=0.0))
    (line,) = stage.wait_for_lines(1)
    assert (line["event_type"], line["src_ip"], line["gatekeeper"]["rule"]) == ("refusal", "2001:db8::7", "")
    assert (line["gatekeeper"]["end"], line["gatekeeper"]["duration_s"]) == ("refused", 0)


def test_suppressed_refusals_are_a_sum(stage: Stage) -> None:
    """What the budget left out is one line with its count."""
    slot = stage.slot(action="deny", rule="", reason="default")
    stage.report(stage.record(SUPPRESSED, slot=slot, family=0, bytes_in=12345, duration=0.0, end=End.REFUSED))
    (line,) = stage.wait_for_lines(1)
    assert line["event_type"] == "refusals_suppressed"
    assert line["gatekeeper"] == {
        "listener": "web", "action": "deny", "rule": "", "reason": "default", "endpoint": "0.0.0.0:8000", "count": 12345,
        "enforced_by": "worker",
    }  # fmt: skip


def test_the_services_own_events_follow_what_was_reported_before(stage: Stage) -> None:
    """An event of the supervisor comes after the records that workers sent earlier; its keys are under gatekeeper."""
    for round_ in range(20):
        stage.report(*[stage.record(flow=round_)] * 50)
        stage.tell({"op": "event", "event": {"event_type": "reload", "round": round_, "error": 'line 1\n"line 2"\u2028'}})
    lines = stage.wait_for_lines(20 * 51)
    events = [(at, line["gatekeeper"]) for at, line in enumerate(lines) if line["event_type"] == "reload"]
    assert [event for _at, event in events] == [{"round": n, "error": 'line 1\n"line 2"\u2028'} for n in range(20)]
    for at, event in events:
        reported = sum(line.get("flow_id", 99) <= event["round"] for line in lines[:at])
        assert reported == 50 * (event["round"] + 1)


def test_a_record_that_overtakes_its_policy_is_understood(stage: Stage) -> None:
    """Records and policies come on different sockets; a new name is looked for on the other before it is doubted."""
    for number in range(30):
        stage.bind(make_meta(rules=("office", f"rule-{number}")))
        stage.tell_policy()
        stage.report(stage.record(slot=stage.slot(rule=f"rule-{number}")), worker=number % 2)
    rules = {line["gatekeeper"]["rule"] for line in stage.wait_for_lines(30)}
    assert rules == {f"rule-{number}" for number in range(30)}
    assert stage.value('gatekeeper_events_lost_total{class="malformed"}') == 0


def test_old_names_are_understood_after_a_reload(stage: Stage) -> None:
    """A session of a rule that has left the policy still ends under its name."""
    old = stage.record()
    stage.bind(make_meta(listeners=("dns",), rules=("night",)))
    stage.tell_policy()
    stage.report(old)
    (line,) = stage.wait_for_lines(1)
    assert line["gatekeeper"]["rule"] == "office"


def test_text_from_rule_files_is_escaped(stage: Stage) -> None:
    """A path may hold quotes, newlines, escapes and broken UTF-8: the line stays one line of ASCII."""
    stage.bind(make_meta(backend=NASTY))
    stage.tell_policy()
    number = len(stage.bindings.endpoints) - 2  # web, with the new backend
    stage.report(stage.record(endpoint=number))
    (line,) = stage.wait_for_lines(1)
    assert line["gatekeeper"]["backend"] == NASTY
    assert stage.audit_path.read_bytes().isascii()
    assert stage.get("/")[0] == stage.get("/status.json")[0] == 200


def test_garbage_is_counted_and_breaks_nothing(stage: Stage) -> None:
    """Messages of random bytes, odd lengths and no bytes are counted as malformed; the next good record is written."""
    chance = random.Random(5)
    for size in (1, 87, 89, 88 * 3, 88 * 256, 88 * 256 + 1, 60000):
        stage.events[0].send(chance.randbytes(size))
    stage.events[0].send(b"")
    stage.report(stage.record())
    assert stage.wait_for_lines(1)[-1]["flow_id"] == 7
    assert stage.value('gatekeeper_events_lost_total{class="malformed"}') > 256
    assert stage.get("/healthz")[0] == 200


@pytest.mark.parametrize("bad", [
    record(kind=0),
    record(kind=99),
    record(end=16),
    record(family=5),
    record(slot=SLOT + 1),
    record(slot=0xFFFFFFFF),
    record(endpoint=1),
    record(start=float("nan")),
    record(start=float("inf")),
    record(start=-1.0),
    record(start=1e300),
    record(duration=float("nan")),
    record(duration=-0.001),
    record(duration=1e11),
    record(start=253402300799.0, duration=2.0),
])  # fmt: skip
def test_a_record_that_no_honest_worker_sends_is_refused(bad: bytes) -> None:
    """It gives no line, is counted, and its neighbours are written."""
    made = renderer()
    assert len(made.render(memoryview(record() + bad + record()))) == 2
    assert made.malformed == 1


def test_a_verdict_of_another_listener_is_refused() -> None:
    """A worker cannot say that one listener's rule decided at another's endpoint."""
    made = Renderer()
    made.rename(
        Bindings(
            verdicts={VerdictKey("ssh", "allow", "office", "rule"): SLOT},
            endpoints={EndpointKey("web", "tcp", "0.0.0.0:80", "127.0.0.1:1"): 0},
        )
    )
    assert made.render(memoryview(record())) == []
    assert made.malformed == 1


@given(st.binary(max_size=MAX_MESSAGE_BYTES // 8))
def test_any_bytes_give_whole_lines_or_none(message: bytes) -> None:
    """Whatever arrives, each line is one JSON object, and each record is a line or counted."""
    made = renderer(NASTY, NASTY)
    lines = made.render(memoryview(message))
    assert all(line.count("\n") == 1 and line.endswith("\n") and isinstance(json.loads(line), dict) for line in lines)
    assert len(lines) + made.malformed >= len(message) // RECORD.size


@given(
    st.sampled_from([CONNECTION, REFUSAL, SUPPRESSED]), st.sampled_from([0, 4, 6]), st.sampled_from(list(End)),
    st.floats(), st.floats(), st.integers(0, 2**64 - 1), st.binary(min_size=16, max_size=16),
)  # fmt: skip
def test_numbers_survive(kind: int, family: int, end: End, start: float, duration: float, count: int, address: bytes) -> None:
    """Records with known names are written as they are or refused; counts keep all 64 bits."""
    made = renderer(NASTY, NASTY)
    message = RECORD.pack(kind, end, family, SLOT, 0, 1, 2, count, start, duration, count, count, address, address)
    for line in made.render(memoryview(message)):
        event = json.loads(line)
        details = event["gatekeeper"]
        assert count == (details["count"] if kind == SUPPRESSED else details["bytes_in"])
        if family == 4 and kind != SUPPRESSED:
            assert socket.inet_aton(event["src_ip"]) == address[:4]
        if family == 6 and kind != SUPPRESSED:
            assert socket.inet_pton(socket.AF_INET6, details["peer_ip"]) == address


def test_unix_peers_have_no_address() -> None:
    """On a unix socket, addresses and ports are null and the socket is named instead."""
    (line,) = renderer("unix:/run/x.sock").render(memoryview(record(family=0)))
    event = json.loads(line)
    assert [event[key] for key in ("src_ip", "src_port", "dest_ip", "dest_port")] == [None] * 4
    assert (event["gatekeeper"]["peer_ip"], event["gatekeeper"]["endpoint"]) == (None, "unix:/run/x.sock")


def test_microseconds_have_six_digits() -> None:
    """Fractions are padded, and rounding never reaches the next second."""
    assert '"2025-06-15T15:06:40.000062Z"' in service_event({"event_type": "start"}, 1750000000.0000625)
    assert '"2025-06-15T15:06:40.999999Z"' in service_event({"event_type": "start"}, 1750000000.9999998)
    (line,) = renderer().render(memoryview(record(start=1750000000.0000625, duration=0.0)))
    assert '"2025-06-15T15:06:40.000062Z"' in line


@pytest.mark.parametrize("cause", Cause)
def test_a_backend_that_failed_is_logged_with_the_cause(cause: Cause) -> None:
    """Whoever is woken by a failed backend reads why in the line itself; what is no cause is malformed."""
    made = renderer("127.0.0.1:80", "127.0.0.1:81")
    (line,) = made.render(memoryview(record(end=End.BACKEND_FAILED | (cause + 1) << CAUSE_SHIFT)))
    words = json.loads(line)["gatekeeper"]
    assert (words["end"], words["cause"]) == ("backend_failed", cause.label)
    assert made.render(memoryview(record(end=End.BACKEND_FAILED | 15 << CAUSE_SHIFT))) == []
    assert made.malformed == 1


def test_a_record_has_the_size_its_readers_expect() -> None:
    """The layout is shared with every worker that runs: it changes on purpose only."""
    assert RECORD.size == struct.calcsize("<BBBxIIHHQddQQ16s16s") == 88


def test_without_an_audit_log_records_are_read_and_forgotten(folder: Path) -> None:
    """With audit off, workers never find the socket full, and metrics go on."""
    with on_stage(folder, audit="off") as stage:
        for _ in range(300):
            until(lambda: _sends(stage), "the observer reads")
        assert stage.value('gatekeeper_events_lost_total{class="audit"}') == 0


def _sends(stage: Stage) -> bool:
    stage.events[0].setblocking(False)
    try:
        stage.report(*[stage.record()] * 256)
    except BlockingIOError:
        return False
    return True
