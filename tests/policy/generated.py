"""Policies and sources for hypothesis: small, crowded at the places where mistakes live.

All addresses lie near a few anchors (the first and the last address, the ends of halves, the border of 64 bits), so
that ranges touch, nest and overlap, and every bound is within reach of the sources that are tried.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from hypothesis import strategies as st

from gatekeeper.policy.model import (
    Action,
    Backend,
    Endpoint,
    Listener,
    Place,
    Policy,
    Protocol,
    Rule,
    Sources,
    Target,
)
from gatekeeper.policy.ranges import BITS, AddressSet

SPREAD = 6  # addresses around each anchor
ANCHORS = {
    4: (0, 1 << 31, 0xC6336400, (1 << 32) - SPREAD),
    6: (0, 1 << 64, 0x20010DB8 << 96, (0x20010DB8 << 96) + (1 << 64), (1 << 128) - SPREAD),
}
UNIVERSE = {
    family: sorted({anchor + step for anchor in anchors for step in range(-2, SPREAD) if anchor + step >= 0})
    for family, anchors in ANCHORS.items()
}
NOWHERE = Place("rules.yaml", 1, 1)
PORTS = (22, 53, 8000)

Pair = tuple[int, int]


@dataclass(frozen=True)
class Written:
    """A set of addresses as somebody would write it, and the same as `AddressSet`."""

    pairs: dict[int, list[Pair]]

    @property
    def compiled(self) -> AddressSet:
        return AddressSet.of(self.pairs[4], self.pairs[6])

    def holds(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        """Say whether an address is meant, by comparing addresses of the standard library."""
        kind = type(address)
        return any(
            kind(first) <= address <= kind(last)  # type: ignore[operator]  # both are of one family
            for first, last in self.pairs[address.version]
        )


@dataclass(frozen=True)
class WrittenRule:
    """A rule before it is compiled."""

    included: Written
    excluded: Written
    rule: Rule


@st.composite
def pairs(draw: st.DrawFn, family: int) -> list[Pair]:
    """A few inclusive ranges, now and then very wide ones."""
    bounds = st.sampled_from(UNIVERSE[family])
    near = st.integers(0, 3)
    found = []
    for first in draw(st.lists(bounds, max_size=4)):
        last = draw(bounds) if draw(st.booleans()) else min(first + draw(near), (1 << BITS[family]) - 1)
        found.append((min(first, last), max(first, last)))
    return found


@st.composite
def written(draw: st.DrawFn) -> Written:
    """Ranges of both families."""
    return Written({4: draw(pairs(4)), 6: draw(pairs(6))})


EVERYBODY = Written({family: [(0, (1 << bits) - 1)] for family, bits in BITS.items()})
NOBODY = Written({4: [], 6: []})


def endpoint_pool() -> list[Endpoint]:
    """Addresses of listeners; several have one port at different addresses."""
    pool = [
        Endpoint(protocol, family, host, port)
        for protocol in Protocol
        for family, host in ((4, "0.0.0.0"), (4, "127.0.0.1"), (6, "::"))
        for port in PORTS
    ]
    return [*pool, Endpoint(Protocol.TCP, 0, "/run/one.sock", 0), Endpoint(Protocol.TCP, 0, "/run/two.sock", 0)]


@st.composite
def listeners(draw: st.DrawFn) -> tuple[Listener, ...]:
    """One to three listeners of one to three endpoints each, no two alike."""
    pool = draw(st.permutations(endpoint_pool()))
    made = []
    for index in range(draw(st.integers(1, 3))):
        protocol = pool[index].protocol
        own = tuple(one for one in pool[index::3] if one.protocol is protocol)[: draw(st.integers(1, 3))]
        made.append(
            Listener(f"l{index}", protocol, own, Backend(4, "127.0.0.1", 9), 5.0, 60.0, 30.0, None, None, NOWHERE)
        )
    return tuple(made)


targets = st.one_of(
    st.none(),
    st.lists(
        st.one_of(
            st.sampled_from(["l0", "l1", "l2"]).map(Target),
            st.builds(
                lambda first, width, protocol: Target(None, first, first + width, protocol),
                st.sampled_from((1, *PORTS)), st.sampled_from((0, 31, 9000)), st.sampled_from((None, *Protocol)),
            ),
        ),
        min_size=1,
        max_size=2,
    ).map(tuple),
)  # fmt: skip


@st.composite
def sources(draw: st.DrawFn) -> tuple[Written, Written, Sources]:
    """What `from` and `except` name, and the same compiled."""
    everybody = draw(st.integers(0, 3)) == 0
    included = EVERYBODY if everybody else draw(written())
    excluded = draw(st.one_of(st.just(NOBODY), written()))
    anyone = everybody and excluded is NOBODY
    compiled = AddressSet.EVERYTHING if everybody else included.compiled
    return included, excluded, Sources(compiled, excluded.compiled, anyone, "from", "except")


@st.composite
def rules(draw: st.DrawFn) -> list[WrittenRule]:
    """Up to six rules."""
    made = []
    for index in range(draw(st.integers(0, 6))):
        included, excluded, compiled = draw(sources())
        rule = Rule(f"r{index}", draw(st.sampled_from(Action)), compiled, draw(targets), Place("rules.yaml", index + 2, 5))
        made.append(WrittenRule(included, excluded, rule))
    return made


@st.composite
def policies(draw: st.DrawFn) -> tuple[Policy, list[WrittenRule]]:
    """A policy, and its rules as they were written."""
    ruled = draw(rules())
    return Policy(draw(listeners()), tuple(one.rule for one in ruled), draw(st.sampled_from(Action)), NOWHERE), ruled
