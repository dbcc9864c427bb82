"""The sk_lookup program: the verdict on a connection before it exists.

The kernel runs it for every SYN and for every datagram of an unconnected sender, and it reads the same table as workers:

    endpoint    (family, protocol, port, local address), else the same with the wildcard address; neither: not ours
    class       binary search of the source among the starts of ranges, one map look-up a step; for IPv4 the snapshot's
                index says where it begins, so that a table of a million ranges costs few misses of the CPU's caches
    verdict     matrix[row of the endpoint][class]
    count       per detail (listener, rule, reason) and CPU; a refusal is also reported, as far as its budget goes
    end         allow: pass, on to whoever listens · deny: drop, which the other side sees as a reset or as ICMP
                unreachable · drop: into a black hole, which the other side sees as silence

Whatever should be there and is not ends in a refusal. `program` is pure and can be listed; `gatekeeper.kernel.judge` fills
the maps that it names. Numbers in maps are little-endian, as they are in the snapshot on all machines we know.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

from gatekeeper.kernel.asm import R0, R1, R2, R3, R4, R6, R7, R8, R9, R10, Assembler, Helper
from gatekeeper.policy.model import Action
from gatekeeper.snapshot.layout import ACTION_MASK, DETAIL_SHIFT

# What the kernel gives: struct bpf_sk_lookup.
_FAMILY, _PROTOCOL, _REMOTE_IP4, _REMOTE_IP6, _REMOTE_PORT = 8, 12, 16, 20, 36
_LOCAL_IP4, _LOCAL_IP6, _LOCAL_PORT = 40, 44, 60
_WORD = 4
_SK_DROP, _SK_PASS = 0, 1
_REPLACE = 1  # the socket that another program may have chosen

# Elements of our maps.
ENDPOINT_KEY = struct.Struct("<HBB16s")  # port, protocol, family (AF_INET, AF_INET6), local address
ENDPOINT = struct.Struct("<IIII")  # first cell of its row in the matrix, its number, 0, unused
COUNT = struct.Struct("<QQ")  # attempts, of those reported; for each detail and CPU
BUDGET = struct.Struct("<QQ")  # the second it was last filled up in, reports left
# boot time (ns), slot, endpoint number, source port (network order), port, family, protocol, source, destination
REPORT = struct.Struct("<QIIIIII16s16s")

# The stack, from its top.
_INDEX = -8  # key of arrays
_KEY = -32  # ENDPOINT_KEY
_FIRST, _NUMBER = -40, -36  # of the endpoint
_REPORT = -40 - REPORT.size

BLACK_HOLE_TCP, BLACK_HOLE_UDP = 0, 1  # keys of "holes"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a program is made for.

    The IPv4 index has 2**``v4_parts_bits`` parts, with at most ``v4_part`` ranges that start in one. ``cpus`` counters are
    kept for each detail. Each verdict reports up to ``burst`` refusals at once and ``per_s`` a second.
    """

    v4_parts_bits: int
    v4_part: int
    v6_ranges: int
    cpus: int
    per_s: int
    burst: int


def program(sizes: Sizes) -> Assembler:
    """Return the program for tables of these sizes; it names the maps that `gatekeeper.kernel.judge` fills."""
    code = Assembler()
    code.do(R6, "=", R1)  # kept throughout: the connection
    _find_endpoint(code)
    _find_class(code, sizes)
    _find_verdict(code)
    _count(code, sizes.cpus)
    _report(code, sizes.per_s, sizes.burst)
    _end(code)
    return code


def steps(ahead: int) -> list[int]:
    """Return what a binary search tries to advance by when the answer is 0 to ``ahead`` places further."""
    return [1 << bit for bit in reversed(range(ahead.bit_length()))]


def _find_endpoint(code: Assembler) -> None:
    """Leave the row and number of the endpoint on the stack, and the zero that the search among IPv6 ranges starts from in R7."""
    code.load(4, R1, R6, _FAMILY)
    code.load(4, R2, R6, _PROTOCOL)
    code.load(4, R3, R6, _LOCAL_PORT)
    code.store(2, R10, _KEY, R3)
    code.store(1, R10, _KEY + 2, R2)
    code.store(1, R10, _KEY + 3, R1)
    for word in range(4):
        code.store(4, R10, _KEY + 4 + word * _WORD, 0)
    code.jump_if(R1, "==", socket.AF_INET, "to_ipv4")
    code.jump_if(R1, "!=", socket.AF_INET6, "not_ours")
    for word in range(4):
        code.load(4, R2, R6, _LOCAL_IP6 + word * _WORD)
        code.store(4, R10, _KEY + 4 + word * _WORD, R2)
    code.jump("exact")
    code.label("to_ipv4")
    code.load(4, R2, R6, _LOCAL_IP4)
    code.store(4, R10, _KEY + 4, R2)
    code.label("exact")
    _look_up(code, "endpoints", _KEY)
    code.jump_if(R0, "!=", 0, "ours")
    for word in range(4):
        code.store(4, R10, _KEY + 4 + word * _WORD, 0)
    _look_up(code, "endpoints", _KEY)
    code.jump_if(R0, "!=", 0, "ours")
    code.label("not_ours")
    code.do(R0, "=", _SK_PASS)
    code.exit()
    code.label("ours")
    code.load(4, R1, R0, 0)
    code.store(4, R10, _FIRST, R1)
    code.load(4, R1, R0, 4)
    code.store(4, R10, _NUMBER, R1)
    # A zero that the verifier does not know to be one: with a constant it would follow every path of the search.
    code.load(4, R7, R0, 8)


