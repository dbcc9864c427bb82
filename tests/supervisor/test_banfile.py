"""Bans on their way to the disk: the latest list arrives, whatever the disk does meanwhile."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gatekeeper.supervisor import banlist
from gatekeeper.supervisor.banfile import BanFile
from gatekeeper.supervisor.banlist import Ban, BanList
from gatekeeper.supervisor.disk import Disk
from gatekeeper.supervisor.log import Log
from gatekeeper.supervisor.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop of this test's own."""
    with Loop(lambda _number: None) as loop:
        yield loop


def add(bans: BanList, number: int) -> None:
    """Ban 0.0.0.<number>."""
    bans.add(Ban((4, number, number), None, "", 0, 1.0))


def on_disk(folder: Path) -> list[str]:
    """Return who is banned in the file."""
    return [ban.text for ban in banlist.read(str(folder))]


def block(disk: Disk) -> threading.Event:
    """Let the disk stand still until the event is set."""
    moves = threading.Event()
    disk.run(lambda: (moves.wait(30), None)[1], lambda _failure: None)
    return moves


def test_what_changes_while_the_disk_is_busy_is_saved_too(loop: Loop, folder: Path) -> None:
    """Everybody is told once the file has what they changed; what comes while it is written goes together."""
    bans, disk, told = BanList(), Disk(loop), []
    file = BanFile(Log(io.StringIO(), {}), disk, str(folder), bans)
    moves = block(disk)

    def tell(number: int) -> None:
        told.append((number, f"0.0.0.{number}" in on_disk(folder)))
        if len(told) == 3:
            loop.stop(0)

    for number in (1, 2, 3):
        add(bans, number)
        file.save(functools.partial(tell, number))
    loop.later(0.05, moves.set)
    loop.run()
    assert told == [(1, True), (2, True), (3, True)]
    assert on_disk(folder) == ["0.0.0.1", "0.0.0.2", "0.0.0.3"]


def test_a_disk_that_stands_still_keeps_nobody_waiting_for_ever(loop: Loop, folder: Path) -> None:
    """Whoever waits is told that it is not saved; that it is, later, is said as well."""
    bans, disk, words = BanList(), Disk(loop, patience_s=0.05), io.StringIO()
    file = BanFile(Log(words, {}), disk, str(folder), bans)
    moves = block(disk)
    add(bans, 1)
    saved: list[bool] = []

    def late() -> None:
        saved.append(file.saved)
        moves.set()
        file.save(again)

    def again() -> None:
        saved.append(file.saved)
        if file.saved:
            loop.stop(0)
        else:
            file.save(again)

    file.save(late)
    loop.run()
    assert (saved[0], saved[-1]) == (False, True)
    assert "did not answer within 0.05 s): they end with the service" in words.getvalue()
    assert f"bans are saved in {folder} again" in words.getvalue()


def test_the_last_change_is_saved_when_the_service_ends(loop: Loop, folder: Path) -> None:
    """Nobody turns the loop any more then."""
    bans, disk = BanList(), Disk(loop)
    file = BanFile(Log(io.StringIO(), {}), disk, str(folder), bans)
    moves = block(disk)
    for number in (1, 2):
        add(bans, number)
        file.save()
    moves.set()
    file.close()
    disk.close()
    assert on_disk(folder) == ["0.0.0.1", "0.0.0.2"]


def test_without_a_directory_nothing_is_saved(loop: Loop) -> None:
    """Whoever waits is told so at once."""
    told: list[bool] = []
    file = BanFile(Log(io.StringIO(), {}), Disk(loop), None, BanList())
    file.save(lambda: told.append(file.saved))
    assert told == [False]
