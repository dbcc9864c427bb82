"""The compiler: a process of its own that reads the rule file, checks it, and writes the snapshot.

`python -m gatekeeper.supervisor.compile FILE --snapshot FD --report FD`. The only part of the running service that
imports the YAML reader. With `--known FD` (a snapshot) or `--last-good` (the one in the state directory) it hands that
one on when it is still what the files say, see `reuse`. With `--progress FD` it writes a line of text to a pipe now and
then, if it takes long. The report is one JSON document:

    accepted    bool: the snapshot was written
    unchanged   bool: it is the one that was known
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
import errno
import json
import os
import re
import resource
import stat
import sys
from collections.abc import Iterator
from typing import Any

from gatekeeper.config import reading
from gatekeeper.kernel import privileges
from gatekeeper.progress import Tell, Watch, silent
from gatekeeper.supervisor import lastgood, places, reuse

MEMORY_LIMIT_BYTES = 4 << 30


def main() -> None:
    """Compile, report, exit."""
    parser = argparse.ArgumentParser(prog="gatekeeper-compile")
    parser.add_argument("file")
    parser.add_argument("--snapshot", type=int, required=True)
    parser.add_argument("--report", type=int, required=True)
    parser.add_argument("--supervisor", type=int, required=True)
    parser.add_argument("--known", type=int, help="a snapshot that may still be what the files say")
    parser.add_argument(
        "--last-good", nargs=2, metavar=("GIVEN", "DEFAULT"), help="state directories: as the command line says, or the service manager"
    )
    parser.add_argument("--progress", type=int)
    parser.add_argument("--memory", type=int, default=MEMORY_LIMIT_BYTES)
    arguments = parser.parse_args()
    privileges.confine(arguments.supervisor)
    with contextlib.suppress(OSError, ValueError):  # a sandbox that forbids it, or a lower limit already
        resource.setrlimit(resource.RLIMIT_AS, (arguments.memory, arguments.memory))
    try:
        with _progress(arguments.progress) as tell:
            report = _reuse(arguments, tell) or compile_file(arguments.file, arguments.snapshot, tell)
    except MemoryError:
        report = _failed(f"compiling {arguments.file} takes more than {arguments.memory >> 20} MiB of memory")
    except OSError as err:
        report = _failed(f"compiling {arguments.file}: {err}")
    with open(arguments.report, "wb") as pipe:
        pipe.write(json.dumps(report).encode())


@contextlib.contextmanager
def _progress(pipe: int | None) -> Iterator[Tell]:
    """Write what is told to a pipe, line by line; whoever does not read misses something."""
    if pipe is None:
        yield silent
        return
    os.set_blocking(pipe, False)

    def show(text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(pipe, f"{text}\n".encode(errors="replace"))

    with Watch(show) as watch:
        yield watch


def _reuse(arguments: argparse.Namespace, tell: Tell) -> dict[str, Any] | None:
    """Hand on the snapshot that is known and return the report, ``None`` when the file has to be compiled.

    Raises:
        OSError: the snapshot could not be written.
    """
    path, known = arguments.file, arguments.known
    if known is None and arguments.last_good is not None:
        known = _last_good(path, *arguments.last_good)
    meta = reuse.read_meta(known) if known is not None else None
    if meta is None or not reuse.still_says(path, meta, tell):
        return None
    size = os.fstat(known).st_size
    while (at := os.lseek(arguments.snapshot, 0, os.SEEK_CUR)) < size:
        if not os.sendfile(arguments.snapshot, known, at, size - at):
            raise OSError(errno.EIO, "the known snapshot has become shorter")
    return {
        "accepted": True, "unchanged": True, "unreadable": False, "problems": meta["origin"]["problems"],
        "text": meta["origin"]["text"], "failure": None, "sought": meta["files"],
        "patterns": meta["origin"]["patterns"], "state": meta["settings"]["state"],
    }  # fmt: skip


def _last_good(path: str, given: str, default: str) -> int | None:
    """Return the last good policy of the service, ``None`` when there is none that can be used."""
    try:
        with open(reading.open_file(path), encoding="utf-8", errors="replace") as file:
            state = _state(path, file.read(reading.SIZE_MOST_BYTES))
        directory = places.state_directory(given, state, {"STATE_DIRECTORY": default})
        found = lastgood.read(directory) if directory is not None else None
    except (reading.Refused, lastgood.LastGoodError, OSError):
        return None  # whoever needs it in earnest says what is wrong with it
    return found.snapshot_fd if found is not None else None


def compile_file(path: str, snapshot_fd: int, tell: Tell = silent) -> dict[str, Any]:
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
    loaded = config.check(path, None, tell)
    text = "\n".join(config.render(problem, loaded.texts) for problem in loaded.problems)
    problems = [config.as_json(problem) for problem in loaded.problems]
    if loaded.config is not None:
        tell("compiling", 0, 0)
        write(loaded.config, snapshot_fd, reuse.origin(path, loaded.patterns, problems, text))
    return {
        "accepted": loaded.config is not None, "unchanged": False, "unreadable": False, "problems": problems, "text": text,
        "failure": None, "sought": loaded.sought, "patterns": loaded.patterns, "state": _state(path, loaded.texts.get(path, "")),
    }  # fmt: skip


def _state(path: str, text: str) -> str | None:
    """Return the directory in which the last good policy may be. The file may be anything but YAML."""
    found = re.search(r"""^state:[ \t]*(["']?)([^"'#\r\n]+?)\1[ \t]*(?:#.*)?$""", text, re.MULTILINE)
    return os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(path)), found[2])) if found else None


def _failed(why: str) -> dict[str, Any]:
    return {
        "accepted": False, "unchanged": False, "unreadable": False, "problems": [], "text": "", "failure": why,
        "sought": [], "patterns": [], "state": None,
    }  # fmt: skip


if __name__ == "__main__":
    # Not even an interpreter that shuts down slowly should hold up a reload.
    main()
    sys.stderr.flush()
    os._exit(0)
