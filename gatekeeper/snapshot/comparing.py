"""Two snapshots side by side: as `gatekeeper.policy.diff` takes them, and what their settings say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gatekeeper.policy.diff import Compiled, Outcome, Served
from gatekeeper.policy.model import Action, Endpoint, Protocol
from gatekeeper.snapshot.reader import Snapshot

AT_ONCE = frozenset({"on_reload"})  # settings that a reload changes; all others take a restart
_OF_A_LISTENER = ("connect_timeout_s", "idle_timeout_s", "half_close_timeout_s", "max_responses", "max_sessions", "on_exit")


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that changes, under its name in rule files. ``listener`` ``None``: of the whole file."""

    listener: str | None
    key: str
    before: Any
    after: Any
    restart: bool


def compiled(snapshot: Snapshot) -> Compiled:
    """Return a snapshot as `compare` takes it; the tables are views of it."""
    meta = snapshot.meta
    rules = [rule["name"] for rule in meta["rules"]]
    return Compiled(
        snapshot.v4, snapshot.v6_high, snapshot.v6_low, snapshot.v6_class, snapshot.matrix, snapshot.classes,
        [
            Outcome(Action[action.upper()], None if rule is None else rules[rule])
            for _, rule, action, _ in meta["details"]
        ],
        {
            Endpoint(Protocol(item["protocol"]), item["family"], item["host"], item["port"]): Served(
                meta["listeners"][item["listener"]]["name"], item["backend"]["text"], item["row"]
            )
            for item in meta["endpoints"]
        },
    )  # fmt: skip


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Setting]:
    """Yield what differs between the meta sections of two snapshots, of listeners that both have and of the file."""
    before = {listener["name"]: listener for listener in old["listeners"]}
    for listener in new["listeners"]:
        known = before.get(listener["name"], listener)
        for key in _OF_A_LISTENER:
            if known[key] != listener[key]:
                yield Setting(listener["name"], key.removesuffix("_s"), known[key], listener[key], restart=False)
    for key in sorted(old["settings"].keys() | new["settings"].keys()):
        values = old["settings"].get(key), new["settings"].get(key)
        if values[0] != values[1]:
            yield Setting(None, key, *values, restart=key not in AT_ONCE)
