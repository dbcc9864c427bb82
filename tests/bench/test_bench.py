"""The benchmark's own parts: its load arrives whole, its ratios are those of neighbouring turns."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from bench.native import Backend, Generator, compile_load
from bench.scenarios import SCENARIOS
from bench.turns import AGAIN, Turn, record

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
