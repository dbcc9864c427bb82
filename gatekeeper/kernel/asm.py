"""A small assembler for eBPF: named registers, labels, maps by name, and a listing that reads like C.

    code = Assembler()
    code.load(4, R1, R6, FAMILY)              r1 = *(u32 *)(r6 + 8)
    code.jump_if(R1, "==", 2, "ipv4")         if r1 == 2 goto ipv4
    ...
    code.assemble({"table": fd})              bytes for the kernel
    code.listing()                            text for people

Pure: no system calls. Nothing but what our programs use, all of it 64 bits wide.
"""

from __future__ import annotations

import enum
import struct

_SIZES = {1: (0x10, "u8"), 2: (0x08, "u16"), 4: (0x00, "u32"), 8: (0x18, "u64")}
_ALU = {"+=": 0x00, "-=": 0x10, "*=": 0x20, "/=": 0x30, "|=": 0x40, "&=": 0x50, "<<=": 0x60, ">>=": 0x70, "%=": 0x90, "=": 0xB0}
_JUMPS = {"==": 0x10, ">": 0x20, ">=": 0x30, "!=": 0x50, "<": 0xA0, "<=": 0xB0}
_FROM_REGISTER = 0x08
_LOAD, _STORE_VALUE, _STORE, _JUMP, _ALU64 = 0x61, 0x62, 0x63, 0x05, 0x07
_ATOMIC_ADD = 0xDB  # 64 bits
_MAP = 0x18  # two instructions wide
_TO_BIG_ENDIAN = 0xDC
_CALL, _EXIT = 0x85, 0x95
_PSEUDO_MAP_FD, _PSEUDO_MAP_VALUE = 1, 2


class Register(enum.IntEnum):
    """R0 is what calls return; R1 to R5 are their arguments, lost in the call; R6 to R9 are kept; R10 is the stack's top."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    R10 = 10

    def __str__(self) -> str:
        return f"r{self.value}"


R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = Register


class Helper(enum.IntEnum):
    """What the kernel offers to programs."""

    MAP_LOOKUP = 1
    CPU = 8
    SK_RELEASE = 86
    SK_ASSIGN = 124
    JIFFIES = 118
    BOOT_NS = 125
    RING_OUTPUT = 130


class Assembler:
    """A program in the making."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int, int, str]] = []  # opcode, registers, offset, value, width; text
        self._labels: dict[str, int] = {}
        self._jumps: dict[int, str] = {}
        self._maps: dict[int, str] = {}
        self._size = 0  # in instructions

    def __len__(self) -> int:
        return self._size

    def label(self, name: str) -> None:
        """Name the place where the next instruction will be."""
        assert name not in self._labels, name
        self._labels[name] = self._size

    def load(self, size: int, into: Register, base: Register, offset: int) -> None:
        """Read memory."""
        mode, name = _SIZES[size]
        self._add(_LOAD | mode, into, base, offset, 0, f"{into} = *({name} *)({base} {offset:+d})")

    def store(self, size: int, base: Register, offset: int, what: Register | int) -> None:
        """Write memory."""
        mode, name = _SIZES[size]
        text = f"*({name} *)({base} {offset:+d}) = {what!s}"
        if isinstance(what, Register):
            self._add(_STORE | mode, base, what, offset, 0, text)
        else:
            self._add(_STORE_VALUE | mode, base, R0, offset, what, text)

    def add_atomically(self, base: Register, offset: int, what: Register) -> None:
        """Add to 64 bits of memory that other CPUs add to."""
        self._add(_ATOMIC_ADD, base, what, offset, 0, f"lock *(u64 *)({base} {offset:+d}) += {what}")

    def do(self, target: Register, operation: str, what: Register | int) -> None:
        """Compute: ``=``, ``+=``, ``<<=`` and so on."""
        opcode, text = _ALU64 | _ALU[operation], f"{target} {operation} {what!s}"
        if isinstance(what, Register):
            self._add(opcode | _FROM_REGISTER, target, what, 0, 0, text)
        else:
            self._add(opcode, target, R0, 0, what, text)

    def from_network(self, target: Register, bits: int) -> None:
        """Turn a number in network byte order into one to compute with."""
        self._add(_TO_BIG_ENDIAN, target, R0, 0, bits, f"{target} = be{bits} {target}")

    def jump(self, label: str) -> None:
        """Go on somewhere else. All jumps lead forward."""
        self._jumps[len(self._code)] = label
        self._add(_JUMP, R0, R0, 0, 0, f"goto {label}")

    def jump_if(self, left: Register, relation: str, right: Register | int, label: str) -> None:
        """Go on somewhere else when it holds (unsigned)."""
        self._jumps[len(self._code)] = label
        opcode, text = _JUMP | _JUMPS[relation], f"if {left} {relation} {right!s} goto {label}"
        if isinstance(right, Register):
            self._add(opcode | _FROM_REGISTER, left, right, 0, 0, text)
        else:
            self._add(opcode, left, R0, 0, right, text)

    def map(self, into: Register, name: str) -> None:
        """Take a map, by its name."""
        self._maps[len(self._code)] = name
        self._add(_MAP, into, Register(_PSEUDO_MAP_FD), 0, 0, f"{into} = map {name}", width=2)

    def contents(self, into: Register, name: str) -> None:
        """Take the address of the first element of an array, by the name of the map: no look-up, and never null."""
        self._maps[len(self._code)] = name
        self._add(_MAP, into, Register(_PSEUDO_MAP_VALUE), 0, 0, f"{into} = &{name}[0]", width=2)

    def call(self, helper: Helper) -> None:
        """Call the kernel."""
        self._add(_CALL, R0, R0, 0, helper, f"r0 = {helper.name.lower()}(...)")

    def exit(self) -> None:
        """Return R0."""
        self._add(_EXIT, R0, R0, 0, 0, "return r0")

    def assemble(self, maps: dict[str, int]) -> bytes:
        """Return the instructions, with the descriptors of the maps in place."""
        parts, at = [], 0
        for number, (opcode, registers, offset, value, width, _text) in enumerate(self._code):
            at += width
            if number in self._jumps:
                offset = self._labels[self._jumps[number]] - at  # noqa: PLW2901 - known only now
            if number in self._maps:
                value = maps[self._maps[number]]  # noqa: PLW2901
            parts.append(struct.pack("=BBhi", opcode, registers, offset, value) + bytes(8) * (width - 1))
        return b"".join(parts)

    def listing(self) -> str:
        """Return the program as text, one instruction a line, numbered as the verifier numbers them."""
        names: dict[int, list[str]] = {}
        for name, place in self._labels.items():
            names.setdefault(place, []).append(name)
        lines, at = [], 0
        for *_, width, text in self._code:
            lines += [f"{name}:" for name in names.get(at, ())]
            lines.append(f"{at:5}  {text}")
            at += width
        return "\n".join(lines)

    def _add(self, opcode: int, first: Register, second: Register, offset: int, value: int, text: str, width: int = 1) -> None:
        self._code.append((opcode, first | second << 4, offset, value, width, text))
        self._size += width
