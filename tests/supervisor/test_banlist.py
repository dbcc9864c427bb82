from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.config.addresses import parse_source
from gatekeeper.supervisor import banlist
from gatekeeper.supervisor.banlist import Ban, BanFileError, BanList, format_range, is_wide


def ban(text: str, until: float | None = None, reason: str = "", by: int = 0, since: float = 1000.0) -> Ban:
    """Return a ban of a source as people write it."""
    return Ban(parse_source(text), until, reason, by, since)


def filled(*texts: str) -> BanList:
    """Return a list with these sources."""
    found = BanList()
    for text in texts:
        found.add(ban(text))
    return found


def names(bans: list[Ban]) -> list[str]:
    """Return the sources of bans, sorted."""
    return sorted(one.text for one in bans)


@pytest.mark.parametrize(
    "text",
    ["198.51.100.7", "198.51.100.0/24", "198.51.100.7-198.51.100.9", "2001:db8::1", "2001:db8::/32", "0.0.0.0/0", "::/0",
     "10.0.0.1-10.0.0.2", "255.255.255.255", "2001:db8::1-2001:db8::2"],
)  # fmt: skip
def test_a_source_is_shown_as_it_was_written(text: str) -> None:
    """Addresses, networks and ranges keep their shape."""
    assert format_range(*parse_source(text)) == text


@pytest.mark.parametrize(
    ("text", "wide"),
    [("10.0.0.0/8", False), ("10.0.0.0/7", True), ("10.0.0.0-11.0.0.0", True), ("0.0.0.0/0", True), ("2001::/16", False),
     ("2000::/15", True), ("::/0", True), ("198.51.100.7", False), ("::ffff:0.0.0.0/96", True)],
)  # fmt: skip
def test_what_is_too_much_to_be_meant(text: str, wide: bool) -> None:
    """IPv4 networks shorter than /8 and IPv6 networks shorter than /16 are wide, and so are ranges as large."""
    assert is_wide(parse_source(text)) is wide


def test_the_latest_word_about_a_source_counts() -> None:
    """A ban of exactly the same source replaces the one before, also when it is to end sooner."""
    found = BanList()
    first, second = ban("198.51.100.7", until=None, reason="a"), ban("198.51.100.7", until=2000.0, reason="b")
    assert found.add(first) is None
    assert found.add(second) is first
    assert list(found) == [second]


@pytest.mark.parametrize(
    ("lifted", "removed", "remaining"),
    [
        ("198.51.100.7", ["198.51.100.7"], ["198.51.100.0/24"]),
        ("198.51.100.0/24", ["198.51.100.0/24", "198.51.100.7", "198.51.100.8-198.51.100.20"], []),
        ("198.51.100.0/25", ["198.51.100.7", "198.51.100.8-198.51.100.20"], ["198.51.100.0/24"]),
        ("198.51.100.0-198.51.100.15", ["198.51.100.7"], ["198.51.100.0/24", "198.51.100.8-198.51.100.20"]),
        ("198.51.100.200", [], ["198.51.100.0/24"]),
        ("203.0.113.1", [], []),
        ("2001:db8::1", [], ["2001:db8::/32"]),
        ("2001:db8::/32", ["2001:db8::/32"], []),
        ("0.0.0.0/0", ["198.51.100.0/24", "198.51.100.7", "198.51.100.8-198.51.100.20"], []),
        ("::ffff:198.51.100.7", ["198.51.100.7"], ["198.51.100.0/24"]),
    ],
)
def test_lifting_removes_what_lies_inside_and_names_what_remains(
    lifted: str, removed: list[str], remaining: list[str]
) -> None:
    """Bans inside the given source go; those that also ban others stay, and are named."""
    found = filled("198.51.100.0/24", "198.51.100.7", "198.51.100.8-198.51.100.20", "2001:db8::/32")
    gone, stays = found.lift([parse_source(lifted)])
    assert names(gone) == removed
    assert names(stays) == remaining
    assert len(found) == 4 - len(removed)


SMALL = st.tuples(st.sampled_from([4, 6]), st.integers(0, 9), st.integers(0, 9)).map(
    lambda item: (item[0], min(item[1:]), max(item[1:]))
)


