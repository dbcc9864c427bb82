"""Problems for people and for programs."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

from gatekeeper.config.problems import Problem

WINDOW = 120  # characters of a long line that are shown
LEAD = 40  # of them before the problem
LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what YAML takes for the end of a line


def render(problem: Problem, texts: dict[str, str]) -> str:
    """Return ``file:line:column: message [code]``, the line and a caret; without the line when its text is not known.

    ``texts`` are the files' texts by name. Nothing in the result is obeyed by a terminal.
    """
    place = problem.place
    kind = "" if problem.severity == "error" else f"{problem.severity}: "
    head = f"{_visible(str(place))}: {kind}{_visible(problem.message)} [{problem.code}]"
    line = _line(texts.get(place.file), place.line)
    if line is None:
        return head
    column = min(place.column - 1, len(line))
    length = max(1, min(problem.length, len(line) - column))
    if len(line) > WINDOW:
        first = max(0, column - LEAD)
        line, column = line[first : first + WINDOW], column - first
        length = min(length, WINDOW - column)
    number = str(place.line)
    gutter = " " * len(number)
    under = "".join(_blank(character) for character in line[:column])
    caret = "^" + "~" * (_width(line[column : column + length]) - 1)
    shown = _visible(line, keep="\t")
    return f"{head}\n{gutter} |\n{number} | {shown}\n{gutter} | {under}{caret}"


def as_json(problem: Problem) -> dict[str, Any]:
    """Return a problem with the keys file, line, column, severity, code, message."""
    return {
        "file": problem.place.file,
        "line": problem.place.line,
        "column": problem.place.column,
        "severity": str(problem.severity),
        "code": problem.code,
        "message": problem.message,
    }


def _line(text: str | None, number: int) -> str | None:
    """Return one line of a text, ``None`` when there is no such line."""
    lines = _lines(text) if text is not None else ()
    return lines[number - 1] if number <= len(lines) else None


@lru_cache(maxsize=4)
def _lines(text: str) -> list[str]:
    """Return the lines of a text; kept, because a file with one problem often has many."""
    return LINE_BREAK.split(text)


def _visible(text: str, keep: str = "") -> str:
    """Replace what does not print, one character for one."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)


def _cells(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _blank(character: str) -> str:
    return "\t" if character == "\t" else " " * _cells(character)


def _width(text: str) -> int:
    return max(1, sum(map(_cells, text)))
