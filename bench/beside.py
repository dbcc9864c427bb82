"""Small round trips beside bulk streams: what a session that sends little waits while others send all they can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.native import Generator
from bench.peers import System
from bench.processes import settle
from bench.turns import View, spread

SMALL = 10  # connections with 64 bytes there and back
STREAMS = 4  # bulk, in both directions at once
LEAST_S = 0.5  # a shorter turn has too few round trips for a p99
HEAD_START_S = 0.05  # the streams are in full flow when the first round trip starts, and after the last one ended


def fairness(
    systems: Sequence[System], program: str, rounds: int, seconds: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Give every system, in each round, a turn without and one with the streams; return the record for the document.

    ``systems[name]`` holds spreads: ``p50_us``, ``p99_us`` without; ``beside_p50_us``, ``beside_p99_us`` with; ``times``, the second p99 over
    the first within a round; ``bulk`` in bytes a second. ``ratios[name]`` is the first system's p99 beside the streams over that of ``name``.
    """
    taking_part = [View(one.name, one, one.ports["tcp"]) for one in systems]
    taking_part += [View(f"{one.name} splice", one, one.ports["splice"]) for one in systems if "splice" in one.ports]
    taken: dict[str, list[dict[str, float]]] = {view.name: [] for view in taking_part}
    trips: dict[str, Generator] = {}
    streams: dict[str, Generator] = {}
    try:
        for view in taking_part:
            trips[view.name] = Generator(program, "round-trip", view.port, SMALL, 64)
            streams[view.name] = Generator(program, "both", view.port, STREAMS)
        for turn in range(-1, rounds):  # nobody's first turn counts
            progress(f"fairness: round {turn + 1} of {rounds}")
            first = turn // 2 % len(taking_part)
            order = taking_part[first:] + taking_part[:first]
            for view in order if turn % 2 == 0 else reversed(order):
                figures = _turn(trips[view.name], streams[view.name], max(seconds, LEAST_S))
                settle([*view.system.pids(), view.system.backend.process.pid])
                if turn >= 0:
                    taken[view.name].append(figures)
    finally:
        for generator in [*trips.values(), *streams.values()]:
            generator.close()
    subject = taking_part[0].name
    title = f"64 bytes there and back on {SMALL} open connections, without and beside {STREAMS} bulk streams in both directions"
    return {
        "name": "fairness",
        "title": title,
        "subject": subject,
        "systems": {
            name: {key: spread([turn[key] for turn in turns]) for key in turns[0]} for name, turns in taken.items()
        },
        "ratios": {
            name: spread([a["beside_p99_us"] / b["beside_p99_us"] for a, b in zip(taken[subject], turns, strict=True)])
            for name, turns in taken.items()
            if name != subject
        },
    }


def _turn(trips: Generator, streams: Generator, seconds: float) -> dict[str, float]:
    alone = trips.turn(seconds)
    streams.begin(seconds + 2 * HEAD_START_S)
    trips.begin(HEAD_START_S)
    trips.end()
    beside = trips.turn(seconds)
    bulk = streams.end()
    return {
        "p50_us": alone.p50_us,
        "p99_us": alone.p99_us,
        "beside_p50_us": beside.p50_us,
        "beside_p99_us": beside.p99_us,
        "times": beside.p99_us / alone.p99_us,
        "rate": alone.units / alone.seconds,
        "beside_rate": beside.units / beside.seconds,
        "bulk": bulk.units / bulk.seconds,
    }
