"""Calling the program as a test does: arguments and standard input in, exit code and text out."""

from __future__ import annotations

import io
from dataclasses import dataclass

from gatekeeper.cli.main import main


@dataclass(frozen=True, slots=True)
class Done:
    """What one invocation left behind."""

    code: int
    out: str
    err: str


class Screen(io.StringIO):
    """A stream that says it is somebody's terminal."""

    def isatty(self) -> bool:
        return True


def gatekeeper(*argv: str, stdin: str = "", terminal: bool = False) -> Done:
    """Run one command line in this process."""
    out, err = Screen() if terminal else io.StringIO(), io.StringIO()
    code = main(argv, io.StringIO(stdin), out, err)
    return Done(code, out.getvalue(), err.getvalue())
