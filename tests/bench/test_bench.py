"""The benchmark's own parts: its load arrives whole, its ratios are those of neighbouring turns."""

from __future__ import annotations

import json
import os
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.document import BLOCKS, PAGES, fill, write_documents
from bench.native import Backend, Generator, compile_load
from bench.report import heading, interpreter, machine
from bench.run import parser
from bench.scenarios import GROWTH, SCENARIOS
from bench.syscalls import per_connection
from bench.turns import AGAIN, Turn, record
from bench.where import OWN, count_kinds

MIB = 1 << 20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the compiled load generator."""
    return compile_load(str(tmp_path_factory.mktemp("load")))


@pytest.fixture
def backend(program: str) -> Iterator[Backend]:
    """Return a running backend."""
    started = Backend(program)
    yield started
    started.close()


@pytest.mark.needs("gcc")
@pytest.mark.parametrize(
    ("mode", "clients", "at_most"),
    [
        ("connect-close", 4, 200),
        ("round-trip", 5, 200),
        ("up", 2, 8 * MIB),
        ("down", 2, 8 * MIB),
        ("both", 2, 8 * MIB),
        ("udp", 5, 200),
    ],
)
def test_a_turn_ends_when_its_units_are_done_and_all_of_them_came_back(
    program: str, backend: Backend, mode: str, clients: int, at_most: int
) -> None:
    """Each kind of load does exactly what it was bounded to, loses nothing, and does so again in the next turn."""
    generator = Generator(program, mode, backend.udp if mode == "udp" else backend.tcp, clients)
    try:
        for _ in range(2):
            result = generator.turn(10, at_most)
            expected = 2 * at_most if mode == "both" else at_most
            assert (result.units, result.lost, result.errors) == (expected, 0, 0)
            assert 0 < result.p50_us <= result.p99_us
    finally:
        generator.close()


@pytest.mark.needs("gcc")
def test_a_closed_port_counts_as_refused(program: str, backend: Backend) -> None:
    """A refusal at the handshake is a unit of `refused`."""
    port = backend.tcp
    backend.close()
    generator = Generator(program, "refused", port, 4)
    try:
        assert generator.turn(10, 100).units == 100
    finally:
        generator.close()


@pytest.mark.needs("gcc")
@pytest.mark.parametrize("target", ["192.0.2.1:80", "128.0.0.1:80", "127.0.0.1", "localhost:80"])
def test_only_loopback_is_ever_loaded(program: str, target: str) -> None:
    """Anything but 127.0.0.0/8 is bad usage."""
    done = subprocess.run([program, "connect-close", target, "1"], capture_output=True, text=True, timeout=10)
    assert done.returncode == 2
    assert "is not 127.x.y.z:port" in done.stderr


def turn(cpu_us: float, units: float = 1000) -> Turn:
    """Return a turn that cost this much."""
    return Turn(cpu_us, 2 * cpu_us, 1000.0, 1.0, 2.0, 0, 0, units, 0.5, {"worker": cpu_us})


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that doubles its speed between rounds changes no ratio, and a round without a result is left out."""
    taken: dict[str, list[Turn | None]] = {
        "gatekeeper": [turn(90), turn(45), turn(9), None],
        "nginx": [turn(100), turn(50), turn(10), turn(10)],
        AGAIN: [turn(100), turn(50), turn(10), None],
    }
    document = record(SCENARIOS[0], taken)
    assert document["ratios"]["nginx"] == {"median": 0.9, "p10": 0.9, "p90": 0.9}
    assert document["machine_ratios"]["nginx"]["median"] == 0.9
    assert document["nginx_to_itself"]["median"] == 1.0
    assert document["systems"]["nginx"]["turns"] == 4


