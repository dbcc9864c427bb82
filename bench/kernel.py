"""Refused by the kernel, and guarded where it is: beside HAProxy, and beside no firewall at all.

    python -m bench.kernel [--turns N] [--only NAME,...] [--json FILE]

Each system has a network namespace of its own, with a backend and a load generator in it: a program that judges in one
would be asked about everybody's connections. It takes root. `python -m bench --only kernel` runs it with the rest.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from bench import verdict
from bench.document import DOCS, fill
from bench.native import Backend, Generator, compile_load
from bench.peers import HOME, System, output, ports_for, raise_file_limit, start, start_direct, start_haproxy, write
from bench.processes import BenchError
from bench.report import heading, machine, scenario_table
from bench.scenarios import GUARDED, KERNEL, KERNEL_TABLE, REFUSED_BY_KERNEL, Scenario
from bench.turns import compare
from gatekeeper.kernel import bpf, layout
from gatekeeper.kernel.judge import Common, Judge
from gatekeeper.kernel.search import levels_v4, levels_v6
from gatekeeper.policy.model import Action, Policy
from gatekeeper.policy.ranges import AddressSet
from gatekeeper.snapshot.bindings import Bindings
from gatekeeper.snapshot.reader import Snapshot

NETWORKS = (1, 1_000, 100_000, 1_000_000)
RULES = 1000
STRANGERS_S, STRANGERS_TURNS = 0.2, 9  # of connections from random sources, per table
SWAPS = 15
PORT = 80  # of the policies of `verdict`
_CLONE_NEWNET = 0x40000000

class Net:
    """A network namespace, which ends with `close`: what is started `inside` lives there."""

    def __init__(self, local: str = "") -> None:
        """Make it. All addresses of ``local`` are at home there, beside loopback's.

        Raises:
            BenchError: we may not.
        """
        self._thread = ThreadPoolExecutor(1)
        self.inside(self._enter, local)

    def inside(self, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call ``work`` there and return what it returns."""
        return self._thread.submit(work, *arguments, **named).result()

    def close(self) -> None:
        self._thread.shutdown()

    def _enter(self, local: str) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
            raise BenchError(f"no network namespace can be made ({os.strerror(ctypes.get_errno())}): it takes root")
        for command in ("link set lo up", *([f"route add local {local} dev lo"] if local else [])):
            subprocess.run(["ip", *command.split()], check=True)


def rules(listeners: str, directory: str, metrics: int) -> str:
    """A rule file with 1,000 rules, of which the last decides what is sent here."""
    many = "\n".join(
        f"  - {{name: net-{i:04}, action: {('allow', 'deny', 'drop')[i % 3]}, from: 10.{i // 200}.{i % 200}.0/24}}"
        for i in range(RULES - 1)
    )
    return f"""version: 1
workers: 1
kernel: require
metrics: {{listen: 127.0.0.1:{metrics}}}
audit: {directory}/audit.log
listeners:
{listeners}
default: deny
rules:
{many}
  - {{name: served, action: allow, from: 127.0.0.0/8, to: [streams]}}
"""


def start_gatekeeper(backend: Backend, directory: str, *, guard: bool) -> System:
    """Start it with the kernel's part: in front of ``backend``, or with ``backend`` itself under its policy."""
    ports = ports_for("tcp", "refused", "metrics")
    if guard:
        ports["tcp"] = backend.tcp
        listeners = f"  - {{name: streams, listen: 127.0.0.1:{backend.tcp}, path: guard, on_exit: open}}"
    else:
        listeners = f"""  - {{name: streams, listen: 127.0.0.1:{ports["tcp"]}, backend: 127.0.0.1:{backend.tcp}}}
  - {{name: refused, listen: 127.0.0.1:{ports["refused"]}, backend: 127.0.0.1:{backend.tcp}}}"""
    path = write(directory, "gatekeeper.yaml", rules(listeners, directory, ports["metrics"]))
    said = os.path.join(directory, "gatekeeper.out")

    def ready() -> bool:
        with open(said) as file:
            return "serving" in file.read()

    process = start("gatekeeper", [sys.executable, "-m", "gatekeeper", "run", path], directory, ports["tcp"], HOME, ready)
    roles = frozenset({"supervisor", "worker", "observer"})
    told = "import gatekeeper, platform; print(gatekeeper.__version__, 'on Python', platform.python_version())"
    return System("gatekeeper", output(sys.executable, "-c", told), backend, ports, process, roles)


