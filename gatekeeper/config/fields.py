"""What single values of a rule file may hold: validators, and the types made of them.

A value's validator returns what it means (a `Backend`, seconds, a `Target`) or raises ValueError with a message for
people. Names of sets and listeners are looked up in the validation context (`Names`), so that a misspelt one is reported
where it stands, with everything else. What several values say together (`crosscheck`) is not judged here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema

from gatekeeper.config import addresses, words
from gatekeeper.config.words import listed, nearest, quote
from gatekeeper.policy.model import Action, Backend, Protocol, Target

ANY = "any"
MOST_WORKERS = 128  # as `run --workers`
GUESSES_MOST = 100  # finding near misses is slow; a file with more of them has another problem
DESCRIBED_AS = {"deny": ("reject", "refuse", "block"), "allow": ("accept", "permit", "pass"), "drop": ("ignore", "silent")}

Member = tuple[int, int, int] | str  # a range (family, first, last), or the name of a set, or ANY


class Refusal(ValueError):
    """A value is wrong in a way that has a code of its own."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class Names:
    """The names that a file gives to things, for the validators that look names up."""

    listeners: list[str] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    guesses: int = 0

    def unknown(self, kind: str, word: str, known: list[str], otherwise: str) -> Refusal:
        """Return the error for a name that nothing has, with the one that was probably meant."""
        self.guesses += 1
        known = [name for name in known if words.NAME.fullmatch(name)]
        near = nearest(word, known) if self.guesses <= GUESSES_MOST else None
        if near is not None:
            return Refusal("unknown-name", f"there is no {kind} {quote(word)}, did you mean {quote(near)}?")
        there = f"known {kind}s: {listed(known, 'and')}" if known else f"there are no {kind}s"
        return Refusal("unknown-name", f"there is no {kind} {quote(word)} ({there}){otherwise}")


def as_text(value: Any, what: str) -> str:
    """Return a scalar that must be text; integers were written as text, too.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"expected {what}, not {describe(value)}")


def describe(value: Any) -> str:
    """Return what people call a value of this type."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()} (quote it if it is a word)"
    if isinstance(value, (int, float)):
        return f"the number {value:.20g}" if isinstance(value, float) else f"the number {value}"
    if isinstance(value, str):
        return f"the text {quote(value)}"
    return "a list" if isinstance(value, list) else "a mapping"


def listing(what: str, empty: str) -> Callable[[Any], list[Any]]:
    """Return a validator that takes one item or a list of them; ``empty`` says what to do instead of writing nothing."""

    def validate(value: Any) -> list[Any]:
        if value is None or value == []:
            raise ValueError(empty)
        if isinstance(value, dict):
            raise ValueError(f"expected {what}, not a mapping")  # noqa: TRY004 - pydantic collects ValueErrors
        return value if isinstance(value, list) else [value]

    return validate


def parsed(parse: Callable[[str], Any], what: str) -> BeforeValidator:
    """Return a validator that reads a scalar as text."""
    return BeforeValidator(lambda value: parse(as_text(value, what)))


def as_path(value: Any) -> str:
    """Return the path of a file that is named. A number is refused: 0x10 and 16 are one number and two paths."""
    if not isinstance(value, str):
        hint = ": quote it" if isinstance(value, int) and not isinstance(value, bool) else ""
        raise ValueError(f"expected a path, not {describe(value)}{hint}")  # noqa: TRY004 - see `listing`
    return parse_file_name(value)


def choice(options: tuple[str, ...], make: Callable[[str], Any] = str) -> BeforeValidator:
    """Return a validator for one word of a closed list."""

    def validate(value: Any) -> Any:
        word = as_text(value, listed(options))
        if word in options:
            return make(word)
        synonym = next((meant for meant, others in DESCRIBED_AS.items() if word.lower() in others), None)
        guess = synonym if synonym in options else nearest(word, options)
        hint = f", did you mean {quote(guess)}?" if guess else ""
        raise ValueError(f"{quote(word)} is not one of {listed(options, 'and')}{hint}")

    return BeforeValidator(validate)


def counted(least: int, most: int, what: str) -> BeforeValidator:
    """Return a validator for a whole number."""

    def validate(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"expected {what} ({least} to {most}), not {describe(value)}")  # noqa: TRY004 - see `listing`
        if not least <= value <= most:
            raise ValueError(f"{value} is out of range: {what} is {least} to {most}")
        return value

    return BeforeValidator(validate)


