"""The files of one rule file: each read once, with its limits and its digest, and includes expanded.

A list file may be large, and is read by `lists`; everything else is YAML of at most 4 MiB.
"""

from __future__ import annotations

import glob
import hashlib
import os

from gatekeeper.config.problems import Problem, Severity
from gatekeeper.config.reading import SIZE_MOST_BYTES, Refused, read
from gatekeeper.config.tree import PROBLEMS_MOST, Spot, Value, decode, parse
from gatekeeper.config.words import brief, quote
from gatekeeper.policy.model import Place
from gatekeeper.progress import Tell, silent

FILES_MOST = 1000
INCLUDES_DEEP_MOST = 32  # files between the rule file and a rule


class TooManyProblems(Exception):
    """There is no point in looking for more; those found are recorded."""


class Files:
    """The files of one load: their trees, texts, digests, and everything that is wrong with them.

    ``sought`` are the paths that were read or could not be, ``patterns`` what was looked for: (folder, pattern in it).
    """

    def __init__(self, tell: Tell = silent) -> None:
        self.tell = tell
        self.problems: list[Problem] = []
        self.texts: dict[str, str] = {}
        self.read: list[str] = []
        self.sought: list[str] = []
        self.patterns: list[tuple[str, str]] = []
        self._hash = hashlib.sha256()

    def error(self, spot: Spot, code: str, message: str) -> None:
        """Record an error.

        Raises:
            TooManyProblems: this one was too much.
        """
        self.problems.append(Problem(spot.place, Severity.ERROR, code, message, spot.length))
        if len(self.problems) > PROBLEMS_MOST:
            raise TooManyProblems

    def warn(self, spot: Spot, code: str, message: str) -> None:
        """Record a warning."""
        self.problems.append(Problem(spot.place, Severity.WARNING, code, message, spot.length))

    def document(self, path: str, text: bytes | None, named_at: Spot) -> Value | None:
        """Return the tree of a YAML file, ``None`` when it is empty or cannot be read (with a problem).

        ``text`` is its content when the caller has it; ``named_at`` is where problems of the file as a whole are.
        """
        self.tell(f"reading {path}", 0, 0)
        if text is None:
            self.sought.append(path)
            try:
                text = read(path)
            except Refused as err:
                self.error(named_at, "file", str(err))
                return None
        if len(text) > SIZE_MOST_BYTES:
            self.error(named_at, "file", f"{brief(path)} is larger than {SIZE_MOST_BYTES >> 20} MiB: move addresses to a list file")
            return None
        self.note(path, hashlib.sha256(text).hexdigest())
        decoded = decode(path, text, self.problems)
        self.texts[path] = text.decode("utf-8-sig", "replace") if decoded is None else decoded
        return None if decoded is None else parse(path, decoded, self.problems)

    def note(self, path: str, digest: str) -> None:
        """Take a file into the digest, in the order of reading."""
        self.read.append(path)
        self._hash.update(f"{digest}\n".encode())

    def digest(self) -> str:
        """Return the SHA-256 over the contents of all files so far, in hexadecimal."""
        return self._hash.hexdigest()

    def expand(self, rules: Value, chain: tuple[str, ...]) -> list[Value]:
        """Return the rules of a list with those of included files in place of each ``include``.

        ``chain`` names the files that are being read, from the rule file to the one that ``rules`` stands in.
        """
        found: list[Value] = []
        for item in rules.data if isinstance(rules.data, list) else ():
            include = item.get("include")
            if include is None:
                found.append(item)
            elif self._stands_alone(item) and isinstance(include.data, str):
                for path in self._matching(include):
                    found += self._included(path, include.spot, chain)
            elif not isinstance(include.data, str):
                self.error(item.keys["include"], "rule.include", "include is a path or a pattern, like rules.d/*.yaml")
        return found

    def _stands_alone(self, item: Value) -> bool:
        others = [key for key in item.keys if key != "include"]
        for key in others:
            self.error(item.keys[key], "rule.include", f"an include stands alone: move {quote(key)} to a rule of its own")
        return not others

    def _matching(self, include: Value) -> list[str]:
        """Return the files that an include names, in byte order; a pattern may match none, a path must exist."""
        pattern = str(include.data)
        folder = os.path.dirname(include.spot.place.file)
        if not pattern or "\0" in pattern:
            self.error(include.spot, "rule.include", "include is empty: write a path or a pattern, like rules.d/*.yaml")
            return []
        if not glob.has_magic(pattern):
            return [os.path.join(folder, pattern)]
        self.patterns.append((folder, pattern))
        names = sorted(glob.glob(pattern, root_dir=folder or None), key=os.fsencode)
        if not names:
            self.warn(include.spot, "rule.include", f"no file matches {quote(pattern)}, so no rule stands here")
        return [os.path.join(folder, name) for name in names]

    def _included(self, path: str, spot: Spot, chain: tuple[str, ...]) -> list[Value]:
        real = os.path.realpath(path)
        if real in chain:
            self.error(spot, "rule.include", f"{brief(path)} includes itself: remove it from here")
            return []
        if len(chain) > INCLUDES_DEEP_MOST:
            self.error(spot, "rule.include", f"{brief(path)} is included by more than {INCLUDES_DEEP_MOST} files, one by another: it was not read")
            return []
        if len(self.read) >= FILES_MOST:
            self.error(spot, "rule.include", f"more than {FILES_MOST} files: {brief(path)} was not read")
            return []
        before = len(self.problems)
        root = self.document(path, None, spot)
        if root is None or root.data is None:
            if len(self.problems) == before:
                self.warn(Spot(Place(path, 1, 1), 1), "rule.include", "this included file has no rules")
            return []
        if not isinstance(root.data, list):
            hint = ": write only the list that stands under it" if root.get("rules") is not None else ""
            self.error(root.spot, "rule.include", f'an included file is a list of rules ("- name: ..."){hint}')
            return []
        return self.expand(root, (*chain, real))
