"""The assembler: bytes as the kernel wants them, a listing as people do."""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise

import pytest

from gatekeeper.kernel import lookup
from gatekeeper.kernel.asm import R0, R1, R10, Assembler, Helper
from gatekeeper.kernel.search import Level, levels_v4, levels_v6
from gatekeeper.snapshot.layout import LOW32


def test_a_program_is_listed_as_it_is_numbered() -> None:
    """Labels, jumps and maps (two instructions wide) have the numbers that the verifier gives them."""
    code = Assembler()
    code.store(4, R10, -8, 7)
    code.map(R1, "table")
    code.call(Helper.MAP_LOOKUP)
    code.jump_if(R0, "==", 0, "end")
    code.do(R0, "=", 1)
    code.label("end")
    code.exit()
    assert code.listing().splitlines() == [
        "    0  *(u32 *)(r10 -8) = 7",
        "    1  r1 = map table",
        "    3  r0 = map_lookup(...)",
        "    4  if r0 == 0 goto end",
        "    5  r0 = 1",
        "end:",
        "    6  return r0",
    ]
    instructions = list(struct.iter_unpack("<BBhi", code.assemble({"table": 99})))
    assert len(instructions) == len(code) == 7
    assert instructions[0] == (0x62, 10, -8, 7)
    assert instructions[1:3] == [(0x18, 0x11, 0, 99), (0, 0, 0, 0)]
    assert instructions[4] == (0x15, 0, 1, 0)


def test_the_program_grows_with_the_levels_alone() -> None:
    """A policy without addresses is short; a hundred thousand times more ranges are a few more levels."""
    small = lookup.program(lookup.Sizes(levels_v4(1), levels_v6(1), exact=True, anywhere=True, cpus=2, per_s=10, burst=50))
    large = lookup.program(
        lookup.Sizes(levels_v4(1 << 21), levels_v6(1 << 21), exact=True, anywhere=True, cpus=64, per_s=10, burst=50)
    )
    assert len(small) < 500 < len(large) < 1000
    assert "goto classified" in large.listing()


@pytest.mark.parametrize("levels_of", [levels_v4, levels_v6])
@pytest.mark.parametrize("ranges", [1, 2, 63, 64, 65, 128, 129, 8192, 8193, 1_000_000, 2_000_001])
def test_levels_stand_for_all_that_is_below(levels_of: Callable[[int], tuple[Level, ...]], ranges: int) -> None:
    """One root; each level has a key for each node below it and room for it; the last are the ranges themselves."""
    levels = levels_of(ranges)
    assert levels[0].nodes == 1
    assert levels[-1].below == ranges and levels[-1].every == 1
    for above, level in pairwise(levels):
        assert above.below == level.nodes
        assert above.every == level.every * level.keys
    for level in levels:
        assert level.nodes == math.ceil(level.below / level.keys)
        assert level.keys.bit_count() == 1


def test_a_search_goes_where_the_table_says() -> None:
    """Followed by hand: from the root to the range that holds the address, whatever the sizes."""
    for ranges in (1, 2, 127, 128, 129, 9000):
        starts = list(range(0, 10 * ranges, 10))
        for address in (0, 9, 10, 10 * ranges // 2, 10 * ranges - 1, LOW32):
            node = 0
            for level in levels_v4(ranges):
                keys = starts[:: level.every]
                keys += [LOW32] * (level.nodes * level.keys - len(keys))
                here = keys[node * level.keys : (node + 1) * level.keys]
                node = min(node * level.keys + bisect_right(here, address, lo=1) - 1, level.below - 1)
            assert node == bisect_right(starts, address) - 1
