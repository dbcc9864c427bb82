"""Golden pairs: ``errors/x.yaml`` is a file with mistakes, ``errors/x.out`` is what people read about it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gatekeeper import config

ERRORS = Path(__file__).parent / "errors"
WRITE = "GATEKEEPER_WRITE_GOLDEN" in os.environ  # rewrites the .out files; read the difference before committing it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that only their owner may write: where a checkout leaves group rights, they would be refused."""
    copy = tmp_path_factory.mktemp("golden") / "errors"
    shutil.copytree(ERRORS, copy)
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return copy


@pytest.mark.parametrize("name", sorted(path.stem for path in ERRORS.glob("*.yaml")))
def test_people_read_what_is_wrong_and_where(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mistake is reported once, at its place, with what would be right."""
    monkeypatch.chdir(folder)
    loaded = config.check(f"{name}.yaml")
    shown = "\n".join(config.render(problem, loaded.texts) for problem in loaded.problems) + "\n"
    golden = ERRORS / f"{name}.out"
    if WRITE:
        golden.write_text(shown, encoding="utf-8")
    assert shown == golden.read_text(encoding="utf-8")
    assert (loaded.config is None) == any(problem.severity == "error" for problem in loaded.problems)
    assert loaded.problems == sorted(loaded.problems)


def test_every_golden_file_has_its_pair() -> None:
    """No expectation is left behind by a file that is gone."""
    assert {path.stem for path in ERRORS.glob("*.out")} == {path.stem for path in ERRORS.glob("*.yaml")}
