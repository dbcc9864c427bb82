"""What changes between two policies, for people and for programs: shared by `diff` and `plan`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from gatekeeper.cli.terminal import Terminal, format_table
from gatekeeper.policy.diff import Change, Difference, Outcome, Place, compare, spans_of
from gatekeeper.policy.model import format_address
from gatekeeper.snapshot.comparing import Setting, changed_settings, compiled

if TYPE_CHECKING:
    from gatekeeper.snapshot.reader import Snapshot

COLOURS = {"allow": "green", "deny": "red", "drop": "red"}
UNSET = {"workers": "auto", "metrics": "off", "control": "off", "on_exit": "relayed"}
BATCH = 4096  # networks that are written at once


@dataclass(frozen=True, slots=True)
class Differences:
    """All that changes. ``hidden``: there are changes of the deciding rule alone, which were not asked for."""

    changes: list[Change]
    places: list[Place]
    settings: list[Setting]
    hidden: bool

    def __bool__(self) -> bool:
        return bool(self.changes or self.places or self.settings)


def find(old: Snapshot, new: Snapshot, *, rules: bool) -> Differences:
    """Return what changes; ``rules``: also where another rule decides, and the action stays."""
    found: Difference = compare(compiled(old), compiled(new))
    changes = [change for change in found.changes if rules or change.changes_action]
    settings = list(changed_settings(old.meta, new.meta))
    return Differences(changes, found.places, settings, hidden=len(changes) < len(found.changes))


# ---------------------------------------------------------------------- for programs


def write_document(terminal: Terminal, found: Differences, more: dict[str, Any] | None = None) -> None:
    """Write one JSON object, however many networks it has; the items of ``more`` stand in front."""
    out = terminal.stdout
    out.write("{\n")
    for key, value in (more or {}).items():
        out.write(f"  {json.dumps(key)}: {_indented(value, 2)},\n")
    out.write('  "changes": [')
    for index, change in enumerate(found.changes):
        out.write(",\n    " if index else "\n    ")
        _write_change(terminal, change)
    out.write("\n  ]" if found.changes else "]")
    for key, value in _rest(found).items():
        out.write(f",\n  {json.dumps(key)}: {_indented(value, 2)}")
    out.write("\n}\n")


def _write_change(terminal: Terminal, change: Change) -> None:
    document = {
        "protocol": change.protocol,
        "ports": change.ports,
        "hosts": _hosts(change),
        "listeners": change.listeners,
        "sources": ["unix"] if change.is_local else ["@"],
        "before": _outcome(change.before),
        "after": _outcome(change.after),
    }
    text = _indented(document, 4)
    if change.is_local:
        terminal.stdout.write(text)
        return
    # There may be millions: they are written as they are made. Nothing else in there is a lone "@".
    head, _, tail = text.partition('"@"')
    terminal.stdout.write(head)
    networks = change.sources().networks()
    first = True
    while batch := list(islice(networks, BATCH)):
        lines = '",\n        "'.join(batch)
        terminal.stdout.write(f'"{lines}"' if first else f',\n        "{lines}"')
        first = False
    terminal.stdout.write(tail)


def _indented(value: Any, columns: int) -> str:
    return json.dumps(value, indent=2).replace("\n", "\n" + " " * columns)


def _outcome(outcome: Outcome | None) -> dict[str, str | None]:
    return {"action": None, "rule": None} if outcome is None else {"action": outcome.action.label, "rule": outcome.rule}


def _rest(found: Differences) -> dict[str, Any]:
    opened, closed, moved = [], [], []
    for place in found.places:
        where = {"protocol": place.endpoint.protocol, "address": place.endpoint.address}
        before, after = (
            None if served is None else {"listener": served.listener, "backend": served.backend}
            for served in (place.before, place.after)
        )
        if before is None:
            opened.append(where | (after or {}))
        elif after is None:
            closed.append(where | before)
        else:
            moved.append(where | {"before": before, "after": after})
    settings = [
        {"listener": one.listener, "key": one.key, "before": one.before, "after": one.after, "restart": one.restart}
        for one in found.settings
    ]
    return {"opened": opened, "closed": closed, "moved": moved, "settings": settings}


# ---------------------------------------------------------------------- for people


def show(terminal: Terminal, found: Differences, most: int) -> None:
    """Print what changes; of each change at most ``most`` networks (0: all). Nothing, when nothing does."""
    if found.places:
        for line in format_table([*_places(found.places)]):
            terminal.print(line)
    for change in found.changes:
        if _matters(change):
            _show_change(terminal, change, most)
    for setting in found.settings:
        whose = f"{setting.listener}: " if setting.listener else ""
        restart = " (takes a restart)" if setting.restart else ""
        before, after = (_value(value, setting.key) for value in (setting.before, setting.after))
        terminal.print(f"{whose}{setting.key}: {before} -> {after}{restart}")
    if found.hidden:
        terminal.note("another rule decides with the same action for some sources (--rules shows them)")


def _matters(change: Change) -> bool:
    """Say whether anybody gets in, or got in: where nothing listens everybody is refused, too."""
    both = (change.before, change.after)
    return None not in both or any(outcome is not None and outcome.action.label == "allow" for outcome in both)


def _show_change(terminal: Terminal, change: Change, most: int) -> None:
    if change.is_local:
        where = ", ".join(_hosts(change))
    else:
        where = f"{change.protocol} {', '.join(_span(*ports) for ports in change.ports)}"
    before, after = (_words(terminal, outcome) for outcome in (change.before, change.after))
    terminal.print(f"{where} ({', '.join(change.listeners)}): {before} -> {after}")
    if change.is_local:
        terminal.print("  local peers")
        return
    sources = change.sources()
    networks = sources.networks()
    for network in islice(networks, most) if most else networks:
        terminal.print(f"  {network}")
    of_v4, of_v6 = sources.v4.count_networks(), sources.v6.count_networks()
    if most and of_v4 + of_v6 > most:
        amounts = [f"{of_v4:,} IPv4 networks with {sources.v4.count_addresses():,} addresses"] if of_v4 else []
        amounts += [f"{of_v6:,} IPv6 networks"] if of_v6 else []
        terminal.print(f"  and {of_v4 + of_v6 - most:,} more; in all {' and '.join(amounts)}")


def _words(terminal: Terminal, outcome: Outcome | None) -> str:
    if outcome is None:
        return "closed"
    action = outcome.action.label
    return f"{terminal.paint(action, COLOURS[action], bold=True)} by {outcome.rule or 'default'}"


def _hosts(change: Change) -> list[str]:
    return [f"unix:{host}" for host in change.hosts] if change.is_local else list(change.hosts)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _value(value: Any, key: str) -> str:
    """Return the value of a setting; ``None`` in the words of rule files."""
    if value is None:
        return UNSET.get(key, "none")
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item, name)}" for name, item in value.items())
    return f"{value:g}s" if isinstance(value, float) else str(value)


def _places(places: Iterable[Place]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each range of ports of one host that fares alike."""
    groups: dict[tuple[str, ...], list[Place]] = {}
    for place in places:
        before, after = place.before, place.after
        what = "opened" if before is None else "closed" if after is None else "moved"
        names = " -> ".join(dict.fromkeys(served.listener for served in (before, after) if served is not None))
        # A backend that keeps the port is another text at each port.
        to = tuple(
            served.backend.removesuffix(f":{place.endpoint.port}") for served in (before, after) if served is not None
        )
        endpoint = place.endpoint
        groups.setdefault((what, names, endpoint.protocol, endpoint.host, *to), []).append(place)
    for (what, names, protocol, *_), alike in groups.items():
        for first, last in spans_of(place.endpoint.port for place in alike):
            some = next(place for place in alike if place.endpoint.port == first)
            backends = _backends(some, keeps_port=first != last)
            address = some.endpoint.address if first == last else _range(some, first, last)
            yield what, names, address if some.endpoint.family == 0 else f"{address}/{protocol}", backends


def _range(place: Place, first: int, last: int) -> str:
    return f"{format_address(place.endpoint.family, place.endpoint.host, first)}-{last}"


def _backends(place: Place, *, keeps_port: bool) -> str:
    texts = [served.backend for served in (place.before, place.after) if served is not None]
    if keeps_port:
        texts = [text.removesuffix(f":{place.endpoint.port}") for text in texts]
    return " -> ".join(dict.fromkeys(texts))