@settings(max_examples=400, deadline=None)
@given(st.lists(SMALL, max_size=8), st.lists(SMALL, max_size=3))
def test_lifting_agrees_with_asking_about_each_address(banned: list[banlist.Source], lifted: list[banlist.Source]) -> None:
    """A ban is removed exactly when all its addresses are lifted, and remains in sight when some of them are."""
    found = BanList()
    for source in banned:
        found.add(Ban(source, None, "", 0, 0.0))
    free = {(family, at) for family, first, last in lifted for at in range(first, last + 1)}
    gone, stays = found.lift(lifted)
    for source in set(banned):
        family, first, last = source
        inside = [(family, at) in free for at in range(first, last + 1)]
        assert (source in {one.source for one in gone}) == all(inside)
        assert (source in {one.source for one in stays}) == (any(inside) and not all(inside))


CHANGES = st.lists(st.tuples(st.sampled_from(["add", "lift", "expire", "look"]), SMALL), max_size=12)


@settings(max_examples=400, deadline=None)
@given(CHANGES)
def test_what_is_covered_follows_every_change(changes: list[tuple[str, banlist.Source]]) -> None:
    """Whatever was added, lifted and expired in between, the addresses covered are those of the bans in the list."""
    found = BanList()
    now = 0.0
    for what, source in changes:
        now += 1.0
        if what == "add":
            found.add(Ban(source, now + 3.0 if source[1] % 2 else None, "", 0, now))
        elif what == "lift":
            found.lift([source])
        elif what == "expire":
            found.expire(now)
        else:
            found.covered()
    for family in (4, 6):
        for at in range(11):
            wanted = any(ban.source[0] == family and ban.source[1] <= at <= ban.source[2] for ban in found)
            assert found.covered().contains(family, at) == wanted
    assert list(BanList.parse(found.dump())) == list(found)


def test_bans_end_when_their_time_has_come() -> None:
    """Those that are over are given back, once; a ban that was made anew ends at its new time."""
    found = BanList()
    for one in (ban("10.0.0.1", 5.0), ban("10.0.0.2", 6.0), ban("10.0.0.3"), ban("10.0.0.1", 9.0)):
        found.add(one)
    assert found.next_end() == 5.0
    assert names(found.expire(5.5)) == []
    assert names(found.expire(6.0)) == ["10.0.0.2"]
    assert names(found.expire(100.0)) == ["10.0.0.1"]
    assert found.next_end() is None
    assert names(list(found)) == ["10.0.0.3"]


def test_a_ban_that_was_lifted_does_not_end_again() -> None:
    """The end of a ban that is gone means nothing, nor does it for a later one without end."""
    found = BanList()
    found.add(ban("10.0.0.1", 5.0))
    found.lift([parse_source("10.0.0.1")])
    found.add(ban("10.0.0.1"))
    assert found.expire(10.0) == []
    assert len(found) == 1


def test_what_touches_a_source() -> None:
    """The bans that cover at least a part of a source, of its family."""
    found = filled("198.51.100.0/24", "198.51.100.7", "203.0.113.0/24", "::c633:6407")
    assert names(list(found.touching(parse_source("198.51.100.7")))) == ["198.51.100.0/24", "198.51.100.7"]
    assert names(list(found.touching(parse_source("198.51.0.0/16")))) == ["198.51.100.0/24", "198.51.100.7"]
    assert names(list(found.touching(parse_source("198.51.100.8")))) == ["198.51.100.0/24"]


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    """Sources, ends, reasons, who and when survive; the file is for its owner alone, and JSON."""
    found = BanList()
    for one in (
        ban("198.51.100.0/24", 2e9 + 0.5, 'he said "no"', 1000, 1.7e9), ban("2001:db8::5", None, "", 0, 1.7e9),
        ban("10.0.0.1-10.0.0.9"), ban("0.0.0.0/0"), ban("::/0"),
    ):  # fmt: skip
        found.add(one)
    banlist.write(str(tmp_path), found.dump())
    assert list(banlist.read(str(tmp_path))) == list(found)
    assert os.listdir(tmp_path) == [banlist.FILE]
    assert (tmp_path / banlist.FILE).stat().st_mode & 0o777 == 0o600
    assert json.loads((tmp_path / banlist.FILE).read_text())["version"] == 1
    banlist.write(str(tmp_path), BanList().dump())
    assert list(banlist.read(str(tmp_path))) == []


