from __future__ import annotations

import hashlib
import ipaddress
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gatekeeper.config import lists
from gatekeeper.config.addresses import parse_source
from gatekeeper.config.lists import BLOCK_BYTES, LONGEST_LINE_BYTES, MOST_PROBLEMS, ListFile, load_list
from gatekeeper.config.problems import Severity
from gatekeeper.policy.ranges import AddressSet


def load(folder: Path, text: str | bytes) -> ListFile:
    """Read a list with this content."""
    path = folder / "list.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_list(str(path))


def said(found: ListFile) -> list[tuple[int, int, str]]:
    """Line, column and message of every problem."""
    return [(problem.place.line, problem.place.column, problem.message) for problem in found.problems]


def v4(first: str, last: str | None = None) -> tuple[int, int]:
    """Both ends of a range, as numbers."""
    return int(ipaddress.IPv4Address(first)), int(ipaddress.IPv4Address(last or first))


def v6(first: str, last: str | None = None) -> tuple[int, int]:
    """Both ends of a range, as numbers."""
    return int(ipaddress.IPv6Address(first)), int(ipaddress.IPv6Address(last or first))


@pytest.mark.parametrize(
    ("text", "entries", "addresses"),
    [
        ("10.0.0.1\n", 1, AddressSet.of(v4=[v4("10.0.0.1")])),
        ("10.0.0.1", 1, AddressSet.of(v4=[v4("10.0.0.1")])),
        ("10.0.0.0/8\n192.0.2.0/24\n", 2, AddressSet.of(v4=[v4("10.0.0.0", "10.255.255.255"), v4("192.0.2.0", "192.0.2.255")])),
        ("10.0.0.0/8\r\n192.0.2.1 \r\n", 2, AddressSet.of(v4=[v4("10.0.0.0", "10.255.255.255"), v4("192.0.2.1")])),
        ("\ufeff10.0.0.1\n", 1, AddressSet.of(v4=[v4("10.0.0.1")])),
        ("# café\n\n  10.0.0.1/32\t# ours — really\n#\n", 1, AddressSet.of(v4=[v4("10.0.0.1")])),
        ("10.0.0.1#close\n", 1, AddressSet.of(v4=[v4("10.0.0.1")])),
        ("10.0.0.5-10.0.0.9\n10.0.0.1-10.0.0.4\n", 2, AddressSet.of(v4=[v4("10.0.0.1", "10.0.0.9")])),
        ("2001:db8::/32\n2001:db9::1\n", 2, AddressSet.of(v6=[v6("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"), v6("2001:db9::1")])),
        ("2001:db8::1-2001:db8::9\n", 1, AddressSet.of(v6=[v6("2001:db8::1", "2001:db8::9")])),
        ("::ffff:10.0.0.1\n::ffff:a00:0/104\n", 2, AddressSet.of(v4=[v4("10.0.0.0", "10.255.255.255")])),
        ("::ffff:10.0.0.1-::ffff:10.0.0.3\n", 1, AddressSet.of(v4=[v4("10.0.0.1", "10.0.0.3")])),
        ("0.0.0.0/0\n::/0\n", 2, AddressSet.EVERYTHING),
        ("255.255.255.255\nffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff\n", 2,
         AddressSet.of(v4=[v4("255.255.255.255")], v6=[v6("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")])),
        ("10.0.0.1\n10.0.0.1\n10.0.0.0/30\n", 3, AddressSet.of(v4=[v4("10.0.0.0", "10.0.0.3")])),
    ],
)  # fmt: skip
def test_what_a_list_may_hold(tmp_path: Path, text: str, entries: int, addresses: AddressSet) -> None:
    """Addresses, networks and ranges of both families, comments, blank lines, blanks, any line ending."""
    found = load(tmp_path, text)
    assert found.problems == ()
    assert found.entries == entries
    assert found.addresses == addresses


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing yet\n"])
def test_an_empty_list_is_a_warning(tmp_path: Path, text: str) -> None:
    """A list without an entry is not an error, but it is said."""
    found = load(tmp_path, text)
    assert said(found) == [(1, 1, "this list is empty: it matches nobody")]
    assert found.problems[0].severity is Severity.WARNING
    assert not found.addresses


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        ("10.0.0.5/8", 1, 'network "10.0.0.5/8" has host bits set, did you mean "10.0.0.0/8"?'),
        ("   10.0.0.5/8 # x", 4, 'network "10.0.0.5/8" has host bits set, did you mean "10.0.0.0/8"?'),
        ("010.0.0.1", 1, "leading zeros"),
        ("10.0.0.1/33", 1, "33"),
        ("10.0.0.1/08", 1, "08"),
        ("10.0.0.1/", 1, "10.0.0.1/"),
        ("/24", 1, "/24"),
        ("10.0.0.0/8/8", 1, "8/8"),
        ("10.0.0", 1, "10.0.0"),
        ("167772161", 1, "bare number"),
        ("0x0a000001", 1, "0x0a000001"),
        ("10.0.0.1 10.0.0.2", 1, "one entry a line"),
        ("10.0.0.1, 10.0.0.2", 1, "one entry a line"),
        ("10.0.0.9-10.0.0.1", 1, "backwards"),
        ("10.0.0.1-", 1, "10.0.0.1-"),
        ("-10.0.0.1", 1, "-10.0.0.1"),
        ("10.0.0.1-10.0.0.2-10.0.0.3", 1, "10.0.0.2-10.0.0.3"),
        ("10.0.0.1-::1", 1, "one for each"),
        ("fe80::1%eth0", 1, "zone"),
        ("2001:db8::1/32", 1, "host bits"),
        ("example.net", 1, "host name"),
        ("any", 1, "any"),
        ("10.0.0.1\x00", 1, "10.0.0.1"),
        ("\u0661\u0660.0.0.1", 1, "\u0661\u0660.0.0.1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, column: int, message: str) -> None:
    """The problem stands at the entry, says what is wrong with it, and the lines around it still count."""
    found = load(tmp_path, f"192.0.2.1\n\n{line}\n192.0.2.2\n")
    assert [(problem.place.line, problem.place.column) for problem in found.problems] == [(3, column)]
    assert message in found.problems[0].message
    assert found.problems[0].severity is Severity.ERROR
    assert found.entries == 2
    assert found.addresses == AddressSet.of(v4=[v4("192.0.2.1", "192.0.2.2")])


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    """A byte that is not UTF-8 is shown where it is, even in a comment."""
    found = load(tmp_path, b"10.0.0.1\n# caf\xe9\n")
    assert said(found) == [(2, 6, "this is not UTF-8 text")]


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    """What is no list at all costs bounded memory."""
    found = load(tmp_path, b"\0" * (BLOCK_BYTES + 3 * LONGEST_LINE_BYTES))
    assert any("is longer than" in problem.message for problem in found.problems)
    assert not found.addresses


def test_many_wrong_lines_are_counted(tmp_path: Path) -> None:
    """The first twenty are shown, the others counted, behind them."""
    exact = load(tmp_path, "nonsense\n" * MOST_PROBLEMS)
    assert len(exact.problems) == MOST_PROBLEMS
    found = load(tmp_path, "nonsense\n" * (MOST_PROBLEMS + 7))
    assert len(found.problems) == MOST_PROBLEMS + 1
    assert found.problems[-1].message == "and 7 more wrong lines in this list"
    assert sorted(found.problems) == list(found.problems)


def test_a_wrong_line_deep_in_a_large_list_is_named(tmp_path: Path) -> None:
    """The line's number is right many blocks into the file, and everything else of the list is there."""
    lines = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(100_000)]
    lines[77_777] = "10.1.2.3/24"
    text = "\n".join(lines)
    assert len(text) > 4 * BLOCK_BYTES
    found = load(tmp_path, text)
    assert [(line, column) for line, column, _ in said(found)] == [(77_778, 1)]
    assert found.entries == 99_999
    assert found.digest == hashlib.sha256(text.encode()).hexdigest()
    assert found.addresses == AddressSet.of(v4=[v4("10.0.0.0", "10.1.134.159")]) - AddressSet.of(
        v4=[(10 << 24 | 77_777, 10 << 24 | 77_777)]
    )


