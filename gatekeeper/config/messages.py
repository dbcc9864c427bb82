"""What pydantic found, as problems at their places, in the words of the format.

Pydantic names a place by ``loc``: keys and indices from the root, with the tags of unions and "[key]" between them. They are
looked up in the tree of values; what leads nowhere is skipped, so that a missing key lands on its mapping.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError

from gatekeeper.config.fields import describe
from gatekeeper.config.models import MODELS, IncludeModel, RuleFile, Strict
from gatekeeper.config.problems import Problem, Severity
from gatekeeper.config.tree import BROKEN, PROBLEMS_MOST, Spot, Value
from gatekeeper.config.words import listed, nearest, quote

SINGULAR = {"listeners": "listener", "sets": "set", "rules": "rule", "tests": "test"}
EXPECTED = {
    "listeners": "a list of listeners, each a mapping with name, listen and backend",
    "sets": "a mapping of names to lists of addresses",
    "rules": "a list of rules, each a mapping with name and action",
    "tests": "a list of tests, each a mapping with from, to and expect",
}


def explain(err: ValidationError, root: Value) -> list[Problem]:
    """Return the problems of a rule file, of very many the first; what is at a broken value was reported before."""
    found = (_explain(item, root) for item in err.errors(include_url=False))
    return list(islice((problem for problem in found if problem is not None), PROBLEMS_MOST + 1))


def _explain(item: Any, root: Value) -> Problem | None:
    loc: tuple[str | int, ...] = item["loc"]
    kind = item["type"]
    value, spot, path = _locate(root, loc, at_key=kind == "extra_forbidden")
    if value is not None and value.data is BROKEN:
        return None
    section = str(path[0]) if path else ""
    model = MODELS.get(section, RuleFile) if len(path) > 1 else RuleFile
    code = _code(section, path)
    if kind == "missing":
        key = str(loc[-1])
        return None if value is not None and _stands_in(value, key, model) else _missing(spot, key, model)
    if kind == "extra_forbidden":
        return _unknown(spot, str(loc[-1]), model)
    if kind == "value_error":
        error = item["ctx"]["error"]
        return _problem(spot, getattr(error, "code", code), str(error))
    return _problem(spot, code, _wrong_type(kind, item, path, model))


def _code(section: str, path: Sequence[str | int]) -> str:
    """Return the name of a field: ``rule.from``, ``default``; of a set it is ``set``, whatever its name."""
    if section == "sets":
        return "set"
    field = next((str(step) for step in reversed(path[1:]) if isinstance(step, str)), "")
    return ".".join(filter(None, (SINGULAR.get(section, section), field))) or "file"


def _wrong_type(kind: str, item: Any, path: Sequence[str | int], model: type[Strict]) -> str:
    given = describe(item["input"])
    if kind in {"model_type", "model_attributes_type"}:
        if not path:
            return f"expected a mapping with {listed(known_keys(RuleFile), 'and')}, not {given}"
        return f"a {model.KIND} is a mapping with {listed(known_keys(model), 'and')}, not {given}"
    if kind == "too_short":
        return "there is no listener: write at least one, or there is nothing to protect"
    if kind in {"list_type", "dict_type"} and path[0] in EXPECTED and len(path) == 1:
        advice = "" if item["input"] is not None else ", or leave the key out"
        return f"{path[0]} is {EXPECTED[str(path[0])]}, not {given}{advice}"
    return f"{item['msg']}, not {given}"


def _missing(spot: Spot, key: str, model: type[Strict]) -> Problem:
    return _problem(spot, "missing-key", f'the key "{key}" is missing here: {_description(model, key)}')


def _stands_in(value: Value, key: str, model: type[Strict]) -> bool:
    """Say whether another key in this mapping, which is reported anyway, stands in place of the missing one."""
    keys = known_keys(model)
    others = [other for other in value.keys if other not in keys]
    return any(nearest(other, keys) == key or (key == "file" and other in model.LATER) for other in others)


def _unknown(spot: Spot, key: str, model: type[Strict]) -> Problem:
    if key in model.LATER:
        return _problem(spot, "not-yet", f'"{key}" is not supported yet: remove it')
    keys = known_keys(model)
    near = nearest(key, keys)
    guess = f"did you mean {quote(near)}? " if near else ""
    where = "a rule file" if model is RuleFile else f"a {model.KIND}" if model.KIND != "metrics" else "metrics"
    return _problem(spot, "unknown-key", f"unknown key {quote(key)}, {guess}{where} has {listed(keys, 'and')}")


def known_keys(model: type[Strict]) -> list[str]:
    """Return the keys of a mapping as they are written."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _description(model: type[Strict], key: str) -> str:
    for candidate in (model, IncludeModel):
        for name, field in candidate.model_fields.items():
            if key == (field.alias or name):
                return field.description or ""
    return ""


def _locate(root: Value, loc: Iterable[str | int], *, at_key: bool) -> tuple[Value | None, Spot, list[str | int]]:
    """Follow ``loc`` as far as it leads; return the value there, what to point at, and the steps that led somewhere."""
    value, spot, key = root, root.spot, root.spot
    path: list[str | int] = []
    for step in loc:
        if step == "[key]":
            return None, key, path
        if isinstance(step, int) and isinstance(value.data, list) and step < len(value.data):
            value = value.data[step]
            spot = value.spot
        elif isinstance(step, str) and isinstance(value.data, dict) and step in value.data:
            key = value.keys[step]
            value = value.data[step]
            # An empty value has no width: its key is what people see.
            spot = key if at_key or (value.data is None and not value.text) else value.spot
        else:
            continue
        path.append(step)
    return value, spot, path


def _problem(spot: Spot, code: str, message: str) -> Problem:
    return Problem(spot.place, Severity.ERROR, code, message, spot.length)
