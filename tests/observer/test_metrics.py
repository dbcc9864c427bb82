"""/metrics: what Prometheus is told."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics import parser as openmetrics

from gatekeeper.snapshot.counters import DIAL_BOUNDS_S, Cause, End, ListenerSlot, WorkerSlot
from tests.observer.stage import OFFICE, Stage, make_meta, on_stage
from tests.support import need
from tests.support.wait import until


@pytest.fixture
def stage(folder: Path) -> Iterator[Stage]:
    """An observer that serves."""
    with on_stage(folder) as running:
        yield running


@pytest.mark.needs("promtool")
def test_promtool_has_nothing_to_say(stage: Stage) -> None:
    """The exposition passes `promtool check metrics`."""
    checked = subprocess.run(
        [need.program("promtool"), "check", "metrics"], input=stage.get("/metrics")[2], capture_output=True, timeout=30
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_every_name_of_the_policy_is_there_from_the_start(stage: Stage) -> None:
    """Every verdict and listener has its samples, at zero, before the first connection."""
    for listener in ("web", "ssh"):
        for action, rule, reason in (("allow", "scanners", "rule"), ("allow", "office", "rule"), ("deny", "", "default")):
            labels = f'action="{action}",listener="{listener}",reason="{reason}",rule="{rule}"'
            assert stage.value(f"gatekeeper_connections_total{{{labels}}}") == 0
        for sample in (
            "gatekeeper_sessions{%s}",
            "gatekeeper_accept_queue{%s}",
            "gatekeeper_accept_overflows_total{%s}",
            "gatekeeper_accept_errors_total{%s}",
            "gatekeeper_datagrams_lost_total{%s}",
            "gatekeeper_session_duration_seconds_count{%s}",
            "gatekeeper_backend_connect_seconds_count{%s}",
        ):
            assert stage.value(sample % f'listener="{listener}"') == 0
        for cause in Cause:
            assert stage.value(f'gatekeeper_backend_failures_total{{cause="{cause.label}",listener="{listener}"}}') == 0
    assert stage.value(f'gatekeeper_policy_info{{hash="{"ab" * 32}"}}') == 1
    assert stage.value("gatekeeper_policy_rules") == 2
    assert stage.value('gatekeeper_policy_ranges{family="ipv4"}') == 5
    assert stage.value("gatekeeper_workers") == 2
    assert stage.value("gatekeeper_config_last_reload_successful") == 1
    assert stage.value("gatekeeper_config_last_reload_success_timestamp_seconds") == 1750000000.5
    for name in ("refusal", "connection", "audit", "malformed"):
        assert stage.value(f'gatekeeper_events_lost_total{{class="{name}"}}') == 0


def test_counters_are_the_sum_of_all_workers(stage: Stage) -> None:
    """What any worker counts is seen at the next scrape, added up; gauges and histograms too."""
    first, second = stage.counters
    first[stage.slot()], second[stage.slot()] = 3, 4
    first[stage.block("web", ListenerSlot.SESSIONS_OPENED)] = 10
    second[stage.block("web", ListenerSlot.SESSIONS_OPENED)] = 5
    first[stage.block("web", ListenerSlot.SESSIONS_CLOSED)] = 12  # a session handed over counts where it ends
    first[stage.block("web", ListenerSlot.BYTES_IN)] = 1 << 40
    first[stage.block("web", ListenerSlot.ENDS) + End.IDLE_TIMEOUT] = 2
    second[stage.block("ssh", ListenerSlot.BACKEND_FAILURES) + Cause.REFUSED] = 6
    for index in range(len(DIAL_BOUNDS_S) + 1):
        second[stage.block("web", ListenerSlot.DIAL_BUCKETS) + index] = 1
    second[stage.block("web", ListenerSlot.DIAL_SUM_US)] = 2_500_000
    first[WorkerSlot.LOOP_STALL_MAX_US], second[WorkerSlot.LOOP_STALL_MAX_US] = 1500, 2500
    first[WorkerSlot.EVENTS_LOST_REFUSAL], second[WorkerSlot.REFUSALS_SUPPRESSED] = 8, 9

    assert stage.value('gatekeeper_connections_total{action="allow",listener="web",reason="rule",rule="office"}') == 7
    assert stage.value('gatekeeper_sessions{listener="web"}') == 3
    assert stage.value('gatekeeper_session_bytes_total{direction="in",listener="web"}') == 1 << 40
    assert stage.value('gatekeeper_session_ends_total{end="idle_timeout",listener="web"}') == 2
    assert stage.value('gatekeeper_backend_failures_total{cause="refused",listener="ssh"}') == 6
    assert stage.value('gatekeeper_backend_connect_seconds_bucket{le="0.0001",listener="web"}') == 1
    assert stage.value('gatekeeper_backend_connect_seconds_bucket{le="+Inf",listener="web"}') == len(DIAL_BOUNDS_S) + 1
    assert stage.value('gatekeeper_backend_connect_seconds_sum{listener="web"}') == 2.5
    assert stage.value("gatekeeper_loop_stall_seconds") == 0.0025
    assert stage.value('gatekeeper_events_lost_total{class="refusal"}') == 8
    assert stage.value("gatekeeper_refusals_suppressed_total") == 9


def test_bans_are_counted_and_not_named(stage: Stage) -> None:
    """How many bans are in force is a gauge, and stands on the page; none of them is shown."""
    assert stage.value("gatekeeper_bans") == 0
    stage.tell_state(bans=3)
    until(lambda: stage.value("gatekeeper_bans") == 3, "the number has arrived")
    assert json.loads(stage.text("/status.json"))["bans"] == 3
    assert "<th>Bans</th><td>3</td>" in stage.text("/")


def test_a_worker_cannot_make_live_sessions_negative(stage: Stage) -> None:
    """More ends than beginnings are shown as none, not as a negative number."""
    stage.counters[0][stage.block("web", ListenerSlot.SESSIONS_CLOSED)] = 5
    assert stage.value('gatekeeper_sessions{listener="web"}') == 0


def test_a_worker_that_writes_nonsense_hurts_only_its_figures(stage: Stage) -> None:
    """With every slot at its maximum, metrics, status and page are still well-formed."""
    view = stage.counters[0]
    for slot in range(stage.bindings.next_slot):
        view[slot] = 2**64 - 1
    assert stage.value("gatekeeper_accept_pauses_total") == 2.0**64
    assert stage.get("/readyz")[0] == stage.get("/status.json")[0] == stage.get("/")[0] == 200


def test_names_survive_a_new_policy(stage: Stage) -> None:
    """New rules and listeners appear at zero; those that left the policy keep what they counted."""
    stage.counters[0][stage.slot()] = 5
    stage.bind(make_meta(listeners=("web", "dns"), rules=("night",)))
    stage.tell_policy()
    new = 'gatekeeper_connections_total{action="allow",listener="dns",reason="rule",rule="night"}'
    until(lambda: stage.value(new) == 0, "the new rule appears")
    assert stage.value('gatekeeper_connections_total{action="allow",listener="web",reason="rule",rule="office"}') == 5
    assert stage.value('gatekeeper_sessions{listener="ssh"}') == 0
    assert stage.value("gatekeeper_policy_rules") == 1


def test_a_broken_policy_changes_nothing(stage: Stage) -> None:
    """Descriptors that hold no policy are refused, said once, and the names in force stay."""
    with (stage.folder / "junk").open("w+b") as junk:
        junk.write(b"GKSNAP01" + b"\xff" * 4096)
        junk.flush()
        stage.tell({"op": "policy", "generation": 99}, [junk.fileno(), junk.fileno()])
    until(lambda: "policy" in stage.stderr(), "it is said on stderr")
    assert stage.value("gatekeeper_policy_rules") == 2


def test_counters_go_on_when_a_worker_is_replaced(stage: Stage) -> None:
    """A successor's counters take the place of its predecessor's; nothing goes backwards."""
    sample = 'gatekeeper_connections_total{action="allow",listener="web",reason="rule",rule="office"}'
    stage.counters[1][stage.slot()] = 5
    assert stage.value(sample) == 5
    stage.new_counters(1)
    stage.tell_counters(1)
    stage.counters[1][stage.slot()] += 1
    until(lambda: stage.value(sample) == 6, "the successor's counters are read")


def test_counters_that_could_shrink_are_refused(stage: Stage) -> None:
    """Memory that a worker could truncate would kill whoever reads it, so it is not mapped."""
    with (stage.folder / "short").open("w+b") as short:
        stage.tell({"op": "counters", "worker": 0}, [short.fileno()])
    until(lambda: "NotCounters" in stage.stderr(), "it is said on stderr")
    stage.counters[0][stage.slot()] = 2
    assert stage.value('gatekeeper_connections_total{action="allow",listener="web",reason="rule",rule="office"}') == 2


def test_an_observer_that_was_killed_comes_back_with_everything(stage: Stage) -> None:
    """A successor knows names, counters and state from the supervisor's first messages alone."""
    stage.counters[0][stage.slot()] = 5
    stage.start()
    assert stage.value('gatekeeper_connections_total{action="allow",listener="web",reason="rule",rule="office"}') == 5
    assert stage.get("/readyz")[0] == 200


