"""The measurements as a table for people and as one JSON document."""

from __future__ import annotations

import datetime as dt
import os
import platform
import sys
import sysconfig
from typing import Any


def machine() -> dict[str, Any]:
    """What these figures were measured on."""
    model = "unknown"
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": interpreter(),
        "load_average": os.getloadavg()[0],
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def interpreter() -> dict[str, Any]:
    """The Python that runs gatekeeper and this: ``{"version", "executable", "built", "optimized"}``.

    Debian and Ubuntu build theirs with `make profile-opt`, which the recorded arguments of configure do not tell.
    """
    profiled = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    packaged = sys.base_prefix == "/usr"
    built = (
        "--enable-optimizations"
        if profiled
        else "by the distribution"
        if packaged
        else "without --enable-optimizations"
    )
    where = os.path.realpath(sys.executable)
    return {
        "version": platform.python_version(),
        "executable": where,
        "built": built,
        "optimized": profiled or packaged,
    }


def _columns(rows: list[list[str]]) -> list[str]:
    first, *others = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        aligned = [
            cell.rjust(width) if width < 70 else cell
            for cell, width in zip(cells, others, strict=True)  # no prose
        ]
        lines.append("  ".join(["  " + name.ljust(first), *aligned]).rstrip())
    return lines


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def ratio(figures: dict[str, float] | None) -> str:
    """Median and spread."""
    return f"{figures['median']:.3f} [{figures['p10']:.2f}-{figures['p90']:.2f}]" if figures else ""


def _idle(record: dict[str, Any]) -> list[list[str]]:
    rows = [["", "KiB/session (Pss)", "private", "without sessions, MiB"]]
    for name, figures in record["systems"].items():
        pss, private, base = figures["pss"] / 1024, figures["private"] / 1024, figures["base_pss"] / (1 << 20)
        rows.append([name, f"{pss:.2f}", f"{private:.2f}", f"{base:.1f}"])
    return rows


def _fairness(record: dict[str, Any]) -> list[list[str]]:
    rows = [["", "p50 µs", "p99 µs", "beside: p50", "p99", "p99 with ÷ without", "round trips/s", "bulk GB/s",
             f"p99 of {record['subject']} ÷ it"]]  # fmt: skip
    for name, figures in record["systems"].items():
        keys = ("p50_us", "p99_us", "beside_p50_us", "beside_p99_us")
        row = [number(figures[key]["median"]) for key in keys]
        bulk = number(figures["bulk"]["median"] / 1e9)
        rate = number(figures["beside_rate"]["median"])
        rows.append([name, *row, ratio(figures["times"]), rate, bulk, ratio(record["ratios"].get(name))])
    return rows


def _calls(record: dict[str, Any]) -> list[list[str]]:
    rows = [["", "calls", "of them failed", "which"]]
    for name, figures in record["systems"].items():
        listed = ", ".join(f"{call} {count:.2f}" for call, count in figures["by_name"].items())
        rows.append([name, f"{figures['calls']:.1f}", f"{figures['failed']:.2f}", listed])
    return rows


def _where(record: dict[str, Any]) -> list[list[str]]:
    kinds = list(next(iter(record["systems"].values()))["shares"])
    rows = [["", "µs", *kinds, "in the kernel"]]
    for name, figures in record["systems"].items():
        shares = figures["shares"]
        parts = [f"{figures['cpu_us'] * shares[kind]:.1f}" for kind in kinds]
        rows.append([name, f"{figures['cpu_us']:.1f}", *parts, f"{100 * (1 - shares[kinds[0]]):.0f} %"])
    return rows


def _load(record: dict[str, Any]) -> list[list[str]]:
    rows = [["", "order", "wall s, median", "best", "CPU s, best", "peak MiB"]]
    for run in record["runs"]:
        cells = [f"{run[key]:.2f}" for key in ("wall_s", "best_s", "cpu_s")]
        rows.append([run["program"], run["order"], *cells, f"{run['peak_mib']:.0f}"])
    return rows


