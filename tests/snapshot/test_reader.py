from __future__ import annotations

import json
from collections.abc import Callable
from sys import byteorder
from typing import Any

import pytest
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.errors import SnapshotError
from gatekeeper.policy.ranges import LOW64
from gatekeeper.snapshot.encode import encode
from gatekeeper.snapshot.layout import ACTION_MASK, DETAIL_SHIFT, HEADER, LOCAL_CLASS, MAGIC, SECTIONS
from gatekeeper.snapshot.reader import Snapshot
from tests.policy.generated import UNIVERSE
from tests.snapshot.test_encode import example

WHOLE = b"".join(encode(example()))


def sections(data: bytes) -> dict[str, bytes]:
    """The sections of a whole snapshot, by name."""
    _, *places = HEADER.unpack_from(data)
    return {name: data[at : at + size] for name, at, size in zip(SECTIONS, places[0::2], places[1::2], strict=True)}


def assembled(parts: dict[str, bytes]) -> bytes:
    """A snapshot with these sections."""
    at, places, body = HEADER.size, [], b""
    for name in SECTIONS:
        places += [at, len(parts[name])]
        padded = parts[name] + bytes(-len(parts[name]) % 8)
        body += padded
        at += len(padded)
    return HEADER.pack(MAGIC, *places) + body


def with_section(name: str, change: Callable[[list[int]], None]) -> bytes:
    """A snapshot in which the numbers of one section were changed."""
    parts = sections(WHOLE)
    size = 8 if name in {"v4", "v6_high", "v6_low"} else 4
    data = parts[name]
    numbers = [int.from_bytes(data[at : at + size], byteorder) for at in range(0, len(data), size)]
    change(numbers)
    parts[name] = b"".join(number.to_bytes(size, byteorder) for number in numbers)
    return assembled(parts)


