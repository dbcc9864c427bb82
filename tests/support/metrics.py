"""What a scrape says, as values to compare."""

from __future__ import annotations

import http.client
from collections import Counter
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Scrape:
    """One scrape: sample name and sorted labels -> value."""

    text: str
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    def value(self, name: str, **labels: str) -> float:
        """Return the sum over the samples of this name that carry these labels; 0.0 when there are none."""
        want = set(labels.items())
        return sum(value for (sample, has), value in self.samples.items() if sample == name and want <= set(has))

    def verdicts(self) -> Counter[tuple[str, str, str, str]]:
        """Return (listener, action, rule, reason) -> connections judged, without the zeros."""
        counts: Counter[tuple[str, str, str, str]] = Counter()
        for (name, labels), value in self.samples.items():
            if name == "gatekeeper_connections_total" and value:
                label = dict(labels)
                counts[label["listener"], label["action"], label["rule"], label["reason"]] += int(value)
        return counts


def scrape(port: int, host: str = "127.0.0.1") -> Scrape:
    """Fetch and parse ``/metrics``."""
    status, body = get(port, "/metrics", host)
    assert status == 200, f"/metrics answered {status}: {body[:500]}"
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }
    return Scrape(body, samples)


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    """Return status and body of one HTTP GET."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
