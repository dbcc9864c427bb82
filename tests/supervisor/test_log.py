"""What the service says about itself."""

from __future__ import annotations

import io
import os
from pathlib import Path

from gatekeeper.supervisor.log import Log, printable


def test_one_fact_a_line() -> None:
    """Errors and warnings say so, text of several lines keeps one prefix a line, and there are no priorities."""
    stream = io.StringIO()
    log = Log(stream, {})
    log.info("serving")
    log.warning("careful")
    log.error("one\ntwo")
    log.plain("rules.yaml:1:1: what\n  |", error=True)
    assert stream.getvalue() == (
        "gatekeeper: serving\ngatekeeper: warning: careful\ngatekeeper: error: one\ngatekeeper: error: two\n"
        "rules.yaml:1:1: what\n  |\n"
    )


def test_priorities_for_the_journal_only(folder: Path) -> None:
    """Lines carry priorities exactly when JOURNAL_STREAM names the very stream they go to."""
    for matches in (True, False):
        path = folder / f"{matches}"
        with path.open("w") as stream:
            status = os.fstat(stream.fileno())
            Log(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + (not matches)}"}).warning("careful")
        assert path.read_text() == ("<4>" if matches else "") + "gatekeeper: warning: careful\n"


def test_a_stream_that_is_gone() -> None:
    """Nobody reading is no reason to stop serving."""
    stream = io.StringIO()
    stream.close()
    Log(stream, {}).info("hello?")


def test_a_reader_that_is_stuck() -> None:
    """A full pipe does not stop the service; once it is read again, it is said how many lines are missing."""
    read, write = os.pipe()
    with open(write, "w") as stream, open(read, "rb", buffering=0) as reader:
        log = Log(stream, {})
        for _ in range(1000):
            log.info("x" * 200)
        seen = reader.read(1 << 20)
        while b"lost" not in seen:
            log.info("again")
            seen += reader.read(1 << 20)
    lines = seen.decode().splitlines()
    written = sum(line.endswith("xx") for line in lines)
    assert f"gatekeeper: {1000 - written} lines were lost here: nobody read them" in lines


def test_words_of_others_stay_in_their_line() -> None:
    """Text from another process cannot add lines or move the cursor, and cannot be endless."""
    assert printable("a\nb\x1b[2Jc") == "a?b?[2Jc"
    assert len(printable("x" * 10000)) == 500


def test_a_person_at_a_terminal_sees_what_goes_on_and_the_log_stays_whole() -> None:
    """A line of status gives way to the next line of the log, and to nothing when it is over."""
    terminal, theirs = os.openpty()
    with open(theirs, "w") as stream, open(terminal, "rb", buffering=0) as screen:
        log = Log(stream, {})
        log.status("")  # nothing stands there
        log.status("reading many.txt: 1.0 of 2.0 MB")
        log.info("serving")
        log.status("proving tests")
        log.status("")
        log.info("and on")
        seen = b""
        while b"and on" not in seen:
            seen += screen.read(1 << 12)
    wipe = "\r\x1b[K"
    assert seen.decode().replace("\r\n", "\n") == (
        f"{wipe}reading many.txt: 1.0 of 2.0 MB{wipe}gatekeeper: serving\n{wipe}proving tests{wipe}gatekeeper: and on\n"
    )


def test_a_log_that_is_no_terminal_has_no_status() -> None:
    """What goes into files and pipes is facts."""
    stream = io.StringIO()
    log = Log(stream, {})
    log.status("reading")
    log.info("serving")
    assert stream.getvalue() == "gatekeeper: serving\n"
