from __future__ import annotations

from typing import Any

import pytest

from gatekeeper.config.problems import Problem
from gatekeeper.config.tree import DEPTH_MOST, VALUES_MOST, parse


def read(text: str) -> Any:
    """Return the plain value of a document without problems."""
    problems: list[Problem] = []
    value = parse("x.yaml", text, problems)
    assert problems == []
    return value.plain() if value is not None else None


def codes(text: str) -> list[str]:
    """Return what is wrong with a document."""
    problems: list[Problem] = []
    parse("x.yaml", text, problems)
    return [problem.code for problem in problems]


@pytest.mark.parametrize(("text", "value"), [
    ("22", 22), ("-1", -1), ("0", 0), ("0x16", 22),
    ("1.5", 1.5), ("1e3", 1000.0), ("-.inf", float("-inf")), (".5", 0.5),
    ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
    ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("NO", "NO"),  # words, not truth values
    ("8000-8010", "8000-8010"), ("::1", "::1"), ("0.0.0.0:22", "0.0.0.0:22"), ("2001:db8::/32", "2001:db8::/32"),
    ("10.0.0.0/8", "10.0.0.0/8"), ("2027-01-31", "2027-01-31"), ("20s", "20s"), ("53/udp", "53/udp"),
    ("'22'", "22"), ('"no"', "no"), ("'010'", "010"), ('"22:22"', "22:22"), ("|\n  22", "22"), ("=", "="),
])  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    """The core schema, so that addresses, ports and words are what people wrote."""
    found = read(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["22:22", "1:2:3:4:5:6:7:8", "010", "00", "1_000", "0o17", "0b11", "+010", "0x1_6", "190:20:30.15"])
def test_numbers_that_readers_disagree_on_are_refused(text: str) -> None:
    """Quoted they are text, unquoted they are an error."""
    assert codes(f"key: {text}") == ["yaml.ambiguous"]
    assert read(f"key: '{text}'") == {"key": text}


@pytest.mark.parametrize(("text", "code"), [
    ("a: &x 1", "yaml.anchor"), ("a: *x", "yaml.alias"), ("a: !!int 1", "yaml.tag"), ("a: !x 1", "yaml.tag"), ("a: ! 1", "yaml.tag"),
    ("<<: {b: 1}", "yaml.merge"), ("a: 1\n---\nb: 2", "yaml.document"), ("a: 1\na: 2", "duplicate-key"), ("? [a]\n: 1", "yaml.key"),
    ("1: a", "yaml.key"), ("null: a", "yaml.key"), ("a: \x07", "yaml.character"), ("a: [", "yaml.syntax"),
    ("%YAML 1.1\n---\na: 1", "yaml.version"),
])  # fmt: skip
def test_what_yaml_has_beside_values_is_refused(text: str, code: str) -> None:
    """Each with its own code, once."""
    assert codes(text) == [code]


def test_quoted_merge_keys_are_keys() -> None:
    """Only the plain "<<" means a merge."""
    assert read("'<<': 1") == {"<<": 1}


@pytest.mark.parametrize(("open_", "close"), [("[", "]"), ("{a: ", "}")])
def test_depth_is_limited(open_: str, close: str) -> None:
    """32 levels are read; one more is an error, and so are a hundred thousand."""
    inner = DEPTH_MOST - 1
    read(open_ * inner + "1" + close * inner)
    assert codes(open_ * (inner + 1) + "1" + close * (inner + 1)) == ["yaml.depth"]
    assert codes(open_ * 100_000) == ["yaml.depth"]
    assert codes("- " * 100_000) == ["yaml.depth"]


def test_the_number_of_values_is_limited() -> None:
    """Long lists belong in list files."""
    assert codes("[" + "1," * (VALUES_MOST - 1) + "]") == []
    assert codes("[" + "1," * VALUES_MOST + "]") == ["yaml.size"]


def test_every_value_and_key_knows_its_place() -> None:
    """Lines and columns count from 1; the length is the token's, quotes included."""
    problems: list[Problem] = []
    root = parse("x.yaml", 'first: 1\nsecond:\n  - {key: "a b"}\n', problems)
    assert root is not None
    second = root.get("second")
    assert second is not None
    [item] = second.items()
    key = item.get("key")
    assert key is not None

    def at(spot: Any) -> tuple[int, int, int]:
        return spot.place.line, spot.place.column, spot.length

    assert at(root.keys["second"]) == (2, 1, 6)
    assert at(item.spot) == (3, 5, 12)
    assert at(item.keys["key"]) == (3, 6, 3)
    assert at(key.spot) == (3, 11, 5)
