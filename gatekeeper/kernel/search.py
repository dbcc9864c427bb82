"""The search in a sorted table, as the kernel's part does it: few misses of the CPU's caches, whatever the table holds.

The ranges lie as they do in the snapshot, some of them to an element of a map. Above them lie levels of nodes, as in a
B-tree, each with the first starts of the nodes below it: one map look-up a level and, within a node, a binary search by
offset. Nodes are so large that all levels above the ranges stay in the caches (64 KB for a million IPv4 networks), and
the lines of a node are asked for at once: what a look-up waits for is memory, not instructions.

Pure: what to lay out, and instructions. `gatekeeper.kernel.judge` fills the maps that the levels name.
"""

from __future__ import annotations

from dataclasses import dataclass

from gatekeeper.kernel.asm import R0, R1, R2, R3, R4, R5, R7, R8, R9, R10, Assembler, Helper, Register

# Keys of a node, from the ranges up; the last number goes for all further levels.
_V4_KEYS = (128, 64, 256)  # 1 KiB of starts and classes, 256 bytes of starts, 1 KiB
_V6_KEYS = (64,)  # 512 bytes of upper halves and as many of lower ones
V6_LOW, V6_CLASS = "v6_low", "v6_class"  # maps beside the last level, which has the upper halves
_WORD, _LONG = 4, 8
_CLASS, _START = 0, 4  # in an IPv4 range
_SIGN = 63
_LINE = 64


@dataclass(frozen=True, slots=True)
class Level:
    """``nodes`` elements of the map ``name``, with up to ``keys`` keys each, a power of two.

    ``below``: how many nodes (or ranges) the keys of all of them stand for; ``every``: the ranges below one key.
    """

    name: str
    nodes: int
    keys: int
    below: int
    every: int


def levels_v4(ranges: int) -> tuple[Level, ...]:
    """Return the levels above that many IPv4 ranges, the root first, the ranges themselves last."""
    return _levels("v4", ranges, _V4_KEYS)


def levels_v6(ranges: int) -> tuple[Level, ...]:
    """Return the levels above that many IPv6 ranges."""
    return _levels("v6", ranges, _V6_KEYS)