def with_meta(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A snapshot whose meta section was changed."""
    parts = sections(WHOLE)
    meta = json.loads(parts["meta"])
    change(meta)
    parts["meta"] = json.dumps(meta).encode()
    return assembled(parts)


def exercise(snapshot: Snapshot) -> None:
    """Use a valid snapshot as a worker does: everything that a look-up finds must exist."""
    meta = snapshot.meta
    for endpoint in meta["endpoints"]:
        found = {LOCAL_CLASS, *map(snapshot.lookup_v4, UNIVERSE[4])}
        found |= {snapshot.lookup_v6(address >> 64, address & LOW64) for address in UNIVERSE[6]}
        for number in found:
            word = snapshot.verdict(endpoint["row"], number)
            listener, rule, action, _reason = meta["details"][word >> DETAIL_SHIFT]
            assert word & ACTION_MASK in (1, 2, 3)
            assert action in ("allow", "deny", "drop")
            assert listener == endpoint["listener"]
            assert rule is None or meta["rules"][rule]["name"]


def test_a_whole_snapshot_is_valid() -> None:
    """What `encode` made validates, and every look-up in it finds something."""
    assert assembled(sections(WHOLE)) == WHOLE
    snapshot = Snapshot(WHOLE)
    snapshot.validate()
    exercise(snapshot)


@settings(max_examples=1500, deadline=None)
@given(st.integers(0, 8 * len(WHOLE) - 1))
@case(0)
def test_a_flipped_bit_is_refused_or_harmless(bit: int) -> None:
    """Whatever bit is wrong, the snapshot is refused, or still answers every look-up with something that exists."""
    broken = bytearray(WHOLE)
    broken[bit // 8] ^= 1 << bit % 8
    try:
        snapshot = Snapshot(bytes(broken))
        snapshot.validate()
    except SnapshotError:
        return
    exercise(snapshot)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(WHOLE.rstrip(b"\0")) - 1))  # behind it only zeros fill up to a multiple of eight
def test_a_snapshot_that_was_cut_is_refused(size: int) -> None:
    """A snapshot that lost its end never passes."""
    with pytest.raises(SnapshotError):
        Snapshot(WHOLE[:size]).validate()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    """Bytes that nobody made into a snapshot are none, with the right first bytes or without."""
    for data in (noise, MAGIC + noise):
        with pytest.raises(SnapshotError):
            Snapshot(data).validate()


def put(index: int, value: int) -> Callable[[list[int]], None]:
    """Replace one number."""
    return lambda numbers: numbers.__setitem__(index, value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("v4", put(0, 1 << 32), "does not start at address 0"),
        ("v4", list.clear, "does not start at address 0"),
        ("v4", list.reverse, "does not start at address 0"),
        ("v4", put(2, 10 << 56), "not sorted"),
        ("v4", put(2, 10 << 56 | 1), "not sorted"),  # the same address again, with another class
        ("v4", put(1, 10 << 56 | 99), "a class that does not exist"),
        ("v4_index", list.clear, "not a power of two"),
        ("v4_index", lambda numbers: numbers.extend([3, 3]), "not a power of two"),
        ("v4_index", put(0, 1), "index does not belong"),
        ("v4_index", put(1, 2), "index does not belong"),
        ("v6_high", put(0, 1), "does not start at address 0"),
        ("v6_low", put(0, 1), "does not start at address 0"),
        ("v6_high", put(2, 0), "not sorted"),
        ("v6_high", list.pop, "differ in length"),
        ("v6_class", put(1, 3), "a class that does not exist"),
        ("matrix", put(0, 0), "contradicts its detail"),
        ("matrix", put(0, 4096 << 2 | 1), "a detail that does not exist"),
        ("matrix", list.pop, "rows of classes"),
    ],
)
def test_tables_that_look_ups_cannot_rely_on_are_refused(
    name: str, change: Callable[[list[int]], None], message: str
) -> None:
    """Each assumption of a look-up is checked, and the refusal says which one is broken."""
    with pytest.raises(SnapshotError, match=message):
        Snapshot(with_section(name, change)).validate()


def assign(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    """Replace one value of the meta section."""

    def change(meta: dict[str, Any]) -> None:
        at: Any = meta
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        assign(2, "version"),
        assign(0, "counts", "classes"),
        assign(True, "counts", "classes"),
        assign(7, "counts", "rows"),
        assign([], "listeners"),
        assign([], "endpoints"),
        assign(None, "rules"),
        assign("maybe", "rules", 0, "action"),
        assign("maybe", "default", "action"),
        assign(9, "details", 0, 0),
        assign(-1, "details", 0, 0),
        assign(99, "details", 0, 1),
        assign("maybe", "details", 0, 2),
        assign("because", "details", 0, 3),
        assign(0, "listeners", 0, "over_detail"),
        assign(0, "listeners", 0, "ban_detail"),
        assign(99, "listeners", 0, "ban_detail"),
        assign(None, "listeners", 0, "ban_detail"),
        assign("sctp", "listeners", 0, "protocol"),
        assign(-1, "listeners", 0, "idle_timeout_s"),
        assign("1", "listeners", 0, "connect_timeout_s"),
        assign(1.5, "listeners", 0, "max_sessions"),
        assign(9, "endpoints", 0, "row"),
        assign(2, "endpoints", 0, "row"),  # the row of another listener
        assign(-1, "endpoints", 0, "listener"),
        assign(5, "endpoints", 0, "family"),
        assign(65536, "endpoints", 0, "port"),
        assign("udp", "endpoints", 0, "protocol"),
        assign(None, "endpoints", 0, "backend"),
        assign(0, "settings", "workers"),
        assign({}, "settings", "metrics"),
        assign(1, "settings", "audit"),
    ],
)
def test_meta_that_readers_cannot_rely_on_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    """Every index and every word of the meta section that somebody uses is checked."""
    with pytest.raises(SnapshotError):
        Snapshot(with_meta(change)).validate()


def test_sections_outside_the_buffer_are_refused_at_once() -> None:
    """A header that points behind the buffer, into the header or between items fails before anything is read."""
    _, *places = HEADER.unpack_from(WHOLE)
    for index, value in ((0, 8), (0, places[0] + 4), (1, len(WHOLE)), (1, places[1] - 1), (12, 1 << 63), (13, LOW64)):
        wrong = [*places]
        wrong[index] = value
        with pytest.raises(SnapshotError, match="does not lie in the snapshot"):
            Snapshot(HEADER.pack(MAGIC, *wrong) + WHOLE[HEADER.size :])