def parse_member(value: Any, info: ValidationInfo) -> Member:
    """Return an item of ``from`` or ``except``: a range, the name of a set, or ANY."""
    text = as_text(value, "an address, a network, a range or the name of a set")
    if text == ANY:
        return ANY
    if not words.NAME.fullmatch(text):
        try:
            return addresses.parse_source(text)
        except ValueError:
            if any(character in text for character in ".:/0123456789") or text.strip() == "":
                raise
            raise _names(info).unknown("set", text, _names(info).sets, "") from None
    if text in _names(info).sets:
        return text
    raise _names(info).unknown("set", text, _names(info).sets, _sets_hint(text, info))


def _sets_hint(text: str, info: ValidationInfo) -> str:
    if text in _names(info).listeners:
        return f': {quote(text)} is a listener, which belongs to "to"'
    return ': write an address, a network, a range, a set name or "any"'


def parse_set_member(value: Any, info: ValidationInfo) -> Member:
    """Return an item of a set: as in `parse_member`, without ANY."""
    member = parse_member(value, info)
    if member == ANY:
        raise ValueError('a set cannot hold "any": write "any" in the rule, or 0.0.0.0/0 and "::/0" here')
    return member


def parse_target(value: Any, info: ValidationInfo) -> Target | str:
    """Return an item of ``to``: a target, or ANY."""
    text = as_text(value, 'a listener name, a port, a range of ports like "8000-8010", or "53/udp"')
    if text == ANY:
        return ANY
    if text in _names(info).listeners:
        return Target(text)
    if text[:1].isdigit():
        ports, slash, protocol = text.partition("/")
        first, last = addresses.parse_ports(ports, text)
        if slash and protocol not in {"tcp", "udp"}:
            hint = f", did you mean {quote(f'{ports}/{protocol.lower()}')}?" if protocol.lower() in {"tcp", "udp"} else ""
            raise ValueError(f'{quote(text)}: the protocol after the "/" is tcp or udp{hint}')
        return Target(None, first, last, Protocol(protocol) if slash else None)
    if text in {"tcp", "udp"}:
        raise ValueError(f'{quote(text)} alone is no target: write it behind a port, like "53/{text}", or name listeners')
    hint = f': {quote(text)} is a set, which belongs to "from"' if text in _names(info).sets else ""
    raise _names(info).unknown("listener", text, _names(info).listeners, hint)


def _names(info: ValidationInfo) -> Names:
    return info.context if isinstance(info.context, Names) else Names()


def alone(value: Any) -> Any:
    """Refuse "any" beside others: one of both is not meant."""
    if ANY in value and len(value) > 1:
        raise ValueError('"any" stands beside others, which then mean nothing: keep "any" or the others')
    return value


def parse_metrics(text: str) -> addresses.Span:
    """Return the one address and port of the metrics endpoint."""
    spans = addresses.parse_listen(text)
    if len(spans) > 1 or spans[0].first_port != spans[0].last_port or spans[0].family == 0:
        raise ValueError(f'{quote(text)} is not one address and port: write 127.0.0.1:9180, 0.0.0.0:9180 or "[::]:9180"')
    return spans[0]


def parse_metrics_off(value: Any) -> str:
    """Return the only word that stands in place of a mapping."""
    if value == "off":
        return "off"
    raise ValueError(f"metrics is {{listen: 127.0.0.1:9180}} or off, not {describe(value)}")


def parse_version(value: Any) -> int:
    """Return the version of the format."""
    if value == 1 and isinstance(value, int) and not isinstance(value, bool):
        return 1
    raise ValueError(f"this gatekeeper reads version 1 of the format, not {describe(value)}: write 1")


def parse_file_name(text: str) -> str:
    """Return a path; whether it exists is not asked here."""
    if not text:
        raise ValueError("there is no path here: write one, from the folder of this file")
    return _without_control(text)


def _without_control(path: str) -> str:
    """Return a path that can be written on one line.

    Raises:
        ValueError: it holds what a reader of the logs, or a terminal, could obey.
    """
    if words.CONTROL.search(path):
        raise ValueError(f"{quote(path)} has a control character in it: name the file otherwise")
    return path


