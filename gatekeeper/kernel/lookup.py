"""The sk_lookup program: the verdict on a connection before it exists.

The kernel runs it for every SYN and for every datagram of an unconnected sender, and it reads the same table as workers:

    endpoint    (family, protocol, port, local address), else the same with the wildcard address; neither: not ours
    ban         whether the source is one of the banned, if there are any: they stand above the policy
    class       where the source lies among the sorted ranges: see `gatekeeper.kernel.search`
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
from gatekeeper.kernel.search import Level, search_v4, search_v6
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
ENDPOINT = struct.Struct("<IIII")  # first cell of its row in the matrix, its number, the verdict on the banned, 0
ANYWHERE_KEY = struct.Struct("<HBB")  # port, protocol, family: listens at the wildcard address
COUNT = struct.Struct("<QQ")  # attempts, of those reported; for each detail and CPU
BUDGET = struct.Struct("<QQQ")  # the second it was last filled up in, reports left, the tick it was found empty in
BANS = struct.Struct("<IIII")  # how many addresses, IPv4 networks and IPv6 networks are banned; unused
ADDRESS_BYTES = 16  # IPv4 as IPv4-mapped
BAN_KEY_V4, BAN_KEY_V6 = struct.Struct("<I4s"), struct.Struct("<I16s")  # bits of the prefix, network
# boot time (ns), slot, endpoint number, source port (network order), port, family, protocol, source, destination
REPORT = struct.Struct("<QIIIIII16s16s")

# The stack, from its top.
_INDEX = -8  # key of arrays
_KEY = -32  # ENDPOINT_KEY, which begins with an ANYWHERE_KEY
_FIRST, _NUMBER = -40, -36  # of the endpoint
_ZERO, _BANNED = -48, -52
_BAN_KEY = -80  # of a trie: the bits, then the address; the latter, as IPv4-mapped, is the key of the hash
_ROOM = -104  # for the search
_REPORT = -104 - REPORT.size

BLACK_HOLE_TCP, BLACK_HOLE_UDP = 0, 1  # keys of "holes"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a program is made for.

    ``v4`` and ``v6`` are the levels of the two tables. ``exact`` and ``anywhere``: whether there are endpoints at particular
    addresses and at the wildcard. ``cpus`` counters, a power of two, are kept for each detail. Each verdict reports up to
    ``burst`` refusals at once and ``per_s`` a second.
    """

    v4: tuple[Level, ...]
    v6: tuple[Level, ...]
    exact: bool
    anywhere: bool
    cpus: int
    per_s: int
    burst: int


def program(sizes: Sizes) -> Assembler:
    """Return the program for tables of these sizes; it names the maps that `gatekeeper.kernel.judge` fills."""
    code = Assembler()
    if not sizes.exact and not sizes.anywhere:
        code.do(R0, "=", _SK_PASS)
        code.exit()
        return code
    code.do(R6, "=", R1)  # kept throughout: the connection
    _find_endpoint(code, sizes)
    _find_source(code, sizes)
    _find_verdict(code)
    _count(code, sizes.cpus)
    _report(code, sizes.per_s, sizes.burst)
    _end(code)
    return code


def _find_endpoint(code: Assembler, sizes: Sizes) -> None:
    """Leave what is known of the endpoint on the stack."""
    code.load(4, R1, R6, _FAMILY)
    code.load(4, R2, R6, _PROTOCOL)
    code.load(4, R3, R6, _LOCAL_PORT)
    code.store(2, R10, _KEY, R3)
    code.store(1, R10, _KEY + 2, R2)
    code.store(1, R10, _KEY + 3, R1)
    if sizes.exact:
        for word in range(1, 4):
            code.store(4, R10, _KEY + 4 + word * _WORD, 0)
        code.jump_if(R1, "==", socket.AF_INET, "to_ipv4")
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
    if sizes.anywhere:
        _look_up(code, "anywhere", _KEY)
        code.jump_if(R0, "!=", 0, "ours")
    code.do(R0, "=", _SK_PASS)
    code.exit()
    code.label("ours")
    code.load(4, R1, R0, 0)
    code.store(4, R10, _FIRST, R1)
    code.load(4, R1, R0, 4)
    code.store(4, R10, _NUMBER, R1)
    code.load(4, R1, R0, 8)
    code.store(4, R10, _BANNED, R1)
    code.load(4, R1, R0, 12)
    code.store(8, R10, _ZERO, R1)


