"""One source, one worker: which member of a SO_REUSEPORT group the kernel gives a new connection or datagram to.

`owner` is the rule, and `program` is the same rule as classic BPF; a test holds them together. The program sees the
packet from its payload on, so the source address is loaded relative to the network header (SKF_NET_OFF).

A source is an IPv4 address or an IPv6 /64. The hash is keyed with random numbers, so that a stranger cannot choose
addresses that all land on one worker.
"""

from __future__ import annotations

import ctypes
import secrets
import socket
import struct

KEY_WORDS = 3

_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_LOCK_FILTER = 44
_NET = -0x100000  # SKF_NET_OFF: offsets count from the network header
_IPV4_SOURCE = 12
_IPV6_SOURCE = 8

# A well-mixing 32-bit permutation: every input bit moves every output bit with a probability near one half.
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_SHIFTS = (16, 15, 16)
_LOW32 = 0xFFFFFFFF

Key = tuple[int, int, int]
Instruction = tuple[int, int]  # code, k; nothing here jumps

# class | size or operation | mode or source (linux/bpf_common.h)
_LOAD = 0x00 | 0x00 | 0x20  # A = word at k
_ADD_K = 0x04 | 0x00
_XOR_K = 0x04 | 0xA0
_MUL_K = 0x04 | 0x20
_RSH_K = 0x04 | 0x70
_MOD_K = 0x04 | 0x90
_XOR_X = 0x04 | 0xA0 | 0x08
_TO_X = 0x07 | 0x00  # X = A
_RETURN_A = 0x06 | 0x10


def new_key() -> Key:
    """Return a fresh random key; one serves for the life of the service."""
    first, second, third = struct.unpack("=3I", secrets.token_bytes(4 * KEY_WORDS))
    return first, second, third


def owner(key: Key, family: int, address: int, shards: int) -> int:
    """Return the shard, 0 to ``shards`` - 1, that a source belongs to. Pure.

    ``family`` is 4 or 6; ``address`` is the whole address as a number. Only its /32 or /64 counts.
    """
    first, second, third = key
    if family == 4:
        state = _mix(address ^ first)
    else:
        prefix = address >> 64
        state = _mix(_mix(prefix >> 32 ^ first) ^ (prefix & _LOW32) ^ second)
    return _mix((state + third) & _LOW32) % shards


def program(key: Key, family: int, shards: int) -> list[Instruction]:
    """Return `owner` as a classic BPF program for sockets of one family."""
    first, second, third = key
    if family == 4:
        code = [(_LOAD, _NET + _IPV4_SOURCE), (_XOR_K, first), *_MIX]
    else:
        code = [(_LOAD, _NET + _IPV6_SOURCE), (_XOR_K, first), *_MIX]
        code += [(_TO_X, 0), (_LOAD, _NET + _IPV6_SOURCE + 4), (_XOR_X, 0), (_XOR_K, second), *_MIX]
    return [*code, (_ADD_K, third), *_MIX, (_MOD_K, shards), (_RETURN_A, 0)]


def attach(sock: socket.socket, key: Key, shards: int) -> None:
    """Steer the SO_REUSEPORT group that ``sock`` belongs to; its members are numbered in the order they joined.

    Raises:
        OSError: the kernel refused; without steering it spreads sources by a hash of its own.
    """
    code = program(key, 6 if sock.family == socket.AF_INET6 else 4, shards)
    instructions = b"".join(struct.pack("=HBBI", opcode, 0, 0, k & _LOW32) for opcode, k in code)
    memory = ctypes.create_string_buffer(instructions, len(instructions))
    sock.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", len(code), ctypes.addressof(memory))
    )


def lock(sock: socket.socket) -> None:
    """Let nobody who is handed ``sock`` attach a program in place of the one there is, for as long as the socket lives.

    One program steers the whole group, so whoever holds one member could draw the sources of all others to itself.

    Raises:
        OSError: the kernel refused.
    """
    sock.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)


def _mix(value: int) -> int:
    value ^= value >> _SHIFTS[0]
    value = value * _MULTIPLIERS[0] & _LOW32
    value ^= value >> _SHIFTS[1]
    value = value * _MULTIPLIERS[1] & _LOW32
    return value ^ value >> _SHIFTS[2]


def _shift_xor(bits: int) -> list[Instruction]:
    """Return the code of A ^= A >> bits."""
    return [(_TO_X, 0), (_RSH_K, bits), (_XOR_X, 0)]


_MIX: list[Instruction] = [
    *_shift_xor(_SHIFTS[0]), (_MUL_K, _MULTIPLIERS[0]),
    *_shift_xor(_SHIFTS[1]), (_MUL_K, _MULTIPLIERS[1]),
    *_shift_xor(_SHIFTS[2]),
]  # fmt: skip - A = _mix(A)
