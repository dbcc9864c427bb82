"""Reading a rule file for a command: what is refused at once, and what people see while it takes long."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gatekeeper.cli.files import load
from gatekeeper.cli.terminal import CannotDo, Terminal
from gatekeeper.config import Loaded
from gatekeeper.progress import Tell, Watch, describe, silent
from tests.cli.program import Screen, gatekeeper
from tests.cli.test_check import GOOD
from tests.support.wait import until

ROOT = Path(__file__).parents[2]
NOTHING = Loaded(None)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    """A pipe that nobody writes to and a device that never ends hold up nobody: exit code 3, and the reason."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (str(pipe), "/dev/zero", "/dev/full"):
        done = gatekeeper("check", path)
        assert (done.code, done.out) == (3, "")
        assert f"cannot read {path}: not a regular file" in done.err


def test_a_pipe_that_a_shell_made_is_read_to_its_end(tmp_path: Path) -> None:
    """`check <(generate)` waits for the generator: that pipe has no name of its own, and was made to be read."""
    (tmp_path / "rules.yaml").write_text(GOOD)
    generate = f"sleep 0.3; cat {tmp_path}/rules.yaml"
    command = f"{sys.executable} -m gatekeeper check <({generate})"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok: 1 listener" in done.stdout


def test_a_policy_that_takes_too_much_memory_is_3(tmp_path: Path) -> None:
    """Out of memory is not an answer to the question whether the file is right: exit code 3, and a line that says so."""
    (tmp_path / "many.txt").write_bytes(b"".join(b"10.%d.%d.0/24\n" % (n >> 8, n & 255) for n in range(1 << 16)) * 60)
    path = tmp_path / "rules.yaml"
    path.write_text(GOOD.replace("default:", "sets: {many: {file: many.txt}}\ndefault:"))
    limited = (
        "import resource, sys; import gatekeeper.config as config; config.check; "
        "pages = int(open('/proc/self/statm').read().split()[0]); "
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (20 << 20),) * 2); "
        "from gatekeeper.cli.main import main; sys.exit(main(sys.argv[1:], sys.stdin, sys.stdout, sys.stderr))"
    )
    command = [sys.executable, "-c", limited, "check", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert "more memory than it may have" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_limit_of_memory_is_gone_afterwards() -> None:
    """Loading is limited as in the service; the process that asked for it is as free as before."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    during = []

    def loader(_file: str, _text: bytes | None, _tell: Tell) -> Loaded:
        during.append(resource.getrlimit(resource.RLIMIT_AS))
        return NOTHING

    load(Terminal(io.StringIO(), io.StringIO(), io.StringIO()), "-", loader)
    assert during != [before]
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with pytest.raises(CannotDo):
        load(Terminal(io.StringIO(), io.StringIO(), io.StringIO()), "-", out_of_memory)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def out_of_memory(_file: str, _text: bytes | None, _tell: Tell) -> Loaded:
    """Load as if there were no memory left."""
    raise MemoryError


def test_a_person_sees_how_far_a_long_load_is() -> None:
    """On a terminal a line says what is read and how much of it there is; it is wiped before anything else is printed."""
    screen = Screen()

    def loader(_file: str, _text: bytes | None, tell: Tell) -> Loaded:
        tell("reading lists/many.txt", 4_200_000, 15_600_000)
        until(lambda: "of 15.6 MB" in screen.getvalue(), "the first line")
        tell("proving tests", 0, 0)
        until(lambda: "proving tests" in screen.getvalue(), "the next one")
        return NOTHING

    load(Terminal(io.StringIO(), io.StringIO(), screen), "-", loader)
    shown = screen.getvalue()
    assert shown == "\r\x1b[Kreading lists/many.txt: 4.2 of 15.6 MB\r\x1b[Kproving tests\r\x1b[K"


def test_a_pipe_hears_nothing_of_progress() -> None:
    """Where nobody looks on, loading is told to nobody."""
    told = []

    def loader(_file: str, _text: bytes | None, tell: Tell) -> Loaded:
        told.append(tell)
        return NOTHING

    err = io.StringIO()
    load(Terminal(io.StringIO(), io.StringIO(), err), "-", loader)
    assert told == [silent]
    assert err.getvalue() == ""


def test_a_short_load_shows_nothing(tmp_path: Path) -> None:
    """Within the first second nothing flickers."""
    shown: list[str] = []
    with Watch(shown.append, first_s=1000.0) as tell:
        tell("reading", 1, 2)
    assert shown == []
    path = tmp_path / "rules.yaml"
    path.write_text(GOOD)
    assert gatekeeper("check", str(path), terminal=True).err == ""


def test_names_of_files_cannot_write_to_the_terminal() -> None:
    """Whatever a path is made of, a terminal does not obey it."""
    assert describe("reading a\x1b[2Jb\n", 0, 0) == "reading a?[2Jb?"
