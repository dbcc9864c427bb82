"""The compiler: a process of its own that reads the rule file, checks it, and writes the snapshot.

`python -m gatekeeper.supervisor.compile FILE --snapshot FD --report FD`. The only part of the running service that
imports the YAML reader. The report is one JSON document:

    accepted    bool: the snapshot was written
    unreadable  bool: the rule file itself could not be read
    problems    [as `gatekeeper.config.as_json`]
    text        the same problems for people, with the lines they are in
    failure     null, or why there is neither a snapshot nor a problem in the file
    sought      [path] of all files that were wanted, there or not
    patterns    [[folder, pattern]] of the files that includes look for
    state       the state directory that the rule file names, as far as that can be told of a broken file, or null

Exit code 0 when the report was written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import stat
import sys
from typing import Any

from gatekeeper.kernel import privileges

MEMORY_LIMIT_BYTES = 4 << 30


def main() -> None:
    """Compile, report, exit."""
    parser = argparse.ArgumentParser(prog="gatekeeper-compile")
    parser.add_argument("file")
    parser.add_argument("--snapshot", type=int, required=True)
    parser.add_argument("--report", type=int, required=True)
    parser.add_argument("--supervisor", type=int, required=True)
    parser.add_argument("--memory", type=int, default=MEMORY_LIMIT_BYTES)
    arguments = parser.parse_args()
    privileges.confine(arguments.supervisor)
    with contextlib.suppress(OSError, ValueError):  # a sandbox that forbids it, or a lower limit already
        resource.setrlimit(resource.RLIMIT_AS, (arguments.memory, arguments.memory))
    try:
        report = compile_file(arguments.file, arguments.snapshot)
    except MemoryError:
        report = _failed(f"compiling {arguments.file} takes more than {arguments.memory >> 20} MiB of memory")
    except OSError as err:
        report = _failed(f"compiling {arguments.file}: {err}")
    with open(arguments.report, "wb") as pipe:
        pipe.write(json.dumps(report).encode())


def compile_file(path: str, snapshot_fd: int) -> dict[str, Any]:
    """Write the snapshot of a rule file, if it may be applied, and return the report.

    Raises:
        OSError: the snapshot could not be written, or a file could not be read.
    """
    from gatekeeper import config  # noqa: PLC0415 - after the limits are in force
    from gatekeeper.snapshot.encode import write  # noqa: PLC0415

    try:
        # Not blocking: a named pipe that nobody writes to would hold up every reload, and can be read only once.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return _failed(f"cannot read {path}: not a regular file, and a reload reads it again") | {"unreadable": True}
            file.read(1)
    except OSError as err:
        return _failed(f"cannot read {path}: {err.strerror}") | {"unreadable": True}
    loaded = config.check(path)
    text = "\n".join(config.render(problem, loaded.texts) for problem in loaded.problems)
    problems = [config.as_json(problem) for problem in loaded.problems]
    if loaded.config is not None:
        write(loaded.config, snapshot_fd)
    return {
        "accepted": loaded.config is not None, "unreadable": False, "problems": problems, "text": text, "failure": None,
        "sought": loaded.sought, "patterns": loaded.patterns, "state": _state(path, loaded.texts.get(path, "")),
    }  # fmt: skip


def _state(path: str, text: str) -> str | None:
    """Return the directory in which the last good policy may be. The file may be anything but YAML."""
    found = re.search(r"""^state:[ \t]*(["']?)([^"'#\r\n]+?)\1[ \t]*(?:#.*)?$""", text, re.MULTILINE)
    return os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(path)), found[2])) if found else None


def _failed(why: str) -> dict[str, Any]:
    return {
        "accepted": False, "unreadable": False, "problems": [], "text": "", "failure": why,
        "sought": [], "patterns": [], "state": None,
    }  # fmt: skip


if __name__ == "__main__":
    # Not even an interpreter that shuts down slowly should hold up a reload.
    main()
    sys.stderr.flush()
    os._exit(0)
