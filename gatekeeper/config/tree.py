"""YAML text to a tree of values that know where they were written.

One pass over parse events, and nothing else of YAML than values: what could surprise is an error with its place.

    refused     depth > 32, more than 100,000 values, aliases, anchors, tags, merge keys, a second document,
                duplicate keys, keys that are no words, bytes that are no UTF-8, control characters
    scalars     YAML 1.2 core: null, true, false, integers, floats, text. What YAML 1.1 reads otherwise
                (`22:22` as 1342, `010` as 8, `1_000` as 1000) is refused with "quote it"

The events are guarded before anything recurses: PyYAML's C composer crashes the process on 100,000 nested brackets.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from gatekeeper.config.problems import Problem, Severity
from gatekeeper.config.rendering import LINE_BREAK
from gatekeeper.config.words import quote
from gatekeeper.policy.model import Place

DEPTH_MOST = 32
VALUES_MOST = 100_000
PROBLEMS_MOST = 1000  # a file with more is not what it claims to be: the rest of it is not read
INTEGER_DIGITS_MOST = 18
TOO_DEEP = f"this is nested more than {DEPTH_MOST} deep: no rule needs more than 5"

_Loader: Any = getattr(yaml, "CLoader", yaml.Loader)
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_NULL = re.compile(r"|~|null|Null|NULL")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_NO_WORD_YET = "0123456789+-.~nNtTfF"  # how everything begins that may be no text; "" is in it
# Numbers for YAML 1.1 or 1.2, but not the same ones: octals, sexagesimals, underscores, binaries.
_AMBIGUOUS = re.compile(
    r"[-+]?(?:0[0-9_]+|0o[0-7]+|0b[01_]+|0x[0-9a-fA-F_]*_[0-9a-fA-F_]*|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"
    r"|[0-9]+_[0-9_]*(?:\.[0-9_]*)?)"
)


class Broken:
    """The value of something that is in error already; what stands here is not looked at again."""

    def __repr__(self) -> str:
        return "BROKEN"


BROKEN = Broken()

Scalar = str | int | float | bool | None | Broken


@dataclass(frozen=True, slots=True)
class Spot:
    """A place and how many characters of its line are meant."""

    place: Place
    length: int


@dataclass(slots=True)
class Value:
    """A scalar, list or mapping. ``text`` is a scalar as it was written, ``keys`` says where a mapping's keys stand."""

    data: Scalar | list[Value] | dict[str, Value]
    spot: Spot
    text: str = ""
    keys: dict[str, Spot] = field(default_factory=dict)

    def plain(self) -> Any:
        """Return the value without places: lists, dicts, scalars and ``BROKEN``."""
        if isinstance(self.data, list):
            return [item.plain() for item in self.data]
        if isinstance(self.data, dict):
            return {key: item.plain() for key, item in self.data.items()}
        return self.data

    def items(self) -> Iterator[Value]:
        """Go through a list's values; a single value is a list of one, nothing and a mapping are none."""
        if isinstance(self.data, list):
            yield from self.data
        elif self.data is not None and not isinstance(self.data, dict):
            yield self

    def get(self, key: str) -> Value | None:
        """Return the value of a key, ``None`` when it is not there or this is no mapping."""
        return self.data.get(key) if isinstance(self.data, dict) else None


class _Unreadable(Exception):
    """Nothing after this place can be trusted; the problem is recorded."""


def decode(file: str, text: bytes, problems: list[Problem]) -> str | None:
    """Return the text of a file, or ``None`` with a problem at the first byte that is no UTF-8."""
    text = text.removeprefix(codecs.BOM_UTF8)
    try:
        return text.decode()
    except UnicodeDecodeError as err:
        lines = LINE_BREAK.split(text[: err.start].decode())
        message = f"byte 0x{text[err.start]:02x} is not UTF-8: save the file as UTF-8"
        problems.append(Problem(Place(file, len(lines), len(lines[-1]) + 1), Severity.ERROR, "yaml.encoding", message))
        return None


def parse(file: str, text: str, problems: list[Problem]) -> Value | None:
    """Return the document in ``text``; ``None`` when there is none, or when it cannot be read (with a problem)."""
    builder = _Builder(file, text, problems)
    try:
        return builder.document()
    except _Unreadable:
        return None