class Stage:
    """The systems of one comparison, each in a namespace of its own. Owns them."""

    def __init__(self, program: str, directory: str) -> None:
        self.systems: list[System] = []
        self._program = program
        self._directory = directory
        self._nets: list[Net] = []

    def add(self, name: str, starter: Callable[[Backend, str], System]) -> None:
        """Start one. One that is not installed is named and left out, unless it is ours."""
        net = Net()
        self._nets.append(net)
        backend = net.inside(Backend, self._program)
        place = os.path.join(self._directory, name)
        os.makedirs(place, exist_ok=True)
        try:
            system = net.inside(starter, backend, place)
        except BenchError as err:
            backend.close()
            if name.startswith("gatekeeper"):
                raise
            print(f"left out: {err}", file=sys.stderr)
            return
        system.name, system.inside = name, net.inside
        self.systems.append(system)

    def close(self) -> None:
        for system in self.systems:
            system.close()
        for net in self._nets:
            net.close()


def comparisons(
    program: str, directory: str, rounds: int, seconds: float, wanted: list[str], progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the records of the scenarios that are wanted."""
    records = []
    scenarios: list[tuple[Scenario, list[tuple[str, Callable[[Backend, str], System]]]]] = [
        (REFUSED_BY_KERNEL, [
            ("gatekeeper", lambda backend, place: start_gatekeeper(backend, place, guard=False)),
            ("haproxy", lambda backend, place: start_haproxy(backend, place, 1)),
        ]),
        *((one, [
            ("gatekeeper guard", lambda backend, place: start_gatekeeper(backend, place, guard=True)),
            ("direct", lambda backend, place: start_direct(backend, place, 1)),
            ("haproxy", lambda backend, place: start_haproxy(backend, place, 1)),
        ]) for one in GUARDED),
    ]  # fmt: skip
    for scenario, starters in scenarios:
        if scenario.name not in wanted:
            continue
        stage = Stage(program, os.path.join(directory, scenario.name))
        try:
            for name, starter in starters:
                stage.add(name, starter)
            records.append(compare(stage.systems, scenario, program, rounds, seconds, progress))
            records[-1]["versions"] = {system.name: system.version for system in stage.systems if system.version}
            records[-1]["load_average"] = os.getloadavg()[0]
        finally:
            stage.close()
    return records


def tables(program: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Return the record of programs over tables of several sizes: loading, swapping, memory, and the time of a verdict.

    ``verdict_ns``: while connections from random sources arrive as fast as one generator makes them, everything that it
    takes included, the median of some turns (``best_ns``: the best); ``hot_ns``: the same source again and again.
    """
    dice = random.Random(verdict.SEED)
    net = Net("0.0.0.0/0")
    common, sizes = net.inside(Common), []
    measuring = bpf.measuring()
    namespace = net.inside(os.open, "/proc/thread-self/ns/net", os.O_RDONLY)
    generator: Generator | None = None
    try:
        for size in NETWORKS:
            progress(f"{KERNEL_TABLE}: {size:,} networks")
            both = replace(verdict.policy(size, dice), default=Action.DENY)
            snapshot, six = verdict.shared(only(both, 4)), verdict.shared(only(both, 6))
            bindings = Bindings().bind(1, snapshot.meta)
            link = -1

            def load(snapshot: Snapshot = snapshot, bindings: Bindings = bindings) -> Judge:
                return Judge(snapshot, bindings.details, bindings.rows, common)

            loads, swaps, loads_v6 = [], [], []
            judge = load()
            link = bpf.attach(judge.program, namespace)
            for _ in range(SWAPS):
                loaded, loading = timed(load)
                _, swapping = timed(functools.partial(bpf.swap, link, loaded.program))
                judge.close()
                judge = loaded
                other, loading_v6 = timed(functools.partial(load, six))
                other.close()
                loads.append(loading)
                swaps.append(swapping)
                loads_v6.append(loading_v6)
            program_fd = judge.program
            generator = net.inside(Generator, program, "strangers", PORT, 1)
            turns, rates = [], []
            for _ in range(STRANGERS_TURNS):
                before_ns, before_runs = bpf.run_time(program_fd)
                result = generator.turn(STRANGERS_S)
                after_ns, after_runs = bpf.run_time(program_fd)
                turns.append((after_ns - before_ns) / max(after_runs - before_runs, 1))
                rates.append(result.units / result.seconds)
            generator.close()
            context = struct.pack(
                "=QII4s16sHxx4s16sIII", 0, socket.AF_INET, socket.IPPROTO_TCP, bytes((10, 1, 2, 3)), b"", 0,
                bytes((127, 0, 0, 1)), b"", PORT, 0, 0,
            )  # fmt: skip
            sizes.append({
                "networks": size, "instructions": judge.instructions,
                "load_ms": 1e3 * statistics.median(loads), "load_v6_ms": 1e3 * statistics.median(loads_v6),
                "swap_ms": 1e3 * statistics.median(swaps),
                "memory_mb": memory_mb(snapshot)["v4"], "memory_v6_mb": memory_mb(six)["v6"],
                "verdict_ns": statistics.median(turns), "best_ns": min(turns), "refused_per_s": statistics.median(rates),
                "hot_ns": bpf.try_out(program_fd, context, 100_000)[2],
            })  # fmt: skip
            os.close(link)
            judge.close()
    finally:
        common.close()
        os.close(measuring)
        os.close(namespace)
        net.close()
    title = "programs over tables of isolated networks, IPv4 unless it says IPv6"
    return {"name": KERNEL_TABLE, "title": title, "sizes": sizes}


def only(policy: Policy, family: int) -> Policy:
    """Return the policy with the networks of one family."""
    (rule,) = policy.rules
    addresses = rule.sources.included
    kept = AddressSet(addresses.v4, AddressSet.EMPTY.v6) if family == 4 else AddressSet(AddressSet.EMPTY.v4, addresses.v6)
    return replace(policy, rules=(replace(rule, sources=replace(rule.sources, included=kept)),))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what ``work`` returns, and how many seconds it took."""
    before = time.perf_counter()
    made = work()
    return made, time.perf_counter() - before


def memory_mb(snapshot: Snapshot) -> dict[str, float]:
    """Return what the maps of each family take, as the kernel accounts for it."""
    found = {"v4": 0.0, "v6": 0.0}
    for name, fd in layout.tables(snapshot, levels_v4(len(snapshot.v4)), levels_v6(len(snapshot.v6_class))):
        with open(f"/proc/self/fdinfo/{fd}") as file:
            (line,) = [line for line in file if line.startswith("memlock:")]
        found[name[:2]] += int(line.split()[1]) / 1e6
        os.close(fd)
    return found


def measure(
    program: str, directory: str, rounds: int, seconds: float, wanted: list[str], progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return all records that are wanted, as far as they can be had here."""
    records = comparisons(program, directory, rounds, seconds, wanted, progress)
    if KERNEL_TABLE in wanted:
        records.append(tables(program, progress) | {"load_average": os.getloadavg()[0]})
    return records


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel", description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--only", metavar="NAME,...", default=",".join(KERNEL), help=", ".join(KERNEL))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/kernel.md")
    options = parser.parse_args()
    raise_file_limit()
    document: dict[str, Any] = {
        "machine": machine(), "versions": {}, "settings": {"turns": options.turns, "seconds": options.seconds},
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="gatekeeper-bench-") as directory:
            os.chmod(directory, 0o755)
            program = compile_load(directory)
            records = measure(program, directory, options.turns, options.seconds, options.only.split(","), lambda _text: None)
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 3
    for record in records:
        document["versions"] |= record.get("versions", {})
    print(heading(document))
    for record in records:
        print("\n" + scenario_table(record))
    document["scenarios"] = records
    if options.json:
        with open(options.json, "w") as file:
            json.dump(document, file, indent=1)
    if options.write_docs:
        page = os.path.join(DOCS, "kernel.md")
        with open(page) as file:
            text = fill(file.read(), document)
        with open(page, "w") as file:
            file.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
