"""From a rule file to a `Config`, or to everything that is wrong with it.

    text      bytes, guarded, to a tree of values with places       tree, files
    include   the rules of other files come to stand in place       files
    validate  each value on its own, in one pass                    models, messages
    check     values against each other                             crosscheck
    resolve   names to addresses: only when there is no error       resolve

Every step but the last goes on behind an error, so that one run reports all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from pydantic import ValidationError

from gatekeeper.config import reading
from gatekeeper.config.crosscheck import crosscheck
from gatekeeper.config.fields import Names
from gatekeeper.config.files import Files, TooManyProblems
from gatekeeper.config.lists import ListFile, load_list
from gatekeeper.config.messages import explain
from gatekeeper.config.models import RuleFile
from gatekeeper.config.problems import Problem, Severity
from gatekeeper.config.resolve import resolve
from gatekeeper.config.tree import PROBLEMS_MOST, Spot, Value
from gatekeeper.config.words import brief
from gatekeeper.policy.model import Config, Place
from gatekeeper.progress import Tell, silent


@dataclass(slots=True)
class Loaded:
    """What came of a rule file. ``config`` is ``None`` exactly when there is an error among ``problems`` (sorted).

    ``texts`` are the texts of the files by name, for `render`; of list files only the lines that are wrong. ``sought``
    are the paths of all files that were wanted, ``patterns`` (folder, pattern) of those that includes look for: when
    one of them changes, what came of the rule file may change too.
    """

    config: Config | None
    problems: list[Problem] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    sought: list[str] = field(default_factory=list)
    patterns: list[tuple[str, str]] = field(default_factory=list)


def load(path: str, text: bytes | None = None, tell: Tell = silent) -> Loaded:
    """Read a rule file and everything it names; does not run its tests.

    ``path`` is its name in messages, and paths in it start from its folder; ``text`` is its content, read from ``path``
    when ``None``; ``tell`` hears how far it is. Never raises for what is in the files or missing.
    """
    files = Files(tell)
    try:
        config = _read(path, text, files)
    except TooManyProblems:
        config = None
    return _loaded(config, files)


def _read(path: str, text: bytes | None, files: Files) -> Config | None:
    root = files.document(path, text, Spot(Place(path, 1, 1), 1))
    if root is None or root.data is None:
        if not files.problems:
            files.error(Spot(Place(path, 1, 1), 1), "file", 'the file is empty: write at least "version", "listeners" and "default"')
        return None
    _splice(root, files, os.path.realpath(path))
    model = _validate(root, files)
    crosscheck(root, files)
    lists = _load_lists(root, files)
    if model is None or _has_error(files.problems):
        return None
    files.tell("compiling", 0, 0)
    policy, settings = resolve(model, root, lists)
    return Config(policy, settings, files.digest(), tuple(files.read))


def _has_error(problems: list[Problem]) -> bool:
    return any(problem.severity is Severity.ERROR for problem in problems)


def _loaded(config: Config | None, files: Files) -> Loaded:
    problems = sorted(set(files.problems))
    if len(problems) > PROBLEMS_MOST:
        problems = problems[:PROBLEMS_MOST]
        last = problems[-1].place
        behind = Place(last.file, last.line, last.column + 1)  # whoever sorts again
        problems.append(Problem(behind, Severity.ERROR, "file", "and more problems, which were not looked for"))
    return Loaded(config, problems, files.texts, files.sought, files.patterns)


def _splice(root: Value, files: Files, real: str) -> None:
    """Put the rules of included files where they are included."""
    rules = root.get("rules")
    if rules is not None and isinstance(rules.data, list):
        rules.data = files.expand(rules, (real,))


def _validate(root: Value, files: Files) -> RuleFile | None:
    """Return the file as a model, ``None`` when anything in it is wrong on its own (with problems)."""
    try:
        return RuleFile.model_validate(root.plain(), context=_names(root))
    except ValidationError as err:
        files.problems += explain(err, root)
        return None


def _names(root: Value) -> Names:
    """Return the names that the file gives, also to what is wrong otherwise."""
    listeners, sets = root.get("listeners"), root.get("sets")
    given = [item.get("name") for item in listeners.items()] if listeners else []
    return Names(
        listeners=[name.data for name in given if name is not None and isinstance(name.data, str)],
        sets=list(sets.data) if sets is not None and isinstance(sets.data, dict) else [],
    )


def _load_lists(root: Value, files: Files) -> dict[str, ListFile]:
    """Return the list files by set name; those that cannot be read become problems."""
    sets = root.get("sets")
    found: dict[str, ListFile] = {}
    read: dict[str, ListFile] = {}
    for name, value in sets.data.items() if sets is not None and isinstance(sets.data, dict) else ():
        named = value.get("file")
        if named is None or not isinstance(named.data, str) or not named.data:
            continue
        path = os.path.join(os.path.dirname(named.spot.place.file), named.data)
        try:
            if path not in read:
                files.sought.append(path)
                reading.check_readable(path)
                read[path] = load_list(path, files.tell)
                files.note(path, read[path].digest)
                _keep_lines(path, read[path].problems, files)
            found[name] = read[path]
        except reading.Refused as err:
            files.error(named.spot, "set.file", str(err))
        except OSError as err:
            files.error(named.spot, "set.file", f"cannot read {brief(path)}: {err.strerror}")
    return found


def _keep_lines(path: str, problems: tuple[Problem, ...], files: Files) -> None:
    """Take over a list's problems, and of its text the lines that they point at."""
    files.problems += problems
    wanted = {problem.place.line for problem in problems}
    if not wanted:
        return
    kept: list[str] = []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in zip(range(1, max(wanted) + 1), file, strict=False):
            kept.append(line.rstrip("\r\n") if number in wanted else "")
    files.texts[path] = "\n".join(kept)
