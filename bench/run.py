"""Command line of the benchmark: start the systems, let them take turns, print a table, write JSON."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from bench import kernel, tables
from bench.beside import fairness
from bench.document import write_documents
from bench.envoy import start_envoy
from bench.native import Backend, compile_load
from bench.peers import (
    WORKER_ALONE,
    System,
    raise_file_limit,
    start_direct,
    start_gatekeeper,
    start_haproxy,
    start_nginx,
)
from bench.processes import BenchError
from bench.report import heading, machine, scenario_table
from bench.scenarios import (
    CALLS,
    FAIRNESS,
    GROUPS,
    IDLE,
    KERNEL,
    LOAD,
    NAMES,
    SCENARIOS,
    VERDICT,
    WHERE,
    Scenario,
    that_fit,
)
from bench.syscalls import system_calls
from bench.turns import compare, idle_memory
from bench.where import where_it_goes
from gatekeeper.errors import KernelError

DEFAULT_PEERS = ("haproxy", "nginx", "envoy")

EXAMPLES = """examples:
  python -m bench                                        everything, about 12 minutes
  python -m bench --turns 5                              the short form, about 5 minutes
  python -m bench --turns 60 --write-docs                the long form, and docs/performance.md with it
  python -m bench --only connect-close --turns 15        one comparison, about 15 seconds
  python -m bench --peers haproxy,nginx --no-gatekeeper  the others among themselves
  python -m bench --only round-trip-50,udp-50 --json out.json
  python -m bench --only connect-close --gatekeeper 'python my_driver.py {config}'
"""


def _names(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = [one for name in text.split(",") if name for one in GROUPS.get(name, (name,))]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name}: not one of {', '.join((*allowed, *GROUPS))}")
        return names

    return parse


def parser() -> argparse.ArgumentParser:
    """The options; see --help."""
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--only",
        type=_names(NAMES),
        metavar="NAME,...",
        help=f"scenarios to run: {', '.join(NAMES)}, and the groups {', '.join(GROUPS)}",
    )
    made.add_argument(
        "--turns", type=int, default=15, metavar="N", help="rounds; each system has one turn in each (default 15)"
    )
    made.add_argument("--seconds", type=float, default=0.2, metavar="S", help="length of a turn (default 0.2)")
    made.add_argument(
        "--peers",
        type=_names((*DEFAULT_PEERS, "direct")),
        metavar="NAME,...",
        help="haproxy, nginx, envoy, direct (no proxy)",
    )
    made.add_argument(
        "--gatekeeper",
        metavar="CMD",
        help="how to start gatekeeper; {config} is the rule file (default: gatekeeper run)",
    )
    made.add_argument("--worker-alone", action="store_true", help="one worker without supervisor and observer")
    made.add_argument("--no-gatekeeper", action="store_true", help="leave gatekeeper out")
    made.add_argument(
        "--idle", type=int, default=2000, metavar="N", help="sessions for the memory measurement (default 2000)"
    )
    made.add_argument("--json", metavar="FILE", help="write everything measured to FILE")
    made.add_argument(
        "--write-docs",
        action="store_true",
        help="put tables and plots into docs/performance.md",
    )
    made.add_argument("--from", dest="source", metavar="FILE", help="measure nothing: take what --json wrote before")
    made.add_argument("--keep", metavar="DIR", help="use DIR for configurations and logs and leave them there")
    return made


def start_systems(options: argparse.Namespace, program: str, directory: str, workers: int) -> list[System]:
    """Start everybody with ``workers`` workers; a peer that is not installed is named and left out, unless it was asked for by name."""
    starters: dict[str, Callable[[Backend, str, int], System]] = {
        "gatekeeper": functools.partial(start_gatekeeper, command=options.gatekeeper),
        "haproxy": start_haproxy,
        "nginx": start_nginx,
        "envoy": start_envoy,
        "direct": start_direct,
    }
    names = [] if options.no_gatekeeper else ["gatekeeper"]
    names += options.peers if options.peers is not None else DEFAULT_PEERS
    started: list[System] = []
    for name in names:
        backend = Backend(program)
        place = os.path.join(directory, f"{name}-{workers}")
        os.makedirs(place, exist_ok=True)
        try:
            started.append(starters[name](backend, place, workers))
        except BenchError as err:
            backend.close()
            if name == "gatekeeper" or options.peers is not None:
                stop_systems(started)
                raise
            print(f"left out: {err}", file=sys.stderr)
    return started


def stop_systems(systems: list[System]) -> None:
    """End them all."""
    for system in systems:
        system.close()


def progress(text: str) -> None:
    """Say on a terminal what is being done; an empty text takes it back."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def write_json(document: dict[str, Any], path: str) -> None:
    """Write all that was measured so far."""
    with open(path, "w") as file:
        json.dump(document, file, indent=1)
        file.write("\n")


