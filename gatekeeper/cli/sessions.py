"""``gatekeeper sessions``: who is connected now."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from typing import Any

import click

from gatekeeper.cli.daemon import connect, control_option
from gatekeeper.cli.filters import as_arguments, filter_options
from gatekeeper.cli.terminal import FINE, Command, Terminal, count

MOST_INDENTED = 1000  # Python takes ten times as long for JSON that is laid out for people
SHOWN = 100  # rows for people, unless they ask for more
ROW_KEYS = (
    ("  flow_id", "the number that the audit log will have; `gatekeeper cut` takes it"),
    ("  listener, rule, reason, proto", 'as in the audit log; the rule is "" for the default'),
    ("  path", "relay, or guard where the service owns the port"),
    ("  src_ip, src_port, dest_ip, dest_port", "null on unix sockets"),
    ("  endpoint, backend", "where we listen, and where it is relayed to"),
    ("  state", "dialing, open, client_closed, backend_closed, resetting; flow for UDP"),
    ("  began, age_s, idle_s", "Unix time, and seconds"),
    ("  bytes_in, bytes_out", "from and to the client"),
    ("  client_tcp, backend_tcp", "with --details: {rtt_us, retransmits, unsent, unacked}; else null"),
)


def _rate(row: dict[str, Any]) -> float:
    return float((row["bytes_in"] + row["bytes_out"]) / max(row["age_s"], 0.001))


def _rtt(row: dict[str, Any]) -> int:
    return max((int(side["rtt_us"]) for side in (row["client_tcp"], row["backend_tcp"]) if side), default=-1)


def _source(row: dict[str, Any]) -> tuple[bool, bytes, int]:
    import ipaddress  # noqa: PLC0415 - for this order alone

    if row["src_ip"] is None:
        return True, b"", 0
    address = ipaddress.ip_address(row["src_ip"])
    return address.version == 6, address.packed, row["src_port"]


ORDERS: dict[str, tuple[Callable[[dict[str, Any]], Any], bool]] = {  # key, and whether the greatest comes first
    "age": (lambda row: (row["began"], row["flow_id"]), False),
    "idle": (lambda row: row["idle_s"], True),
    "bytes": (lambda row: row["bytes_in"] + row["bytes_out"], True),
    "rate": (_rate, True),
    "rtt": (_rtt, True),
    "source": (_source, False),
}


@click.command(
    "sessions",
    cls=Command,
    examples=(
        "gatekeeper sessions                                      the oldest first",
        "gatekeeper sessions --listener ssh --source 198.51.100.0/24",
        "gatekeeper sessions --sort bytes --limit 10              who moves most",
        "gatekeeper sessions --stuck --details                    closed on one side only, with what TCP says",
        "gatekeeper sessions --json --older 1h | jq '.sessions[].flow_id'",
    ),
    json_keys=(
        ("matched", "how many sessions match"),
        ("sessions", "[...], one object for each, sorted and limited:"),
        *ROW_KEYS,
        ("missing_workers", "workers that did not answer; their sessions are missing"),
        ("now", "Unix time of the daemon"),
    ),
)
@filter_options
@click.option("--sort", type=click.Choice(list(ORDERS)), default="age", show_default=True, help="The order; rate is the average.")
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help=f"Show so many; 0 is all.  [default: {SHOWN}, with --json all]")
@click.option("--details", is_flag=True, help="Ask the kernel for round-trip times, retransmissions and unsent bytes.")
@control_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def command(
    terminal: Terminal, /, sort: str, reverse: bool, limit: int | None, details: bool, control: str | None, as_json: bool,
    **filters: Any,
) -> int:  # fmt: skip
    """List live sessions. Without options: all of them, the oldest first.

    Options of one kind are alternatives (--listener ssh --listener web), options of different kinds must all fit.
    """
    details = details or sort == "rtt"
    rows: list[dict[str, Any]] = []
    with connect(control) as daemon:
        result = daemon.ask("sessions", rows=rows.extend, details=details or None, **as_arguments(**filters)).result
    most = limit if limit is not None else (0 if as_json else SHOWN)
    shown = in_order(rows, sort, reverse=reverse, most=most)
    if as_json:
        document = {
            "matched": result["matched"], "sessions": shown,
            "missing_workers": result["missing_workers"], "now": result["now"],
        }  # fmt: skip
        if len(shown) <= MOST_INDENTED:
            terminal.print_json(document)
        else:
            terminal.print(json.dumps(document))
    else:
        from gatekeeper.cli.session_table import show_sessions  # noqa: PLC0415 - rich is slow to import

        show_sessions(terminal, shown, details=details)
        if len(shown) < result["matched"]:
            terminal.note(f"{len(shown)} of {count(result['matched'], 'session')}; --limit 0 shows all")
    tell_missing(terminal, result)
    return FINE


def in_order(rows: list[dict[str, Any]], sort: str, *, reverse: bool, most: int) -> list[dict[str, Any]]:
    """Return the first ``most`` rows of an order; 0: all."""
    key, greatest_first = ORDERS[sort]
    if not most or most >= len(rows):
        return sorted(rows, key=key, reverse=greatest_first is not reverse)
    return (heapq.nlargest if greatest_first is not reverse else heapq.nsmallest)(most, rows, key=key)


def tell_missing(terminal: Terminal, result: dict[str, Any]) -> None:
    """Say which workers are not in an answer."""
    for worker in result["missing_workers"]:
        terminal.note(f"worker {worker} did not answer: its sessions are missing here")
