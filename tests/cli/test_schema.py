"""`gatekeeper schema`: what editors load."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.cli.program import gatekeeper

RULES = Path(__file__).parents[2] / "rules"
EXAMPLES = sorted(RULES.glob("*.yaml"))


def test_the_committed_schema_is_current() -> None:
    """rules/gatekeeper.schema.json is what the command prints; `gatekeeper schema > rules/gatekeeper.schema.json` mends it."""
    done = gatekeeper("schema")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == json.loads((RULES / "gatekeeper.schema.json").read_text())


def test_it_is_a_schema() -> None:
    """The output is a valid JSON schema of the dialect it names."""
    jsonschema.Draft202012Validator.check_schema(json.loads(gatekeeper("schema").out))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_valid_by_it(example: Path) -> None:
    """Every ready-to-use rule file is valid by the schema, and is not once a key is misspelt."""
    validator = jsonschema.Draft202012Validator(json.loads(gatekeeper("schema").out))
    document = yaml.safe_load(example.read_text())
    assert validator.is_valid(document)
    assert not validator.is_valid(document | {"listner": []})
