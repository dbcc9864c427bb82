"""The measurements as a table for people and as one JSON document."""

from __future__ import annotations

import datetime as dt
import os
import platform
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
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def _columns(rows: list[list[str]]) -> list[str]:
    first, *others = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, others, strict=True)]
        lines.append("  ".join(["  " + name.ljust(first), *aligned]).rstrip())
    return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _ratio(figures: dict[str, float] | None) -> str:
    return f"{figures['median']:.3f} [{figures['p10']:.2f}-{figures['p90']:.2f}]" if figures else ""


def scenario_table(record: dict[str, Any]) -> str:
    """One scenario: a row for each system; the last columns are the first system's cost over that system's."""
    if record["name"] == "idle":
        rows = [["", "KiB/session (Pss)", "private", "without sessions, MiB"]]
        for name, figures in record["systems"].items():
            pss, private, base = figures["pss"] / 1024, figures["private"] / 1024, figures["base_pss"] / (1 << 20)
            rows.append([name, f"{pss:.2f}", f"{private:.2f}", f"{base:.1f}"])
        return "\n".join([f"idle: {record['title']}", *_columns(rows)])
    scale, unit = (1000, "ms") if record["unit"] == "GB" else (1, "µs")
    subject = record["subject"]
    header = [f"CPU {unit}/{record['unit']}", "whole machine", "rate/s", "p50 µs", "p99 µs", "lost", "errors", "cores"]
    rows = [["", *header, f"{subject} ÷ it [p10-p90]", "machine"]]
    for name, figures in record["systems"].items():
        cpu, whole = figures["cpu_us"], figures["machine_us"]
        medians = [_number(figures[key]["median"]) for key in ("rate", "p50_us", "p99_us")]
        counts = [str(figures["lost"]), str(figures["errors"]), f"{figures['cores']['median']:.2f}"]
        machine_ratio = record["machine_ratios"].get(name)
        rows.append([
            name, _number(cpu["median"] / scale), _number(whole["median"] / scale), *medians, *counts,
            _ratio(record["ratios"].get(name)), f"{machine_ratio['median']:.3f}" if machine_ratio else "",
        ])  # fmt: skip
    lines = [f"{record['name']}: {record['title']}", *_columns(rows)]
    shares = record["systems"].get(subject, {}).get("shares", {})
    if len(shares) > 1:
        parts = [f"{what} {_number(share / scale)}" for what, share in shares.items()]
        lines.append(f"  {subject} by process, CPU {unit}/{record['unit']}: {', '.join(parts)}")
    for name, count in record["left_out"].items():
        lines.append(
            f"  {count} turns of {name} left out: nothing came back, or one of its processes ended or was missing"
        )
    itself = record.get("nginx_to_itself")
    if itself:
        lines.append(f"  nginx ÷ nginx again: {_ratio(itself)}")
        if not 0.98 <= itself["median"] <= 1.03:
            lines[-1] += "   (outside 0.98-1.03: the machine is too restless, use more turns)"
    return "\n".join(lines)


def heading(document: dict[str, Any]) -> str:
    """Versions, machine and settings, in two lines."""
    box = document["machine"]
    versions = ", ".join(f"{name} {version}".strip() for name, version in document["versions"].items())
    settings = document["settings"]
    return (
        f"{versions}\n{box['cpu']}, {box['cores']} cores, {box['kernel']}, load {box['load_average']:.2f}; "
        f"{settings['turns']} rounds of {settings['seconds']} s turns"
    )