def _find_class(code: Assembler, sizes: Sizes) -> None:
    """Leave the class of the source in R7."""
    code.load(4, R1, R6, _FAMILY)
    code.jump_if(R1, "==", socket.AF_INET, "from_ipv4")
    for half, register in ((0, R8), (2, R9)):
        code.load(4, register, R6, _REMOTE_IP6 + half * _WORD)
        code.from_network(register, 32)
        code.do(register, "<<=", 32)
        code.load(4, R1, R6, _REMOTE_IP6 + (half + 1) * _WORD)
        code.from_network(R1, 32)
        code.do(register, "|=", R1)
    code.jump_if(R8, "!=", 0, "search_v6")
    code.do(R1, "=", R9)
    code.do(R1, ">>=", 32)
    code.jump_if(R1, "!=", 0xFFFF, "search_v6")
    # IPv4-mapped: ::ffff:a.b.c.d is judged as a.b.c.d.
    code.do(R8, "=", R9)
    code.do(R8, "<<=", 32)
    code.do(R8, ">>=", 32)
    code.jump("search_v4")

    _search_v6(code, sizes)
    code.label("from_ipv4")
    code.load(4, R8, R6, _REMOTE_IP4)
    code.from_network(R8, 32)
    _search_v4(code, sizes)
    code.label("classified")


def _search_v6(code: Assembler, sizes: Sizes) -> None:
    """R8 and R9: the source; R7: 0. Leave the class in R7."""
    code.label("search_v6")
    for step in steps(sizes.v6_ranges - 1):
        behind = f"v6_{step}"
        _look_further(code, "v6", step, behind)
        code.load(8, R1, R0, 0)
        code.jump_if(R1, ">", R8, behind)
        code.jump_if(R1, "<", R8, f"{behind}_yes")
        code.load(8, R1, R0, 8)
        code.jump_if(R1, ">", R9, behind)
        code.label(f"{behind}_yes")
        code.do(R7, "+=", step)
        code.label(behind)
    code.store(4, R10, _INDEX, R7)
    _look_up(code, "v6", _INDEX)
    code.jump_if(R0, "==", 0, "refuse")
    code.load(4, R7, R0, 16)
    code.jump("classified")


def _search_v4(code: Assembler, sizes: Sizes) -> None:
    """R8: the source. Leave the class in R7."""
    code.label("search_v4")
    code.do(R1, "=", R8)
    code.do(R1, ">>=", 32 - sizes.v4_parts_bits)
    code.store(4, R10, _INDEX, R1)
    _look_up(code, "v4_index", _INDEX)
    code.jump_if(R0, "==", 0, "refuse")
    # From the last range that starts before this part of all addresses; those of later parts start behind the source.
    code.load(4, R7, R0, 0)
    code.do(R7, "-=", 1)
    for step in steps(sizes.v4_part):
        behind = f"v4_{step}"
        _look_further(code, "v4", step, behind)
        code.load(4, R1, R0, 4)
        code.jump_if(R1, ">", R8, behind)
        code.do(R7, "+=", step)
        code.label(behind)
    code.store(4, R10, _INDEX, R7)
    _look_up(code, "v4", _INDEX)
    code.jump_if(R0, "==", 0, "refuse")
    code.load(4, R7, R0, 0)


def _find_verdict(code: Assembler) -> None:
    """Leave the detail of the verdict in R7 and its action in R8."""
    code.load(4, R1, R10, _FIRST)
    code.do(R1, "+=", R7)
    code.store(4, R10, _INDEX, R1)
    _look_up(code, "matrix", _INDEX)
    code.jump_if(R0, "==", 0, "refuse")
    code.load(4, R7, R0, 0)
    code.do(R8, "=", R7)
    code.do(R8, "&=", ACTION_MASK)
    code.do(R7, ">>=", DETAIL_SHIFT)


def _count(code: Assembler, cpus: int) -> None:
    """Count the attempt, and go on only with a refusal; leave its count in R9, null when there is none."""
    code.call(Helper.CPU)
    code.do(R0, "%=", cpus)
    code.do(R1, "=", R7)
    code.do(R1, "*=", cpus)
    code.do(R1, "+=", R0)
    code.store(4, R10, _INDEX, R1)
    _look_up(code, "counts", _INDEX)
    code.do(R9, "=", R0)
    code.jump_if(R9, "==", 0, "counted")
    code.do(R1, "=", 1)
    code.add_atomically(R9, 0, R1)
    code.label("counted")
    code.jump_if(R8, "!=", Action.ALLOW, "refused")
    code.do(R0, "=", _SK_PASS)
    code.exit()
    code.label("refused")


