"""Rule files: text to an immutable `Config`, every error with its place.

    load(path, text=None) -> Loaded      read and validate; does not run the file's tests
    check(path, text=None) -> Loaded     load, prove the file's tests, look for rules that cannot match
    render(problem, texts) -> str        a problem for people, with its line and a caret
    as_json(problem) -> dict             a problem for programs

The names are looked up when they are asked for: yaml and pydantic are slow to import, and only these need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatekeeper.config.checking import check
    from gatekeeper.config.loader import Loaded, load
    from gatekeeper.config.problems import Problem, Severity
    from gatekeeper.config.rendering import as_json, render

__all__ = ["Loaded", "Problem", "Severity", "as_json", "check", "load", "render"]

_HOMES = {
    "Loaded": "loader",
    "Problem": "problems",
    "Severity": "problems",
    "as_json": "rendering",
    "check": "checking",
    "load": "loader",
    "render": "rendering",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found