class _Builder:
    """Reads events one by one; ``problems`` collects what is wrong."""

    def __init__(self, file: str, text: str, problems: list[Problem]) -> None:
        self._file = file
        self._lines = LINE_BREAK.split(text)
        self._problems = problems
        self._values = 0
        found = _FORBIDDEN.search(text)
        if found:
            before = LINE_BREAK.split(text[: found.start()])
            spot = Spot(Place(file, len(before), len(before[-1]) + 1), 1)
            self._say(spot, "yaml.character", f"the character U+{ord(found[0]):04X} is not allowed in YAML: remove it")
            self._loader = None
        else:
            self._loader = _Loader(text)

    def document(self) -> Value | None:
        if self._loader is None:
            raise _Unreadable
        try:
            return self._document()
        finally:
            self._loader.dispose()

    def _document(self) -> Value | None:
        self._next()  # the stream starts
        start = self._next()
        if isinstance(start, yaml.StreamEndEvent):
            return None
        self._check_directives(start)
        value = self._value(self._next(), 1)
        self._next()  # the document ends
        more = self._next()
        if not isinstance(more, yaml.StreamEndEvent):
            self._say(self._spot(more), "yaml.document", "a second document starts here: one file holds one document")
        return value

    def _check_directives(self, start: Any) -> None:
        if start.version and tuple(start.version) != (1, 2):
            version = ".".join(map(str, start.version))
            self._say(self._spot(start), "yaml.version", f"rule files are YAML 1.2, not {version}: remove the directive")

    def _next(self) -> Any:
        try:
            return self._loader.get_event()  # type: ignore[union-attr]
        except yaml.MarkedYAMLError as err:
            mark = err.problem_mark or err.context_mark
            if mark is None:
                spot = Spot(Place(self._file, 1, 1), 1)
            else:
                # The end of the text is named after its last character, where the editor can go.
                line = min(mark.line, len(self._lines) - 1)
                spot = Spot(Place(self._file, line + 1, mark.column + 1), 1)
            if "nesting depth" in (err.problem or ""):  # libyaml's own limit: it reads ahead of its events
                self._say(spot, "yaml.depth", TOO_DEEP)
            else:
                self._say(spot, "yaml.syntax", self._explain(err, spot))
        except (yaml.YAMLError, RecursionError) as err:
            self._say(Spot(Place(self._file, 1, 1), 1), "yaml.syntax", f"this is not YAML: {err}")
        raise _Unreadable

    def _explain(self, err: yaml.MarkedYAMLError, spot: Spot) -> str:
        """Return what the parser found, and what was probably meant."""
        line = self._lines[spot.place.line - 1]
        found = " ".join(filter(None, (err.problem, err.context)))
        if err.context_mark is not None and err.context_mark.line != spot.place.line - 1:
            found += f" that starts in line {err.context_mark.line + 1}"
        rest = line[spot.place.column - 1 :]
        hint = ""
        if "\t" in line[: len(line) - len(line.lstrip())]:
            hint = "indent with spaces, not tabs"
        elif re.search(r"(^|[\s,\[{])\*:", line):
            hint = 'quote addresses that start with "*", like "*:22"'
        elif rest.lstrip().startswith("::") or re.search(r"\[[0-9a-fA-F:.]*\]:", line):
            hint = 'quote IPv6 addresses, like "[::]:22" or "::1"'
        elif err.problem and "cannot start any token" in err.problem:
            hint = f"quote text that starts with {quote(rest[:1])}"
        elif err.problem and "mapping values are not allowed" in err.problem:
            hint = 'quote text with ": " in it, or check the indentation'
        elif "flow" in (err.context or ""):
            hint = "a comma, a closing bracket or a quote is missing"
        elif "quoted scalar" in (err.context or ""):
            hint = "a closing quote is missing"
        elif "block" in (err.context or ""):
            hint = "check the indentation"
        return f"this is not YAML: {hint} ({found})" if hint else f"this is not YAML: {found}"

    def _say(self, spot: Spot, code: str, message: str) -> None:
        self._problems.append(Problem(spot.place, Severity.ERROR, code, message, spot.length))
        if len(self._problems) > PROBLEMS_MOST:
            raise _Unreadable

    def _spot(self, event: Any) -> Spot:
        """Return where an event starts; its length ends with the line."""
        start, end = event.start_mark, event.end_mark
        column_end = end.column if end.line == start.line else len(self._lines[start.line].rstrip())
        return Spot(Place(self._file, start.line + 1, start.column + 1), max(1, column_end - start.column))

    def _value(self, event: Any, depth: int) -> Value:
        """Build the value that starts with ``event``, and take its events."""
        spot = self._spot(event)
        self._values += 1
        if depth > DEPTH_MOST:
            self._say(spot, "yaml.depth", TOO_DEEP)
            raise _Unreadable
        if self._values > VALUES_MOST:
            self._say(spot, "yaml.size", f"more than {VALUES_MOST} values in one file: move addresses to a list file")
            raise _Unreadable
        if isinstance(event, yaml.AliasEvent):
            self._say(spot, "yaml.alias", self._explain_alias(event, spot))
            return Value(BROKEN, spot)
        decorated = self._refuse_decoration(event, spot)
        if isinstance(event, yaml.ScalarEvent):
            return Value(BROKEN if decorated else self._scalar(event, spot), spot, event.value)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(spot, depth)
        return self._mapping(event, spot, depth)

    def _explain_alias(self, event: Any, spot: Spot) -> str:
        word = self._lines[spot.place.line - 1][spot.place.column - 1 :].split(" #")[0].strip() or f"*{event.anchor}"
        return f'aliases are not supported: write the value out, or quote text that starts with "*", like {quote(word)}'

    def _refuse_decoration(self, event: Any, spot: Spot) -> bool:
        if event.anchor is not None:
            self._say(spot, "yaml.anchor", f"anchors are not supported: remove {quote('&' + event.anchor)}, name a set or a listener instead")
        if event.tag is not None:
            word = next(iter(self._lines[spot.place.line - 1][spot.place.column - 1 :].split()), event.tag)
            self._say(spot, "yaml.tag", f'tags are not supported: remove {quote(word)}, or quote text that starts with "!"')
        return event.anchor is not None or event.tag is not None

    def _scalar(self, event: Any, spot: Spot) -> Scalar:
        """Return what a scalar means under the core schema of YAML 1.2."""
        text: str = event.value
        if event.style or not event.implicit[0] or text[:1] not in _NO_WORD_YET:
            return text
        if _AMBIGUOUS.fullmatch(text):
            self._say(spot, "yaml.ambiguous", f"some YAML readers take {text[:40]} for another number: quote it, {quote(text)}")
            return BROKEN
        if _INTEGER.fullmatch(text):
            if len(text) > INTEGER_DIGITS_MOST:
                self._say(spot, "yaml.ambiguous", f"{quote(text)} is too long for a number: quote it if it is text")
                return BROKEN
            return int(text, 0)
        for pattern, value in ((_NULL, None), (_TRUE, True), (_FALSE, False)):
            if pattern.fullmatch(text):
                return value
        if _FLOAT.fullmatch(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return text

    def _list(self, spot: Spot, depth: int) -> Value:
        items = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._value(event, depth + 1))
        return Value(items, self._closed(spot, event))

    def _closed(self, spot: Spot, end: Any) -> Spot:
        """Return ``spot`` up to the closing bracket when that is in the same line."""
        if end.end_mark.line != spot.place.line - 1:
            return spot
        return Spot(spot.place, max(spot.length, end.end_mark.column + 1 - spot.place.column))

    def _mapping(self, start: Any, spot: Spot, depth: int) -> Value:
        data: dict[str, Value] = {}
        keys: dict[str, Spot] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key_spot = self._spot(event)
            key = self._key(event, key_spot, depth)
            value = self._value(self._next(), depth + 1)
            if key is None:
                continue
            if key in data:
                first = keys[key].place.line
                self._say(key_spot, "duplicate-key", f"the key {quote(key)} stands here again, first in line {first}: keep one")
                continue
            data[key] = value
            keys[key] = key_spot
        if keys and not start.flow_style:
            return Value(data, next(iter(keys.values())), keys=keys)
        return Value(data, self._closed(spot, event), keys=keys)

    def _key(self, event: Any, spot: Spot, depth: int) -> str | None:
        """Return a key, or ``None`` with a problem."""
        if not isinstance(event, yaml.ScalarEvent):
            value = self._value(event, depth + 1)
            if value.data is not BROKEN:
                self._say(spot, "yaml.key", "a key is a word, not a list or a mapping: quote text that starts with [ or {")
            return None
        if self._refuse_decoration(event, spot):
            return None
        if event.value == "<<" and not event.style:
            self._say(spot, "yaml.merge", "merge keys are not supported: write the keys out")
            return None
        key = self._scalar(event, spot)
        if key is BROKEN:
            return None
        if not isinstance(key, str):
            shown = quote(event.value) if event.value else "nothing"
            self._say(spot, "yaml.key", f"a key is a word, not {shown}")
            return None
        return key

