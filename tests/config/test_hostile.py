"""Whatever is in a rule file, `check` answers with a configuration or with problems at places: it never fails."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatekeeper import config
from gatekeeper.config.rendering import LINE_BREAK

RULES = Path(__file__).parents[2] / "rules"
EXAMPLES = {path.name: path.read_bytes() for path in sorted(RULES.glob("*.yaml"))}
TOKENS = [
    b"\n", b" ", b"\t", b"- ", b": ", b"[", b"]", b"{", b"}", b"'", b'"', b"*a", b"&a ", b"!!str ", b"<<: ", b"---\n", b"...\n", b"#",
    b"|", b">", b"%", b"?", b"@", b"\x00", b"\x1b[31m", b"\xff", b"\xc3\xa9", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\r", b"\x85",
    b"null", b"true", b"010", b"22:22", b"1e999", b".nan", b"9" * 400, b"any", b"::/0", b"*:22", b"unix:/x", b"0.0.0.0/0", b"-1",
    b"[" * 50, b"x" * 5000, b"include: '*'\n", b"from:", b"name: a", b"{file: /dev/zero}", b"{file: lists}", b"${HOME}", b"\\u0000",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _in_the_examples_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    copy = tmp_path_factory.mktemp("hostile") / "rules"
    shutil.copytree(RULES, copy)
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    with chdir(copy):
        yield


def judge(name: str, text: bytes) -> None:
    """Check a file and everything that is promised about the answer."""
    loaded = config.check(name, text)
    errors = [problem for problem in loaded.problems if problem.severity == "error"]
    assert (loaded.config is None) == bool(errors)
    lines = len(LINE_BREAK.split(text.decode("utf-8", "replace")))
    for problem in loaded.problems:
        assert problem.place.line >= 1
        assert problem.place.file != name or problem.place.line <= lines
        assert problem.place.column >= 1
        assert problem.message
        shown = config.render(problem, loaded.texts)
        assert all(character.isprintable() or character in "\n\t" for character in shown)


def mutated(text: bytes, chooser: random.Random) -> bytes:
    """Return the text with a few pieces cut, doubled, moved, or replaced by something that YAML or the format knows."""
    for _ in range(chooser.randint(1, 4)):
        at, end = sorted(chooser.randrange(len(text) + 1) for _ in range(2))
        end = min(end, at + chooser.choice([0, 1, 2, 8, 60, 400]))
        kind = chooser.randrange(5)
        if kind == 0:
            text = text[:at] + chooser.choice(TOKENS) + text[end:]
        elif kind == 1:
            text = text[:at] + text[end:]
        elif kind == 2:
            text = text[:end] + text[at:]
        elif kind == 3:
            text = text[:at]
        else:
            text = text[:at] + bytes([chooser.randrange(256)]) + text[at + 1 :]
    return text


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(EXAMPLES)), seed=st.integers(0, 2**32))
def test_a_mutated_example_is_accepted_or_refused_with_a_place(name: str, seed: int) -> None:
    """Cut, doubled, replaced and overwritten bytes never end in a traceback."""
    judge(name, mutated(EXAMPLES[name], random.Random(seed)))


KEYS = ["version", "listeners", "sets", "default", "rules", "tests", "workers", "metrics", "audit", "state", "limits"]
FIELDS = ["name", "listen", "backend", "protocol", "from", "except", "to", "action", "expect", "include", "file", "path", "idle_timeout"]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates(),
    st.sampled_from(["any", "a", "b", "10.0.0.0/8", "*:22", "127.0.0.1:1", "allow", "deny", "tcp", "udp", "53/udp", "20s", "off", "::1"]),
)  # fmt: skip
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(document=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), values, max_size=8))
def test_any_document_is_accepted_or_refused_with_a_place(document: dict[str, Any]) -> None:
    """Values of any type where others are expected never end in a traceback."""
    judge("any.yaml", yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "replace"))


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_truncated_example_is_accepted_or_refused_with_a_place(name: str) -> None:
    """A file that was cut while it was written ends in no traceback either."""
    text = EXAMPLES[name]
    for end in range(0, len(text), 7):
        judge(name, text[:end])
