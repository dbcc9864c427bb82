"""Files that change, in all the ways in which files change."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gatekeeper.supervisor import watching
from gatekeeper.supervisor.loop import Loop
from gatekeeper.supervisor.watching import Watcher

LONG_S = 20.0


class Stage:
    """A watcher in a loop, and a folder to play in."""

    def __init__(self, loop: Loop, folder: Path) -> None:
        self.folder = folder
        self.rules = folder / "rules.yaml"
        self.warnings: list[str] = []
        self._loop = loop
        self._looked = 0
        self._expected = 0
        self.watcher = Watcher(loop, str(self.rules), self._look, self.warnings.append)

    def _look(self) -> None:
        self._looked += 1
        self._loop.stop(0)

    def follow(self, *sought: Path | str, patterns: tuple[tuple[str, str], ...] = ()) -> None:
        """Do what follows a compilation that has just begun."""
        self.watcher.follow([str(path) for path in sought], patterns, time.time() + 1)

    def notices(self, change: Callable[[], object], *, within_s: float = LONG_S) -> bool:
        """Whether a change is noticed: once."""
        before = self._looked
        change()
        self._loop._result = None
        limit = self._loop.later(within_s, lambda: self._loop.stop(1))
        self._loop.run()
        limit.cancel()
        return self._looked == before + 1

    def ignores(self, change: Callable[[], object]) -> bool:
        """Whether nothing comes of a change."""
        before = self._looked
        change()
        self._loop._result = None
        limit = self._loop.later(2 * watching.QUIET_S, lambda: self._loop.stop(1))
        self._loop.run()
        limit.cancel()
        return self._looked == before


@pytest.fixture
def stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """A stage on which quiet comes soon."""
    monkeypatch.setattr(watching, "QUIET_S", 0.05)
    (folder / "in").mkdir()
    (folder / "in/rules.yaml").write_text("a")
    with Loop(lambda _number: None) as loop:
        made = Stage(loop, folder / "in")
        yield made
        made.watcher.close()


def put(path: Path, text: str) -> None:
    """Replace a file as `mv` does."""
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(text)
    fresh.rename(path)


def test_ways_to_write_a_file(stage: Stage) -> None:
    """In place, by renaming, with an editor's back-up, with other rights, away and back."""
    rules = stage.rules
    assert stage.notices(lambda: rules.write_text("b"))
    assert stage.notices(lambda: put(rules, "c"))

    def edit() -> None:
        rules.rename(rules.with_suffix(".bak"))
        rules.write_text("d")

    assert stage.notices(edit)
    assert stage.notices(lambda: rules.chmod(0o600))
    assert stage.notices(rules.unlink)
    assert stage.notices(lambda: put(rules, "e"))
    assert stage.notices(lambda: os.replace(rules, rules.with_suffix(".bak")))
    assert stage.notices(lambda: os.link(rules.with_suffix(".bak"), rules))


def test_others_in_the_same_directory_do_not_matter(stage: Stage) -> None:
    """Logs, swap files and back-ups of editors are nobody's business; nor is a file that is still being written."""
    assert stage.ignores(lambda: (stage.folder / ".rules.yaml.swp").write_text("x"))
    assert stage.ignores(lambda: (stage.folder / "audit.jsonl").write_text("x"))
    with stage.rules.open("ab", buffering=0) as file:
        assert stage.ignores(lambda: file.write(b"x"))
        assert stage.notices(file.close)


def test_many_changes_at_once_are_one(stage: Stage) -> None:
    """A hundred files written in a row are looked at once, when it is quiet."""
    stage.follow(*(stage.folder / f"{number}.txt" for number in range(100)))

    def write() -> None:
        for number in range(100):
            put(stage.folder / f"{number}.txt", "x")

    assert stage.notices(write)
    assert stage.ignores(lambda: None)


