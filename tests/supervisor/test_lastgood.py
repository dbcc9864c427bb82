"""The last good policy on disk: what is read back is what was saved, or it is not used at all."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gatekeeper.kernel import memfd
from gatekeeper.supervisor import lastgood
from gatekeeper.supervisor.disk import Disk
from gatekeeper.supervisor.lastgood import LastGoodError
from gatekeeper.supervisor.loop import Loop

DATA = bytes(range(256)) * 8192  # two blocks


def save(directory: Path, data: bytes = DATA, digest: str = "d1") -> None:
    """Save these bytes as a snapshot."""
    fd = memfd.from_bytes("test", data)
    try:
        lastgood.save(str(directory), fd, digest)
    finally:
        os.close(fd)


def read(directory: Path) -> tuple[bytes, str] | None:
    """Return the bytes and the digest that are read back."""
    found = lastgood.read(str(directory))
    if found is None:
        return None
    with open(found.snapshot_fd, "rb") as file:
        file.seek(0)
        return file.read(), found.digest


def why(directory: Path) -> str:
    """Return why what is there is not used."""
    with pytest.raises(LastGoodError) as caught:
        lastgood.read(str(directory))
    return str(caught.value)


def test_what_was_saved_is_read_back(folder: Path) -> None:
    """The latest save counts, nothing else is left in the directory, and the file is its owner's alone."""
    assert read(folder) is None
    save(folder)
    save(folder, DATA[:1000], "d2")
    assert read(folder) == (DATA[:1000], "d2")
    assert [path.name for path in folder.iterdir()] == ["last-good"]
    assert (folder / "last-good").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("cut", [0, 1, 100, 4096, len(DATA) - 1])
def test_a_truncated_file(folder: Path, cut: int) -> None:
    """A file that is not whole is not used, wherever it ends."""
    save(folder)
    path = folder / "last-good"
    path.write_bytes(path.read_bytes()[:cut])
    assert why(folder) == "it is damaged"


def test_a_changed_byte(folder: Path) -> None:
    """A single bit that fell over on the disk is noticed; so is what was appended."""
    save(folder)
    path = folder / "last-good"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert why(folder) == "it is damaged"
    path.write_bytes(whole + b"x")
    assert why(folder) == "it is damaged"
    path.write_bytes(whole)
    assert read(folder) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "it was written by another version of gatekeeper (format 2)"),
        ({"format": "something"}, "it is something else"),
        ({"bytes": -1}, "it is damaged"),
        ({"bytes": 1 << 60}, "it is damaged"),
        ({"bytes": "many"}, "it is damaged"),
        ({"saved": None}, "it is damaged"),
        ({"digest": 7}, "it is damaged"),
    ],
)
def test_another_header(folder: Path, change: dict[str, object], message: str) -> None:
    """What another version wrote is ignored with a message, and nonsense is nonsense."""
    save(folder)
    header, _, rest = (folder / "last-good").read_bytes().partition(b"\n")
    (folder / "last-good").write_bytes(json.dumps(json.loads(header) | change).encode() + b"\n" + rest)
    assert why(folder) == message


@pytest.mark.parametrize("header", [b"", b"\n", b"[" * 5000, b"{}\n", b"[]\n", b"\xff\n", b"x" * 10000])
def test_no_header(folder: Path, header: bytes) -> None:
    """Whatever else stands there is no policy."""
    (folder / "last-good").write_bytes(header)
    assert why(folder) == "it is damaged"


def test_what_others_may_write_is_not_used(folder: Path) -> None:
    """Neither a file nor a directory that others may write, nor anything but a regular file."""
    save(folder)
    path = folder / "last-good"
    path.chmod(0o660)
    assert why(folder) == "it may be written by others (mode 660)"
    path.chmod(0o600)
    folder.chmod(0o777)
    assert why(folder) == f"the directory {folder} may be written by others (mode 777)"
    folder.chmod(0o755)
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    assert why(folder) == os.strerror(errno.ELOOP)
    path.unlink()
    os.mkfifo(path, 0o600)
    assert why(folder) == "it is not what we wrote"


@pytest.mark.needs_root
def test_what_belongs_to_somebody_else_is_not_used(folder: Path) -> None:
    """Who owns the file decides what is in it."""
    save(folder)
    os.chown(folder / "last-good", 65534, 65534)
    assert why(folder) == "it belongs to another user (uid 65534)"


def test_a_save_that_fails_leaves_the_older_one(folder: Path) -> None:
    """When there is no room, or the directory is gone, the error says so and the file that was there stays whole."""
    save(folder, DATA[:100])
    (folder / "last-good.new").mkdir()  # whatever is in the way
    with pytest.raises(OSError, match="directory"):
        save(folder, DATA)
    assert read(folder) == (DATA[:100], "d1")
    with pytest.raises(FileNotFoundError):
        save(folder / "gone")


def test_a_save_that_was_interrupted_is_in_nobodys_way(folder: Path) -> None:
    """What a killed process left half-written is replaced."""
    (folder / "last-good.new").write_bytes(b"half")
    save(folder)
    assert read(folder) == (DATA, "d1")


def test_what_was_confirmed_is_no_trial_even_when_it_cannot_be_saved(folder: Path) -> None:
    """A restart then starts with the rule file, which is what was confirmed, and not with something older."""
    lastgood.note_trial(str(folder), "d7")
    (folder / "last-good").mkdir()
    with pytest.raises(IsADirectoryError):
        save(folder)
    assert lastgood.read_trial(str(folder)) is None


def test_a_trial_is_remembered_until_something_is_saved(folder: Path) -> None:
    """The digest on trial survives, and goes when a policy is the last good one again."""
    assert lastgood.read_trial(str(folder)) is None
    lastgood.note_trial(str(folder), "d7")
    assert lastgood.read_trial(str(folder)) == "d7"
    (folder / "unconfirmed").chmod(0o666)
    assert lastgood.read_trial(str(folder)) is None  # anybody may have written that
    save(folder)
    assert not (folder / "unconfirmed").exists()


class TestDisks:
    """Jobs in a thread, results in the loop."""

    @pytest.fixture
    def loop(self) -> Iterator[Loop]:
        """A loop of this test's own."""
        with Loop(lambda _number: None) as loop:
            yield loop

    def test_jobs_end_in_order(self, loop: Loop) -> None:
        """Each begins when the one before has ended, and each result comes once."""
        done: list[object] = []
        disk = Disk(loop)

        def ended(number: int, failure: str | None) -> None:
            done.append((number, failure))
            if number == 2:
                loop.stop(0)

        def fail() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        disk.run(lambda: done.append("first job"), lambda failure: ended(0, failure))
        disk.run(fail, lambda failure: ended(1, failure))
        disk.run(lambda: done.append("last job"), lambda failure: ended(2, failure))
        loop.run()
        assert [one for one in done if isinstance(one, str)] == ["first job", "last job"]
        assert [one for one in done if isinstance(one, tuple)] == [(0, None), (1, "No space left on device"), (2, None)]

    def test_a_disk_that_stands_still(self, loop: Loop) -> None:
        """Whoever waits for it goes on after a while; what it says then is too late."""
        moves = threading.Event()
        said: list[str | None] = []
        disk = Disk(loop, patience_s=0.05)
        disk.run(lambda: (moves.wait(30), None)[1], said.append)
        loop.later(0.1, moves.set)
        loop.later(0.3, lambda: loop.stop(0))
        loop.run()
        assert said == ["the disk did not answer within 0.05 s"]
        disk.close()
