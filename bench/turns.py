"""Systems take turns of a fraction of a second, because the speed of a shared machine wanders within seconds.

Every round each system has one turn; the order rotates and its direction alternates. Ratios are taken within a round, then their median over the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.native import Generator
from bench.peers import System
from bench.processes import cpu_ns, memory_bytes, role, settle, ticks
from bench.scenarios import Scenario

AGAIN = "nginx again"  # a second turn of nginx in every round: how far the method can be trusted


@dataclass(frozen=True, slots=True)
class View:
    """A system by the port that is driven: HAProxy with forced splice is the same process at another port."""

    name: str
    system: System
    port: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn. CPU in microseconds per unit of the table: of the system, and of generator, system and backend together."""

    cpu_us: float
    machine_us: float
    rate: float
    p50_us: float
    p99_us: float
    lost: int
    errors: int
    units: float
    cores: float  # how many cores the system kept busy
    shares: dict[str, float]  # cpu_us by what the process is
    ticks: tuple[int, int] = (0, 0)  # of the system, in user space and in the kernel


def views(systems: Sequence[System], scenario: Scenario) -> list[View]:
    """Who takes part in ``scenario``: systems without that kind of port do not."""
    found = []
    for system in systems:
        if scenario.port in system.ports:
            found.append(View(system.name, system, system.ports[scenario.port]))
        if scenario.bulk and "splice" in system.ports:
            found.append(View(f"{system.name} splice", system, system.ports["splice"]))
        if system.name == "nginx" and scenario.port in system.ports and not scenario.idle:
            found.append(View(AGAIN, system, system.ports[scenario.port]))
    return found


def take_turn(view: View, generator: Generator, scenario: Scenario, seconds: float) -> Turn | None:
    """Drive ``view`` once; None when nothing at all was done, or when processes of the system came, went or were missing."""
    own = view.system.pids()
    others = [generator.process.pid, view.system.backend.process.pid]
    before_ticks = ticks(own)
    before_own, before_others = {pid: cpu_ns([pid]) for pid in own}, cpu_ns(others)
    result = generator.turn(seconds)
    settle(own + others)
    if view.system.pids() != own or not view.system.roles <= {role(pid) for pid in own}:
        return None
    shares: dict[str, float] = {}
    for pid in own:
        shares[role(pid)] = shares.get(role(pid), 0.0) + cpu_ns([pid]) - before_own[pid]
    spent = sum(shares.values())
    everything = spent + cpu_ns(others) - before_others
    units = result.units / scenario.per
    if not units:
        return None
    return Turn(
        cpu_us=spent / 1000 / units,
        machine_us=everything / 1000 / units,
        rate=units / result.seconds,
        p50_us=result.p50_us,
        p99_us=result.p99_us,
        lost=result.lost,
        errors=result.errors,
        units=units,
        cores=spent / 1e9 / result.seconds,
        shares={what: share / 1000 / units for what, share in shares.items()},
        ticks=(ticks(own)[0] - before_ticks[0], ticks(own)[1] - before_ticks[1]),
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the values below which a tenth and nine tenths lie."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
    }