def _levels(family: str, ranges: int, keys: tuple[int, ...]) -> tuple[Level, ...]:
    found: list[Level] = []
    below, every = ranges, 1
    while not found or below > 1:
        most = keys[min(len(found), len(keys) - 1)]
        # A root is no larger than it must be; ranges always fill their line.
        width = most if not found else min(most, 1 << (below - 1).bit_length())
        nodes = -(-below // width)
        found.append(Level(f"{family}_{len(found)}", nodes, width, below, every))
        below, every = nodes, every * width
    return tuple(reversed(found))


def search_v4(code: Assembler, levels: tuple[Level, ...], key: int, refuse: str) -> None:
    """R8: the address. Leave its class in R7. ``key`` is room on the stack; at ``refuse`` goes on what cannot be.

    Without a branch: where the answer is random, half of them would be mispredicted.
    """
    code.do(R9, "=", R8)
    code.do(R9, "+=", 1)
    code.do(R7, "=", 0)
    for level in levels[:-1]:
        _element(code, level.name, key, refuse)
        _fetch(code, level.keys * _WORD)
        code.do(R1, "=", 0)
        for step in _halves(level.keys):
            _advance(code, R0, step * _WORD, 0)
            code.do(R1, "+=", R3)
        code.do(R7, "*=", level.keys)
        code.do(R1, ">>=", 2)
        code.do(R7, "+=", R1)
        _not_past(code, level)
    _element(code, levels[-1].name, key, refuse)
    _fetch(code, levels[-1].keys * _LONG)
    for step in _halves(levels[-1].keys):
        _advance(code, R0, step * _LONG, _START)
    code.load(4, R7, R0, _CLASS)


def _advance(code: Assembler, at: Register, by: int, field: int) -> None:
    """Move ``at`` on by that many bytes if the key there is not above the address, of which R9 is one more; R3 is by how much."""
    code.load(4, R3, at, by + field)
    code.do(R3, "-=", R9)
    code.do(R3, ">>=", _SIGN)
    code.do(R3, "<<=", by.bit_length() - 1)
    code.do(at, "+=", R3)


def search_v6(code: Assembler, levels: tuple[Level, ...], key: int, zero: int, refuse: str) -> None:
    """R8 and R9: the address. Leave its class in R7. ``key`` is room on the stack for three words of 8 bytes.

    ``zero``: a zero on the stack that the verifier does not know to be one. Added to a position it lets both ways that a
    comparison can go look the same; else every path through the search would be followed.
    """
    code.do(R7, "=", 0)
    for level in levels[:-1]:
        _element(code, level.name, key, refuse)
        _fetch(code, level.keys * _LONG)
        code.do(R3, "=", R0)
        code.do(R4, "=", R0)
        code.do(R4, "+=", level.keys * _LONG)
        _find_v6(code, level, zero)
        code.do(R7, "*=", level.keys)
        code.do(R1, ">>=", 3)
        code.do(R7, "+=", R1)
        _not_past(code, level)
    # Upper halves, lower halves and classes are tables of their own, as in the snapshot.
    _element(code, V6_CLASS, key, refuse)
    _fetch(code, levels[-1].keys * _WORD, 0)
    code.store(8, R10, key + 8, R0)
    _element(code, levels[-1].name, key, refuse)
    _fetch(code, levels[-1].keys * _LONG)
    code.store(8, R10, key + 16, R0)
    _element(code, V6_LOW, key, refuse)
    code.do(R4, "=", R0)
    code.load(8, R3, R10, key + 16)
    _find_v6(code, levels[-1], zero)
    code.do(R1, ">>=", 1)
    code.load(8, R2, R10, key + 8)
    code.do(R2, "+=", R1)
    code.load(4, R7, R2, 0)


def _find_v6(code: Assembler, level: Level, zero: int) -> None:
    """R3, R4: the upper and lower halves of a node. Leave in R1, in bytes, where its last key is that is not above the address."""
    code.load(8, R0, R10, zero)
    code.do(R1, "=", 0)
    for step in _halves(level.keys):
        _advance_v6(code, f"{level.name}_{step}", step * _LONG, level.keys * _LONG)


def _advance_v6(code: Assembler, name: str, by: int, size: int) -> None:
    """Move R1 on by that many bytes if the key there is not above the address."""
    code.do(R2, "=", R3)
    code.do(R2, "+=", R1)
    code.load(8, R5, R2, by)
    code.jump_if(R5, ">", R8, f"{name}_behind")
    code.jump_if(R5, "<", R8, f"{name}_on")
    code.do(R2, "=", R4)
    code.do(R2, "+=", R1)
    code.load(8, R5, R2, by)
    code.jump_if(R5, ">", R9, f"{name}_behind")
    code.label(f"{name}_on")
    code.do(R1, "+=", by)
    code.label(f"{name}_behind")
    code.do(R1, "+=", R0)
    code.do(R1, "&=", size - by)  # no bits below a step are set


def _element(code: Assembler, name: str, key: int, refuse: str) -> None:
    """R0: the element of a map whose number is R7."""
    code.store(4, R10, key, R7)
    code.map(R1, name)
    code.do(R2, "=", R10)
    code.do(R2, "+=", key)
    code.call(Helper.MAP_LOOKUP)
    code.jump_if(R0, "==", 0, refuse)


def _fetch(code: Assembler, size: int, first: int = _LINE) -> None:
    """Ask for all lines of an element at R0 at once, rather than for one after the other as the search comes to them."""
    for line in range(first, size, _LINE):
        code.load(4, R2, R0, line)


def _not_past(code: Assembler, level: Level) -> None:
    """Behind the last key are some that no address is below, except for the highest of all."""
    if level.below < level.nodes * level.keys:
        code.jump_if(R7, "<", level.below, f"{level.name}_exists")
        code.do(R7, "=", level.below - 1)
        code.label(f"{level.name}_exists")


def _halves(keys: int) -> list[int]:
    """Return the steps of a binary search among a power of two of keys."""
    return [1 << bit for bit in reversed(range((keys - 1).bit_length()))]