def _report(code: Assembler, per_s: int, burst: int) -> None:
    """Report the refusal if its verdict's budget allows. CPUs that race for the last report may both win."""
    code.jump_if(R9, "==", 0, "end")
    code.call(Helper.BOOT_NS)
    code.store(8, R10, _REPORT, R0)
    code.store(4, R10, _INDEX, R7)
    _look_up(code, "budgets", _INDEX)
    code.jump_if(R0, "==", 0, "end")
    code.load(8, R1, R10, _REPORT)
    code.do(R1, "/=", 1_000_000_000)
    code.load(8, R2, R0, 0)
    code.load(8, R3, R0, 8)
    code.jump_if(R1, "<=", R2, "filled")
    code.store(8, R0, 0, R1)
    code.do(R1, "-=", R2)
    code.do(R1, "*=", per_s)
    code.do(R3, "+=", R1)
    code.jump_if(R3, "<=", burst, "filled")
    code.do(R3, "=", burst)
    code.label("filled")
    code.jump_if(R3, "==", 0, "spent")
    code.do(R3, "-=", 1)
    code.store(8, R0, 8, R3)
    _send_report(code)
    code.label("spent")


def _send_report(code: Assembler) -> None:
    """Fill in a REPORT, whose time is there already, and send it."""
    _look_up(code, "details", _INDEX)
    code.jump_if(R0, "==", 0, "end")
    code.load(4, R1, R0, 0)
    code.store(4, R10, _REPORT + 8, R1)
    code.load(4, R1, R10, _NUMBER)
    code.store(4, R10, _REPORT + 12, R1)
    code.load(2, R1, R6, _REMOTE_PORT)
    code.store(4, R10, _REPORT + 16, R1)
    code.load(4, R1, R6, _LOCAL_PORT)
    code.store(4, R10, _REPORT + 20, R1)
    code.load(4, R2, R6, _FAMILY)
    code.store(4, R10, _REPORT + 24, R2)
    code.load(4, R1, R6, _PROTOCOL)
    code.store(4, R10, _REPORT + 28, R1)
    for word in range(4):
        code.store(4, R10, _REPORT + 32 + word * _WORD, 0)
        code.store(4, R10, _REPORT + 48 + word * _WORD, 0)
    code.jump_if(R2, "==", socket.AF_INET6, "report_ipv6")
    for at, word in ((32, _REMOTE_IP4), (48, _LOCAL_IP4)):
        code.load(4, R1, R6, word)
        code.store(4, R10, _REPORT + at, R1)
    code.jump("send")
    code.label("report_ipv6")
    for at, word in ((32, _REMOTE_IP6), (48, _LOCAL_IP6)):
        for step in range(0, 16, _WORD):
            code.load(4, R1, R6, word + step)
            code.store(4, R10, _REPORT + at + step, R1)
    code.label("send")
    code.map(R1, "ring")
    code.do(R2, "=", R10)
    code.do(R2, "+=", _REPORT)
    code.do(R3, "=", REPORT.size)
    code.do(R4, "=", 0)
    code.call(Helper.RING_OUTPUT)
    code.jump_if(R0, "!=", 0, "end")  # full: what is not reported is at least counted
    code.do(R1, "=", 1)
    code.add_atomically(R9, 8, R1)


def _end(code: Assembler) -> None:
    """Refuse as the action in R8 says."""
    code.label("end")
    code.jump_if(R8, "!=", Action.DROP, "refuse")
    code.store(4, R10, _INDEX, BLACK_HOLE_TCP)
    code.load(4, R1, R6, _PROTOCOL)
    code.jump_if(R1, "==", socket.IPPROTO_TCP, "hole")
    code.store(4, R10, _INDEX, BLACK_HOLE_UDP)
    code.label("hole")
    _look_up(code, "holes", _INDEX)
    code.jump_if(R0, "==", 0, "refuse")
    code.do(R7, "=", R0)
    code.do(R1, "=", R6)
    code.do(R2, "=", R7)
    code.do(R3, "=", _REPLACE)
    code.call(Helper.SK_ASSIGN)
    code.do(R9, "=", R0)
    code.do(R1, "=", R7)
    code.call(Helper.SK_RELEASE)
    code.jump_if(R9, "!=", 0, "refuse")
    code.do(R0, "=", _SK_PASS)
    code.exit()
    code.label("refuse")
    code.do(R0, "=", _SK_DROP)
    code.exit()


def _look_up(code: Assembler, name: str, key: int) -> None:
    """R0 = the element of a map whose key is on the stack, or null."""
    code.map(R1, name)
    code.do(R2, "=", R10)
    code.do(R2, "+=", key)
    code.call(Helper.MAP_LOOKUP)


def _look_further(code: Assembler, name: str, step: int, behind: str) -> None:
    """R0 = the range that is ``step`` further than R7; past the end of the table go on at ``behind``."""
    code.do(R1, "=", R7)
    code.do(R1, "+=", step)
    code.store(4, R10, _INDEX, R1)
    _look_up(code, name, _INDEX)
    code.jump_if(R0, "==", 0, behind)
