"""``gatekeeper top``: what goes on now, renewed every second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from gatekeeper.cli.daemon import Daemon, Unreachable, connect, control_option
from gatekeeper.cli.run import parse_duration
from gatekeeper.cli.terminal import FINE, Command, Terminal

MOST_ASKED = 20_000  # live sessions up to which each frame looks at all of them
YOUNG_S = 10.0  # beyond, it looks at new ones only


@click.command(
    "top",
    cls=Command,
    examples=(
        "gatekeeper top                          until Ctrl-C",
        "gatekeeper top --interval 5s --rows 20",
        "gatekeeper top --once | mail -s gatekeeper admin",
    ),
    json_keys=(
        ("(one frame, as with --once)", "rates are per second, over one interval:"),
        ("listeners", "[{name, sessions, new_per_s, refused_per_s, in_per_s, out_per_s, accept_queue}]"),
        ("refusals", "[{listener, rule, action, reason, per_s, count}], the most frequent first"),
        ("newest, busiest", "sessions as in `gatekeeper sessions --json`; those of busiest with per_s, bytes"),
        ("status", "as in `gatekeeper status --json`"),
    ),
)
@click.option("--interval", callback=parse_duration, metavar="DURATION", default="1s", show_default=True, help="Time between frames.")
@click.option("--rows", type=click.IntRange(1, 1000), default=8, show_default=True, help="Rows of each table of sessions and refusals.")
@click.option("--once", is_flag=True, help="Print one frame and end; so it is where the output is no terminal.")
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one frame as a JSON document.")
@click.pass_obj
def command(terminal: Terminal, interval: float, rows: int, once: bool, control: str | None, as_json: bool) -> int:
    """Show rates of each listener, the busiest and newest sessions, and who is refused by which rule."""
    interval = max(interval, 0.1)
    if once or as_json or not terminal.stdout.isatty():
        with connect(control) as daemon:
            before = sample(daemon)
            time.sleep(interval)
            now = frame(before, sample(daemon), rows)
        if as_json:
            terminal.print_json(now)
        else:
            from gatekeeper.cli.top_view import show_once  # noqa: PLC0415 - rich is slow to import

            show_once(terminal, now)
        return FINE
    from gatekeeper.cli.top_view import show_live  # noqa: PLC0415 - as above

    show_live(terminal, _frames(control, rows), interval)
    return FINE


def _frames(control: str | None, rows: int) -> Callable[[], dict[str, Any] | str]:
    """Return what makes the next frame; a daemon that is gone makes a text, and is looked for again."""
    daemon: Daemon | None = connect(control)
    before: dict[str, Any] | None = None

    def following() -> dict[str, Any] | str:
        nonlocal daemon, before
        try:
            daemon = daemon or connect(control)
            now = sample(daemon)
        except Unreachable as err:
            if daemon is not None:
                daemon.close()
            daemon = None
            return err.message
        made, before = frame(before or now, now, rows), now
        return made

    return following


def sample(daemon: Daemon) -> dict[str, Any]:
    """Ask how things are; return the status, with sessions as ``rows``."""
    status = daemon.ask("status").result
    live = sum(listener["sessions"] for listener in status.get("listeners", ()))
    found: list[dict[str, Any]] = []
    if status["policy"] is not None:
        daemon.ask("sessions", rows=found.extend, younger_s=None if live <= MOST_ASKED else YOUNG_S, most=MOST_ASKED)
    return status | {"rows": found}


def frame(before: dict[str, Any], now: dict[str, Any], most: int) -> dict[str, Any]:
    """Return what changed between two samples, per second. A daemon that was restarted meanwhile begins at zero."""
    same = before["pid"] == now["pid"] and before["started"] == now["started"]
    seconds = max(now["clock_s"] - before["clock_s"], 0.001) if same else max(now["uptime_s"], 0.001)

    def rates(name: str, key: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any], str], float]:
        earlier = {key(item): item for item in before.get(name, ())} if same else {}

        def rate(item: dict[str, Any], field: str) -> float:
            return float(round(max(item[field] - earlier.get(key(item), {}).get(field, 0), 0) / seconds, 3))

        return rate

    listener_rate = rates("listeners", lambda item: item["name"])
    verdict_rate = rates("verdicts", _verdict)
    session_rate = rates("rows", lambda item: item["flow_id"])
    refusals = [
        {name: item[name] for name in ("listener", "rule", "action", "reason")}
        | {
            "per_s": verdict_rate(item, "count") + verdict_rate(item, "kernel_attempts"),
            "count": item["count"] + item["kernel_attempts"],
        }
        for item in now.get("verdicts", ())
        if item["action"] != "allow"
    ]
    busiest = [
        row | {"bytes": row["bytes_in"] + row["bytes_out"], "per_s": session_rate(row, "bytes_in") + session_rate(row, "bytes_out")}
        for row in now["rows"]
    ]
    return {
        "listeners": [
            {
                "name": item["name"],
                "sessions": item["sessions"],
                "new_per_s": listener_rate(item, "allowed"),
                "refused_per_s": listener_rate(item, "refused") + listener_rate(item, "kernel_refused"),
                "in_per_s": listener_rate(item, "bytes_in"),
                "out_per_s": listener_rate(item, "bytes_out"),
                "accept_queue": item["accept_queue"],
            }
            for item in now.get("listeners", ())
        ],
        "refusals": sorted(refusals, key=lambda item: (item["per_s"], item["count"]), reverse=True)[:most],
        "newest": sorted(now["rows"], key=lambda row: (row["began"], row["flow_id"]), reverse=True)[:most],
        "busiest": sorted(busiest, key=lambda row: (row["per_s"], row["bytes"]), reverse=True)[:most],
        "status": {name: value for name, value in now.items() if name != "rows"},
    }


def _verdict(item: dict[str, Any]) -> tuple[str, ...]:
    return item["listener"], item["action"], item["rule"], item["reason"]
