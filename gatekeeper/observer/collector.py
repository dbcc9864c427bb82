"""What Prometheus reads: the workers' shared counters as metric families, made anew at every scrape.

Names and labels are public interface. Labels are names from rule files and words from closed lists, never a peer's
address, so the size of a scrape depends on the policy and not on traffic. Names that left the policy stay, because a
counter that disappears looks like a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gatekeeper import __version__
from gatekeeper.observer.state import Service, Totals
from gatekeeper.policy.model import Reason
from gatekeeper.snapshot.counters import DIAL_BOUNDS_S, DURATION_BOUNDS_S, Cause, End, ListenerSlot, WorkerSlot

# Simple counters by listener: name, offset in the listener's block, help.
BY_LISTENER = (
    (
        "gatekeeper_accept_overflows",
        ListenerSlot.ACCEPT_OVERFLOWS,
        "Connections (UDP: datagrams) the kernel dropped because the queue of a listener was full.",
    ),
    (
        "gatekeeper_accept_errors",
        ListenerSlot.ACCEPT_ERRORS,
        "Connections that ended before they could be judged.",
    ),
    (
        "gatekeeper_datagrams_lost",
        ListenerSlot.DATAGRAMS_LOST,
        "UDP datagrams that the policy allowed and that could not be forwarded.",
    ),
)
# Closed lists by listener: name, label, offset of the first, members, help.
BY_LISTENER_AND_WORD = (
    (
        "gatekeeper_session_ends",
        "end",
        ListenerSlot.ENDS,
        # REFUSED is a word of the audit log only: refusals are not sessions.
        tuple((end, end.label) for end in End if end is not End.REFUSED),
        "Sessions that ended, by what ended them.",
    ),
    (
        "gatekeeper_backend_failures",
        "cause",
        ListenerSlot.BACKEND_FAILURES,
        tuple((cause, cause.label) for cause in Cause),
        "Backends that could not be reached, by cause.",
    ),
)
# Histograms by listener: name, offset of the sum, offset of the buckets, bounds, help.
HISTOGRAMS = (
    (
        "gatekeeper_session_duration_seconds",
        ListenerSlot.DURATION_SUM_US,
        ListenerSlot.DURATION_BUCKETS,
        DURATION_BOUNDS_S,
        "How long sessions lasted.",
    ),
    (
        "gatekeeper_backend_connect_seconds",
        ListenerSlot.DIAL_SUM_US,
        ListenerSlot.DIAL_BUCKETS,
        DIAL_BOUNDS_S,
        "How long it took to connect to the backend.",
    ),
)

KERNEL_REASONS = (str(Reason.RULE), str(Reason.DEFAULT))  # all others are about sessions, which only workers know


class ServiceCollector(Collector):
    """Makes metric families of a `Service`. ``lost`` gives the observer's own losses: (class, count)."""

    def __init__(self, service: Service, lost: Callable[[], Sequence[tuple[str, int]]]) -> None:
        self._service = service
        self._lost = lost

    def collect(self) -> Iterator[Metric]:
        """Yield every family, all from one reading of the counters; always the same ones, some of them still empty."""
        service = self._service.frozen()
        totals = service.totals()
        yield _connections(service, totals)
        yield from _kernel(service, totals)
        yield from _listeners(service, totals)
        yield from _policy(service)
        yield from _processes(service, totals)
        yield from self._events(totals)
        yield InfoMetricFamily("gatekeeper_build", "The version that runs.", value={"version": __version__})

    def _events(self, totals: Totals) -> Iterator[Metric]:
        lost = CounterMetricFamily(
            "gatekeeper_events_lost", "Events that are missing from the audit log, by class.", labels=["class"]
        )
        lost.add_metric(["refusal"], totals.worker(WorkerSlot.EVENTS_LOST_REFUSAL))
        lost.add_metric(["connection"], totals.worker(WorkerSlot.EVENTS_LOST_CONNECTION))
        for name, count in self._lost():
            lost.add_metric([name], count)
        yield lost
        yield CounterMetricFamily(
            "gatekeeper_refusals_suppressed",
            "Refusals that the audit log only counts, because their rule had used up its budget of lines.",
            value=totals.worker(WorkerSlot.REFUSALS_SUPPRESSED),
        )


def make_registry(service: Service, lost: Callable[[], Sequence[tuple[str, int]]]) -> CollectorRegistry:
    """Return a registry with the service's metrics and the observer's own process metrics."""
    registry = CollectorRegistry(auto_describe=True)  # so that scrapes can ask for some names only
    registry.register(ServiceCollector(service, lost))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def _connections(service: Service, totals: Totals) -> Metric:
    family = CounterMetricFamily(
        "gatekeeper_connections",
        "Connections and UDP flows judged by a worker, each once; rule is empty for the default, bans and limits.",
        labels=["listener", "action", "rule", "reason"],
    )
    for key, slot in service.bindings.verdicts.items():
        family.add_metric([key.listener, key.action, key.rule, key.reason], totals.slots[slot])
    return family


