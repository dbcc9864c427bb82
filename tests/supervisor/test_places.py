"""The audit log and the state directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gatekeeper.supervisor import places


def test_the_audit_file_is_appended_to(folder: Path) -> None:
    """An existing file keeps its lines; a new one is not readable by everybody."""
    path = folder / "audit.jsonl"
    for line in (b"one\n", b"two\n"):
        fd = places.open_audit(str(path))
        assert fd is not None
        os.write(fd, line)
        os.close(fd)
    assert path.read_text() == "one\ntwo\n"
    assert stat.S_IMODE(path.stat().st_mode) & 0o027 == 0


def test_audit_off() -> None:
    """`off` opens nothing."""
    assert places.open_audit("off") is None


def test_an_audit_file_that_cannot_be_written(folder: Path) -> None:
    """The message names the file and the cause."""
    with pytest.raises(places.PlaceError, match=f"cannot write the audit log to {folder}/no/audit: No such file"):
        places.open_audit(f"{folder}/no/audit")


def test_one_process_has_the_state(folder: Path) -> None:
    """A second process is told who has the state directory; when the first lets go, the next can have it."""
    state = folder / "deep" / "state"
    lock = places.lock_state(str(state))
    with pytest.raises(places.PlaceError, match=f"in use by another gatekeeper, pid {os.getpid()}"):
        places.lock_state(str(state))
    os.close(lock)
    os.close(places.lock_state(str(state)))


def test_a_state_directory_that_cannot_be_made(folder: Path) -> None:
    """The message names the directory."""
    (folder / "file").write_text("")
    with pytest.raises(places.PlaceError, match=f"cannot use the state directory {folder}/file/state"):
        places.lock_state(str(folder / "file" / "state"))