def test_without_a_file_nobody_is_banned(tmp_path: Path) -> None:
    """The first start has none."""
    assert len(banlist.read(str(tmp_path))) == 0


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """A failed write is an error, and the list of before is still there; what a killed run left is no obstacle."""
    banlist.write(str(tmp_path), filled("10.0.0.1").dump())
    (tmp_path / f"{banlist.FILE}.new").write_text("half a li")
    banlist.write(str(tmp_path), filled("10.0.0.2").dump())
    (tmp_path / f"{banlist.FILE}.new").mkdir()
    with pytest.raises(OSError):
        banlist.write(str(tmp_path), filled("10.0.0.3").dump())
    assert names(list(banlist.read(str(tmp_path)))) == ["10.0.0.2"]


ROW = ["198.51.100.7", "198.51.100.7", None, "", 0, 1000.0]


def with_row(at: int, value: object) -> str:
    """Return the text of a file in which one value is another."""
    row = [*ROW]
    row[at] = value  # type: ignore[call-overload]
    return json.dumps({"version": 1, "bans": [row]})


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", "\0" * 100, '{"version": 1}', '{"version": 2, "bans": []}', '{"version": 1, "bans": 7}',
        '{"version": 1, "bans": [[]]}', '{"version": 1, "bans": ["abcdef"]}', '{"version": 1, "bans": [{"a": 1}]}',
        "[" * 100_000, with_row(0, 7), with_row(0, "198.51.100.8"), with_row(0, "nobody"), with_row(1, "2001:db8::1"),
        with_row(0, "198.51.100.07"), with_row(2, "soon"), with_row(2, -1), with_row(2, float("nan")), with_row(2, 1e300),
        with_row(3, None), with_row(4, "root"), with_row(4, -1), with_row(4, 1 << 40), with_row(5, None), with_row(5, float("inf")),
        json.dumps({"version": 1, "bans": [["::ffff:1.2.3.4", "::ffff:1.2.3.4", None, "", 0, 0]]}),
        json.dumps({"version": 1, "bans": [[*ROW, "more"]]}),
    ],
)  # fmt: skip
def test_a_file_that_we_did_not_write_is_refused(text: str, tmp_path: Path) -> None:
    """Whatever is wrong with it, it is one kind of error, and the file can be set aside."""
    (tmp_path / banlist.FILE).write_text(text)
    with pytest.raises(BanFileError):
        banlist.read(str(tmp_path))
    banlist.set_aside(str(tmp_path))
    assert (tmp_path / banlist.BROKEN).read_text() == text
    assert len(banlist.read(str(tmp_path))) == 0


def test_other_things_in_its_place_are_refused(tmp_path: Path) -> None:
    """Bytes that are no text, a pipe, a folder, a link: none of them is followed, waited for or taken for an empty list."""
    place = tmp_path / banlist.FILE
    place.write_bytes(b'{"version": 1, "bans": []}\xff')
    with pytest.raises(BanFileError):
        banlist.read(str(tmp_path))
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(BanFileError):
        banlist.read(str(tmp_path))
    place.unlink()
    (tmp_path / "elsewhere").write_text(BanList().dump())
    place.symlink_to("elsewhere")
    with pytest.raises(OSError):
        banlist.read(str(tmp_path))
    place.unlink()
    place.mkdir()
    with pytest.raises((OSError, BanFileError)):
        banlist.read(str(tmp_path))


def test_reasons_cannot_carry_anything_that_a_terminal_would_obey() -> None:
    """A reason is one line of bounded length, also when it comes from the file."""
    assert banlist.clean_reason("a\x1b[2J\nb") == "a?[2J?b"
    assert len(banlist.clean_reason("x" * 10_000)) == banlist.LONGEST_REASON
    (read,) = BanList.parse(with_row(3, "a\x1b]0;b\x07"))
    assert read.reason == "a?]0;b?"


@given(st.lists(SMALL, max_size=5))
@settings(max_examples=100, deadline=None)
def test_every_list_survives_its_text(sources: list[banlist.Source]) -> None:
    """Parsing what was dumped gives the same list; every address in it is one that the standard library knows."""
    found = BanList()
    for number, source in enumerate(sources):
        found.add(Ban(source, float(number) if number % 2 else None, f"r{number}", number, 5.0))
    again = BanList.parse(found.dump())
    assert list(again) == list(found)
    for row in json.loads(found.dump())["bans"]:
        ipaddress.ip_address(row[0])