def _verdict(record: dict[str, Any]) -> list[list[str]]:
    rows = [["networks", "IPv4 µs", "IPv6 µs"]]
    rows += [[f"{one['networks']:,}", f"{one['v4_us']:.2f}", f"{one['v6_us']:.2f}"] for one in record["sizes"]]
    return rows


def _kernel_table(record: dict[str, Any]) -> list[list[str]]:
    rows = [["networks", "verdict ns", "best turn", "same source again", "load ms", "swap ms", "MB", "instructions", "IPv6: load ms", "MB"]]
    for one in record["sizes"]:
        times = [f"{one[key]:.0f}" for key in ("verdict_ns", "best_ns", "hot_ns")]
        program = [f"{one['load_ms']:.1f}", f"{one['swap_ms']:.3f}", f"{one['memory_mb']:.1f}", str(one["instructions"])]
        rows.append([f"{one['networks']:,}", *times, *program, f"{one['load_v6_ms']:.1f}", f"{one['memory_v6_mb']:.1f}"])
    return rows


ROWS = {"kernel-table": _kernel_table, "idle": _idle, "fairness": _fairness, "syscalls": _calls, "where": _where, "load": _load, "verdict": _verdict}


def scenario_table(record: dict[str, Any]) -> str:
    """One scenario: a row for each system; the last columns are the first system's cost over that system's."""
    if record["name"] in ROWS:
        return "\n".join([f"{record['name']}: {record['title']}", *_columns(ROWS[record["name"]](record))])
    scale, unit = (1000, "ms") if record["unit"] == "GB" else (1, "µs")
    subject = record["subject"]
    rated = not all(record["ratios"].get(name) for name in record["systems"] if name != subject)
    header = [f"CPU {unit}/{record['unit']}", "whole machine", "rate/s", "p50 µs", "p99 µs", "lost", "errors", "cores"]
    rows = [["", *header, f"{subject} ÷ it [p10-p90]", "machine", *(["rate"] if rated else [])]]
    for name, figures in record["systems"].items():
        cpu, whole = figures["cpu_us"], figures["machine_us"]
        medians = [number(figures[key]["median"]) for key in ("rate", "p50_us", "p99_us")]
        counts = [str(figures["lost"]), str(figures["errors"]), f"{figures['cores']['median']:.2f}"]
        machine_ratio = record["machine_ratios"].get(name)
        rows.append([
            name, number(cpu["median"] / scale), number(whole["median"] / scale), *medians, *counts,
            ratio(record["ratios"].get(name)), f"{machine_ratio['median']:.3f}" if machine_ratio else "",
            *([ratio(record["rate_ratios"].get(name))] if rated else []),
        ])  # fmt: skip
    lines = [f"{record['name']}: {record['title']}", *_columns(rows)]
    shares = record["systems"].get(subject, {}).get("shares", {})
    if len(shares) > 1:
        parts = [f"{what} {number(share / scale)}" for what, share in shares.items()]
        lines.append(f"  {subject} by process, CPU {unit}/{record['unit']}: {', '.join(parts)}")
    for name, count in record["left_out"].items():
        lines.append(
            f"  {count} turns of {name} left out: nothing came back, or one of its processes ended or was missing"
        )
    itself = record.get("nginx_to_itself")
    if itself:
        lines.append(f"  nginx ÷ nginx again: {ratio(itself)}")
        if not 0.98 <= itself["median"] <= 1.03:
            lines[-1] += "   (outside 0.98-1.03: the machine is too restless, use more turns)"
    return "\n".join(lines)


def heading(document: dict[str, Any]) -> str:
    """Versions, machine and settings."""
    box = document["machine"]
    python = box["python"]
    versions = ", ".join(f"{name} {version}".strip() for name, version in document["versions"].items())
    settings = document["settings"]
    hardware = f"{box['cpu']}, {box['cores']} cores, {box['kernel']}, load {box['load_average']:.2f}"
    lines = [
        versions,
        f"Python {python['version']}, {python['executable']}, built {python['built']}",
        f"{hardware}; {settings['turns']} rounds of {settings['seconds']} s turns",
    ]
    if not python["optimized"]:
        lines.append(
            "warning: this Python is not optimized, which costs about a tenth; a distribution's own is (/usr/bin/python3)"
        )
    return "\n".join(lines)
