"""docs/performance.md and docs/kernel.md: tables between markers, and plots beside it, from one document of the benchmark.

A marker is `<!-- measured: NAME -->`, up to `<!-- end -->`; NAME is a key of `BLOCKS`. What a document did not measure stays.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from bench import plot
from bench.report import ROWS, heading, number, ratio
from bench.scenarios import GROWTH, GUARDED, REFUSED_BY_KERNEL, SCENARIOS, SINGLE, TWO

DOCS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs")
PAGES = ("performance.md", "kernel.md")
PEERS = ("haproxy", "haproxy splice", "nginx", "envoy")
MARGIN = 0.02  # as far from 1 as nginx's ratio to itself may be
QUIET, BUSY = 1.0, 5.0  # load averages before and during a run; the benchmark alone makes 2 to 4
RESTLESS = (
    "**The machine was busy with other work meanwhile.** Ratios between neighbouring turns bear that, with wider spreads;\n"
    "rates and latencies do not: they are lower and longer than on a machine at rest."
)
Records = dict[str, dict[str, Any]]
Points = list[tuple[float, float]]


def table(rows: list[list[str]]) -> str:
    """A table in Markdown; the first row is its head, the first column is to the left."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _scale(record: dict[str, Any]) -> tuple[float, str]:
    return (1000, "ms") if record["unit"] == "GB" else (1, "µs")


def _compared(records: Records, names: list[str], which: str, label: str = "work") -> str:
    """Medians of ``which`` (cpu or machine) of everybody, and the ratios."""
    present = [peer for peer in PEERS if any(peer in records[name]["systems"] for name in names)]
    rows = [[label, "CPU", "gatekeeper", *present, *(f"÷ {peer}" for peer in present)]]
    for name in names:
        record = records[name]
        scale, unit = _scale(record)
        systems, ratios = record["systems"], record["ratios" if which == "cpu" else "machine_ratios"]
        costs = [
            number(systems[one][f"{which}_us"]["median"] / scale) if one in systems else ""
            for one in ("gatekeeper", *present)
        ]
        rows.append([name, f"{unit}/{record['unit']}", *costs, *(ratio(ratios.get(peer)) for peer in present)])
    return table(rows)


def _costs(records: Records, names: list[str]) -> str:
    return _compared(records, names, "cpu")


def _summary(records: Records, names: list[str]) -> str:
    """The cheapest peer of each work, and where gatekeeper stands beside it."""
    rows = [["work", "cheapest peer", "gatekeeper ÷ it", "", "difference"]]
    for name in names:
        record = records[name]
        ratios = {peer: record["ratios"][peer] for peer in PEERS if peer in record["ratios"]}
        if not ratios or "gatekeeper" not in record["systems"]:
            continue
        cheapest = max(ratios, key=lambda peer: ratios[peer]["median"])
        median = ratios[cheapest]["median"]
        stands = "ahead" if median < 1 - MARGIN else "behind" if median > 1 + MARGIN else "level"
        scale, unit = _scale(record)
        theirs = record["systems"][cheapest]["cpu_us"]["median"] / scale
        difference = f"{theirs * (median - 1):+.1f} {unit}/{record['unit']}"
        rows.append([name, cheapest, ratio(ratios[cheapest]), stands, difference])
    return table(rows)


def _machine(records: Records, names: list[str]) -> str:
    return _compared(records, names, "machine")


def _rates(records: Records, names: list[str]) -> str:
    rows = [["work", "system", "rate/s", "p50 µs", "p99 µs", "cores", "in the kernel", "lost", "errors"]]
    for name in names:
        for system, figures in records[name]["systems"].items():
            if system == "nginx again":
                continue
            medians = [number(figures[key]["median"]) for key in ("rate", "p50_us", "p99_us", "cores")]
            share = figures.get("kernel_share")
            kernel = "" if share is None else f"{100 * share:.0f} %"
            rows.append([name, system, *medians, kernel, str(figures["lost"]), str(figures["errors"])])
    return table(rows)


def _itself(records: Records, names: list[str]) -> str:
    rows = [["work", "nginx ÷ nginx again"]]
    rows += [[name, ratio(records[name]["nginx_to_itself"])] for name in names if records[name].get("nginx_to_itself")]
    return table(rows)


def _shares(records: Records, names: list[str]) -> str:
    rows = [["work", "CPU", "worker", "observer", "supervisor"]]
    for name in names:
        scale, unit = _scale(records[name])
        shares = records[name]["systems"].get("gatekeeper", {}).get("shares", {})
        cells = [number(shares.get(role, 0.0) / scale) for role in ("worker", "observer", "supervisor")]
        rows.append([name, f"{unit}/{records[name]['unit']}", *cells])
    return table(rows)


def _beside(records: Records, names: list[str]) -> str:
    """The kernel's part: what the whole machine spends, and rates, beside no firewall and beside HAProxy."""
    rows = [["work", "system", "own CPU, µs", "whole machine, µs", "rate/s", "p50 µs", "gatekeeper's whole machine ÷ it", "rate ÷ it"]]
    for name in names:
        for system, figures in records[name]["systems"].items():
            costs = [number(figures[key]["median"]) for key in ("cpu_us", "machine_us", "rate", "p50_us")]
            rows.append([name, system, *costs, *(ratio(records[name][key].get(system)) for key in ("machine_ratios", "rate_ratios"))])
    return table(rows)