def test_prometheus_gets_what_it_asks_for(stage: Stage) -> None:
    """OpenMetrics when accepted, gzip when accepted, single families when named."""
    _status, headers, body = stage.get("/metrics", {"Accept": "application/openmetrics-text; version=1.0.0"})
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = openmetrics.text_string_to_metric_families(body.decode())  # type: ignore[no-untyped-call]
    assert any(family.name == "gatekeeper_connections" for family in families)
    _status, headers, body = stage.get("/metrics", {"Accept-Encoding": "gzip"})
    assert headers["content-encoding"] == "gzip"
    assert b"gatekeeper_connections_total" in gzip.decompress(body)
    _status, headers, body = stage.get("/metrics?name[]=gatekeeper_workers")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert [line for line in body.decode().splitlines() if not line.startswith("#")] == ["gatekeeper_workers 2.0"]


def test_no_source_address_is_ever_shown(stage: Stage) -> None:
    """Records of many sources leave the size of a scrape, of the status and of the page as it was."""
    before = len(stage.text("/metrics").splitlines())
    for _ in range(5):
        stage.report(*[stage.record(port=port) for port in range(200)])
    stage.wait_for_lines(1000)
    assert len(stage.text("/metrics").splitlines()) == before
    for path in ("/metrics", "/status.json", "/"):
        assert OFFICE not in stage.text(path)


def test_the_observers_own_process_is_measured(stage: Stage) -> None:
    """The usual process metrics are those of the observer."""
    assert stage.value("process_open_fds") > 5
    assert stage.value("process_resident_memory_bytes") > 1 << 20
