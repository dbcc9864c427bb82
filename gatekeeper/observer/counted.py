"""The metrics of the workers' and the kernel's counters: which sample shows which counter.

These are by far the most samples, some twenty thousand where there are thousands of rules, and what they are called
changes only with the policy. So the families are laid out once, with holes instead of values, and a scrape only fills
the holes. Names that left the policy stay, because a counter that disappears looks like a restart; and names are there
at zero before anything happens, because a counter that appears at one has no rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gatekeeper.observer.state import Totals
from gatekeeper.policy.model import Reason
from gatekeeper.snapshot.bindings import Bindings
from gatekeeper.snapshot.counters import DIAL_BOUNDS_S, DURATION_BOUNDS_S, Cause, End, ListenerSlot

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

KERNEL_REASONS = (str(Reason.RULE), str(Reason.DEFAULT), str(Reason.BAN))  # others are about sessions, which workers know
BAN_RULE = "ban"  # a reserved word, so no rule has that name
HOLE = math.nan

Family = TypeVar("Family", bound=Metric)


class Layout:
    """The families that some names call for. ``families`` have a `HOLE` in place of each value, ``cells`` say what fills it.

    A cell is an index into what `_derived` makes of the totals: the workers' slots, then the kernel's. Families are
    large, about half a kilobyte for a sample: keep the text that is made of them, and not them.
    """

    def __init__(self, bindings: Bindings, *, kernel: bool) -> None:
        self.bindings = bindings
        self.kernel = kernel
        self.families: list[Metric] = []
        self.cells: list[int] = []
        self._lay_out_verdicts()
        self._lay_out_listeners()
        self._lay_out_histograms()

    def filled(self, totals: Totals) -> Iterator[Metric]:
        """Yield the families with their values; ``totals`` are of the same bindings."""
        values = iter(read(self.bindings, totals, self.cells))
        for family in self.families:
            metric = Metric(family.name, family.documentation, family.type)
            metric.samples = [sample._replace(value=value) for sample, value in zip(family.samples, values, strict=False)]
            yield metric

    def _lay_out_verdicts(self) -> None:
        judged = self._add(
            CounterMetricFamily(
                "gatekeeper_connections",
                "Connections and UDP flows judged by a worker, each once; rule is empty for the default, bans and limits.",
                labels=["listener", "action", "rule", "reason"],
            )
        )
        refused = CounterMetricFamily(
            "gatekeeper_kernel_refused_attempts",
            "Attempts (SYNs with their repetitions, UDP datagrams) that the kernel refused; rule is empty for the default, ban for bans.",
            labels=["listener", "action", "rule"],
        )
        passed = CounterMetricFamily(
            "gatekeeper_kernel_passed_attempts",
            "Attempts that the kernel let pass: to a worker, or to the service that owns a guarded port.",
            labels=["listener", "rule"],
        )
        verdicts = self.bindings.verdicts.items()
        for key, slot in verdicts:
            self._sample(judged, [key.listener, key.action, key.rule, key.reason], slot)
        first = self.bindings.next_slot
        known = [item for item in verdicts if item[0].reason in KERNEL_REASONS] if self.kernel else []
        self._add(refused)
        for key, slot in known:
            if key.action != "allow":
                rule = BAN_RULE if key.reason == Reason.BAN else key.rule
                self._sample(refused, [key.listener, key.action, rule], first + slot)
        self._add(passed)
        for key, slot in known:
            if key.action == "allow":
                self._sample(passed, [key.listener, key.rule], first + slot)

    def _lay_out_listeners(self) -> None:
        listeners = self.bindings.listeners.items()
        sessions = self._add(GaugeMetricFamily("gatekeeper_sessions", "Live sessions.", labels=["listener"]))
        for name, block in listeners:
            self._sample(sessions, [name], block + ListenerSlot.SESSIONS_OPENED)
        moved = self._add(
            CounterMetricFamily(
                "gatekeeper_session_bytes", "Bytes relayed; in is from the client.", labels=["listener", "direction"]
            )
        )
        for name, block in listeners:
            self._sample(moved, [name, "in"], block + ListenerSlot.BYTES_IN)
            self._sample(moved, [name, "out"], block + ListenerSlot.BYTES_OUT)
        queue = self._add(
            GaugeMetricFamily(
                "gatekeeper_accept_queue", "Connections that wait in the kernel to be accepted.", labels=["listener"]
            )
        )
        for name, block in listeners:
            self._sample(queue, [name], block + ListenerSlot.ACCEPT_QUEUE)
        for metric, offset, text in BY_LISTENER:
            counter = self._add(CounterMetricFamily(metric, text, labels=["listener"]))
            for name, block in listeners:
                self._sample(counter, [name], block + offset)
        for metric, label, first, words, text in BY_LISTENER_AND_WORD:
            counter = self._add(CounterMetricFamily(metric, text, labels=["listener", label]))
            for name, block in listeners:
                for index, word in words:
                    self._sample(counter, [name, word], block + first + index)

    def _lay_out_histograms(self) -> None:
        for metric, sum_offset, first, bounds, text in HISTOGRAMS:
            histogram = self._add(HistogramMetricFamily(metric, text, labels=["listener"]))
            buckets = [(bound, HOLE) for bound in (*map(str, bounds), "+Inf")]
            for name, block in self.bindings.listeners.items():
                histogram.add_metric([name], buckets, HOLE)
                last = block + first + len(bounds)
                self.cells += [*range(block + first, last + 1), last, block + sum_offset]  # the last one is the count, too

    def _add(self, family: Family) -> Family:
        self.families.append(family)
        return family

    def _sample(self, family: CounterMetricFamily | GaugeMetricFamily, labels: list[str], cell: int) -> None:
        family.add_metric(labels, HOLE)
        self.cells.append(cell)


class Holes(Collector):
    """Families as they are, for the library's encoders."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return the families."""
        return self._families


def read(bindings: Bindings, totals: Totals, cells: Sequence[int]) -> Sequence[float]:
    """Return what belongs into the holes that show these cells, in order."""
    everything = _derived(bindings, totals)
    return [everything[cell] for cell in cells]


def _derived(bindings: Bindings, totals: Totals) -> list[float]:
    """Return what is shown: the slots themselves, but gauges, sums and cumulative buckets where their parts were."""
    cells: list[float] = list(totals.slots)
    for block in bindings.listeners.values():
        cells[block + ListenerSlot.SESSIONS_OPENED] = totals.live(block)
        for _name, sum_offset, first, bounds, _text in HISTOGRAMS:
            cells[block + sum_offset] /= 1e6
            begin, end = block + first, block + first + len(bounds) + 1
            cells[begin:end] = accumulate(cells[begin:end])
    return cells[: bindings.next_slot] + totals.kernel[: bindings.next_slot]
