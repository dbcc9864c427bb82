from __future__ import annotations

import ipaddress
import random
from array import array
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.policy.ranges import BITS, MAPPED, AddressSet, Ranges, Wide, bounds_from, format_source, normalize
from tests.policy.generated import UNIVERSE, Pair, pairs

FAMILIES = st.sampled_from((4, 6))


def both(family: int) -> st.SearchStrategy[tuple[int, list[Pair], list[Pair]]]:
    """A family and two sets of it."""
    return st.tuples(st.just(family), pairs(family), pairs(family))


two_sets = FAMILIES.flatmap(both)


def plain(family: int, listed: list[Pair]) -> set[int]:
    """The members of a set among the addresses that are tried."""
    return {address for address in UNIVERSE[family] if any(first <= address <= last for first, last in listed)}


def members(ranges: Ranges) -> set[int]:
    """The same of a compiled set."""
    return {address for address in UNIVERSE[ranges.family] if address in ranges}


def well_formed(ranges: Ranges) -> None:
    """Fail unless the ranges are sorted, disjoint and not adjacent."""
    listed = list(ranges)
    assert len(listed) == len(ranges)
    assert all(first <= last for first, last in listed)
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(listed))
    assert not listed or (listed[0][0] >= 0 and listed[-1][1] < 1 << BITS[ranges.family])


@settings(max_examples=250, deadline=None)
@given(two_sets)
def test_operations_do_what_they_do_to_plain_sets(case: tuple[int, list[Pair], list[Pair]]) -> None:
    """Union, intersection, difference and complement have exactly the members that sets of integers would have."""
    family, left, right = case
    a, b = Ranges.of(family, left), Ranges.of(family, right)
    universe = set(UNIVERSE[family])
    for made, want in (
        (a, plain(family, left)),
        (a | b, plain(family, left) | plain(family, right)),
        (a & b, plain(family, left) & plain(family, right)),
        (a - b, plain(family, left) - plain(family, right)),
        (~a, universe - plain(family, left)),
    ):
        well_formed(made)
        assert members(made) == want