def compare(
    systems: Sequence[System],
    scenario: Scenario,
    program: str,
    rounds: int,
    seconds: float,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Run ``scenario``; return its record for the JSON document.

    ``systems[name]`` holds the spread of each figure over the turns; ``ratios[name]`` holds the CPU of the first system over that of
    ``name`` within each round, likewise ``machine_ratios`` for generator, system and backend together, and ``rate_ratios``.
    """
    taking_part = views(systems, scenario)
    generators: dict[str, Generator] = {}
    beside: list[Generator] = []
    taken: dict[str, list[Turn | None]] = {view.name: [] for view in taking_part}
    try:
        for view in taking_part:
            if view.name != AGAIN:
                if scenario.idle:
                    progress(f"{scenario.name}: {scenario.idle} sessions through {view.name}")
                    beside.append(view.system.inside(Generator, program, "idle", view.port, scenario.idle))
                generators[view.name] = view.system.inside(
                    Generator, program, scenario.mode, view.port, scenario.clients, scenario.size
                )
        for view in taking_part:  # nobody's first turn counts
            if view.name != AGAIN:
                take_turn(view, generators[view.name], scenario, seconds)
        for turn in range(rounds):
            progress(f"{scenario.name}: round {turn + 1} of {rounds}")
            first = (turn // 2) % len(taking_part)
            order = taking_part[first:] + taking_part[:first]
            for view in order if turn % 2 == 0 else reversed(order):
                generator = generators["nginx" if view.name == AGAIN else view.name]
                taken[view.name].append(take_turn(view, generator, scenario, seconds))
    finally:
        for generator in [*generators.values(), *beside]:
            generator.close()
    return record(scenario, taken)


def record(scenario: Scenario, taken: dict[str, list[Turn | None]]) -> dict[str, Any]:
    """Spreads and ratios of the turns; ``taken[name]`` has one entry a round."""
    subject = next(iter(taken), None)
    document: dict[str, Any] = asdict(scenario)
    document.update(subject=subject, systems={}, ratios={}, machine_ratios={}, rate_ratios={}, left_out={})
    for name, turns in taken.items():
        done = [turn for turn in turns if turn]
        if len(done) < len(turns):
            document["left_out"][name] = len(turns) - len(done)
        if not done:
            continue
        figures: dict[str, Any] = {
            key: spread([getattr(turn, key) for turn in done])
            for key in ("cpu_us", "machine_us", "rate", "p50_us", "p99_us", "cores")
        }
        units = sum(turn.units for turn in done)
        figures.update(
            turns=len(done), units=units, lost=sum(turn.lost for turn in done), errors=sum(turn.errors for turn in done)
        )
        roles = dict.fromkeys(what for turn in done for what in turn.shares)
        figures["shares"] = {what: statistics.median(turn.shares.get(what, 0.0) for turn in done) for what in roles}
        user, kernel = (sum(turn.ticks[i] for turn in done) for i in range(2))
        figures["kernel_share"] = kernel / (user + kernel) if user + kernel else None
        document["systems"][name] = figures
        pairs = [(ours, theirs) for ours, theirs in zip(taken[subject or ""], turns, strict=True) if ours and theirs]
        if name != subject and pairs:
            if all(theirs.cpu_us for _ours, theirs in pairs):  # the direct way has no process of its own
                document["ratios"][name] = spread([ours.cpu_us / theirs.cpu_us for ours, theirs in pairs])
            document["rate_ratios"][name] = spread([ours.rate / theirs.rate for ours, theirs in pairs])
            document["machine_ratios"][name] = spread([ours.machine_us / theirs.machine_us for ours, theirs in pairs])
    if AGAIN in taken:
        itself = [one.cpu_us / two.cpu_us for one, two in zip(taken["nginx"], taken[AGAIN], strict=True) if one and two]
        document["nginx_to_itself"] = spread(itself) if itself else None
    return document


def idle_memory(
    systems: Sequence[System], program: str, sessions: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Memory per idle session, in bytes: all processes of a system with ``sessions`` open ones, minus before."""
    figures: dict[str, Any] = {}
    for system in systems:
        if not system.process:
            continue
        progress(f"idle: {sessions} sessions through {system.name}")
        Generator(program, "idle", system.ports["tcp"], 50).close()  # what the first sessions allocate once
        settle(system.pids())
        before = memory_bytes(system.pids())
        generator = Generator(program, "idle", system.ports["tcp"], sessions)
        try:
            settle(system.pids())
            after = memory_bytes(system.pids())
        finally:
            generator.close()
        settle(system.pids())
        figures[system.name] = {key: (after[key] - before[key]) / sessions for key in after} | {
            "base_pss": before["pss"]
        }
    return {"name": "idle", "title": f"memory of {sessions} idle sessions", "sessions": sessions, "systems": figures}
