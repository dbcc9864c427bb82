"""Whether a compiled policy is still what its rule file says: then nobody has to compile it again.

What comes of a rule file depends on the compiler, on the contents of all files in the order of reading, on which files
its includes find, and on the folder that paths start from. A snapshot names all of it (`origin`, and ``digest`` and
``files`` of its meta section); `still_says` looks whether everything is as it was. Tests in a rule file are proved by
the compiler and depend on nothing else, so they hold, and warnings are the same. When in doubt it has changed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gatekeeper
from gatekeeper.config.reading import Refused, open_file
from gatekeeper.snapshot.layout import HEADER, MAGIC

if TYPE_CHECKING:
    from gatekeeper.progress import Tell

_COMPILER = ("config", "policy", "snapshot", "supervisor/compile.py")  # of our package: what verdicts are made by
_MOST_META_BYTES = 1 << 28


def origin(path: str, patterns: list[tuple[str, str]], problems: list[dict[str, Any]], text: str) -> dict[str, Any]:
    """Return what the snapshot of a rule file has to say beside its digest and its files, for `still_says`.

    ``patterns`` are (folder, pattern) of its includes; ``problems`` and ``text`` the warnings about it.
    """
    return {
        "compiler": compiler(), "path": os.path.abspath(path), "patterns": patterns, "problems": problems, "text": text,
    }  # fmt: skip


def still_says(path: str, meta: dict[str, Any], tell: Tell) -> bool:
    """Say whether compiling ``path`` would give the snapshot with this meta section, as far as verdicts go."""
    try:
        origin, files = meta["origin"], meta["files"]
        if not origin["compiler"] or origin["compiler"] != compiler():
            return False
        if files[0] != path or origin["path"] != os.path.abspath(path) or not _finds_nothing_new(origin["patterns"], files):
            return False
        return bool(_digest(files, tell) == meta["digest"])
    except (LookupError, TypeError, ValueError, OSError, Refused):
        return False


def read_meta(snapshot_fd: int) -> dict[str, Any] | None:
    """Return the meta section of a snapshot that nobody has checked yet, ``None`` when it has none."""
    try:
        magic, *places = HEADER.unpack(os.pread(snapshot_fd, HEADER.size, 0))
        offset, length = places[-2:]
        if magic != MAGIC or length > _MOST_META_BYTES:
            return None
        meta = json.loads(os.pread(snapshot_fd, length, offset))
    except (OSError, OverflowError, ValueError, struct.error, RecursionError):
        return None
    return meta if isinstance(meta, dict) else None


def compiler() -> str:
    """Return the SHA-256 of the code that makes a snapshot out of a rule file, "" when it cannot be read."""
    home = Path(gatekeeper.__file__).parent
    found = hashlib.sha256(gatekeeper.__version__.encode())
    try:
        for name in _COMPILER:
            place = home / name
            for file in sorted(place.glob("*.py")) if place.is_dir() else [place]:
                found.update(file.read_bytes())
    except OSError:  # an archive, or not a file that we may read
        return ""
    return found.hexdigest()


def _finds_nothing_new(patterns: list[tuple[str, str]], files: list[str]) -> bool:
    """Say whether includes find no other files than those that were read. One that is gone shows when it is opened."""
    known = set(files)
    return all(
        os.path.join(folder, name) in known
        for folder, pattern in patterns
        for name in glob.iglob(pattern, root_dir=folder or None)
    )


def _digest(files: list[str], tell: Tell) -> str:
    """Return what `config.files.Files.digest` returns for these files; those that must not be read raise."""
    found = hashlib.sha256()
    for path in files:
        tell(f"reading {path}", 0, 0)
        with open(open_file(path), "rb") as file:
            found.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()
