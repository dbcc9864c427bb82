"""Sessions that a page shows, run as they stand: each command, and whether it prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "---- next command ----"  # printed between the commands of a session
PROGRAMS = (("gatekeeper", "-m gatekeeper"), ("python3", ""))

Step = tuple[str, str]  # command, what it prints


def blocks(language: str, text: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def steps(session: str) -> list[Step]:
    """Return the steps of a console block; the lines of a here-document belong to the command."""
    found: list[Step] = []
    for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        length = lines.index("EOF\n") + 1 if "<<'EOF'" in lines[0] else 1
        found.append(("".join(lines[:length]), "".join(lines[length:])))
    return found


def matches(shown: str, printed: str) -> bool:
    """Say whether output is as shown; "..." stands for anything, and any blanks for any others: columns are as wide as need be."""
    shown, printed = (re.sub(r"[ \t]+", " ", text).replace(" \n", "\n") for text in (shown, printed))
    pattern = ".*?".join(map(re.escape, shown.split("...")))
    return re.fullmatch(pattern, printed, re.DOTALL) is not None


def run(wanted: Sequence[Step], folder: Path, before: str, within_s: int, unshare: Sequence[str] = ()) -> None:
    """Run the steps in one shell in namespaces of its own, after the script ``before``, and compare what they print.

    The shell finds our interpreter and the program in this checkout; ``folder`` is empty.
    """
    programs, work = folder / "bin", folder / "work"
    programs.mkdir()
    work.mkdir()
    for name, module in PROGRAMS:
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        (programs / name).chmod(0o755)
    script = before + "".join(f"{command}echo; echo '{MARK}'\n" for command, _ in wanted)
    script += "kill $(jobs -p); wait\n"
    # In a process namespace of its own, so that nothing the session starts outlives it.
    namespaces = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", *unshare]
    if os.geteuid() != 0:
        namespaces.append("--map-root-user")
    with (folder / "printed").open("w+") as file:
        subprocess.run(
            ["timeout", "--signal=KILL", str(within_s), *namespaces, "bash", "-c", script], cwd=work, stdout=file, stderr=file,
            env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        file.seek(0)
        everything = file.read()
    printed = everything.split(f"\n{MARK}\n")
    for (command, shown), output in zip(wanted, printed, strict=False):
        assert matches(shown, output), f"$ {command}printed:\n{output}\nbut the page shows:\n{shown}"
    assert len(printed) == len(wanted) + 1, everything
