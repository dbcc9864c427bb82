from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_left

import pytest

from gatekeeper.policy.model import (
    Action,
    Backend,
    Config,
    Endpoint,
    Listener,
    Place,
    Policy,
    Protocol,
    Rule,
    Settings,
    Sources,
    Target,
)
from gatekeeper.policy.ranges import AddressSet
from gatekeeper.snapshot.bindings import Bindings
from gatekeeper.snapshot.encode import encode, write
from gatekeeper.snapshot.layout import HEADER, LOW64, MAGIC, SECTIONS
from gatekeeper.snapshot.reader import Snapshot
from tests.policy.generated import NOWHERE

OFFICE = AddressSet.of(v4=[(10 << 24, (11 << 24) - 1)], v6=[(0x20010DB8 << 96, (0x20010DB9 << 96) - 1)])


def example(*, metrics: bool = True) -> Config:
    """A configuration with a little of everything."""
    ssh = Listener(
        "ssh",
        Protocol.TCP,
        (Endpoint(Protocol.TCP, 4, "0.0.0.0", 22), Endpoint(Protocol.TCP, 6, "::", 2222)),
        Backend(4, "127.0.0.1", 0),
        5.0, 86400.0, 30.0, None, 100, NOWHERE,
    )  # fmt: skip
    app = Listener(
        "app", Protocol.TCP, (Endpoint(Protocol.TCP, 0, "/run/app.sock", 0),), Backend(0, "/run/backend.sock", 0),
        5.0, 60.0, 30.0, None, None, NOWHERE,
    )  # fmt: skip
    dns = Listener(
        "dns", Protocol.UDP, (Endpoint(Protocol.UDP, 4, "0.0.0.0", 53),), Backend(6, "::1", 5353),
        5.0, 20.0, 30.0, 1, None, NOWHERE,
    )  # fmt: skip
    rules = (
        Rule(
            "office",
            Action.ALLOW,
            Sources(OFFICE, AddressSet.EMPTY, False, "office", ""),
            (Target("ssh"),),
            Place("a.yaml", 7, 5),
        ),
        Rule(
            "all",
            Action.DROP,
            Sources(AddressSet.EVERYTHING, AddressSet.EMPTY, True, "any", ""),
            None,
            Place("b.yaml", 9, 5),
        ),
    )
    endpoint = Endpoint(Protocol.TCP, 4, "127.0.0.1", 9180) if metrics else None
    settings = Settings(2, endpoint, "/run/control.sock", "/var/log/audit.json", "/var/lib/gatekeeper", control_group="operators")
    policy = Policy((ssh, app, dns), rules, Action.DENY, Place("a.yaml", 3, 1))
    return Config(policy, settings, "ab" * 32, ("a.yaml", "b.yaml"))


def test_the_meta_section_is_what_its_page_says() -> None:
    """Names, places, listeners, endpoints with their backends, settings: all as documented, from JSON."""
    meta = Snapshot(b"".join(encode(example()))).meta
    assert meta["version"] == 1
    assert meta["digest"] == "ab" * 32
    assert meta["files"] == ["a.yaml", "b.yaml"]
    assert meta["default"] == {"action": "deny", "file": "a.yaml", "line": 3}
    assert meta["rules"] == [
        {"name": "office", "action": "allow", "file": "a.yaml", "line": 7},
        {"name": "all", "action": "drop", "file": "b.yaml", "line": 9},
    ]
    assert meta["counts"] == {"rules": 2, "sets_ranges": 4, "v4_ranges": 3, "v6_ranges": 3, "classes": 3, "rows": 3}
    ssh = meta["listeners"][0]
    assert meta["details"][ssh.pop("over_detail")] == [0, None, "deny", "max_sessions"]
    assert meta["details"][ssh.pop("ban_detail")] == [0, None, "deny", "ban"]
    assert ssh == {
        "name": "ssh", "protocol": "tcp", "connect_timeout_s": 5.0, "idle_timeout_s": 86400.0,
        "half_close_timeout_s": 30.0, "max_responses": None, "max_sessions": 100, "on_exit": None,
    }  # fmt: skip
    assert meta["endpoints"][1] == {
        "listener": 0, "key": "tcp:[::]:2222", "protocol": "tcp", "family": 6, "host": "::", "port": 2222,
        "address": "[::]:2222", "row": meta["endpoints"][0]["row"],
        "backend": {"family": 4, "host": "127.0.0.1", "port": 2222, "text": "127.0.0.1:2222"},
    }  # fmt: skip
    assert meta["endpoints"][2]["key"] == "tcp:unix:/run/app.sock"
    assert meta["endpoints"][2]["backend"] == {
        "family": 0, "host": "/run/backend.sock", "port": 0, "text": "unix:/run/backend.sock",
    }  # fmt: skip
    assert meta["settings"] == {
        "workers": 2, "metrics": {"family": 4, "host": "127.0.0.1", "port": 9180},
        "control": {"socket": "/run/control.sock", "group": "operators"},
        "audit": "/var/log/audit.json", "state": "/var/lib/gatekeeper", "kernel": "off", "on_reload": "revoke",
    }  # fmt: skip
    assert Snapshot(b"".join(encode(example(metrics=False)))).meta["settings"]["metrics"] is None