def _find_source(code: Assembler, sizes: Sizes) -> None:
    """Leave the class of the source in R7, or go on at "judged" with the verdict on the banned."""
    code.load(4, R1, R6, _FAMILY)
    code.jump_if(R1, "==", socket.AF_INET, "from_ipv4")
    for half, register in ((0, R8), (2, R9)):
        code.load(4, register, R6, _REMOTE_IP6 + half * _WORD)
        code.from_network(register, 32)
        code.do(register, "<<=", 32)
        code.load(4, R1, R6, _REMOTE_IP6 + (half + 1) * _WORD)
        code.from_network(R1, 32)
        code.do(register, "|=", R1)
    code.jump_if(R8, "!=", 0, "from_ipv6")
    code.do(R1, "=", R9)
    code.do(R1, ">>=", 32)
    code.jump_if(R1, "!=", 0xFFFF, "from_ipv6")
    # IPv4-mapped: ::ffff:a.b.c.d is judged as a.b.c.d.
    code.load(4, R8, R6, _REMOTE_IP6 + 3 * _WORD)
    code.jump("ipv4")

    code.label("from_ipv6")
    for word in range(4):
        code.load(4, R1, R6, _REMOTE_IP6 + word * _WORD)
        code.store(4, R10, _BAN_KEY + (word + 1) * _WORD, R1)
    _look_for_ban(code, 6)
    search_v6(code, sizes.v6, _ROOM, _ZERO, "refuse")
    code.jump("classified")

    code.label("from_ipv4")
    code.load(4, R8, R6, _REMOTE_IP4)
    code.label("ipv4")
    code.store(4, R10, _BAN_KEY + 4 * _WORD, R8)
    _look_for_ban(code, 4)
    code.from_network(R8, 32)
    search_v4(code, sizes.v4, _ROOM, "refuse")
    code.label("classified")


def _look_for_ban(code: Assembler, family: int) -> None:
    """Go on at "judged" if the source is banned; it lies where the key of the hash ends, for IPv6 all of it."""
    v4 = family == 4
    none, wide = f"not_banned_v{family}", f"bans_v{family}"
    code.contents(R7, "bans")
    code.load(4, R1, R7, 0)
    code.jump_if(R1, "==", 0, wide)
    if v4:
        code.store(4, R10, _BAN_KEY + _WORD, 0)
        code.store(4, R10, _BAN_KEY + 2 * _WORD, 0)
        code.store(4, R10, _BAN_KEY + 3 * _WORD, socket.htonl(0xFFFF) - (1 << 32))
    _look_up(code, "banned", _BAN_KEY + _WORD)
    code.jump_if(R0, "!=", 0, f"banned_v{family}")
    code.label(wide)
    code.load(4, R1, R7, _WORD if v4 else 2 * _WORD)
    code.jump_if(R1, "==", 0, none)
    key = _BAN_KEY + 3 * _WORD if v4 else _BAN_KEY
    code.store(4, R10, key, 32 if v4 else 128)
    _look_up(code, wide, key)
    code.jump_if(R0, "==", 0, none)
    code.label(f"banned_v{family}")
    code.load(4, R7, R10, _BANNED)
    code.jump("judged")
    code.label(none)


def _find_verdict(code: Assembler) -> None:
    """Leave the detail of the verdict in R7 and its action in R8."""
    code.load(4, R1, R10, _FIRST)
    code.do(R1, "+=", R7)
    code.store(4, R10, _INDEX, R1)
    _look_up(code, "matrix", _INDEX)
    code.jump_if(R0, "==", 0, "refuse")
    code.load(4, R7, R0, 0)
    code.label("judged")
    code.do(R8, "=", R7)
    code.do(R8, "&=", ACTION_MASK)
    code.do(R7, ">>=", DETAIL_SHIFT)


def _count(code: Assembler, cpus: int) -> None:
    """Count the attempt, and go on only with a refusal; leave its count in R9, null when there is none."""
    code.call(Helper.CPU)
    code.do(R0, "&=", cpus - 1)
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
    code.store(4, R10, _INDEX, R7)
    _look_up(code, "budgets", _INDEX)
    code.jump_if(R0, "==", 0, "end")
    code.do(R7, "=", R0)
    # In a flood the clock is read once a tick: it costs more than all the rest.
    code.call(Helper.JIFFIES)
    code.load(8, R1, R7, 16)
    code.jump_if(R1, "==", R0, "end")
    code.store(8, R10, _REPORT, R0)
    code.call(Helper.BOOT_NS)
    code.load(8, R4, R10, _REPORT)
    code.store(8, R10, _REPORT, R0)
    code.do(R1, "=", R0)
    code.do(R1, "/=", 1_000_000_000)
    code.load(8, R2, R7, 0)
    code.load(8, R3, R7, 8)
    code.jump_if(R1, "<=", R2, "filled")
    code.store(8, R7, 0, R1)
    code.do(R1, "-=", R2)
    code.do(R1, "*=", per_s)
    code.do(R3, "+=", R1)
    code.jump_if(R3, "<=", burst, "filled")
    code.do(R3, "=", burst)
    code.label("filled")
    code.jump_if(R3, "!=", 0, "granted")
    code.store(8, R7, 16, R4)
    code.jump("end")
    code.label("granted")
    code.do(R3, "-=", 1)
    code.store(8, R7, 8, R3)
    _send_report(code)


def _send_report(code: Assembler) -> None:
    """Fill in a REPORT, whose time is there already, and send it; the detail's number is in _INDEX."""
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
