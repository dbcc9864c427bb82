"""`python -m tests.endurance.hostile.judge FOLDER KIND FIRST LAST STEP`: judge a batch of hostile rule files under limits.

KIND is ``mutants`` or ``truncations``. Prints one JSON object: ``judged``, ``accepted``, ``slowest_s`` (CPU), ``peak_kib`` and
``failures``, each a number and what went wrong. The memory limit and the time limit end the process or the file, as they would in
the real compiler.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from gatekeeper import config
from gatekeeper.config.rendering import LINE_BREAK
from tests.endurance.hostile import meaning, mutants

MEMORY_BYTES = 256 << 20
CPU_S = 1.0
ENDPOINTS_WRITTEN = 3000  # a file with more is not written back: each would be an item


class TooLong(Exception):
    """A file took more than its share of CPU."""


def judge(name: str, text: bytes) -> bool:
    """Check one file and everything that is promised about the answer; say whether it was accepted."""
    loaded = config.check(name, text)
    errors = [problem for problem in loaded.problems if problem.severity == "error"]
    assert (loaded.config is None) == bool(errors), "neither accepted nor refused"
    lines = len(LINE_BREAK.split(text.decode("utf-8-sig", "replace")))
    for problem in loaded.problems:
        assert problem.place.line >= 1
        assert problem.place.column >= 1
        assert problem.place.file != name or problem.place.line <= lines, f"{problem.place} of {lines} lines"
        shown = config.render(problem, loaded.texts)
        assert all(character.isprintable() or character in "\n\t" for character in shown), repr(shown)
        assert len(shown) < 10_000, len(shown)
        json.dumps(config.as_json(problem)).encode()
    if loaded.config is None:
        return False
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)  # what follows is this test's own work
    _keeps_its_meaning(loaded.config, text)
    return True


def _keeps_its_meaning(accepted: Any, text: bytes) -> None:
    read = meaning.of_config(accepted)
    again = meaning.of_text(text, os.getcwd())
    assert read == again, f"read as {_difference(read, again)}"
    if sum(len(one["endpoints"]) for one in read["listeners"]) > ENDPOINTS_WRITTEN:
        return
    back = config.load("again.yaml", meaning.written(read))
    assert back.config is not None, f"written back, it is refused: {back.problems[:3]}"
    assert meaning.of_config(back.config) == read, f"written back: {_difference(meaning.of_config(back.config), read)}"


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    return "; ".join(f"{key}: {one[key]!r:.600} instead of {other[key]!r:.600}" for key in one if one[key] != other[key])


def batch(seeds: dict[str, bytes], kind: str, numbers: Iterator[int]) -> Iterator[tuple[int, bytes]]:
    """Yield (number, text) of the files to judge."""
    if kind == "mutants":
        for number in numbers:
            yield number, mutants.mutant(seeds, number)
        return
    wanted = set(numbers)
    for number, (name, length) in enumerate(mutants.truncations(seeds)):
        if number in wanted:
            yield number, seeds[name][:length]


def main(folder: str, kind: str, first: int, last: int, step: int) -> None:
    """Judge every ``step``-th file from ``first`` up to, not including, ``last``."""
    seeds = mutants.lay_out(Path(folder))
    os.chdir(folder)
    judge("warm.yaml", seeds["everything.yaml"])  # what is imported late belongs to no file
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGVTALRM, _too_long)
    accepted, slowest_s, judged, failures = 0, 0.0, 0, []
    for number, text in batch(seeds, kind, iter(range(first, last, step))):
        judged += 1
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
        try:
            accepted += judge("rules.yaml", text)
        except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
            failures.append([number, traceback.format_exc()[-3000:]])
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        slowest_s = max(slowest_s, time.process_time() - begun)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({
        "judged": judged, "accepted": accepted, "slowest_s": slowest_s, "peak_kib": peak_kib, "failures": list(itertools.islice(failures, 50)),
    }))  # fmt: skip


def _too_long(_number: int, _frame: FrameType | None) -> None:
    raise TooLong(f"more than {CPU_S:g} s of CPU")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
