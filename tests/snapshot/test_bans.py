from __future__ import annotations

import ipaddress
import struct
from array import array

import pytest
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.errors import SnapshotError
from gatekeeper.policy.ranges import LOW64
from gatekeeper.snapshot.bans import HEADER, MAGIC, Bans, encode

LAST = {4: (1 << 32) - 1, 6: (1 << 128) - 1}
# Few places, so that ranges meet, overlap and share halves; the ends of both families among them.
PLACES = {
    4: [*range(6), 10 << 24, (10 << 24) + 1, *range(LAST[4] - 4, LAST[4] + 1)],
    6: [*range(4), LOW64 - 1, LOW64, LOW64 + 1, *(at << 64 | low for at in (1, 2, 0x20010DB8 << 32) for low in (0, 1, 7, LOW64)),
        *range(LAST[6] - 3, LAST[6] + 1)],
}  # fmt: skip

Range = tuple[int, int, int]


@st.composite
def ranges(draw: st.DrawFn) -> list[Range]:
    """Some inclusive ranges of either family."""
    found = []
    for family in draw(st.lists(st.sampled_from([4, 6]), max_size=8)):
        one, other = draw(st.sampled_from(PLACES[family])), draw(st.sampled_from(PLACES[family]))
        found.append((family, min(one, other), max(one, other)))
    return found


def says(bans: Bans, family: int, address: int) -> bool:
    """Say what the table says about one address."""
    return bans.bans_v4(address) if family == 4 else bans.bans_v6(address >> 64, address & LOW64)


@settings(max_examples=600, deadline=None)
@given(ranges())
@case([])
@case([(4, 0, LAST[4]), (6, 0, LAST[6])])
@case([(4, LAST[4], LAST[4]), (6, LAST[6], LAST[6])])
def test_whoever_lies_in_a_range_is_banned_and_nobody_else(listed: list[Range]) -> None:
    """The table answers as the standard library does when it is asked about each range in turn."""
    bans = Bans(encode(iter(listed)))
    assert bool(bans) == bool(listed)
    for family, make in ((4, ipaddress.IPv4Address), (6, ipaddress.IPv6Address)):
        networks = [
            network
            for one, first, last in listed if one == family
            for network in ipaddress.summarize_address_range(make(first), make(last))
        ]  # fmt: skip
        near = {place + step for place in PLACES[family] for step in (-1, 0, 1)}
        for at in [one for one in near if 0 <= one <= LAST[family]]:
            address = make(at)
            assert says(bans, family, at) == any(address in network for network in networks), str(address)


def test_a_table_may_lie_in_more_memory_than_it_needs() -> None:
    """What follows the table (the rest of a page) is not looked at."""
    bans = Bans(encode([(4, 5, 6), (6, 5, 6)]) + b"\xff" * 4000)
    assert [bans.bans_v4(at) for at in (4, 5, 6, 7)] == [False, True, True, False]
    assert [bans.bans_v6(0, at) for at in (4, 5, 6, 7)] == [False, True, True, False]


WHOLE = encode([(4, 5, 6), (4, 9, 9), (6, 5, 6), (6, 1 << 64, (1 << 64) + 5), (6, (1 << 64) + 9, LAST[6])])


@pytest.mark.parametrize("size", range(len(WHOLE)))
def test_a_table_that_was_cut_is_refused(size: int) -> None:
    """A table that lost its end never passes."""
    with pytest.raises(SnapshotError):
        Bans(WHOLE[:size])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GKSNAP02" + WHOLE[8:],
        HEADER.pack(MAGIC, 1 << 63, 0),
        HEADER.pack(MAGIC, 0, 1 << 60),
        HEADER.pack(MAGIC, 2, 0) + array("I", (6, 5)).tobytes(),
        HEADER.pack(MAGIC, 2, 0) + array("I", (5, 5)).tobytes(),
        HEADER.pack(MAGIC, 0, 2) + struct.pack("=4Q", 1, 1, 5, 5),
        HEADER.pack(MAGIC, 0, 2) + struct.pack("=4Q", 1, 1, 5, 4),
        HEADER.pack(MAGIC, 0, 2) + struct.pack("=4Q", 2, 1, 0, 0),
    ],
)
def test_bytes_that_are_no_table_are_refused(data: bytes) -> None:
    """Another kind of file, impossible sizes, bounds that do not ascend."""
    with pytest.raises(SnapshotError):
        Bans(data).validate()


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 8 * len(WHOLE) - 1))
def test_a_flipped_bit_is_refused_or_harmless(bit: int) -> None:
    """Whatever bit is wrong, the table is refused, or it answers every question."""
    broken = bytearray(WHOLE)
    broken[bit // 8] ^= 1 << bit % 8
    try:
        bans = Bans(bytes(broken))
    except SnapshotError:
        return
    for family, places in PLACES.items():
        for at in places:
            assert says(bans, family, at) in (True, False)
