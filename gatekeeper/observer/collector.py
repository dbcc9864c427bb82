"""What Prometheus reads, as metric families: the shared counters (see `counted`), and what else is known of the service.

Names and labels are public interface. Labels are names from rule files and words from closed lists, never a peer's
address, so the size of a scrape depends on the policy and not on traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gatekeeper import __version__
from gatekeeper.observer.counted import Layout
from gatekeeper.observer.state import Service, Totals
from gatekeeper.snapshot.counters import WorkerSlot


class ServiceCollector(Collector):
    """Makes metric families of a `Service`. ``lost`` gives the observer's own losses: (class, count)."""

    def __init__(self, service: Service, lost: Callable[[], Sequence[tuple[str, int]]]) -> None:
        self._service = service
        self._lost = lost

    def collect(self) -> Iterator[Metric]:
        """Yield every family; always the same ones, some of them still empty."""
        service = self._service.frozen()
        yield from Layout(service.bindings, kernel=service.kernel is not None).filled(service.totals())
        yield from self.others()

    def others(self) -> Iterator[Metric]:
        """Yield the families that `counted` does not know."""
        service = self._service.frozen()
        totals = service.totals()
        yield GaugeMetricFamily(
            "gatekeeper_kernel_enforcing",
            "1 when the kernel refuses, before there is a connection; 0 when workers do.",
            value=float(bool(service.state.get("kernel"))),
        )
        yield GaugeMetricFamily(
            "gatekeeper_kernel_other_programs",
            "Other sk_lookup programs in our network namespace while the kernel refuses; they may let in what it refuses.",
            value=float(service.state.get("kernel_others") or 0),
        )
        yield GaugeMetricFamily(
            "gatekeeper_bans",
            "Bans in force, made by operators; one may ban a whole network.",
            value=float(service.state.get("bans") or 0),
        )
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
    yield GaugeMetricFamily(
        "gatekeeper_config_unconfirmed",
        "1 while the policy in force is on trial and the one before it comes back unless it is confirmed.",
        value=float(bool(state.get("unconfirmed"))),
    )
    yield GaugeMetricFamily(
        "gatekeeper_config_from_last_good",
        "1 while the policy in force is the last good one, because the rule file was of no use at the start.",
        value=float(bool(state.get("last_good"))),
    )
    yield CounterMetricFamily(
        "gatekeeper_config_save_failures",
        "Policies that were put in force and could not be saved in the state directory.",
        value=float(state.get("save_failures_total") or 0),
    )


def _processes(service: Service, totals: Totals) -> Iterator[Metric]:
    yield GaugeMetricFamily("gatekeeper_workers", "Workers that are alive.", value=service.alive())
    yield CounterMetricFamily(
        "gatekeeper_worker_restarts",
        "Workers that were replaced because they had ended or did not answer.",
        value=float(service.state.get("restarts_total") or 0),
    )
    yield GaugeMetricFamily(
        "gatekeeper_old_workers", "Workers of before an upgrade that still have sessions.", value=len(service.state.get("leaving") or ())
    )
    upgrades = CounterMetricFamily("gatekeeper_upgrades", "Upgrades that took place (done) and that did not (failed).", labels=["result"])
    upgrades.add_metric(["done"], float(service.state.get("upgrades") or 0))
    upgrades.add_metric(["failed"], float(service.state.get("upgrades_failed") or 0))
    yield upgrades
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
