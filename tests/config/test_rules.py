from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from gatekeeper import config
from gatekeeper.config.problems import Problem
from gatekeeper.config.schema import json_schema
from gatekeeper.config.tree import parse
from gatekeeper.policy.prove import run_tests

RULES = Path(__file__).parents[2] / "rules"
EXAMPLES = sorted(RULES.glob("*.yaml"))
HINT = "# yaml-language-server: $schema=./gatekeeper.schema.json"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples as files of their own, whatever rights the checkout has."""
    copy = tmp_path / "rules"
    shutil.copytree(RULES, copy)
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    monkeypatch.chdir(copy)
    return copy


@pytest.mark.parametrize("name", [path.name for path in EXAMPLES])
def test_an_example_is_ready_to_use(name: str, folder: Path) -> None:
    """No errors, no warnings, its tests hold, and editors find the schema."""
    loaded = config.check(name)
    assert loaded.problems == []
    assert loaded.config is not None
    assert (folder / name).read_text().splitlines()[0] == HINT
    assert any(test.sources.anyone or test.sources.excluded for test in loaded.config.policy.tests)  # quantified


@pytest.mark.parametrize("name", [path.name for path in EXAMPLES])
def test_every_rule_of_an_example_is_held_by_its_tests(name: str, folder: Path) -> None:
    """Take any rule away, and a test of the file fails."""
    loaded = config.load(name)
    assert loaded.config is not None
    policy = loaded.config.policy
    for index, rule in enumerate(policy.rules):
        without = dataclasses.replace(policy, rules=policy.rules[:index] + policy.rules[index + 1 :])
        assert run_tests(without), rule.name


@pytest.mark.parametrize("name", [path.name for path in EXAMPLES])
def test_an_example_is_valid_for_editors(name: str, folder: Path) -> None:
    """The schema accepts what `check` accepts."""
    problems: list[Problem] = []
    root = parse(name, (folder / name).read_text(), problems)
    assert root is not None
    jsonschema.Draft202012Validator(json_schema()).validate(root.plain())


@pytest.mark.parametrize("wrong", [
    {"versio": 1}, {"default": "reject"}, {"listeners": []}, {"limits": []}, {"workers": 0}, {"metrics": "on"},
    {"rules": [{"name": "a", "action": "allow", "from": []}]}, {"rules": [{"action": "allow"}]},
    {"rules": [{"name": "Any", "action": "allow"}]}, {"rules": [{"name": "any", "action": "allow"}]},
    {"rules": [{"include": "x", "name": "y"}]}, {"sets": {"a": {"url": "x"}}},
])  # fmt: skip
def test_the_schema_refuses_what_check_refuses(wrong: dict[str, object]) -> None:
    """An editor marks the same mistakes while typing."""
    right = {"version": 1, "default": "deny", "listeners": [{"name": "a", "listen": "*:22", "backend": "127.0.0.1:2222"}]}
    validator = jsonschema.Draft202012Validator(json_schema())
    assert validator.is_valid(right)
    assert not validator.is_valid(right | wrong)
    assert config.load("x", json.dumps(right).encode()).config is not None
    assert config.load("x", json.dumps(right | wrong).encode()).config is None


def test_the_committed_schema_is_current() -> None:
    """Write it anew with ``gatekeeper schema > rules/gatekeeper.schema.json``."""
    committed = json.loads((RULES / "gatekeeper.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(committed)
    assert committed == json_schema()