@pytest.mark.needs("gcc")
def test_backends_listen_where_no_client_gets_its_port(backend: Backend) -> None:
    """As services do: gatekeeper looks twice at backends whose port a dial may get as its own."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        lowest = int(file.read().split()[0])
    assert backend.tcp < lowest
    assert backend.udp < lowest


def measured() -> dict[str, Any]:
    """Return a document with one round of each scenario that takes turns."""
    taken: dict[str, list[Turn | None]] = {"gatekeeper": [turn(90)], "nginx": [turn(100)], "haproxy": [turn(80)]}
    records = [{**record(scenario, taken), "load_average": 0.0} for scenario in SCENARIOS]
    settings = {"turns": 1, "seconds": 0.2}
    return {"machine": machine(), "versions": {"gatekeeper": "1"}, "settings": settings, "scenarios": records}


def test_a_page_gets_what_was_measured_and_keeps_the_rest(tmp_path: Path) -> None:
    """Tables appear between their markers, plots beside the page; a block without figures stays, and so does all else."""
    page = tmp_path / "performance.md"
    page.write_text(
        "before\n<!-- measured: costs -->\nold\n<!-- end -->\nbetween\n<!-- measured: idle -->\nolder\n<!-- end -->\nafter\n"
    )
    written = write_documents(measured(), str(tmp_path))
    before, _, after = page.read_text().partition("between")
    assert before.startswith("before\n<!-- measured: costs -->\n| work | CPU | gatekeeper | haproxy | nginx |")
    assert "| connect-close | µs/connection | 90.0 | 80.0 | 100.0 | 1.125 [1.12-1.12] | 0.900 [0.90-0.90] |" in before
    assert after == "\n<!-- measured: idle -->\nolder\n<!-- end -->\nafter\n"
    drawn = {os.path.basename(path) for path in written if path.endswith(".svg")}
    assert drawn == {"ratios.svg", "growth-connect-close.svg", "growth-round-trip-50.svg"}
    for name in drawn:
        assert ET.parse(tmp_path / "performance" / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    again = json.loads((tmp_path / "performance" / "measured.json").read_text())
    assert fill(page.read_text(), again) == page.read_text()


def test_every_table_of_the_page_can_be_measured() -> None:
    """The markers of the pages are those that a run fills, and no table lacks a place."""
    docs = Path(__file__).parents[2] / "docs"
    lines = [line for name in PAGES for line in (docs / name).read_text().splitlines()]
    marked = [line[15:-4] for line in lines if line.startswith("<!-- measured: ")]
    assert sorted(marked) == sorted([*BLOCKS, *["machine"] * len(PAGES)])


def test_a_group_stands_for_its_scenarios() -> None:
    """`--only growth` runs all of them."""
    assert parser().parse_args(["--only", "growth,refused"]).only == [*(one.name for one in GROWTH), "refused"]


def test_an_interpreter_that_is_not_optimized_is_said() -> None:
    """Its build costs as much as a peer is ahead."""
    document = measured()
    document["machine"]["python"] = interpreter() | {"optimized": False}
    assert "warning: this Python is not optimized" in heading(document)
    document["machine"]["python"]["optimized"] = True
    assert "warning" not in heading(document)


def test_system_calls_are_counted_by_connection() -> None:
    """The summary of strace, with and without errors, and its total line."""
    table = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.000600           1       400       100 read
 40.00    0.000400           2       200           close
------ ----------- ----------- --------- --------- ----------------
100.00    0.001000           1       600       100 total
"""
    counted = per_connection(table, 100)
    assert counted == {"calls": 6.0, "failed": 1.0, "by_name": {"read": 4.0, "close": 2.0}}


def test_samples_belong_to_the_outermost_system_call() -> None:
    """What the network does inside a close is the price of that close; no kernel function means own code."""
    lines = """python3
\tffff81 tcp_ack ([kernel.kallsyms])
\tffff82 __x64_sys_close ([kernel.kallsyms])
\tffff83 do_syscall_64 ([kernel.kallsyms])

python3
\tffff81 vfs_read ([kernel.kallsyms])
\tffff82 ksys_read ([kernel.kallsyms])

python3
\t5555 _PyEval_EvalFrameDefault (/usr/bin/python3.11)

python3
\tffff83 sysvec_apic_timer_interrupt ([kernel.kallsyms])
"""
    assert count_kinds(lines.splitlines()) == {"close": 1, "receive": 1, OWN: 1, "other": 1}
