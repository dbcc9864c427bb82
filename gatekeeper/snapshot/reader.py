"""Reading a snapshot where it lies: views into shared memory, nothing copied, nothing believed."""

from __future__ import annotations

import json
import struct
from array import array
from bisect import bisect_left, bisect_right
from itertools import islice, repeat
from operator import lt
from typing import Any

from gatekeeper.errors import SnapshotError
from gatekeeper.policy.compile import span
from gatekeeper.policy.model import Action, Reason
from gatekeeper.snapshot.layout import ACTION_MASK, DETAIL_SHIFT, HEADER, LOW32, MAGIC, SECTIONS

_ALIGNMENT = 8
_ITEM_SIZE = {"v4": 8, "v4_index": 4, "v6_high": 8, "v6_low": 8, "v6_class": 4, "v6_index": 4, "matrix": 4, "meta": 1}
_MOST_PARTS = 1 << 16
_LABELS = {action.label: action for action in Action}
_REASONS = {str(reason) for reason in Reason}


class Snapshot:
    """One compiled policy. Keeps views into ``buffer``, which must outlive it and not change.

    Construction checks that the sections lie inside the buffer; `validate` checks all that look-ups rely on.
    """

    def __init__(self, buffer: bytes | memoryview) -> None:
        """Map the sections.

        Raises:
            SnapshotError: this is not a snapshot.
        """
        view = memoryview(buffer).cast("B")
        sections = _sections(view)
        self.v4 = sections["v4"].cast("Q")
        self.v4_index = sections["v4_index"].cast("I")
        self._shift = 32 - _parts_bits("IPv4", self.v4_index)  # from an address to its part
        self.v6_high = sections["v6_high"].cast("Q")
        self.v6_low = sections["v6_low"].cast("Q")
        self.v6_class = sections["v6_class"].cast("I")
        self.v6_index = sections["v6_index"].cast("I")
        self._v6_first, bits = span(self.v6_high)
        self._v6_last = (1 << bits) - 1
        self._v6_shift = max(bits - _parts_bits("IPv6", self.v6_index), 0)
        self.matrix = sections["matrix"].cast("I")
        try:
            self.meta: dict[str, Any] = json.loads(bytes(sections["meta"]))
            self.classes: int = self.meta["counts"]["classes"]
        except (ValueError, LookupError, TypeError, RecursionError) as err:
            raise SnapshotError(f"the meta section is broken: {err}") from err
        if type(self.classes) is not int or self.classes < 1:
            raise SnapshotError("the number of classes is not a positive integer")

    def lookup_v4(self, address: int) -> int:
        """Return the class of an IPv4 address."""
        v4, index = self.v4, self.v4_index
        part = address >> self._shift
        return v4[bisect_right(v4, address << 32 | LOW32, index[part], index[part + 1]) - 1] & LOW32

    def lookup_v6(self, high: int, low: int) -> int:
        """Return the class of an IPv6 address, given as halves; never an IPv4-mapped one."""
        highs, index = self.v6_high, self.v6_index
        part = high - self._v6_first
        if part < 0:
            return self.v6_class[0]
        part = min(part, self._v6_last) >> self._v6_shift
        least = index[part]
        at = bisect_right(highs, high, least, index[part + 1]) - 1
        if highs[at] == high and self.v6_low[at] > low:
            # Several ranges start in this /64, the last of them behind the address.
            at = bisect_right(self.v6_low, low, bisect_left(highs, high, least, at), at) - 1
        return self.v6_class[at]

    def verdict(self, row: int, found: int) -> int:
        """Return the verdict word of a class in a row."""
        return self.matrix[row * self.classes + found]

    def validate(self) -> None:
        """Check everything that look-ups and readers of the meta section rely on.

        Raises:
            SnapshotError: nothing in this snapshot may be used.
        """
        _check_v4(self.v4, self.v4_index, self.classes)
        _check_v6(self.v6_high, self.v6_low, self.v6_class, self.v6_index, self.classes)
        try:
            _check_meta(self)
        except (LookupError, TypeError, AttributeError, ValueError) as err:
            raise SnapshotError(f"the meta section is broken: {err!r}") from err


def _sections(view: memoryview) -> dict[str, memoryview]:
    if len(view) < HEADER.size:
        raise SnapshotError(f"too short for a snapshot: {len(view)} bytes")
    magic, *places = HEADER.unpack_from(view)
    if magic != MAGIC:
        raise SnapshotError("not a snapshot, or one of another version")
    sections = {}
    for name, offset, length in zip(SECTIONS, places[0::2], places[1::2], strict=True):
        if offset % _ALIGNMENT or offset < HEADER.size or offset + length > len(view) or length % _ITEM_SIZE[name]:
            raise SnapshotError(f"section {name} does not lie in the snapshot")
        sections[name] = view[offset : offset + length]
    return sections


def _parts_bits(family: str, index: memoryview) -> int:
    """Return the n of an index of 2**n parts."""
    parts = len(index) - 1
    if parts < 1 or parts > _MOST_PARTS or parts & (parts - 1):
        raise SnapshotError(f"the {family} index has {parts} parts, not a power of two")
    return parts.bit_length() - 1


