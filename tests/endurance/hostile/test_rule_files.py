"""Rule files that went wrong in every way: refused with a place, or accepted with the meaning that they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gatekeeper import config
from tests.endurance.hostile import meaning, mutants
from tests.support.gate import PYTHON_PATH, ROOT

HEAD = "version: 1\ndefault: deny\nlisteners:\n  - {name: ssh, listen: 0.0.0.0:22, backend: 127.0.0.1:2222}\n"
ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHON_PATH}


@pytest.fixture
def home(folder: Path) -> Path:
    """A folder with what the seeds name, for its owner alone."""
    folder.chmod(0o700)
    mutants.lay_out(folder)
    return folder


def judged(home: Path, kind: str, numbers: range) -> dict[str, Any]:
    """Return what `judge` says about a batch, in a process of its own with 256 MiB and 1 s of CPU for each file."""
    arguments = [str(home), kind, str(numbers.start), str(numbers.stop), str(numbers.step)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.endurance.hostile.judge", *arguments],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(1000)
def test_mutants_are_refused_with_a_place_or_keep_their_meaning(home: Path, long: bool) -> None:
    """Nested, tagged, swollen, recoded and reshuffled files: no traceback, no hang, no more than 256 MiB, no other meaning."""
    found = judged(home, "mutants", range(20_000) if long else range(0, 20_000, 50))
    assert found["failures"] == []
    assert found["judged"] == (20_000 if long else 400)
    assert found["accepted"] >= found["judged"] // 20, "too few are accepted to say anything about their meaning"
    assert found["peak_kib"] <= 256 << 10


@pytest.mark.timeout(1000)
def test_files_cut_anywhere_are_refused_with_a_place_or_keep_their_meaning(home: Path, long: bool) -> None:
    """A file that was being written when it was read ends in no traceback, wherever it was cut."""
    everything = sum(1 for _ in mutants.truncations(mutants.lay_out(home)))
    found = judged(home, "truncations", range(0, everything, 1 if long else 23))
    assert found["failures"] == []
    assert found["judged"] >= everything // 23
    assert found["peak_kib"] <= 256 << 10


def run(home: Path, command: str, text: bytes) -> subprocess.CompletedProcess[str]:
    """Return how the real program ended on a file."""
    path = home / "rules.yaml"
    path.write_bytes(text)
    path.chmod(0o600)
    return subprocess.run(
        [sys.executable, "-m", "gatekeeper", command, "rules.yaml"],
        cwd=home, env=ENVIRONMENT, capture_output=True, text=True, errors="strict", timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_the_program_itself_says_where(home: Path, long: bool) -> None:
    """`gatekeeper check` exits with 0, 1 or 3, and every refusal begins with file:line:column."""
    seeds = mutants.lay_out(home)
    for number in range(5, 20_000, 100 if long else 4000):
        done = run(home, "check", mutants.mutant(seeds, number))
        assert done.returncode in {0, 1, 3}, (number, done)
        assert "Traceback" not in done.stdout + done.stderr, (number, done)
        if done.returncode == 1:
            assert done.stdout.split(": ")[0].count(":") == 2, (number, done.stdout)


@pytest.mark.timeout(600)
def test_a_service_does_not_start_with_what_is_refused(home: Path, long: bool) -> None:
    """`gatekeeper run` exits with 1 or 3, says where, and never prints what a terminal would obey."""
    seeds = mutants.lay_out(home)
    tried = 0
    for number in range(7, 20_000, 333 if long else 7000):
        text = mutants.mutant(seeds, number)
        (home / "rules.yaml").write_bytes(text)
        (home / "rules.yaml").chmod(0o600)
        if config.check(str(home / "rules.yaml")).config is not None:
            continue
        tried += 1
        done = run(home, "run", text)
        assert done.returncode in {1, 3}, (number, done)
        assert "Traceback" not in done.stderr, (number, done)
        assert "rules.yaml:" in done.stderr, (number, done)
        assert all(character.isprintable() or character in "\n\t" for character in done.stderr), (number, done.stderr)
    assert tried


# ---------------------------------------------------------------------- what mutations rarely reach


@pytest.mark.parametrize("depth", [10, 3000])
def test_sets_of_sets_may_be_nested_deeply(depth: int) -> None:
    """A chain of sets means what its end means, however long it is."""
    chain = "".join(f"  s{number}: [s{number + 1}]\n" for number in range(depth))
    text = f"{HEAD}sets:\n{chain}  s{depth}: [192.0.2.0/24]\nrules:\n  - {{name: a, action: allow, from: s0}}\n"
    loaded = config.check("rules.yaml", text.encode())
    assert loaded.config is not None
    assert meaning.of_config(loaded.config)["rules"][0]["from"] == (["192.0.2.0/24"], [])


def test_files_that_include_each_other_deeply_are_refused(home: Path) -> None:
    """A long chain of includes is an error with a place, not a traceback."""
    for number in range(600):
        path = home / f"chain{number}.yaml"
        path.write_text(f"- include: chain{number + 1}.yaml\n")
        path.chmod(0o600)
    loaded = config.check(str(home / "rules.yaml"), f"{HEAD}rules:\n  - include: chain0.yaml\n".encode())
    assert loaded.config is None
    assert "one by another" in loaded.problems[0].message


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "rules: [" + "a," * 20_000 + "]\n",
        HEAD + "rules:\n" + "  - {name: x, action: allow}\n" * 10_000,
        HEAD + "rules:\n  - {name: a, action: allow, from: [" + "x," * 20_000 + "]}\n",
        HEAD + "".join(f"k{number}: 1\n" for number in range(20_000)),
        HEAD + "sets:\n" + "".join(f"  s{number}: [s{number + 1}, s0]\n" for number in range(5_000)),
        HEAD + "a: 1\n" * 20_000,
        HEAD.replace("0.0.0.0:22", "[" + "'0.0.0.0:22'," * 10_000 + "]"),
    ],
    ids=["types", "names", "sources", "keys", "circles", "duplicates", "overlaps"],
)
def test_files_full_of_errors_are_answered_with_the_first_thousand(text: str) -> None:
    """Tens of thousands of errors are neither collected nor printed; there is one more line that says so."""
    loaded = config.check("rules.yaml", text.encode())
    assert loaded.config is None
    assert len(loaded.problems) == 1001
    assert "not looked for" in loaded.problems[-1].message


@pytest.mark.parametrize("backend", ["127.0.0.7:80", "192.0.2.1:9000"])
def test_a_backend_among_thousands_of_listeners_is_found(backend: str) -> None:
    """A backend that is one of our own listeners is refused and named, also where nobody could compare each with each."""
    lines = [f"  - {{name: l{n}, listen: '127.0.{n >> 8}.{n & 255}:80', backend: '127.1.0.1:{1000 + n}'}}" for n in range(3000)]
    lines += ["  - {name: wide, listen: '192.0.2.1:8000-9999', backend: 127.1.0.1:80}", "  - {name: inner, listen: '192.0.2.1:100', backend: 127.1.0.1:80}"]
    lines += [f"  - {{name: last, listen: '127.2.0.1:80', backend: '{backend}'}}"]
    loaded = config.load("rules.yaml", ("version: 1\ndefault: deny\nlisteners:\n" + "\n".join(lines) + "\n").encode())
    (problem,) = loaded.problems
    assert problem.place.line == 3 + len(lines)
    assert backend in problem.message


def test_a_byte_order_mark_hides_no_broken_byte() -> None:
    """A file with a byte order mark and a byte that is no UTF-8 is refused at that byte."""
    loaded = config.check("rules.yaml", b"\xef\xbb\xbfversion: 1\nx: caf\xc3\xa9 \xff\n")
    (problem,) = loaded.problems
    assert (problem.place.line, problem.place.column) == (2, 9)
    assert "0xff" in problem.message


@pytest.mark.parametrize("line", ["state: 0x10", 'state: "a\\nb"', 'state: "a\\e[31mb"', "state: |\n  a\n"])
def test_paths_are_plain_text(line: str) -> None:
    """A path is neither a number, which has many spellings, nor does it hold what breaks a line of a log."""
    loaded = config.check("rules.yaml", f"{HEAD}{line}\n".encode())
    assert loaded.config is None
    assert all(problem.place.line == 5 for problem in loaded.problems)


def test_file_names_are_hostile_too(home: Path) -> None:
    """An included file may be called anything: what is printed stays on its line, and is UTF-8."""
    for name in (b"x\n- {name: forged}.yaml", b"\xff\x1b[31m.yaml", b"\xe2\x80\xaegnp.yaml"):
        path = os.path.join(os.fsencode(home), b"rules.d", name)
        with open(path, "wb") as file:
            file.write(b"- {name: A, action: allow}\n")
        os.chmod(path, 0o600)
    done = run(home, "check", f"{HEAD}rules:\n  - include: rules.d/*.yaml\n".encode())
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert all(character.isprintable() or character in "\n\t" for character in done.stdout)
    assert len([line for line in done.stdout.splitlines() if "rule.name" in line]) == 3