@settings(max_examples=300, deadline=None)
@given(two_sets)
def test_the_laws_of_sets_hold_exactly(case: tuple[int, list[Pair], list[Pair]]) -> None:
    """De Morgan, absorption, complement and difference hold as equality of whole sets, not of samples."""
    family, left, right = case
    a, b = Ranges.of(family, left), Ranges.of(family, right)
    everything = ~Ranges.of(family, [])
    assert ~(a | b) == ~a & ~b
    assert ~(a & b) == ~a | ~b
    assert ~~a == a
    assert a | (a & b) == a
    assert (a - b) | (a & b) == a
    assert not (a - b) & b
    assert a | ~a == everything
    assert not a & ~a
    assert a | b == b | a
    assert Ranges.of(family, [*left, *right]) == a | b


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("sizes", [(300, 300), (300, 5), (5, 300), (2000, 100)])
def test_large_sets_and_small_ones_agree_with_plain_sets(family: int, sizes: tuple[int, int]) -> None:
    """Whatever the sizes of both sides, and so whichever way is taken, the result is right at every address."""
    dice = random.Random(f"{family} {sizes}")
    top = 1 << BITS[family]
    for base in (0, top // 2 - 3000, top - 6000):
        drawn = [[(base + dice.randrange(5990), dice.randrange(4)) for _ in range(size)] for size in sizes]
        left, right = ([(first, first + more) for first, more in one] for one in drawn)
        a, b = Ranges.of(family, left), Ranges.of(family, right)
        in_a, in_b = ({at for first, last in one for at in range(first, last + 1)} for one in (left, right))
        for made, want in ((a | b, in_a | in_b), (a & b, in_a & in_b), (a - b, in_a - in_b), (b - a, in_b - in_a)):
            well_formed(made)
            assert {at for first, last in made for at in range(first, last + 1)} == want
        assert ~(~a & ~b) == a | b


@pytest.mark.parametrize("sizes", [(1,), (1, 4, 256), tuple(range(1, 400))], ids=["one", "few", "more than a byte holds"])
@pytest.mark.parametrize("order", ["sorted", "random"])
def test_ranges_of_any_order_join_to_their_union(sizes: tuple[int, ...], order: str) -> None:
    """Ranges that nest, overlap and repeat join to the same set in any order, up to the last address of all."""
    dice = random.Random(f"{sizes} {order}")
    top = 1 << 32
    listed = []
    for base in (0, 1 << 31, top - 5000):
        for _ in range(700):
            size = dice.choice(sizes)
            first = min(base + dice.randrange(5000), top - size)
            listed.append((first, first + size - 1))
    listed.append((top - 1, top - 1))
    listed.sort()
    if order == "random":
        dice.shuffle(listed)
    starts, lasts = ([pair[side] for pair in listed] for side in (0, 1))
    for family in (4, 6):
        made = Ranges.joined(family, bounds_from(family, starts), bounds_from(family, lasts))
        well_formed(made)
        assert list(made) == union(listed)


def union(listed: list[Pair]) -> list[Pair]:
    """The slow and plain way."""
    merged: list[Pair] = []
    for first, last in sorted(listed):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return merged


@settings(max_examples=300, deadline=None)
@given(FAMILIES.flatmap(lambda family: st.tuples(st.just(family), pairs(family))))
def test_networks_are_the_fewest_that_cover_the_set(case: tuple[int, list[Pair]]) -> None:
    """The networks of a set are those that the standard library finds for its ranges, as text; they can be counted alone."""
    family, listed = case
    kind = ipaddress.IPv4Address if family == 4 else ipaddress.IPv6Address
    made = Ranges.of(family, listed)
    want = [
        str(network.network_address) if network.prefixlen == BITS[family] else str(network)
        for first, last in made
        for network in ipaddress.summarize_address_range(kind(first), kind(last))
    ]
    assert list(made.networks()) == want
    assert made.count_networks() == len(want)
    assert made.count_addresses() == sum(ipaddress.ip_network(text).num_addresses for text in want)


def test_everything_and_nothing() -> None:
    """Everything has every address of both families, nothing none, and a peer without an address is in neither."""
    assert list(AddressSet.EVERYTHING.networks()) == ["0.0.0.0/0", "::/0"]
    assert AddressSet.EVERYTHING.count_ranges() == 2
    assert AddressSet.EVERYTHING.first() == (4, 0)
    assert not AddressSet.EMPTY
    assert AddressSet.EMPTY.first() is None
    assert ~AddressSet.EVERYTHING == AddressSet.EMPTY
    assert not AddressSet.EVERYTHING.contains(0, 0)
    assert AddressSet.EVERYTHING.contains(6, (1 << 128) - 1)


def test_families_do_not_mix() -> None:
    """A number is in a set only in the family that it was put in, and the first address is IPv4 where there is one."""
    only_v6 = AddressSet.of(v6=[(5, 9)])
    assert only_v6.contains(6, 5)
    assert not only_v6.contains(4, 5)
    assert only_v6.first() == (6, 5)
    assert (only_v6 | AddressSet.of(v4=[(7, 7)])).first() == (4, 7)
    assert (~only_v6).v4 == AddressSet.EVERYTHING.v4


def test_a_mapped_address_is_ipv4() -> None:
    """An IPv4-mapped IPv6 address is judged as the IPv4 address in it; its neighbours are IPv6."""
    first = int(ipaddress.IPv6Address("::ffff:0.0.0.0"))
    assert normalize(6, int(ipaddress.IPv6Address("::ffff:198.51.100.7"))) == (4, int(ipaddress.IPv4Address("198.51.100.7")))
    assert normalize(6, first - 1) == (6, first - 1)
    assert normalize(6, first + (1 << 32)) == (6, first + (1 << 32))
    assert normalize(4, 0xFFFF00000000 & 0xFFFFFFFF) == (4, 0)
    assert list(MAPPED.networks()) == ["::ffff:0:0/96"]


def test_a_million_networks_stay_compact() -> None:
    """A million isolated IPv4 addresses take eight bytes each, and the algebra keeps it so."""
    starts = array("I", range(0, 4_000_000, 4))
    made = Ranges.joined(4, starts, starts)
    assert len(made) == 1_000_000
    assert isinstance(made.bounds, array)
    assert made.bounds.itemsize * len(made.bounds) == 8_000_000
    assert (~made & made) == Ranges.of(4, [])
    assert len(~made) == 1_000_000


def test_wide_is_a_sequence_of_128_bits() -> None:
    """Numbers of 128 bits go in and come out whole, by index, by slice and one by one."""
    values = [0, 1, 1 << 64, (1 << 128) - 1]
    wide = Wide(values)
    assert list(wide) == values
    assert [wide[index] for index in range(-4, 4)] == values * 2
    assert list(wide[1::2]) == values[1::2]
    wide.append(7)
    wide.extend([8, 9])
    assert list(wide) == [*values, 7, 8, 9]
    assert wide == Wide([*values, 7, 8, 9])
    assert wide != Wide(values)


@pytest.mark.parametrize(
    ("family", "address", "text"),
    [(0, 0, "unix"), (4, 0, "0.0.0.0"), (4, 0xC6336407, "198.51.100.7"), (6, 0, "::"), (6, 0x20010DB8 << 96, "2001:db8::")],
)
def test_addresses_are_written_canonically(family: int, address: int, text: str) -> None:
    """An address is written as the standard library writes it; a local peer is called unix."""
    assert format_source(family, address) == text


def test_what_a_set_prints_as_is_short() -> None:
    """A set in a traceback shows its first networks only."""
    assert repr(Ranges.of(4, [(0, 0)])) == "<1 IPv4 ranges: 0.0.0.0>"
    assert repr(AddressSet.of(v4=[(at, at) for at in range(0, 40, 2)])).endswith(", ...> <0 IPv6 ranges: >>")