def _growth(records: Records, names: list[str]) -> str:
    titled: Records = {}
    for name in names:
        kind = name.partition("-open-")[0]
        titled[f"{kind}, {records[name]['idle']:,} open"] = records[name]
    return _compared(titled, list(titled), "cpu", "work beside idle sessions")


def _own(name: str) -> Any:
    def block(records: Records) -> str | None:
        return table(ROWS[name](records[name])) if name in records else None

    return block


def _of(scenarios: Any, make: Any) -> Any:
    def block(records: Records) -> str | None:
        names = [scenario.name for scenario in scenarios if scenario.name in records]
        return make(records, names) if names else None

    return block


BLOCKS = {
    "summary": _of((*SINGLE, *TWO), _summary),
    "costs": _of(SINGLE, _costs),
    "whole machine": _of(SINGLE, _machine),
    "rates": _of((*SINGLE, *TWO), _rates),
    "processes": _of(SINGLE, _shares),
    "nginx to itself": _of(SCENARIOS, _itself),
    "two workers": _of(TWO, _costs),
    "growth": _of(GROWTH, _growth),
    "kernel": _of((REFUSED_BY_KERNEL, *GUARDED), _beside),
    **{name: _own(name) for name in ROWS},
}


def fill(text: str, document: dict[str, Any]) -> str:
    """Return ``text`` with what ``document`` measured between its markers."""
    records = {record["name"]: record for record in document["scenarios"]}

    def replace(found: re.Match[str]) -> str:
        name = found[1]
        if name == "machine":
            loads = [record["load_average"] for record in document["scenarios"]]
            busy = f"load average before {document['machine']['load_average']:.1f}, during {min(loads):.1f} to {max(loads):.1f}"
            made = f"```\n{heading(document)}\n{document['machine']['date']}, {busy}\n```"
            if document["machine"]["load_average"] > QUIET or max(loads) > BUSY:
                made += f"\n\n{RESTLESS}"
        else:
            made = BLOCKS[name](records) or ""
        return found[0] if not made else f"<!-- measured: {name} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- measured: ([\w -]+?) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def plots(document: dict[str, Any]) -> dict[str, str]:
    """File name -> SVG, of all plots for which ``document`` has figures."""
    records = {record["name"]: record for record in document["scenarios"]}
    head = heading(document).splitlines()
    notes = [head[0], f"{head[2]}; {document['machine']['date'][:10]}"]
    made: dict[str, str] = {}
    rows = []
    for name in (scenario.name for scenario in (*SINGLE, *TWO) if scenario.name in records):
        spreads = {
            peer: (each["p10"], each["median"], each["p90"])
            for peer, each in records[name]["ratios"].items()
            if peer in PEERS
        }
        if spreads:
            rows.append((name, spreads))
    if rows:
        subtitle = (
            "CPU of gatekeeper ÷ CPU of the peer for the same work; left of 1 gatekeeper is cheaper; lines: p10 to p90"
        )
        made["ratios.svg"] = plot.ratios("What the work costs beside the peers", subtitle, notes, rows)
    for kind, unit in (("connect-close", "connection"), ("round-trip-50", "round trip")):
        curves: dict[str, Points] = {}
        for scenario in GROWTH:
            record = records.get(scenario.name, {"systems": {}}) if scenario.name.startswith(kind) else {"systems": {}}
            for system, figures in record["systems"].items():
                curves.setdefault(system, []).append((record["idle"], figures["cpu_us"]["median"]))
        if curves:
            title = f"CPU for one {unit} beside idle sessions"
            made[f"growth-{kind}.svg"] = plot.lines(title, "µs, all processes, median", notes, "idle sessions", curves)
    if "verdict" in records:
        sizes = records["verdict"]["sizes"]
        curves = {f"IPv{family}": [(one["networks"], one[f"v{family}_us"]) for one in sizes] for family in (4, 6)}
        made["verdict.svg"] = plot.lines(
            "One verdict", "µs of CPU, median", notes[1:], "networks in the policy", curves
        )
    return made


def write_documents(document: dict[str, Any], docs: str = DOCS) -> list[str]:
    """Fill the pages that have figures, write plots and the document itself into docs/performance/; return the paths written."""
    folder = os.path.join(docs, "performance")
    os.makedirs(folder, exist_ok=True)
    files = {os.path.join(folder, "measured.json"): json.dumps(document, indent=1) + "\n"}
    for page in filter(os.path.exists, (os.path.join(docs, name) for name in PAGES)):
        with open(page) as file:
            files[page] = fill(file.read(), document)
    files |= {os.path.join(folder, name): svg for name, svg in plots(document).items()}
    for path, content in files.items():
        with open(path, "w") as file:
            file.write(content)
    return list(files)
