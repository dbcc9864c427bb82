"""The assembler: bytes as the kernel wants them, a listing as people do."""

from __future__ import annotations

import struct

from gatekeeper.kernel import lookup
from gatekeeper.kernel.asm import R0, R1, R10, Assembler, Helper


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


def test_the_program_grows_with_the_search_alone() -> None:
    """A policy without addresses is short; a hundred thousand times more ranges are a few more steps."""
    small = lookup.program(lookup.Sizes(0, 1, 1, 2, 10, 50))
    large = lookup.program(lookup.Sizes(16, 1 << 21, 1 << 21, 64, 10, 50))
    assert len(small) < 350 < len(large) < 1000
    assert "goto classified" in large.listing()