def _check_v4(v4: memoryview, index: memoryview, classes: int) -> None:
    if not v4 or v4[0] >> 32:
        raise SnapshotError("the IPv4 table does not start at address 0")
    # Halves of 32 bits, copied: arrays are read three times as fast as views.
    words = array("I")
    words.frombytes(v4.cast("B"))
    first_is_start = struct.pack("=Q", 1) == struct.pack(">Q", 1)
    starts, found = (words[0::2], words[1::2]) if first_is_start else (words[1::2], words[0::2])
    if not all(map(lt, starts, islice(starts, 1, None))):
        raise SnapshotError("the IPv4 table is not sorted")
    parts = range(0, 1 << 32, (1 << 32) // (len(index) - 1))
    if index.tolist() != [*map(bisect_left, repeat(starts), parts), len(starts)]:
        raise SnapshotError("the IPv4 index does not belong to the table")
    if max(found) >= classes:
        raise SnapshotError("the IPv4 table names a class that does not exist")


def _check_v6(high: memoryview, low: memoryview, found: memoryview, index: memoryview, classes: int) -> None:
    if not len(high) == len(low) == len(found):
        raise SnapshotError("the IPv6 tables differ in length")
    if not high or high[0] or low[0]:
        raise SnapshotError("the IPv6 table does not start at address 0")
    highs, lows = array("Q", high), array("Q", low)
    if not all(map(lt, highs, islice(highs, 1, None))) and not all(
        map(lt, zip(highs, lows, strict=True), islice(zip(highs, lows, strict=True), 1, None))
    ):
        raise SnapshotError("the IPv6 table is not sorted")
    first, bits = span(highs)
    parts = range(first, first + (1 << bits), max((1 << bits) // (len(index) - 1), 1))
    if index.tolist() != [*map(bisect_left, repeat(highs), parts), len(highs)]:
        raise SnapshotError("the IPv6 index does not belong to the table")
    if max(found) >= classes:
        raise SnapshotError("the IPv6 table names a class that does not exist")


def _check_meta(snapshot: Snapshot) -> None:
    """Check the matrix, and every number and word of the meta section that somebody uses as an index or a key."""
    meta, classes = snapshot.meta, snapshot.classes
    listeners, rules, details, endpoints = meta["listeners"], meta["rules"], meta["details"], meta["endpoints"]
    rows = len(snapshot.matrix) // classes
    _require(meta["version"] == 1, "it is of another version")
    _require(len(snapshot.matrix) == rows * classes, "the matrix is not rows of classes")
    _require(_is_count(meta["counts"]["rows"], rows + 1) and meta["counts"]["rows"] == rows, "rows")
    _require(bool(listeners) and bool(endpoints), "it has no listeners")
    _require(isinstance(meta["digest"], str) and meta["default"]["action"] in _LABELS, "digest or default")
    for rule in rules:
        _require(isinstance(rule["name"], str) and rule["action"] in _LABELS, "a rule")
    for listener, rule, action, reason in details:
        _require(_is_count(listener, len(listeners)), "a detail names a listener that does not exist")
        _require(rule is None or _is_count(rule, len(rules)), "a detail names a rule that does not exist")
        _require(action in _LABELS and reason in _REASONS, "a detail's action or reason")
    for word in set(snapshot.matrix):
        number, action = word >> DETAIL_SHIFT, word & ACTION_MASK
        _require(number < len(details), "a verdict names a detail that does not exist")
        _require(_LABELS[details[number][2]] == action, "a verdict contradicts its detail")
    for index, listener in enumerate(listeners):
        _check_listener(listener)
        for key, reason in (("over_detail", Reason.MAX_SESSIONS), ("ban_detail", Reason.BAN)):
            _require(_is_count(listener[key], len(details)), key)
            _require(details[listener[key]] == [index, None, Action.DENY.label, str(reason)], key)
    for endpoint in endpoints:
        _require(_is_count(endpoint["listener"], len(listeners)), "an endpoint's listener")
        _require(_is_count(endpoint["row"], rows), "an endpoint's row")
        first = endpoint["row"] * classes
        own = {details[word >> DETAIL_SHIFT][0] for word in set(snapshot.matrix[first : first + classes])}
        _require(own == {endpoint["listener"]}, "an endpoint's row belongs to another listener")
        _require(endpoint["protocol"] == listeners[endpoint["listener"]]["protocol"], "an endpoint's protocol")
        _check_address(endpoint)
        _check_address(endpoint["backend"])
        _require(isinstance(endpoint["key"], str) and isinstance(endpoint["address"], str), "an endpoint")
    _check_settings(meta["settings"])


def _check_listener(listener: dict[str, Any]) -> None:
    _require(isinstance(listener["name"], str) and listener["protocol"] in ("tcp", "udp"), "a listener")
    for key in ("connect_timeout_s", "idle_timeout_s", "half_close_timeout_s"):
        _require(type(listener[key]) in (int, float) and listener[key] >= 0, key)
    _require(listener["on_exit"] in (None, "closed", "open"), "on_exit")
    for key in ("max_responses", "max_sessions"):
        _require(listener[key] is None or _is_count(listener[key], 1 << 63), key)


def _check_address(address: dict[str, Any]) -> None:
    _require(address["family"] in (0, 4, 6) and isinstance(address["host"], str), "an address")
    _require(_is_count(address["port"], 1 << 16), "a port")


def _check_settings(settings: dict[str, Any]) -> None:
    workers = settings["workers"]
    _require(workers is None or (_is_count(workers, 1 << 16) and workers > 0), "workers")
    if settings["metrics"] is not None:
        _check_address(settings["metrics"])
    _require(isinstance(settings["audit"], str), "audit")
    _require(settings["kernel"] in ("auto", "off", "require"), "kernel")
    _require(settings["on_reload"] in ("revoke", "keep"), "on_reload")
    for value in (settings["state"], settings["control"]["socket"], settings["control"]["group"]):
        _require(value is None or isinstance(value, str), "state or control")


def _is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise SnapshotError(f"the meta section is broken: {what}")