def test_a_folder_that_is_never_quiet(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written again and again is looked at all the same."""
    monkeypatch.setattr(watching, "LONGEST_WAIT_S", 0.3)

    def write() -> None:
        put(stage.rules, "x")
        stage._loop.later(0.01, write)

    assert stage.notices(write)


def test_included_files_and_lists(stage: Stage) -> None:
    """Files beside the rule file are followed, also those that do not exist yet, in folders that do not exist yet."""
    listed = stage.folder / "lists/a/addresses.txt"
    stage.follow(listed)
    assert stage.notices(listed.parent.parent.mkdir)
    assert stage.notices(listed.parent.mkdir)
    assert stage.notices(lambda: listed.write_text("x"))
    assert stage.notices(lambda: listed.write_text("y"))
    assert stage.notices(lambda: shutil.rmtree(stage.folder / "lists"))
    new = stage.folder / "new"
    (new / "a").mkdir(parents=True)
    (new / "a/addresses.txt").write_text("z")
    assert stage.notices(lambda: new.rename(stage.folder / "lists"))
    assert stage.notices(lambda: put(listed, "zz"))
    stage.follow()
    assert stage.ignores(lambda: listed.write_text("nobody wants it any more"))


def test_patterns(stage: Stage) -> None:
    """A new file that an include matches matters, another one does not; folders may be part of the pattern."""
    folder = stage.folder
    stage.follow(patterns=((str(folder), "rules.d/*.yaml"), (str(folder), "teams/*/[ab].yaml")))
    assert stage.notices((folder / "rules.d").mkdir)
    assert stage.notices(lambda: put(folder / "rules.d/new.yaml", "x"))
    assert stage.ignores(lambda: put(folder / "rules.d/readme.txt", "x"))
    assert stage.notices((folder / "rules.d/new.yaml").unlink)
    assert stage.notices(lambda: (folder / "teams/red").mkdir(parents=True))
    assert stage.notices(lambda: (folder / "teams/red/a.yaml").write_text("x"))
    assert stage.ignores(lambda: (folder / "teams/red/c.yaml").write_text("x"))
    assert stage.notices((folder / "teams/blue").mkdir)
    assert stage.notices(lambda: (folder / "teams/blue/b.yaml").write_text("x"))


@pytest.mark.parametrize("absolute", [False, True])
def test_a_config_map_is_swapped(folder: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool) -> None:
    """A link in the middle of the path is replaced in one step; what the old one pointed to is removed later."""
    monkeypatch.setattr(watching, "QUIET_S", 0.05)
    (folder / "..one").mkdir()
    (folder / "..one/rules.yaml").write_text("1")
    (folder / "..data").symlink_to(folder / "..one" if absolute else "..one")
    (folder / "rules.yaml").symlink_to("..data/rules.yaml")
    with Loop(lambda _number: None) as loop:
        stage = Stage(loop, folder)
        for old, new in (("one", "two"), ("two", "three"), ("three", "four")):
            (folder / f"..{new}").mkdir()
            (folder / f"..{new}/rules.yaml").write_text(new)

            def swap(new: str = new) -> None:
                (folder / "..tmp").symlink_to(folder / f"..{new}" if absolute else f"..{new}")
                (folder / "..tmp").rename(folder / "..data")

            assert stage.notices(swap)
            assert stage.ignores(lambda old=old: shutil.rmtree(folder / f"..{old}"))  # type: ignore[misc]
        assert stage.notices(lambda: (folder / "..four/rules.yaml").write_text("edited where it really is"))
        stage.watcher.close()


def test_folders_that_vanish_and_come_back(stage: Stage, folder: Path) -> None:
    """The folder, or one above it, is moved away, deleted, or replaced by another: that is seen, and what follows too."""
    away = folder / "away"
    assert stage.notices(lambda: stage.folder.rename(away))
    assert stage.ignores(lambda: put(away / "rules.yaml", "x"))
    assert stage.notices(lambda: away.rename(stage.folder))
    assert stage.notices(lambda: put(stage.rules, "y"))
    assert stage.notices(lambda: shutil.rmtree(stage.folder))
    assert stage.notices(stage.folder.mkdir)
    assert stage.notices(lambda: put(stage.rules, "z"))
    moved = folder.with_name(folder.name + "-moved")
    assert stage.notices(lambda: folder.rename(moved))
    assert stage.notices(lambda: moved.rename(folder))
    assert stage.notices(lambda: put(stage.rules, "again"))


def test_more_events_than_the_kernel_keeps(stage: Stage) -> None:
    """When events were lost, it is time to look."""
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 100_000:
        pytest.skip("this kernel keeps more events than a test should make")
    names = [str(stage.folder / f"noise-{number % 2}") for number in range(2)]
    for name in names:
        Path(name).touch()

    def noise() -> None:
        for number in range(most // 2 + 100):
            os.rename(names[number % 2], names[1 - number % 2])

    assert stage.notices(noise, within_s=30)


def test_what_changed_while_it_was_compiled(stage: Stage) -> None:
    """A file that nobody watched yet, and that changed after the compiler had begun, is looked at again; but only once."""
    late = stage.folder / "late.txt"
    began = time.time()
    late.write_text("x")
    assert stage.notices(lambda: stage.watcher.follow([str(late)], (), began))
    assert stage.ignores(lambda: stage.watcher.follow([str(late)], (), began))


def test_links_that_go_in_circles(stage: Stage) -> None:
    """A path without an end is no end of us, and a change in it is noticed."""
    for one, other in (("a", "b"), ("b", "a")):
        (stage.folder / one).symlink_to(other)
    stage.follow(stage.folder / "a/list.txt")
    assert stage.notices((stage.folder / "a").unlink)


@pytest.mark.may_skip
def test_a_folder_that_we_may_not_read(stage: Stage) -> None:
    """It cannot be watched, which is said once; the rest is watched on."""
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    closed = stage.folder / "closed"
    closed.mkdir(mode=0o311)
    stage.follow(closed / "list.txt")
    stage.follow(closed / "list.txt")
    assert [f"cannot watch {closed}" in warning for warning in stage.warnings] == [True]
    assert stage.notices(lambda: put(stage.rules, "x"))