def parse_workers(value: Any) -> int | None:
    """Return the number of workers, ``None`` for one per CPU."""
    if value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_WORKERS:
        raise ValueError(f'expected a number of workers (1 to {MOST_WORKERS}) or "auto", not {describe(value)}')
    return value


def parse_audit(text: str) -> str:
    """Return stdout, journald, off, or a path with a "/" in it."""
    kinds = ("stdout", "journald", "off")
    if text in kinds or "/" in text:
        return _without_control(text)
    near = nearest(text, kinds)
    hint = f"did you mean {quote(near)}?" if near else f'write {listed(kinds)}, or a path with a "/" in it, like ./audit.log'
    raise ValueError(f"{quote(text)} is no place for the audit log: {hint}")


def parse_control(value: Any) -> str:
    """Return off, or a path with a "/" in it."""
    text = as_text(value, "a path like /run/gatekeeper/control.sock, {socket: PATH, group: NAME} or off")
    if text == "off" or "/" in text:
        return _without_control(text)
    raise ValueError(f'{quote(text)} is no place for the control socket: write a path with a "/" in it, like ./control.sock, or off')


def parse_group(value: Any) -> str:
    """Return the name of a group of this system; whether it exists is not asked here."""
    text = as_text(value, "the name of a group")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?", text, re.ASCII):
        raise ValueError(f"{quote(text)} is not the name of a group: write one of /etc/group, like adm")
    return text


# JSON schema, for editors: what can be said without knowing the file's own names.
_SCALAR = {"type": ["string", "integer"]}
_TEXT = {"type": "string", "minLength": 1}
_DURATION = {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,3})?(ms|s|m|h|d)$", "examples": ["500ms", "20s", "24h"]}
_NAME = {"type": "string", "pattern": r"^(?!(all|any|ban|default|none|tcp|udp|unix)$)[a-z][a-z0-9_-]{0,62}$"}


def _one_or_more(item: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]}


Name = Annotated[str, parsed(words.parse_name, "a name"), WithJsonSchema(_NAME)]
Verb = Annotated[
    Action,
    choice(("allow", "deny", "drop"), lambda word: Action[word.upper()]),
    WithJsonSchema({"enum": ["allow", "deny", "drop"]}),
]
Path = Annotated[str, BeforeValidator(as_path), WithJsonSchema(_TEXT)]
Seconds = Annotated[float | None, parsed(words.parse_duration, "a duration like 20s"), WithJsonSchema(_DURATION)]
Places = Annotated[
    list[Annotated[tuple[addresses.Span, ...], parsed(addresses.parse_listen, "an address and a port")]],
    BeforeValidator(listing("an address and a port, or a list of them", "listen is empty: write one like 0.0.0.0:22")),
    WithJsonSchema(_one_or_more({**_TEXT, "examples": ["0.0.0.0:22", "[::]:22", "*:22", "unix:/run/x.sock"]})),
]
OWN_PORT = Backend(0, "", 0)  # of a guarded listener: the service is at the listener's own addresses


def parse_backend(value: Any) -> Backend:
    """Return what a listener protects."""
    return OWN_PORT if value is OWN_PORT else addresses.parse_backend(as_text(value, "an address and a port"))


BackendText = Annotated[Backend, BeforeValidator(parse_backend), WithJsonSchema(_TEXT)]
From = Annotated[
    list[Annotated[Member, BeforeValidator(parse_member)]],
    BeforeValidator(alone),
    BeforeValidator(listing("sources (addresses, networks, ranges, set names)", 'from is empty, and empty never means any: write "any", or sources')),
    WithJsonSchema(_one_or_more(_TEXT)),
]
Members = Annotated[
    list[Annotated[Member, BeforeValidator(parse_set_member)]],
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}),
]
Except = Annotated[
    list[Annotated[Member, BeforeValidator(parse_member)]],
    BeforeValidator(listing("sources (addresses, networks, ranges, set names)", "except is empty: write sources, or leave the key out")),
    WithJsonSchema(_one_or_more(_TEXT)),
]
_TARGETS = '"any", listener names or ports'
To = Annotated[
    list[Annotated[Target | str, BeforeValidator(parse_target)]],
    BeforeValidator(alone),
    BeforeValidator(listing("listener names or ports", f"to is empty, and empty never means any: write {_TARGETS}")),
    WithJsonSchema(_one_or_more({**_SCALAR, "examples": ["ssh", 22, "8000-8010", "53/udp"]})),
]
