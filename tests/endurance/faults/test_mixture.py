"""Everything goes wrong at once, for as long as it is told to: nothing grows, and nobody is forgotten.

`GATEKEEPER_ENDURANCE_S` is the length in seconds (with --long 60 by default), `GATEKEEPER_SEED` repeats a run.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.endurance.faults.mixture import Mixture
from tests.endurance.faults.watch import threads
from tests.support.clients import Sources
from tests.support.faults import descriptors, resident_kib
from tests.support.gate import Gate
from tests.support.ports import free_port, free_ports
from tests.support.process import Process
from tests.support.wait import until

SHORT_S, LONG_S = 8.0, 60.0
LENGTH = "GATEKEEPER_ENDURANCE_S"
ALLOWED = [f"127.0.7.{number}" for number in range(1, 65)]
DENIED = [f"127.0.8.{number}" for number in range(1, 9)]
BACKEND = str(Path(__file__).parent / "echo_backend.py")
SAMPLE_S = 0.25
# What may differ between the second and the last quarter of a run: noise, and not a slope over hours.
MORE_KIB, MORE_DESCRIPTORS, MORE_SESSIONS = 2048, 8, 8
FLOOD = 300
GONE = (OSError, AssertionError, StopIteration, http.client.HTTPException)  # what asking an observer that was just killed gives

Samples = dict[tuple[str, str], list[float]]


class Scene:
    """The gate, its backend, and the faults."""

    def __init__(self, gate: Gate, folder: Path, port: int, behind: int, seed: int) -> None:
        self.gate, self.port, self._folder, self._behind = gate, port, folder, behind
        self.chance = random.Random(seed)
        self.deaths = self.reloads = self.flooded = self._backends = 0
        self.spared = gate.worker_pids()[0]  # the one worker whose growth is watched
        self.samples: Samples = defaultdict(list)
        # How often, in seconds on average, what happens.
        self.faults = {
            0.7: self.reload,
            2.3: self.kill_worker,
            3.1: self.kill_backend,
            3.7: self.flood,
            5.3: self.kill_observer,
            SAMPLE_S: self.look,
            1.1: self.count_sessions,
        }
        self.start_backend()

    def policy(self) -> str:
        """Return the rule file, with one listener more in every second one."""
        return policy(self.port, self._behind, self.port + 1 if self.reloads % 2 else None)

    def start_backend(self) -> None:
        self._backends += 1
        self.backend = Process([sys.executable, BACKEND, str(self._behind)], self._folder, f"backend{self._backends}")
        self.backend.wait_for_port(self._behind)

    def kill_backend(self) -> None:
        self.backend.signal(signal.SIGKILL)
        self.backend.stop()
        self.start_backend()

    def kill_worker(self) -> None:
        others = [pid for pid in self.gate.worker_pids() if pid != self.spared]
        if others:
            os.kill(others[0], signal.SIGKILL)
            self.deaths += 1

    def kill_observer(self) -> None:
        with contextlib.suppress(ValueError, ProcessLookupError):  # the one before is not replaced yet
            os.kill(self.gate.observer_pid(), signal.SIGKILL)

    def flood(self) -> None:
        """Knock as fast as we can from where nobody may come."""
        for number in range(FLOOD):
            try:
                Sources().connect(DENIED[number % len(DENIED)], "127.0.0.1", self.port).close()
            except ConnectionResetError:
                pass  # judged and refused before we looked
            self.flooded += 1

    def reload(self) -> None:
        self.reloads += 1
        self.gate.write(self.policy())
        self.gate.signal(signal.SIGHUP)

    def look(self) -> None:
        """Take a sample of all that could grow."""
        watched = [("supervisor", self.gate.pid), ("worker", self.spared)]
        with contextlib.suppress(ValueError):  # there is none just now
            watched.append(("observer", self.gate.observer_pid()))
        for name, pid in watched:
            with contextlib.suppress(*GONE if name == "observer" else ()):
                found = (resident_kib(pid), descriptors(pid), threads(pid))
                for what, value in zip(("KiB", "descriptors", "threads"), found, strict=True):
                    self.samples[name, what].append(value)

    def count_sessions(self) -> None:
        """Take a sample of what the gate says that it has open."""
        with contextlib.suppress(*GONE):
            self.samples["gate", "sessions"].append(self.gate.scrape().value("gatekeeper_sessions"))


def policy(port: int, behind: int, more: int | None) -> str:
    """Return the rule file."""
    extra = "" if more is None else f'  - {{name: more, listen: "127.0.0.1:{more}", backend: "127.0.0.1:{behind}"}}\n'
    return (
        f'listeners:\n  - {{name: door, listen: "127.0.0.1:{port}", backend: "127.0.0.1:{behind}"}}\n{extra}'
        "default: deny\nrules:\n  - {name: known, action: allow, from: 127.0.7.0/24}\n"
    )


@pytest.fixture
def scene(run_gate: Callable[..., Gate], folder: Path) -> Iterator[Scene]:
    """A gate with two workers, its backend, and a seed."""
    port, behind = free_ports(2), free_port()
    seed = int(os.environ.get("GATEKEEPER_SEED") or random.SystemRandom().randrange(1 << 30))
    print("seed", seed)
    made = Scene(run_gate(policy(port, behind, None), workers=2), folder, port, behind, seed)
    yield made
    made.backend.stop()


def capacity(scene: Scene, port: int) -> float:
    """Return how many sessions a second go through when clients do not wait."""
    with Mixture(port, None, ALLOWED, DENIED, seed=0) as probe:
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 1.0, "a second has passed")
    return probe.connected / (time.monotonic() - began)


@pytest.mark.timeout(4 * 3600)
def test_mixed_faults(scene: Scene, long: bool) -> None:
    """At half capacity, with resets, reloads and deaths: no slope in memory, descriptors or threads, and exact accounts."""
    length_s = float(os.environ.get(LENGTH) or LONG_S) if long else SHORT_S
    gate, port = scene.gate, scene.port
    before = gate.scrape().value("gatekeeper_connections_total")
    rate = capacity(scene, port) / 2
    gate.wait_for_value(0, "gatekeeper_sessions")
    counted = gate.scrape().value("gatekeeper_connections_total") - before
    with Mixture(port, rate, ALLOWED, DENIED, seed=scene.chance.randrange(1 << 30)) as mixture:
        began = time.monotonic()
        due = [began + every_s for every_s in scene.faults]
        while (now := time.monotonic()) - began < length_s:
            for number, (every_s, do) in enumerate(scene.faults.items()):
                if now >= due[number]:
                    do()
                    due[number] = time.monotonic() + every_s * scene.chance.uniform(0.5, 1.5)
            until(lambda: time.monotonic() >= min(due), "the next thing is due")
            gate.assert_alive()
    assert mixture.wrong == []
    assert mixture.turned_away == 0
    gate.wait_for_value(0, "gatekeeper_sessions")
    conserved(scene, mixture, before + counted)
    if long:
        for what in scene.samples:
            level(*what, scene.samples[what])


def conserved(scene: Scene, mixture: Mixture, before: float) -> None:
    """Every connection that clients made was judged or failed, but for one that a worker may have held as it died."""
    seen = scene.gate.scrape()
    judged = seen.value("gatekeeper_connections_total") - before
    errors = seen.value("gatekeeper_accept_errors_total")
    connected = mixture.connected + scene.flooded
    print(f"{connected} connected, {judged:g} judged, {errors:g} errors, {mixture.right} right, {mixture.cut} cut,",
          f"{scene.flooded} of a flood, {scene.deaths} workers died, {scene.reloads} reloads")  # fmt: skip
    print("\n".join(line for line in scene.gate.output().splitlines() if "error" in line))
    assert 0 <= connected - (judged + errors) <= scene.deaths
    allowed = seen.value("gatekeeper_connections_total", action="allow")
    assert seen.value("gatekeeper_session_ends_total", listener="door") == allowed
    assert scene.gate.worker_pids()[0] == scene.spared
    assert seen.value("gatekeeper_worker_restarts_total") == scene.deaths


def level(who: str, what: str, samples: list[float]) -> None:
    """Fail when the last quarter of a series lies above the second."""
    quarter = len(samples) // 4
    early, late = statistics.median(samples[quarter : 2 * quarter]), statistics.median(samples[-quarter:])
    print(f"{who}: {what} {early:g} -> {late:g}")
    allowed = {"KiB": MORE_KIB, "descriptors": MORE_DESCRIPTORS, "threads": 0, "sessions": MORE_SESSIONS}[what]
    assert late - early <= allowed, f"{what} of the {who} grew from {early:g} to {late:g}"