def _kernel(service: Service, totals: Totals) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "gatekeeper_kernel_enforcing",
        "1 when the kernel refuses, before there is a connection; 0 when workers do.",
        value=float(bool(service.state.get("kernel"))),
    )
    refused = CounterMetricFamily(
        "gatekeeper_kernel_refused_attempts",
        "Attempts (SYNs with their repetitions, UDP datagrams) that the kernel refused; rule is empty for the default.",
        labels=["listener", "action", "rule"],
    )
    passed = CounterMetricFamily(
        "gatekeeper_kernel_passed_attempts",
        "Attempts that the kernel let pass: to a worker, or to the service that owns a guarded port.",
        labels=["listener", "rule"],
    )
    if service.kernel is not None:
        for key, slot in service.bindings.verdicts.items():
            if key.reason not in KERNEL_REASONS:
                continue
            if key.action == "allow":
                passed.add_metric([key.listener, key.rule], totals.kernel[slot])
            else:
                refused.add_metric([key.listener, key.action, key.rule], totals.kernel[slot])
    yield from (refused, passed)


def _listeners(service: Service, totals: Totals) -> Iterator[Metric]:
    listeners, slots = service.bindings.listeners.items(), totals.slots
    sessions = GaugeMetricFamily("gatekeeper_sessions", "Live sessions.", labels=["listener"])
    moved = CounterMetricFamily(
        "gatekeeper_session_bytes", "Bytes relayed; in is from the client.", labels=["listener", "direction"]
    )
    queue = GaugeMetricFamily(
        "gatekeeper_accept_queue", "Connections that wait in the kernel to be accepted.", labels=["listener"]
    )
    for name, block in listeners:
        sessions.add_metric([name], totals.live(block))
        moved.add_metric([name, "in"], slots[block + ListenerSlot.BYTES_IN])
        moved.add_metric([name, "out"], slots[block + ListenerSlot.BYTES_OUT])
        queue.add_metric([name], slots[block + ListenerSlot.ACCEPT_QUEUE])
    yield from (sessions, moved, queue)
    for metric, offset, text in BY_LISTENER:
        counter = CounterMetricFamily(metric, text, labels=["listener"])
        for name, block in listeners:
            counter.add_metric([name], slots[block + offset])
        yield counter
    for metric, label, first, words, text in BY_LISTENER_AND_WORD:
        counter = CounterMetricFamily(metric, text, labels=["listener", label])
        for name, block in listeners:
            for index, word in words:
                counter.add_metric([name, word], slots[block + first + index])
        yield counter
    for metric, sum_offset, first, bounds, text in HISTOGRAMS:
        histogram = HistogramMetricFamily(metric, text, labels=["listener"])
        for name, block in listeners:
            at = block + first
            histogram.add_metric([name], _buckets(slots[at : at + len(bounds) + 1], bounds), slots[block + sum_offset] / 1e6)
        yield histogram


def _buckets(counts: list[int], bounds: Sequence[float]) -> list[tuple[str, float]]:
    """Return cumulative buckets; ``counts`` has one more than ``bounds``, for what is above all of them."""
    total, buckets = 0, []
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets


def _policy(service: Service) -> Iterator[Metric]:
    info = InfoMetricFamily("gatekeeper_policy", "The policy in force.")
    rules = GaugeMetricFamily("gatekeeper_policy_rules", "Rules of the policy in force.")
    ranges = GaugeMetricFamily(
        "gatekeeper_policy_ranges", "Address ranges of the compiled policy in force.", labels=["family"]
    )
    if service.policy is not None:
        meta = service.policy.meta
        info.add_metric([], {"hash": meta["digest"]})
        rules.add_metric([], meta["counts"]["rules"])
        ranges.add_metric(["ipv4"], meta["counts"]["v4_ranges"])
        ranges.add_metric(["ipv6"], meta["counts"]["v6_ranges"])
    successful = GaugeMetricFamily(
        "gatekeeper_config_last_reload_successful",
        "1 when the latest reload (or the start) was applied, 0 when the policy before it is still in force.",
    )
    timestamp = GaugeMetricFamily(
        "gatekeeper_config_last_reload_success_timestamp_seconds",
        "When the policy in force was applied, in Unix time.",
    )
    state = service.state
    if state:
        successful.add_metric([], float(bool(state.get("last_reload_successful"))))
        timestamp.add_metric([], float(state.get("last_reload_timestamp") or 0.0))
    yield from (info, rules, ranges, successful, timestamp)


def _processes(service: Service, totals: Totals) -> Iterator[Metric]:
    yield GaugeMetricFamily("gatekeeper_workers", "Workers that are alive.", value=service.alive())
    yield CounterMetricFamily(
        "gatekeeper_worker_restarts",
        "Workers that were replaced because they had ended or did not answer.",
        value=float(service.state.get("restarts_total") or 0),
    )
    yield GaugeMetricFamily(
        "gatekeeper_loop_stall_seconds",
        "The longest turn of a worker's event loop since it was started, of all workers.",
        value=totals.stall_us / 1e6,
    )
    yield CounterMetricFamily(
        "gatekeeper_accept_pauses",
        "Times a listener stopped accepting for a moment for want of descriptors or memory.",
        value=totals.worker(WorkerSlot.ACCEPT_PAUSES),
    )
