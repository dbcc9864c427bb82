"""`gatekeeper check`: problems on standard output, the answer in the exit code."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.cli.program import gatekeeper

GOOD = """\
version: 1
listeners:
  - {name: web, listen: "127.0.0.1:8080", backend: "127.0.0.1:8081"}
default: deny
rules:
  - {name: friends, action: allow, from: 192.0.2.0/24, to: web}
tests:
  - {from: 192.0.2.7, to: web, expect: allow}
  - {from: any, except: 192.0.2.0/24, to: web, expect: deny}
"""
HOST_BITS = GOOD.replace("from: 192.0.2.0/24, to", "from: 192.0.2.5/24, to")


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """A good rule file."""
    path = tmp_path / "rules.yaml"
    path.write_text(GOOD)
    return path


def test_a_good_file_is_0(rules: Path) -> None:
    """A good file: exit code 0 and one line that counts what is in it; no problem in the JSON."""
    done = gatekeeper("check", str(rules))
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{rules}: ok: 1 listener, 1 rule, 2 tests proved\n"
    done = gatekeeper("check", "--json", str(rules))
    assert (done.code, json.loads(done.out), done.err) == (0, [], "")


def test_a_problem_is_shown_with_its_place_and_a_caret(rules: Path) -> None:
    """An error: exit code 1, `file:line:column: message [code]`, the line, and a caret under the wrong item."""
    rules.write_text(HOST_BITS)
    done = gatekeeper("check", str(rules))
    assert done.code == 1
    first, *excerpt = done.out.splitlines()
    column = HOST_BITS.splitlines()[5].index("192.0.2.5/24") + 1
    assert first.startswith(f"{rules}:6:{column}: ")
    assert '"192.0.2.0/24"' in first
    assert first.endswith("]")
    caret = next(line for line in excerpt if "^" in line)
    shown = next(line for line in excerpt if "192.0.2.5/24" in line)
    assert caret.index("^") == shown.index("192.0.2.5/24")


def test_json_has_the_documented_keys(rules: Path) -> None:
    """With --json the same problem is an object with exactly the keys that --help lists."""
    rules.write_text(HOST_BITS)
    done = gatekeeper("check", "--json", str(rules))
    (problem,) = json.loads(done.out)
    assert done.code == 1
    assert set(problem) == {"file", "line", "column", "severity", "code", "message"}
    assert (problem["file"], problem["line"], problem["severity"]) == (str(rules), 6, "error")


def test_a_file_that_breaks_its_own_tests_is_1(rules: Path) -> None:
    """A claim that does not hold is an error with a counterexample, at the place of the test."""
    rules.write_text(GOOD.replace("except: 192.0.2.0/24", "except: 192.0.2.0/25"))
    done = gatekeeper("check", str(rules))
    assert done.code == 1
    assert f"{rules}:9:" in done.out
    assert "192.0.2.128" in done.out


def test_standard_input_has_a_name(rules: Path) -> None:
    """`-` reads standard input, which messages call <stdin>."""
    assert gatekeeper("check", "-", stdin=GOOD).out == "<stdin>: ok: 1 listener, 1 rule, 2 tests proved\n"
    done = gatekeeper("check", "-", stdin=HOST_BITS)
    assert done.code == 1
    assert done.out.startswith("<stdin>:6:")


@pytest.mark.parametrize("argv", [(), ("--json",)])
def test_a_file_that_cannot_be_read_is_3(tmp_path: Path, argv: tuple[str, ...]) -> None:
    """No such file, or a directory: exit code 3, nothing on standard output, the reason on standard error."""
    for path in (tmp_path / "missing.yaml", tmp_path):
        done = gatekeeper("check", *argv, str(path))
        assert (done.code, done.out) == (3, "")
        assert str(path) in done.err


def test_check_opens_no_socket(rules: Path) -> None:
    """A file whose port is taken is still good: `check` looks at the text alone."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        rules.write_text(GOOD.replace(":8080", f":{taken.getsockname()[1]}"))
        assert gatekeeper("check", str(rules)).code == 0
