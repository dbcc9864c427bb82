"""The small words of rule files: names, durations, and how messages quote and suggest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
RESERVED = frozenset({"all", "any", "ban", "default", "none", "tcp", "udp", "unix"})

UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
LONGEST_S = 366 * UNIT_SECONDS["d"]
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|s|m|h|d)")

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # whatever a terminal or a reader of lines could obey

PATH_SHOWN = 300
QUOTED_MOST = 80  # characters of the file that a message repeats
LISTED_MOST = 20  # names that a message lists
GUESSED_MOST = 64  # longer words are no misspelt names, and comparing them takes quadratic time


def quote(text: str) -> str:
    """Return ``text`` in quotes, on one line, shortened, with nothing in it that a terminal would obey."""
    shown = text if len(text) <= QUOTED_MOST else text[:QUOTED_MOST] + "..."
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + '"'


def brief(path: str) -> str:
    """Return a path for a message, of a very long one both ends."""
    return path if len(path) <= PATH_SHOWN else f"{path[: PATH_SHOWN // 2]}...{path[-PATH_SHOWN // 2 :]}"


def listed(words: Iterable[str], last: str = "or") -> str:
    """Return ``a, b or c``; of very many words the first."""
    found = list(words)
    if len(found) > LISTED_MOST:
        return ", ".join(found[:LISTED_MOST]) + f" and {len(found) - LISTED_MOST} more"
    return f" {last} ".join(filter(None, (", ".join(found[:-1]), *found[-1:])))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant, if one is near."""
    if len(word) > GUESSED_MOST:
        return None
    found = get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def parse_name(text: str) -> str:
    """Return the name of a listener, set or rule.

    Raises:
        ValueError: it is reserved or not of the shape of a name; the message is for people.
    """
    if text in RESERVED:
        raise ValueError(f"{quote(text)} is reserved, choose another name (reserved are {listed(sorted(RESERVED), 'and')})")
    if NAME.fullmatch(text):
        return text
    guess = re.sub(r"[^a-z0-9_-]+", "-", text[:GUESSED_MOST].lower()).strip("-_")
    hint = f", did you mean {quote(guess)}?" if NAME.fullmatch(guess) and guess not in RESERVED else ""
    raise ValueError(
        f'{quote(text)} is not a name: a lower-case letter, then at most 62 letters, digits, "_" and "-"{hint}'
    )


def parse_duration(text: str) -> float:
    """Return seconds.

    Raises:
        ValueError: it is not a duration above zero; the message is for people.
    """
    found = _DURATION.fullmatch(text)
    if not found:
        hint = f', did you mean "{text}s"?' if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,3})?", text) else ""
        raise ValueError(f"{quote(text)} is not a duration: a number and ms, s, m, h or d, like 500ms, 20s or 24h{hint}")
    seconds = float(found[1]) * UNIT_SECONDS[found[2]]
    if not 0 < seconds <= LONGEST_S:
        raise ValueError(f"{quote(text)} is out of range: a duration is above 0 and at most {LONGEST_S / 86400:.0f}d")
    return seconds
