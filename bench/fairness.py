"""Fairness: how long small round trips take beside bulk streams, and without them.

    python -m bench.fairness                     gatekeeper, HAProxy (copying and with forced splice) and nginx
    python -m bench.fairness --rounds 20 --json fairness.json

64 bytes go there and back on 10 connections, for one turn alone and for one beside 4 bulk streams in both directions through the same
proxy; the systems take turns. All share the machine's cores with the load generators and backends, so part of what the bulk costs is paid
there, by everyone alike: *direct* shows how much. Exit codes as for `python -m bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.native import Backend, Generator, compile_load
from bench.peers import System, raise_file_limit, start_direct, start_gatekeeper, start_haproxy, start_nginx
from bench.processes import BenchError

SMALL_CLIENTS, SMALL_BYTES = 10, 64
BULK_STREAMS = 4
SETTLE_S = 0.2  # bulk runs this long before and after the round trips beside it

STARTERS: dict[str, Callable[[Backend, str, int], System]] = {
    "gatekeeper": start_gatekeeper,
    "haproxy": start_haproxy,
    "nginx": start_nginx,
    "direct": start_direct,
}


@dataclass
class Subject:
    """One way through one system: round trips and bulk have a generator each, open all the time."""

    name: str
    small: Generator
    bulk: Generator

    def close(self) -> None:
        self.small.close()
        self.bulk.close()


def turn(subject: Subject, seconds: float) -> dict[str, float]:
    """Return p50 and p99 in microseconds alone and beside bulk, and the bulk's rate in GB a second."""
    alone = subject.small.turn(seconds)
    moved: list[float] = []

    def bulk() -> None:
        result = subject.bulk.turn(seconds + 2 * SETTLE_S)
        moved.append(result.units / result.seconds / 1e9)

    thread = threading.Thread(target=bulk)
    thread.start()
    subject.small.turn(SETTLE_S)
    beside = subject.small.turn(seconds)
    thread.join()
    return {
        "alone_p50_us": alone.p50_us,
        "alone_p99_us": alone.p99_us,
        "beside_p50_us": beside.p50_us,
        "beside_p99_us": beside.p99_us,
        "p99_ratio": beside.p99_us / alone.p99_us,
        "bulk_gb_s": moved[0],
    }


@contextlib.contextmanager
def subjects(directory: str) -> Iterator[list[Subject]]:
    """Start every system that is installed, and its generators."""
    program = compile_load(directory)
    with contextlib.ExitStack() as ends:
        found = []
        for name, start in STARTERS.items():
            place = os.path.join(directory, name)
            os.makedirs(place)
            backend = Backend(program)
            try:
                system = start(backend, place, 1)
            except BenchError as err:
                backend.close()
                if name == "gatekeeper":
                    raise
                print(f"left out: {err}", file=sys.stderr)
                continue
            ends.callback(system.close)
            for way in ("tcp", "splice"):
                if way in system.ports:
                    small = Generator(program, "round-trip", system.ports["tcp"], SMALL_CLIENTS, SMALL_BYTES)
                    ends.callback(small.close)
                    bulk = Generator(program, "both", system.ports[way], BULK_STREAMS)
                    ends.callback(bulk.close)
                    found.append(Subject(name if way == "tcp" else f"{name} splice", small, bulk))
        yield found


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 3 when the comparison could not be made."""
    made = argparse.ArgumentParser(prog="python -m bench.fairness", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--rounds", type=int, default=9, help="turns of each system (default 9)")
    made.add_argument("--seconds", type=float, default=0.5, help="length of a turn (default 0.5)")
    made.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    options = made.parse_args(argv)
    raise_file_limit()
    directory = tempfile.mkdtemp(prefix="gatekeeper-bench-")
    os.chmod(directory, 0o755)
    try:
        with subjects(directory) as taking_part:
            taken: dict[str, list[dict[str, float]]] = {subject.name: [] for subject in taking_part}
            for number in range(options.rounds):
                for subject in taking_part if number % 2 else reversed(taking_part):
                    taken[subject.name].append(turn(subject, options.seconds))
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 3
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    medians = {
        name: {key: statistics.median(one[key] for one in turns) for key in turns[0]} for name, turns in taken.items()
    }
    print(f"{'':16}{'alone p50':>11}{'p99 µs':>9}{'beside p50':>13}{'p99 µs':>9}{'p99 ratio':>11}{'bulk GB/s':>11}")
    for name, row in medians.items():
        print(
            f"{name:16}{row['alone_p50_us']:11.0f}{row['alone_p99_us']:9.0f}{row['beside_p50_us']:13.0f}"
            f"{row['beside_p99_us']:9.0f}{row['p99_ratio']:11.2f}{row['bulk_gb_s']:11.2f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"median": medians, "turns": taken}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
