"""Reading a rule file for a command: by path, or standard input as ``-``; with progress, within limits."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gatekeeper.cli.terminal import CannotDo, Terminal
from gatekeeper.progress import Tell, Watch, silent

if TYPE_CHECKING:
    from gatekeeper.config import Loaded

STDIN = "<stdin>"  # the name of standard input in messages; paths in it resolve from the working directory
LARGEST_BYTES = 8 << 20  # read no further: config refuses smaller files already, and a pipe may never end
MEMORY_MOST_BYTES = 4 << 30  # as for the compiler of the service: what it cannot load is not to pass here


def load(terminal: Terminal, file: str, loader: Callable[[str, bytes | None, Tell], Loaded]) -> Loaded:
    """Return what ``loader`` (`config.load` or `config.check`) makes of a rule file.

    Raises:
        CannotDo: the file cannot be read, or takes more memory than it may.
    """
    if file == "-":
        stream = getattr(terminal.stdin, "buffer", None)
        text = stream.read(LARGEST_BYTES) if stream is not None else terminal.stdin.read(LARGEST_BYTES).encode()
        file = STDIN
    else:
        text = _read(file)
    with _limited_memory() as most, progress(terminal) as tell:
        try:
            return loader(file, text, tell)
        except MemoryError:
            pass  # not raised from here: what it holds is to be released first
    raise CannotDo(f"{file} takes more memory than it may have{f' ({most >> 20} MiB)' if most else ''}")


@contextlib.contextmanager
def progress(terminal: Terminal) -> Iterator[Tell]:
    """Show a person how far what is told is, once it takes longer than a second; on a terminal, and gone afterwards."""
    stream = terminal.stderr
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        yield silent
        return

    def draw(text: str) -> None:
        # Not with rich: its import takes a tenth of the time in which a million networks are loaded.
        stream.write(f"\r\x1b[K{text[: _width(terminal) - 1]}")
        stream.flush()

    with Watch(draw) as watch:
        yield watch


def _width(terminal: Terminal) -> int:
    try:
        return os.get_terminal_size(terminal.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _read(path: str) -> bytes:
    """Return the start of a file; never waits for anybody, unless it is a pipe that a shell has made for us.

    Raises:
        CannotDo: it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with open(fd, "rb") as file:
            mode = os.fstat(fd).st_mode
            if stat.S_ISFIFO(mode) and not os.path.exists(os.path.realpath(path)):  # `check <(generate)`: no name of its own
                os.set_blocking(fd, True)
            elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise CannotDo(f"cannot read {path}: not a regular file; standard input is -")
            return file.read(LARGEST_BYTES)
    except (OSError, ValueError) as err:
        raise CannotDo(f"cannot read {path}: {getattr(err, 'strerror', None) or err}") from err


@contextlib.contextmanager
def _limited_memory() -> Iterator[int]:
    """Allow this process as much memory as the service's compiler has, or less; give how many bytes, 0 when not known."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY_MOST_BYTES if soft == resource.RLIM_INFINITY else min(soft, MEMORY_MOST_BYTES)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    except (OSError, ValueError):  # a sandbox that forbids it
        yield 0
        return
    try:
        yield most
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