class Run:
    """One run: a document, to which each measurement is added, and its table printed, when it is there."""

    def __init__(self, options: argparse.Namespace, program: str, directory: str) -> None:
        self.options = options
        self.program = program
        self.directory = directory
        self.wanted: list[str] = options.only or list(NAMES)
        self.document: dict[str, Any] = {
            "machine": machine(),
            "versions": {},
            "settings": {"turns": options.turns, "seconds": options.seconds},
            "scenarios": [],
        }

    def done(self, record: dict[str, Any]) -> None:
        record["load_average"] = os.getloadavg()[0]
        self.document["scenarios"].append(record)
        if self.options.json:  # what was measured is not lost when the run is ended
            write_json(self.document, self.options.json)
        progress("")
        print("\n" + scenario_table(record), flush=True)

    def measure(self) -> dict[str, Any]:
        """Run what is wanted."""
        for workers in (1, 2):
            scenarios = [one for one in SCENARIOS if one.workers == workers and one.name in self.wanted]
            others = [name for name in (IDLE, FAIRNESS, CALLS, WHERE) if name in self.wanted and workers == 1]
            if scenarios or others:
                self.with_workers(workers, scenarios, others)
        rounds = min(self.options.turns, 9)  # a round takes ten seconds
        if LOAD in self.wanted:
            progress("loading big lists")
            self.done(tables.loading(rounds))
        if VERDICT in self.wanted:
            progress("verdicts among many networks")
            self.done(tables.verdicts(rounds))
        self.with_kernel([name for name in KERNEL if name in self.wanted])
        return self.document

    def with_kernel(self, wanted: list[str]) -> None:
        """Measure what the kernel does, where we may load programs."""
        if not wanted or self.options.no_gatekeeper or self.options.gatekeeper:
            return
        options = self.options
        try:
            for record in kernel.measure(self.program, self.directory, options.turns, options.seconds, wanted, progress):
                self.done(record)
        except (BenchError, OSError, KernelError) as err:
            print(f"left out: {', '.join(wanted)}: {err}", file=sys.stderr)

    def with_workers(self, workers: int, scenarios: list[Scenario], others: list[str]) -> None:
        """Start the systems with ``workers`` workers, and drive them."""
        options, program = self.options, self.program
        systems = start_systems(options, program, self.directory, workers)
        try:
            if not self.document["versions"]:
                self.document["versions"] = {system.name: system.version for system in systems}
                print(heading(self.document), flush=True)
            if IDLE in others:  # first, while nobody has memory left over from other work
                self.done(idle_memory(systems, program, options.idle, progress))
            for scenario in scenarios:
                self.done(compare(systems, that_fit(scenario), program, options.turns, options.seconds, progress))
            if FAIRNESS in others:
                self.done(fairness(systems, program, options.turns, options.seconds, progress))
            for name, measured in ((CALLS, system_calls), (WHERE, where_it_goes)):
                if name in others:
                    try:
                        self.done(measured(systems, program, self.directory, progress))
                    except BenchError as err:
                        print(f"left out: {err}", file=sys.stderr)
            insist(systems[0].name, self.document)
        finally:
            stop_systems(systems)


def insist(subject: str, document: dict[str, Any]) -> None:
    """Raise BenchError when there is a scenario in which nothing was measured of ``subject``."""
    missing = [record["name"] for record in document["scenarios"] if subject not in record.get("systems", (subject,))]
    if subject == "gatekeeper" and missing:
        raise BenchError(f"nothing was measured of gatekeeper in {', '.join(missing)}; see --keep for what it says")


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 3 when the comparison could not be made."""
    options = parser().parse_args(argv)
    if options.write_docs and (options.only or options.no_gatekeeper or options.gatekeeper or options.worker_alone):
        parser().error("--write-docs is for a run of everything: all figures of the page are of one run")
    if options.worker_alone:
        options.gatekeeper = f"{shlex.quote(sys.executable)} {WORKER_ALONE}"
    raise_file_limit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with us
    directory = options.keep or tempfile.mkdtemp(prefix="gatekeeper-bench-")
    os.makedirs(directory, exist_ok=True)
    try:
        if options.source:
            with open(options.source) as file:
                document = json.load(file)
            print("\n\n".join([heading(document), *map(scenario_table, document["scenarios"])]))
        else:
            document = Run(options, compile_load(directory), directory).measure()
        if options.json:
            write_json(document, options.json)
        if options.write_docs:
            print("\nwritten: " + ", ".join(write_documents(document)))
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    finally:
        if not options.keep:
            shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
