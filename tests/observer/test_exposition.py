"""The text of a scrape is what the library would have written, whatever the names, the values and the format."""

from __future__ import annotations

import random
import subprocess
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from gatekeeper.observer import exposition
from gatekeeper.observer.collector import ServiceCollector
from gatekeeper.observer.exposition import Exposition
from gatekeeper.observer.state import Service
from gatekeeper.snapshot.bindings import Bindings, VerdictKey
from gatekeeper.snapshot.counters import CAPACITY_BYTES, LISTENER_SLOTS, WORKER_SLOTS
from tests.support import need

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
FORMATS = ["", OPENMETRICS, "text/plain; version=1.0.0; escaping=allow-utf-8", f"{OPENMETRICS}; escaping=underscores"]
VALUES = [0, 1, 999_999, 1_000_000, 1_234_567, 1 << 40, (1 << 53) + 1, (1 << 64) - 1]
ODD_NAMES = ["web", "NaN", ' NaN\n"', "back\\slash", "snow\u2603", 'quo"te']


def bindings(listeners: list[str], rules: list[str]) -> Bindings:
    """Return slots for these names."""
    made = Bindings()
    for listener in listeners:
        made.listeners[listener] = made.next_slot
        made.next_slot += LISTENER_SLOTS
        for rule in rules:
            for action, reason in (("allow", "rule"), ("deny", "rule"), ("deny", "max_sessions")):
                made.verdicts[VerdictKey(listener, action, rule, reason)] = made.next_slot
                made.next_slot += 1
    return made


def make_service(names: Bindings, *, kernel: bool = True) -> Service:
    """Return a service whose counters hold small, large and no numbers."""
    chance = random.Random(1)
    views = [memoryview(bytearray(CAPACITY_BYTES)).cast("Q") for _ in range(3)]
    for view in views:
        for slot in range(WORKER_SLOTS, names.next_slot):
            view[slot] = chance.choice(VALUES)
    return Service(2, names, None, {}, dict(enumerate(views[:2])), views[2] if kernel else None)


def counters(text: bytes) -> bytes:
    """Return a scrape without what differs from moment to moment: the observer's own process."""
    kept = [line for line in text.splitlines(keepends=True) if b"process_" not in line and b"python_info" not in line]
    return b"".join(sorted(kept))


def by_the_library(service: Service, accept: str) -> bytes:
    """Return what the library alone writes."""
    registry = CollectorRegistry()
    registry.register(ServiceCollector(service, list))
    return choose_encoder(accept)[0](registry)


@pytest.mark.parametrize("kernel", [False, True], ids=["workers", "kernel"])
@pytest.mark.parametrize("accept", FORMATS)
@pytest.mark.parametrize("names", [(["web", "ssh"], ["office", ""]), (ODD_NAMES, ODD_NAMES), (["web"], []), ([], [])], ids=str)
def test_a_scrape_is_what_the_library_would_have_written(
    names: tuple[list[str], list[str]], accept: str, *, kernel: bool
) -> None:
    """Every line, for names and values of all kinds, in the format that was asked for; the first scrape and those after it."""
    service = make_service(bindings(*names), kernel=kernel)
    scraped = Exposition(service, list)
    for _ in range(2):
        body, content_type, encoding = scraped.answer(accept, "", [])
        assert counters(body) == counters(by_the_library(service, accept))
        assert (content_type, encoding) == (choose_encoder(accept)[1], "")
        assert body.endswith(b"# EOF\n") == accept.startswith(OPENMETRICS)
        assert body.count(b"# EOF\n") == accept.startswith(OPENMETRICS)


def test_formats_and_policies_may_change_at_every_scrape() -> None:
    """No text is filled with the values of other names, whoever asks for whatever, before and after a reload."""
    service = make_service(bindings(["web"], ["one"]))
    scraped = Exposition(service, list)
    policies = [bindings(["web"], ["one"]), bindings(["web"], ["two"]), bindings(["ssh"], ["two"])]
    strangers = [f"{OPENMETRICS[:-5]}{number}.0.0" for number in range(1, 9)]
    for number, names in enumerate(policies * 2):
        service.bindings = names
        service.kernel = make_service(names).kernel if number % 2 else None
        for accept in [*FORMATS, *strangers, ""]:
            assert counters(scraped.answer(accept, "", [])[0]) == counters(by_the_library(service, accept))


def test_a_library_that_writes_holes_otherwise_is_left_to_write_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a hole not be found where it is expected, the answer is still right."""
    service = make_service(bindings(["web"], ["office"]))
    monkeypatch.setattr(exposition, "IN_A_HOLE", " nan\n")
    for accept in ("", OPENMETRICS):
        body = Exposition(replace(service), list).answer(accept, "", [])[0]
        assert counters(body) == counters(by_the_library(service, accept))


@pytest.mark.needs("promtool")
def test_promtool_has_nothing_to_say_about_strange_names() -> None:
    """`promtool check metrics` accepts a scrape with names that need quotes and escapes."""
    body = Exposition(make_service(bindings(ODD_NAMES, ODD_NAMES)), list).answer("", "", [])[0]
    checked = subprocess.run([need.program("promtool"), "check", "metrics"], input=body, capture_output=True, timeout=30)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
