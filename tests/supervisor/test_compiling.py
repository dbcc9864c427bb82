"""The compiler seen from the supervisor: whatever becomes of it, there is one result."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gatekeeper.snapshot.reader import Snapshot
from gatekeeper.supervisor import child as children
from gatekeeper.supervisor.compiling import Compilation, Compiled
from gatekeeper.supervisor.loop import Loop

Compile = Callable[..., Compiled]
ARGUMENTS = """
import json, os, signal, sys, time
snapshot, report = (int(sys.argv[sys.argv.index(name) + 1]) for name in ("--snapshot", "--report"))
"""
GOOD = {
    "accepted": True, "unreadable": False, "problems": [], "text": "", "failure": None, "sought": [], "patterns": [], "state": None,
}  # fmt: skip


@pytest.fixture
def compile_with() -> Iterator[Compile]:
    """Run a compilation with a script in the compiler's place and return its result."""
    owned: list[int] = []
    before = len(os.listdir("/proc/self/fd"))

    def run(script: str, patience_s: float = 20.0) -> Compiled:
        results: list[Compiled] = []
        compilation: Compilation

        def signalled(number: int) -> None:
            if number == signal.SIGCHLD:
                compilation.poll()

        def done(compiled: Compiled) -> None:
            results.append(compiled)
            loop.stop(0)

        with Loop(signalled) as loop:
            compilation = Compilation(loop, [sys.executable, "-c", ARGUMENTS + script], "rules.yaml", done, patience_s)
            loop.later(30, lambda: loop.stop(1))
            assert loop.run() == 0
        (result,) = results
        if result.snapshot_fd is not None:
            owned.append(result.snapshot_fd)
        return result

    yield run
    for fd in owned:
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_snapshot_comes_out(compile_with: Compile) -> None:
    """What the compiler wrote is handed on, also when it is reported in many pieces."""
    result = compile_with(f"""
os.write(snapshot, b"bytes")
with open(report, "wb") as pipe:
    pipe.write(json.dumps({GOOD!r} | dict(text="x" * 300000)).encode())
""")
    assert result.snapshot_fd is not None
    assert os.pread(result.snapshot_fd, 10, 0) == b"bytes"
    assert (len(result.text), result.failure) == (300000, None)


def test_problems_come_out(compile_with: Compile) -> None:
    """A refused file has problems and no snapshot."""
    where = {"file": "rules.yaml", "line": 1, "column": 2, "message": "what"}
    problems = [{"severity": "warning"}, where | {"severity": "error"}]
    report = json.dumps(GOOD | {"accepted": False, "problems": problems, "text": "rules.yaml:1:2: what [x]"})
    expected = Compiled(None, "rules.yaml:1:2: what [x]", 2, "rules.yaml:1:2: what")
    assert compile_with(f"os.write(report, {report!r}.encode())") == expected


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("", "exited with 0 without a report"),
        ("sys.exit(5)", "exited with 5 without a report"),
        ("os.write(report, b'{}')", "exited with 0 without a report"),
        ("os.write(report, b'[' * 50000)", "without a report"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV without a report"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed (out of memory?)"),
        ("while True: os.write(report, b' ' * 60000)", "was killed"),
    ],
)
def test_a_compiler_that_fails(compile_with: Compile, script: str, why: str) -> None:
    """However the compiler ends without a report, that is what is said, and the file is named."""
    result = compile_with(script)
    assert result.snapshot_fd is None
    assert result.failure is not None
    assert why in result.failure
    assert "rules.yaml" in result.failure


def test_a_compiler_that_hangs(compile_with: Compile) -> None:
    """A compiler that takes too long is killed and said to have taken too long."""
    began = time.monotonic()
    assert compile_with("time.sleep(60)", 0.3).failure == "compiling rules.yaml took longer than 0.3 s"
    assert time.monotonic() - began < 20




class TestTheRealOne:
    """`gatekeeper.supervisor.compile` itself."""

    @staticmethod
    def run(*arguments: str, path: Path) -> tuple[dict[str, Any], bytes]:
        """Return the report and the snapshot."""
        snapshot = os.memfd_create("snapshot")
        read, write = os.pipe()
        command = [*children.python("gatekeeper.supervisor.compile"), *arguments, str(path)]
        fds = ["--snapshot", str(snapshot), "--report", str(write), "--supervisor", str(os.getpid())]
        ran = children.start([*command, *fds], [snapshot, write])
        os.close(write)
        with open(read, "rb") as pipe:
            report = json.loads(pipe.read())
        assert ran.wait(30) == 0
        data = os.pread(snapshot, 1 << 20, 0)
        os.close(snapshot)
        return report, data

    def test_a_sound_file(self, folder: Path) -> None:
        """A sound file gives a snapshot that can be used, and warnings do not keep it from being applied."""
        (folder / "rules.yaml").write_text(
            'version: 1\nlisteners: [{name: a, listen: "127.0.0.1:1999", backend: "127.0.0.1:1998"}]\ndefault: deny\n'
            "sets: {nobody: {file: empty.txt}}\nrules: [{name: x, action: allow, from: nobody}]\n"
        )
        (folder / "empty.txt").write_text("# nobody yet\n")
        report, data = self.run(path=folder / "rules.yaml")
        assert report["accepted"]
        assert {item["severity"] for item in report["problems"]} == {"warning"}
        assert "empty" in report["text"]
        snapshot = Snapshot(data)
        snapshot.validate()
        assert snapshot.meta["rules"][0]["name"] == "x"

    def test_a_file_whose_tests_fail(self, folder: Path) -> None:
        """A policy that does not pass the tests in its own file is not accepted."""
        (folder / "rules.yaml").write_text(
            'version: 1\nlisteners: [{name: a, listen: "127.0.0.1:1999", backend: "127.0.0.1:1998"}]\ndefault: deny\n'
            "tests: [{from: 10.0.0.1, to: a, expect: allow}]\n"
        )
        report, data = self.run(path=folder / "rules.yaml")
        assert not report["accepted"]
        assert [item["code"] for item in report["problems"]] == ["test"]
        assert data == b""

    def test_a_file_that_cannot_be_read(self, folder: Path) -> None:
        """A missing file is not a problem in the file."""
        report, _data = self.run(path=folder / "missing.yaml")
        assert report["unreadable"]
        assert report["failure"] == f"cannot read {folder}/missing.yaml: No such file or directory"

    @pytest.mark.timeout(30)
    def test_a_pipe(self, folder: Path) -> None:
        """A named pipe is refused at once: nobody may ever write to it, and it can be read only once."""
        os.mkfifo(folder / "rules.yaml")
        report, _data = self.run(path=folder / "rules.yaml")
        assert report["unreadable"]
        assert report["failure"] == f"cannot read {folder}/rules.yaml: not a regular file, and a reload reads it again"

    def test_memory_is_limited(self, folder: Path) -> None:
        """What takes too much memory is given up with that reason, and the machine is not dragged down."""
        with (folder / "list.txt").open("w") as entries:
            entries.writelines(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}\n" for number in range(0, 4_000_000, 2))
        (folder / "rules.yaml").write_text(
            'version: 1\nlisteners: [{name: a, listen: "127.0.0.1:1999", backend: "127.0.0.1:1998"}]\ndefault: deny\n'
            "sets: {many: {file: list.txt}}\nrules: [{name: x, action: allow, from: many}]\n"
        )
        report, _data = self.run("--memory", str(100 << 20), path=folder / "rules.yaml")
        assert report["failure"] == f"compiling {folder}/rules.yaml takes more than 100 MiB of memory"
