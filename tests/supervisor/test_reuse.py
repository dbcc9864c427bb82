"""A policy that its files still say is not compiled again, and whatever could change it makes that it is."""

from __future__ import annotations

import json
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gatekeeper.snapshot.reader import Snapshot
from gatekeeper.supervisor import child, lastgood, reuse
from gatekeeper.supervisor.compiling import Compilation, Compiled, Known
from gatekeeper.supervisor.loop import Loop

RULES = """\
version: 1
listeners:
  - {name: web, listen: "127.0.0.1:8080", backend: "127.0.0.1:8081"}
sets:
  office: {file: office.txt}
  nobody: {file: nobody.txt}
default: deny
rules:
  - {name: vacant, action: deny, from: nobody, to: web}
  - include: rules.d/*.yaml
tests:
  - {from: 192.0.2.7, to: web, expect: allow}
"""
Compile = Callable[..., Compiled]


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """A rule file with a list, an include and a warning (a list is empty)."""
    (tmp_path / "rules.d").mkdir()
    (tmp_path / "rules.d" / "10-office.yaml").write_text("- {name: office, action: allow, from: office, to: web}\n")
    (tmp_path / "office.txt").write_text("192.0.2.0/24\n")
    (tmp_path / "nobody.txt").write_text("# nobody\n")
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return path


@pytest.fixture
def compile_file() -> Iterator[Compile]:
    """Run the compiler on a file, as the supervisor does, and return its result."""
    owned: list[int] = []

    def run(path: Path | str, known: Known | None = None) -> Compiled:
        results: list[Compiled] = []

        def signalled(number: int) -> None:
            if number == signal.SIGCHLD:
                compilation.poll()

        def done(compiled: Compiled) -> None:
            results.append(compiled)
            loop.stop(0)

        with Loop(signalled) as loop:
            compiler = child.python("gatekeeper.supervisor.compile")
            compilation = Compilation(loop, compiler, str(path), done, known=known)
            loop.later(60, lambda: loop.stop(1))
            assert loop.run() == 0
        owned.extend(result.snapshot_fd for result in results if result.snapshot_fd is not None)
        return results[0]

    yield run
    for fd in owned:
        os.close(fd)


def content(compiled: Compiled) -> bytes:
    """Return the snapshot that came out."""
    assert compiled.snapshot_fd is not None
    return os.pread(compiled.snapshot_fd, 1 << 30, 0)


def test_what_has_not_changed_is_handed_on(rules: Path, compile_file: Compile) -> None:
    """The same snapshot, the same warnings, the same files to watch: only faster."""
    first = compile_file(rules)
    assert not first.unchanged
    assert "this list is empty" in first.text
    again = compile_file(rules, Known(first.snapshot_fd))
    assert again.unchanged
    assert content(again) == content(first)
    assert (again.text, again.problems, again.first, again.failure) == (first.text, first.problems, "", None)
    assert (set(again.sought), again.patterns, again.state) == (set(first.sought), first.patterns, first.state)
    third = compile_file(rules, Known(again.snapshot_fd))
    assert third.unchanged


def rewrite(name: str, text: str) -> Callable[[Path], object]:
    """Return a change: a file of the folder that gets another text, or its first."""
    return lambda folder: (folder / name).write_text(text)


