"""`load`, and then everything that the file says about itself: its tests are proved, rules that cannot match are named."""

from __future__ import annotations

import os
import stat
from dataclasses import replace

from gatekeeper.config.lint import lint
from gatekeeper.config.loader import Loaded, load
from gatekeeper.config.problems import Problem, Severity
from gatekeeper.config.reading import writable_by
from gatekeeper.policy.model import Place
from gatekeeper.policy.prove import prove
from gatekeeper.progress import Tell, silent


def check(path: str, text: bytes | None = None, tell: Tell = silent) -> Loaded:
    """Load a rule file, prove its tests and look for rules that never decide; see `load`.

    ``config`` is ``None`` when a test does not hold: such a policy is not applied.
    """
    loaded = load(path, text, tell)
    problems = list(loaded.problems)
    if text is not None:
        problems += _foresee_rights(path)
    config = loaded.config
    if config is not None:
        tell("looking for rules that never decide", 0, 0)
        problems += lint(config.policy)
        tell("proving tests", 0, 0)
        proof = prove(config.policy)
        errors = [_error(failure.place, failure.message) for failure in proof.failures]
        errors += [
            _error(test.place, 'this test proves nothing: no source of it can reach its "to", correct one of them')
            for test in proof.empty
        ]
        problems += errors
        config = None if errors else config
    return replace(loaded, config=config, problems=sorted(set(problems)))


def _error(place: Place, message: str) -> Problem:
    return Problem(place, Severity.ERROR, "test", message)


def _foresee_rights(path: str) -> list[Problem]:
    """Warn when the text came with the name of a file that will be refused when it is read from there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return []
    who = writable_by(found.st_mode) if stat.S_ISREG(found.st_mode) else ""
    if not who:
        return []
    message = f"this file may be written by {who}, who could let anybody in; it will not be served: chmod go-w {path}"
    return [Problem(Place(path, 1, 1), Severity.WARNING, "file", message)]
