"""How a compiled policy lies in memory: the same bytes for workers, the kernel program and the disk.

    header      magic, then for each section its offset and length in bytes (little-endian 64-bit)
    v4          unsigned 64-bit, sorted: first address << 32 | class; starts at address 0
    v4_index    unsigned 32-bit, 2**n + 1 of them, n from 0 to 16: how many ranges start before the k-th of 2**n equal
                parts of all addresses; so a look-up searches between two neighbours, and costs the same in any table
    v6_high     unsigned 64-bit: upper half of the first address of each range; (high, low) is sorted, starts at 0
    v6_low      unsigned 64-bit: lower half
    v6_class    unsigned 32-bit
    v6_index    as v4_index, by v6_high; its parts divide what lies between the second range and the last, in bits
    matrix      unsigned 32-bit [row][class]: verdict words
    meta        UTF-8 JSON: see `gatekeeper.snapshot.encode`

Every section starts at a multiple of 8. A row belongs to one endpoint or to several that are judged alike. Class 0 is
kept for peers without an address (unix sockets). A verdict word is ``detail << 2 | action``: the low two bits answer
the only question of the hot path, the rest is the index of the detail (listener, rule, reason) in ``meta``.
"""

from __future__ import annotations

import struct

MAGIC = b"GKSNAP02"
SECTIONS = ("v4", "v4_index", "v6_high", "v6_low", "v6_class", "v6_index", "matrix", "meta")
HEADER = struct.Struct("<8s" + "QQ" * len(SECTIONS))

LOCAL_CLASS = 0  # the class of a peer without an address
ACTION_MASK = 3
DETAIL_SHIFT = 2
LOW32 = 0xFFFFFFFF
LOW64 = 0xFFFFFFFFFFFFFFFF