def test_sections_lie_one_behind_the_other() -> None:
    """Every section starts at a multiple of eight, none overlaps another, and the last ends where the snapshot does."""
    data = b"".join(encode(example()))
    magic, *places = HEADER.unpack_from(data)
    assert magic == MAGIC
    at = HEADER.size
    for name, offset, length in zip(SECTIONS, places[0::2], places[1::2], strict=True):
        assert offset == at, name
        at = offset + length + -length % 8
    assert at == len(data)
    assert json.loads(data[places[-2] : places[-2] + places[-1]])


def test_what_is_written_is_what_is_encoded() -> None:
    """A snapshot in a memfd validates and holds the same bytes; writing leaves the descriptor open."""
    fd = os.memfd_create("snapshot")
    try:
        write(example(), fd)
        data = os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)
    assert data == b"".join(encode(example()))
    Snapshot(data).validate()


def test_equal_configurations_give_equal_bytes() -> None:
    """Nothing in a snapshot depends on when or where it was compiled."""
    assert b"".join(encode(example())) == b"".join(encode(example()))


def test_every_name_can_be_bound_to_a_counter() -> None:
    """The supervisor finds a slot for every detail and a number for every endpoint."""
    meta = Snapshot(b"".join(encode(example()))).meta
    bound = Bindings().bind(1, meta)
    assert len(bound.details) == len(meta["details"])
    assert bound.rows == [0, 1, 2, 3]


@pytest.mark.parametrize("ranges", [0, 1, 40, 3000, 70_000])
def test_the_index_leads_to_every_part(ranges: int) -> None:
    """The index of the IPv4 table grows with it, and says how many ranges start before each part."""
    listed = [(at * 60_001, at * 60_001 + 7) for at in range(1, ranges + 1)]
    one = Rule("one", Action.DENY, Sources(AddressSet.of(v4=listed), AddressSet.EMPTY, False, "", ""), None, NOWHERE)
    policy = Policy(example().policy.listeners, (one,), Action.ALLOW, NOWHERE)
    snapshot = Snapshot(b"".join(encode(Config(policy, Settings(), ""))))
    snapshot.validate()
    starts = array("Q", snapshot.v4)
    parts = len(snapshot.v4_index) - 1
    assert parts <= max(1, len(starts) // 8)
    assert snapshot.v4_index.tolist() == [
        *(bisect_left(starts, part * (1 << 32) // parts << 32) for part in range(parts)), len(starts),
    ]  # fmt: skip


@pytest.mark.parametrize("ranges", [0, 1, 40, 3000])
@pytest.mark.parametrize("step", [1 << 40, 1 << 64, 1 << 100])
def test_the_ipv6_index_leads_to_every_range(ranges: int, step: int) -> None:
    """Whether ranges share a /64 or lie far apart: at every bound the table answers as the policy does."""
    first = 0x20010DB8 << 96
    listed = [(first + at * step, first + at * step + 7) for at in range(1, ranges + 1) if at * step < 1 << 124]
    one = Rule("one", Action.DENY, Sources(AddressSet.of(v6=listed), AddressSet.EMPTY, False, "", ""), None, NOWHERE)
    policy = Policy(example().policy.listeners, (one,), Action.ALLOW, NOWHERE)
    snapshot = Snapshot(b"".join(encode(Config(policy, Settings(), ""))))
    snapshot.validate()
    inside = {snapshot.lookup_v6(at >> 64, at & LOW64) for low, high in listed for at in (low, high)}
    around = [at for low, high in listed for at in (low - 1, high + 1)]
    outside = {snapshot.lookup_v6(at >> 64, at & LOW64) for at in [0, 1, first, (1 << 128) - 1, *around]}
    assert len(outside) == 1
    assert len(inside) == (1 if listed else 0)
    assert not inside & outside
