"""Rule files in a folder of the test."""

from __future__ import annotations

from pathlib import Path

from gatekeeper import config
from gatekeeper.policy.model import Config

HEAD = """\
version: 1
default: deny
listeners:
  - {name: ssh, listen: 0.0.0.0:22, backend: 127.0.0.1:2222}
"""


def write(path: Path, text: str) -> Path:
    """Write a file that only its owner may change, as `load` asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


def accepted(text: str, name: str = "<stdin>") -> Config:
    """Return the configuration of a file that has no problem at all."""
    loaded = config.load(name, text.encode())
    assert loaded.problems == []
    assert loaded.config is not None
    return loaded.config


def messages(loaded: config.Loaded) -> list[str]:
    """Return the problems as ``line:column [code] message``."""
    return [f"{found.place.line}:{found.place.column} [{found.code}] {found.message}" for found in loaded.problems]