def test_unreadable_files_raise(tmp_path: Path) -> None:
    """A file that is not there is the caller's to report."""
    with pytest.raises(FileNotFoundError):
        load_list(str(tmp_path / "missing.txt"))


addresses = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.sampled_from(["::ffff:198.51.100.7", "::", "::1.2.3.4", "1:2:3:4:5:6:7::", "2001:DB8::A", "0.0.0.0", "255.255.255.255"]),
)
entries = st.one_of(
    addresses,
    st.builds(lambda address, prefix: f"{address}/{prefix}", addresses, st.integers(0, 130)),
    st.builds(
        lambda address, prefix: str(ipaddress.ip_network(f"{address}/{prefix}", strict=False)),
        st.ip_addresses(), st.integers(0, 32),
    ),
    st.builds(lambda first, last: f"{first}-{last}", addresses, addresses),
    st.text(alphabet="0123456789abcdf.:/-# \t\r%x", max_size=12),
)  # fmt: skip


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(entries, max_size=8))
@example(["1.2.3.4", "24/5.6.7.8", "24/1.2.3.4/24"])
@example(["1.2.3.4-", "1.2.3.5"])
@example(["10.0.0.0/8 ", "11.0.0.0/8"])
@example([""])
def test_the_fast_path_reads_what_the_slow_path_reads(tmp_path: Path, listed: list[str]) -> None:
    """Whatever the lines, both ways accept the same ones and make the same set of them."""
    found = load(tmp_path, "\n".join(listed))
    want: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
    wrong = []
    # A carriage return within a line is no line end.
    for number, line in enumerate("\n".join(listed).split("\n"), 1):
        text = line.partition("#")[0].strip(" \t\r")
        if text:
            try:
                family, first, last = parse_source(text)
            except ValueError:
                wrong.append(number)
            else:
                want[family].append((first, last))
    assert found.addresses == AddressSet.of(want[4], want[6])
    assert [problem.place.line for problem in found.problems if problem.severity is Severity.ERROR] == wrong
    assert found.entries == len(want[4]) + len(want[6])


@pytest.mark.parametrize("kind", ["networks", "mixed"])
def test_clean_blocks_take_the_fast_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Nothing that a clean list may hold makes the reader go line by line."""
    dice = random.Random(3)
    shapes = ["{}/32", "{}", "{}  # seen", "2001:db8::{}/128", "::{}", "{}-255.255.255.255", "2001:db8::-2001:db8::1", "", "# note"]
    lines = [
        (shapes[0] if kind == "networks" else dice.choice(shapes)).format(ipaddress.IPv4Address(dice.getrandbits(32)))
        for _ in range(40_000)
    ]

    def slowly(self: object, block: bytes, line: int) -> None:
        raise AssertionError(f"block at line {line} went line by line")

    monkeypatch.setattr(lists._Reader, "_read_slowly", slowly)
    found = load(tmp_path, "\n".join(lines))
    assert found.entries == sum(1 for line in lines if line.partition("#")[0].strip())