def put_a_pipe_there(path: Path) -> None:
    """Let a named pipe take the place of a file."""
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a rule": rewrite("rules.yaml", RULES.replace("action: deny, from: nobody", "action: drop, from: nobody")),
    "a comment": rewrite("rules.yaml", f"{RULES}# why\n"),
    "a list": rewrite("office.txt", "192.0.2.0/25\n"),
    "an included file": rewrite("rules.d/10-office.yaml", "- {name: office, action: allow, from: office}\n"),
    "a file that the pattern finds, too": rewrite("rules.d/20.yaml", "- {name: more, action: deny, from: 198.51.100.1}\n"),
    "a file that it finds no more": lambda folder: (folder / "rules.d" / "10-office.yaml").rename(folder / "rules.d" / "off"),
    "two files that change places": lambda folder: (
        (folder / "office.txt").rename(folder / "x"), (folder / "nobody.txt").rename(folder / "office.txt"),
        (folder / "x").rename(folder / "nobody.txt"),
    ),
    "a list that is gone": lambda folder: (folder / "office.txt").unlink(),
    "rights": lambda folder: (folder / "office.txt").chmod(0o666),
    "a pipe in a list's place": lambda folder: put_a_pipe_there(folder / "office.txt"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_is_compiled(rules: Path, compile_file: Compile, what: str) -> None:
    """With a known snapshot everything ends as it ends without one."""
    first = compile_file(rules)
    CHANGES[what](rules.parent)
    with_known, without = compile_file(rules, Known(first.snapshot_fd)), compile_file(rules)
    assert not with_known.unchanged
    assert (with_known.text, with_known.first) == (without.text, without.first)
    assert (with_known.snapshot_fd is None) == (without.snapshot_fd is None)
    if without.snapshot_fd is not None:
        assert content(with_known) == content(without)


def test_another_folder_and_another_name_are_another_policy(
    rules: Path, compile_file: Compile, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths in a rule file start from its folder: equal bytes elsewhere do not mean the same."""
    monkeypatch.chdir(rules.parent)
    first = compile_file("rules.yaml")
    assert compile_file("rules.yaml", Known(first.snapshot_fd)).unchanged
    assert not compile_file(rules, Known(first.snapshot_fd)).unchanged
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("rules.yaml", "office.txt", "nobody.txt", "rules.d/10-office.yaml"):
        (elsewhere / name).parent.mkdir(exist_ok=True)
        (elsewhere / name).write_bytes((rules.parent / name).read_bytes())
    monkeypatch.chdir(elsewhere)
    assert not compile_file("rules.yaml", Known(first.snapshot_fd)).unchanged


@pytest.mark.parametrize("damage", ["no snapshot", "empty", "another compiler", "no origin", "origin of another kind"])
def test_what_cannot_be_trusted_is_compiled(rules: Path, compile_file: Compile, damage: str) -> None:
    """A known snapshot is believed only when this very compiler has made it."""
    whole = content(compile_file(rules))
    meta = Snapshot(whole).meta
    at = whole.rindex(b'{"version":1')
    if damage == "another compiler":
        meta["origin"]["compiler"] = "0" * 64
    elif damage == "no origin":
        meta["origin"] = None
    else:
        meta["origin"] = {"compiler": meta["origin"]["compiler"], "path": 7, "patterns": 8}
    text = json.dumps(meta, separators=(",", ":")).encode()
    bytes_of = {"no snapshot": b"not a snapshot" * 100, "empty": b""}
    fd = os.memfd_create("known")
    os.write(fd, bytes_of.get(damage, whole[:at] + text.ljust(len(whole) - at)))
    again = compile_file(rules, Known(fd))
    os.close(fd)
    assert not again.unchanged
    assert content(again) == whole


def test_a_start_takes_the_last_good_policy_when_its_files_still_say_it(rules: Path, compile_file: Compile) -> None:
    """In whichever way the state directory is named; one that is damaged is as good as none."""
    state = rules.parent / "state"
    rules.write_text(f"{RULES}state: state\n")
    first = compile_file(rules)
    assert first.snapshot_fd is not None
    state.mkdir(mode=0o700)
    lastgood.save(str(state), first.snapshot_fd, Snapshot(content(first)).meta["digest"])
    for states in (str(state), ""), ("", str(state)), ("", ""):
        again = compile_file(rules, Known(states=states))
        assert again.unchanged, states
        assert content(again) == content(first)
    assert not compile_file(rules, Known(states=(str(rules.parent), ""))).unchanged  # as the command line says
    kept = state / lastgood.POLICY_FILE
    kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    again = compile_file(rules, Known(states=("", "")))
    assert not again.unchanged
    assert content(again) == content(first)


def test_the_meta_section_is_found_without_reading_the_tables(rules: Path, compile_file: Compile) -> None:
    """What the cheap reader says is what the reader that checks everything says."""
    compiled = compile_file(rules)
    assert compiled.snapshot_fd is not None
    with mmap.mmap(compiled.snapshot_fd, 0, prot=mmap.PROT_READ) as mapped:
        assert reuse.read_meta(compiled.snapshot_fd) == Snapshot(bytes(mapped)).meta
