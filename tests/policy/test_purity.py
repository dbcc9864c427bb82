from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gatekeeper.policy

FOLDER = Path(gatekeeper.policy.__file__).parent
IMPURE = {
    "socket", "time", "datetime", "os", "pathlib", "io", "logging", "random", "secrets", "asyncio", "select", "selectors",
    "subprocess", "threading", "signal", "mmap", "ctypes",
}  # fmt: skip


def imported(source: str) -> set[str]:
    """The top-level names of everything that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("module", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_policy_is_pure(module: Path) -> None:
    """Nothing in the policy core can reach a socket, a clock, a file or a log, nor anything of gatekeeper beside itself."""
    names = imported(module.read_text())
    assert not {name.partition(".")[0] for name in names} & IMPURE
    assert all(name.startswith("gatekeeper.policy") for name in names if name.startswith("gatekeeper"))
    assert "open(" not in module.read_text()
