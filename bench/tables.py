"""Big policies: what it costs to load a million networks, and to look one up. Each in a child, whose memory nobody inherits."""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import load, verdict
from bench.processes import BenchError

NETWORKS = 1_000_000


def loading(rounds: int) -> dict[str, Any]:
    """Return the record of `check` of a million networks beside HAProxy and nginx, ``rounds`` times each."""

    def measured() -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="gatekeeper-load-") as folder:
            taken = load.take_turns(load.prepare_apart(Path(folder), NETWORKS), rounds)
        runs = []
        for (order, program), results in taken.items():
            walls, processors, peaks = zip(*results, strict=True)
            runs.append({
                "order": order, "program": program, "wall_s": statistics.median(walls), "best_s": min(walls),
                "cpu_s": min(processors), "peak_mib": max(peaks),
            })  # fmt: skip
        return runs

    return {"name": "load", "title": f"checking a list of {NETWORKS:,} networks", "runs": apart(measured)}


def verdicts(rounds: int) -> dict[str, Any]:
    """Return the record of the time of one verdict, by the number of networks in the policy."""

    def measured() -> list[dict[str, Any]]:
        dice = random.Random(verdict.SEED)
        v4 = [dice.getrandbits(32) for _ in range(verdict.LOOKUPS)]
        v6 = [(dice.getrandbits(64), dice.getrandbits(64)) for _ in range(verdict.LOOKUPS)]
        snapshots = {size: verdict.shared(verdict.policy(size, dice)) for size in verdict.SIZES}
        times: dict[tuple[int, int], list[float]] = {(size, family): [] for size in snapshots for family in (4, 6)}
        for _ in range(rounds):
            for size, snapshot in snapshots.items():
                times[size, 4].append(verdict.per_lookup_us(lambda one: verdict.verdicts_v4(one, v4), snapshot))
                times[size, 6].append(verdict.per_lookup_us(lambda one: verdict.verdicts_v6(one, v6), snapshot))
        return [
            {
                "networks": size,
                "v4_us": statistics.median(times[size, 4]),
                "v6_us": statistics.median(times[size, 6]),
            }
            for size in snapshots
        ]

    title = (
        "one verdict of a worker for a random source, by the number of isolated networks in the policy (CPU, median)"
    )
    return {"name": "verdict", "title": title, "sizes": apart(measured)}


def apart(work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns in a child of ours.

    Raises:
        BenchError: it failed; what it said is on stderr.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = json.dumps(work())
            with open(writing, "w") as pipe:
                pipe.write(text)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise BenchError(f"{work.__qualname__.partition('.')[0]} could not be measured")
    return json.loads(told)
