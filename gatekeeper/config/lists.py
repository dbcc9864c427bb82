"""List files: one address, network or range a line, ``#`` comments, blank lines; a million lines is normal.

Read in blocks. The fast path is C loops over a block that accept exactly what `parse_source` accepts, or give up: one
line they cannot read sends its block down the slow path, which goes line by line and names the wrong ones.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import gt
from socket import AF_INET, AF_INET6, inet_pton
from sys import byteorder

from gatekeeper.config.addresses import parse_source
from gatekeeper.config.problems import Problem, Severity
from gatekeeper.policy.model import Place
from gatekeeper.policy.ranges import AddressSet, Bounds, Ranges, Wide, normalize
from gatekeeper.progress import Tell, silent

BLOCK_BYTES = 1 << 16  # what is made of a block fits the cache, and its memory is used again for the next
LONGEST_LINE_BYTES = 1 << 16
MOST_PROBLEMS = 20
CODE = "list"

_BLANKS = " \t\r"
_COMMENT = re.compile(r"#[^\n]*")
_HOST_MASKS = {
    4: {f"/{n}": ((1 << (32 - n)) - 1).to_bytes(4, "big") for n in range(33)},
    6: {f"/{n}": ((1 << (128 - n)) - 1).to_bytes(16, "big") for n in range(129)},
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ListFile:
    """What a list file says. ``entries`` counts its addresses, networks and ranges, ``digest`` is its SHA-256 (hex).

    Lines with a problem are in ``problems`` and not in ``addresses``.
    """

    addresses: AddressSet
    problems: tuple[Problem, ...]
    entries: int
    digest: str


def load_list(path: str, tell: Tell = silent) -> ListFile:
    """Read a list file. An empty one is a warning; wrong lines are errors: at most 20, and then how many more.

    Raises:
        OSError: the file cannot be read.
    """
    return _Reader(path).read(tell)


class _Reader:
    def __init__(self, path: str) -> None:
        self._path = path
        self._starts: dict[int, Bounds] = {4: array("I"), 6: Wide()}  # by family, in the order of the file
        self._lasts: dict[int, Bounds] = {4: array("I"), 6: Wide()}
        self._entries = 0
        self._wrong = 0
        self._problems: list[Problem] = []

    def read(self, tell: Tell) -> ListFile:
        digest = hashlib.sha256()
        what, done = f"reading {self._path}", 0
        line = 1
        with open(self._path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while block := file.read(BLOCK_BYTES):
                block += file.readline(LONGEST_LINE_BYTES)
                digest.update(block)
                done += len(block)
                tell(what, done, size)
                entries = block.removeprefix(_BYTE_ORDER_MARK) if line == 1 else block
                if not self._read_fast(entries):
                    self._read_slowly(entries, line)
                line += block.count(b"\n")
                if not block.endswith(b"\n") and file.peek(1):
                    self._refuse(line, 1, f"this line is longer than {LONGEST_LINE_BYTES} bytes: the rest is not read", 1)
                    break
        tell(f"sorting {self._path}", 0, 0)
        addresses = AddressSet(*(Ranges.joined(family, self._starts[family], self._lasts[family]) for family in (4, 6)))
        return ListFile(addresses, self._all_problems(), self._entries, digest.hexdigest())

    def _read_fast(self, block: bytes) -> bool:
        """Take in a block; ``False``: something in it needs the slow path, and nothing was taken."""
        try:
            text = block.decode()
            if "#" in text:
                text = _COMMENT.sub("", text)
            found, entries = _read_block(text)
        except (ValueError, OSError, LookupError):
            return False
        for family, starts, lasts in found:
            self._starts[family].extend(starts)
            self._lasts[family].extend(lasts)
        self._entries += entries
        return True

    def _read_slowly(self, block: bytes, line: int) -> None:
        for number, raw in enumerate(block.removesuffix(b"\n").split(b"\n"), line):
            try:
                text = raw.decode().partition("#")[0].rstrip(_BLANKS)
            except UnicodeDecodeError as err:
                self._refuse(number, err.start + 1, "this is not UTF-8 text", 1)
                continue
            entry = text.lstrip(_BLANKS)
            if not entry:
                continue
            column = len(text) - len(entry) + 1
            try:
                family, first, last = parse_source(entry)
            except ValueError as err:
                hint = "; a list has one entry a line" if re.search(r"[,;\s]", entry) else ""
                self._refuse(number, column, f"{err}{hint}", len(entry))
                continue
            self._starts[family].append(first)
            self._lasts[family].append(last)
            self._entries += 1

    def _refuse(self, line: int, column: int, message: str, length: int) -> None:
        self._wrong += 1
        if self._wrong <= MOST_PROBLEMS:
            self._problems.append(Problem(Place(self._path, line, column), Severity.ERROR, CODE, message, length))

    def _all_problems(self) -> tuple[Problem, ...]:
        if self._wrong > MOST_PROBLEMS:
            # Behind the others when sorted: at the place of the last that is shown.
            place = self._problems[-1].place
            more = Place(place.file, place.line, place.column + 1)
            message = f"and {self._wrong - MOST_PROBLEMS} more wrong lines in this list"
            return (*self._problems, Problem(more, Severity.ERROR, CODE, message))
        if not self._entries and not self._wrong:
            return (Problem(Place(self._path, 1, 1), Severity.WARNING, CODE, "this list is empty: it matches nobody"),)
        return tuple(self._problems)


def _read_block(text: str) -> tuple[list[tuple[int, Bounds, Bounds]], int]:
    """Return (family, first addresses, last addresses) of a block without comments, and the number of its entries.

    Raises:
        ValueError, OSError, LookupError: something is wrong, or unusual.
    """
    blanks = " " in text or "\t" in text or "\r" in text
    if not blanks and ":" not in text and "-" not in text:
        # IPv4 networks and nothing else: one split does.
        parts = text.strip("\n").replace("/", "\n/").split("\n")
        count = text.count("/")
        if len(parts) == 2 * count:
            starts, lasts = _read_networks(4, parts)
            return [(4, _numbers(4, starts), _numbers(4, lasts))], count
    lines = text.split("\n")
    if blanks:
        lines = list(map(str.strip, lines, repeat(_BLANKS)))
    lines = list(filter(None, lines))
    return list(_read_mixed(lines)), len(lines)


def _read_mixed(lines: Sequence[str]) -> Iterator[tuple[int, Bounds, Bounds]]:
    """Yield (family, first addresses, last addresses) of lines of all kinds, each kind at once.

    Raises:
        ValueError, OSError, LookupError: something is wrong, or unusual.
    """
    ranges = [line for line in lines if "-" in line]
    if len(ranges) < len(lines):
        yield 4, *_read_family(4, [line for line in lines if ":" not in line and "-" not in line])
        v6 = [line for line in lines if ":" in line and "-" not in line]
        starts, lasts = _read_family(6, v6)
        if v6 and any(normalize(6, start)[0] == 4 for start in starts):
            raise ValueError("IPv4-mapped")
        yield 6, starts, lasts
    starts, lasts = _read_ranges([line for line in ranges if ":" not in line])
    yield 4, starts, lasts
    for family, first, last in map(parse_source, [line for line in ranges if ":" in line]):
        yield (4, array("I", (first,)), array("I", (last,))) if family == 4 else (6, Wide((first,)), Wide((last,)))


def _read_family(family: int, lines: Sequence[str]) -> tuple[Bounds, Bounds]:
    """Return the first and last addresses of lines that are addresses or networks of one family.

    Raises:
        ValueError, OSError, LookupError: something is wrong.
    """
    singles = _packed(family, [line for line in lines if "/" not in line])
    # The "/" stays with the prefix, so that no line can pass for half of two others.
    parts = "\n".join([line for line in lines if "/" in line]).replace("/", "\n/").split("\n")
    starts, lasts = _read_networks(family, parts) if parts != [""] else (b"", b"")
    return _numbers(family, singles + starts), _numbers(family, singles + lasts)


def _read_networks(family: int, parts: Sequence[str]) -> tuple[bytes, bytes]:
    """Return the packed first and last addresses of networks, given as address and "/prefix" in turn.

    Raises:
        ValueError, OSError, LookupError: something is wrong.
    """
    firsts = _packed(family, parts[0::2])
    masks = b"".join(map(_HOST_MASKS[family].__getitem__, parts[1::2]))
    if len(firsts) != len(masks):
        raise ValueError("not networks")
    # All of them as one long number: two operations check and complete them all.
    first, mask = int.from_bytes(firsts, "big"), int.from_bytes(masks, "big")
    if first & mask:
        raise ValueError("host bits")
    return firsts, (first | mask).to_bytes(len(firsts), "big")


def _read_ranges(lines: Sequence[str]) -> tuple[Bounds, Bounds]:
    """Return the first and last addresses of IPv4 ranges.

    Raises:
        ValueError, OSError: something is wrong.
    """
    parts = "\n".join(lines).replace("-", "\n-").split("\n") if lines else []
    if not all(map(str.startswith, parts[1::2], repeat("-"))):
        raise ValueError("not ranges")
    starts = _numbers(4, _packed(4, parts[0::2]))
    lasts = _numbers(4, _packed(4, list(map(str.removeprefix, parts[1::2], repeat("-")))))
    if len(starts) != len(lasts) or any(map(gt, starts, lasts)):
        raise ValueError("not first to last")
    return starts, lasts


def _packed(family: int, addresses: Sequence[str]) -> bytes:
    """Return addresses as the network writes them.

    Raises:
        ValueError, OSError: one of them is not an address of this family.
    """
    return b"".join(map(inet_pton, repeat(AF_INET if family == 4 else AF_INET6), addresses))


def _numbers(family: int, packed: bytes) -> Bounds:
    words = array("I" if family == 4 else "Q")
    words.frombytes(packed)
    if byteorder == "little":
        words.byteswap()
    if family == 4:
        return words
    wide = Wide()
    wide.high, wide.low = words[0::2], words[1::2]
    return wide
