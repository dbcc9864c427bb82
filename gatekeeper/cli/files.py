"""Reading a rule file for a command: by path, or standard input as ``-``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gatekeeper.cli.terminal import CannotDo, Terminal

if TYPE_CHECKING:
    from gatekeeper.config import Loaded

STDIN = "<stdin>"  # the name of standard input in messages; paths in it resolve from the working directory
LARGEST_BYTES = 8 << 20  # read no further: config refuses smaller files already, and /dev/zero never ends


def load(terminal: Terminal, file: str, loader: Callable[[str, bytes | None], Loaded]) -> Loaded:
    """Return what ``loader`` (`config.load` or `config.check`) makes of a rule file.

    Raises:
        CannotDo: the file cannot be read.
    """
    if file == "-":
        stream = getattr(terminal.stdin, "buffer", None)
        text = stream.read(LARGEST_BYTES) if stream is not None else terminal.stdin.read(LARGEST_BYTES).encode()
        return loader(STDIN, text)
    try:
        with open(file, "rb") as opened:
            text = opened.read(LARGEST_BYTES)
    except OSError as err:
        raise CannotDo(f"cannot read {file}: {err.strerror}") from err
    return loader(file, text)
