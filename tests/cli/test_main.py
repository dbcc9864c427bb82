"""The program as a whole: quick, helpful, and honest about its exit code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gatekeeper import __version__
from gatekeeper.cli.main import COMMANDS
from tests.cli.program import gatekeeper

SLOW_TO_IMPORT = ("yaml", "pydantic", "ctypes", "asyncio", "starlette", "uvicorn", "prometheus_client", "rich", "subprocess")
MOST_MODULES = 170  # Python itself and click are about 140


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a process of its own."""
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=50, env=os.environ | environment
    )


def test_version_is_quick() -> None:
    """`--version` imports nothing but click: no YAML reader, no web server, not one of our parts."""
    code = (
        "import sys; from gatekeeper.cli.main import main;"
        "main(['--version'], sys.stdin, sys.stdout, sys.stderr); print(*sorted(sys.modules))"
    )
    version, modules = run("-c", code).stdout.splitlines()
    assert version == f"gatekeeper {__version__}"
    assert not set(SLOW_TO_IMPORT) & set(modules.split())
    assert len(modules.split()) < MOST_MODULES, modules


@pytest.mark.parametrize("word", ["--help", "completion"])
def test_help_and_completion_import_no_heavy_module(word: str) -> None:
    """Neither the list of commands nor what the shell asks on every Tab waits for a YAML reader."""
    code = (
        "import sys; from gatekeeper.cli.main import main;"
        f"main({[word, 'bash'] if word == 'completion' else [word]}, sys.stdin, sys.stdout, sys.stderr);"
        "print(*sorted(sys.modules))"
    )
    modules = run("-c", code).stdout.splitlines()[-1]
    assert not set(SLOW_TO_IMPORT) & set(modules.split()) - {"subprocess"}


def test_both_ways_to_start_it_agree() -> None:
    """`python -m gatekeeper` and the installed command print the same version."""
    assert run("-m", "gatekeeper", "--version").stdout == f"gatekeeper {__version__}\n"
    assert run("-c", "from gatekeeper.cli.main import entry; entry()").returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_opens_with_examples_and_ends_with_exit_codes(command: str) -> None:
    """Every command's help starts with examples that call it, and says what its exit codes mean."""
    done = gatekeeper(command, "--help")
    lines = done.out.splitlines()
    assert (done.code, lines[0], done.err) == (0, "Examples:", "")
    assert f"gatekeeper {command}" in lines[1]
    assert "Exit codes: 0 done" in done.out
    assert ("--json" in done.out) == ("Keys of --json:" in done.out)


def test_help_of_the_program_lists_every_command() -> None:
    """The program's own help has examples, all commands and the exit codes."""
    done = gatekeeper("--help")
    assert done.code == 0
    assert done.out.startswith("Examples:")
    assert all(f"\n  {command} " in done.out for command in COMMANDS)


@pytest.mark.parametrize("argv", [(), ("nonsense",), ("check",), ("check", "--nonsense", "x"), ("completion", "csh")])
def test_bad_usage_is_2_and_goes_to_stderr(argv: tuple[str, ...]) -> None:
    """A command line that makes no sense exits with 2, prints no result, and says where the help is."""
    done = gatekeeper(*argv)
    assert (done.code, done.out) == (2, "")
    assert "Usage: gatekeeper" in done.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    """The script of each shell names the program and asks it for completions."""
    done = gatekeeper("completion", shell)
    assert done.code == 0
    assert f"_GATEKEEPER_COMPLETE={shell}_complete" in done.out


def test_completion_answers() -> None:
    """What the bash script asks for on Tab is answered: `gatekeeper ex<Tab>` is explain."""
    done = run(
        "-m", "gatekeeper", _GATEKEEPER_COMPLETE="bash_complete", COMP_WORDS="gatekeeper ex", COMP_CWORD="1"
    )
    assert done.stdout == "plain,explain\n"


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams(closed: str) -> None:
    """With standard streams closed by the caller commands work as with /dev/null, and no other file gets their numbers."""
    code = (
        "import gatekeeper.cli.main as program, os;"
        "program.main = lambda argv, *streams: print(*streams) or any(os.fstat(number) is None for number in range(3));"
        "raise SystemExit(program.entry())"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m gatekeeper check - {closed}', sys.executable],
        input="version: 2\n", capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_the_terminal_does_not_have(encoding: str) -> None:
    """A message about letters that standard output cannot show is written all the same."""
    done = subprocess.run(
        [sys.executable, "-m", "gatekeeper", "check", "-"],
        input="größe☃: 1\n".encode(), capture_output=True, timeout=50, env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (done.returncode, b"Traceback" in done.stderr) == (1, False)
    assert 'unknown key "größe☃"'.encode(encoding, "backslashreplace") in done.stdout


def test_nobody_reads() -> None:
    """When the reader of its output goes away it ends quietly, as shells expect: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "gatekeeper", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=50
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
