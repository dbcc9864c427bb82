"""The JSON schema of rule files, for editors: completion, help and most errors while typing.

It says what can be said without reading other keys; ``gatekeeper check`` knows the rest. The committed copy is
``rules/gatekeeper.schema.json``.
"""

from __future__ import annotations

from typing import Any

from gatekeeper.config.models import RuleFile

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Return the schema of a rule file as JSON values."""
    schema = RuleFile.model_json_schema(by_alias=True, mode="validation")
    return {"$schema": DIALECT, **_without_noise(schema), "title": "gatekeeper rule file"}


def _without_noise(node: Any) -> Any:
    """Drop what pydantic adds for itself: titles made of Python's names, and defaults (the descriptions tell them)."""
    if isinstance(node, list):
        return [_without_noise(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _without_noise(item) for name, item in value.items()} if key == "properties" else _without_noise(value)
        for key, value in node.items()
        if not (key == "title" and isinstance(value, str)) and key != "default"
    }
