"""The tables in docs/ list exactly what the code has."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from gatekeeper.observer.audit import Renderer
from gatekeeper.observer.collector import ServiceCollector
from gatekeeper.observer.state import PolicyView, Service
from gatekeeper.policy.model import Reason
from gatekeeper.proxy.events import CAUSE_SHIFT, CONNECTION, RECORD
from gatekeeper.snapshot.bindings import Bindings, EndpointKey, VerdictKey
from gatekeeper.snapshot.counters import LISTENER_SLOTS, WORKER_SLOTS, Cause, End

DOCS = Path(__file__).parents[2] / "docs"
META = {"digest": "0" * 64, "counts": {"rules": 1, "v4_ranges": 1, "v6_ranges": 1}}


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Return first cell -> other cells of the table whose heading line starts so; backquotes are removed."""
    rows: dict[str, list[str]] = {}
    lines = iter(text.splitlines())
    assert any(line.startswith(heading) for line in lines), heading
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            break
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        for name in first.split(", "):
            rows[name.strip("`")] = others
    return rows


def service() -> Service:
    """Return a service that knows one listener and two verdicts, and whose kernel refuses."""
    bindings = Bindings(
        listeners={"web": WORKER_SLOTS},
        verdicts={
            VerdictKey("web", "allow", "all", "rule"): WORKER_SLOTS + LISTENER_SLOTS,
            VerdictKey("web", "deny", "", "default"): WORKER_SLOTS + LISTENER_SLOTS + 1,
        },
        endpoints={EndpointKey("web", "tcp", "127.0.0.1:80", "127.0.0.1:8080"): 0},
        next_slot=WORKER_SLOTS + LISTENER_SLOTS + 2,
    )
    kernel = memoryview(bytes(8 * bindings.next_slot)).cast("Q")
    return Service(1, bindings, PolicyView(1, META), {"last_reload_successful": True}, kernel=kernel)


def test_every_metric_is_documented_with_its_labels() -> None:
    """docs/metrics.md names every metric family, no other, and the labels of each."""
    documented = {
        name: {label.strip(" `") for label in cells[0].split(",") if label}
        for name, cells in table((DOCS / "metrics.md").read_text(), "| metric |").items()
    }
    suffix = {"counter": "_total", "info": "_info", "gauge": "", "histogram": ""}
    found: dict[str, set[str]] = {}
    for family in ServiceCollector(service(), lambda: [("audit", 0)]).collect():
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        found[family.name + suffix[family.type]] = labels
    assert documented == found


def test_causes_are_documented() -> None:
    """docs/metrics.md lists the causes of a backend failure."""
    sentence = re.search(r"`cause` is one of (.*?)\.", (DOCS / "metrics.md").read_text(), re.DOTALL)
    assert sentence
    assert re.findall(r"`(\w+)`", sentence[1]) == [cause.label for cause in Cause]
    assert list(table((DOCS / "metrics.md").read_text(), "| cause |")) == [cause.label for cause in Cause if cause is not Cause.OTHER]


def test_audit_fields_are_documented() -> None:
    """docs/audit.md lists the fields of a connection's line, TCP and unix, and its example has the same."""
    text = (DOCS / "audit.md").read_text()
    documented = set(table(text, "| field |"))

    def keys(event: dict[str, Any]) -> set[str]:
        inner = {f"gatekeeper.{key}" for key in event["gatekeeper"]}
        return (event.keys() - {"gatekeeper"}) | inner

    renderer = Renderer()
    renderer.rename(service().bindings)
    slot = WORKER_SLOTS + LISTENER_SLOTS
    found: set[str] = set()
    for family, end in ((4, End.FINISHED), (0, End.FINISHED), (4, End.BACKEND_FAILED | (Cause.DENIED + 1) << CAUSE_SHIFT)):
        record = RECORD.pack(
            CONNECTION, end, family, slot, 0, 5, 80, 9, 1e9, 1.0, 1, 2, bytes(16), struct.pack("16s", b"")
        )
        (line,) = renderer.render(memoryview(record))
        found |= keys(json.loads(line))
    assert documented == found
    example = re.search(r"```json\n(.*)\n```", text)
    assert example
    assert keys(json.loads(example[1])) == found - {"gatekeeper.endpoint", "gatekeeper.cause"}


def test_ends_and_reasons_are_documented() -> None:
    """docs/audit.md lists every reason a verdict has and every end a session comes to."""
    text = (DOCS / "audit.md").read_text()
    assert set(table(text, "| `end` |")) == {end.label for end in End}
    reasons = table(text, "| field |")["gatekeeper.reason"][0]
    assert re.findall(r"`(\w+)`", reasons) == list(Reason)
