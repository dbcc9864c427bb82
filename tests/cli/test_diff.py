"""`gatekeeper diff`: who gets another verdict, for people and for programs, and what the exit code says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import gatekeeper

OLD = """\
version: 1
listeners:
  - {name: ssh, listen: "*:22", backend: "127.0.0.1:2222"}
  - {name: range, listen: "0.0.0.0:8000-8010", backend: "10.0.0.1"}
  - {name: dns, protocol: udp, listen: "0.0.0.0:53", backend: "10.0.0.1:5353"}
  - {name: app, listen: "unix:/run/app.sock", backend: "127.0.0.1:80"}
sets:
  office: [198.51.100.0/24, "2001:db8:42::/48"]
default: deny
rules:
  - {name: office-ssh, action: allow, from: office, to: ssh}
  - {name: on-this-machine, action: allow, to: app}
  - {name: web, action: allow, from: 10.0.0.0/8, to: "8000-8010"}
"""


@pytest.fixture
def files(tmp_path: Path) -> Any:
    """Return a function that writes OLD and an edited copy, and compares them with more arguments."""

    def compare(*edits: tuple[str, str], argv: tuple[str, ...] = (), terminal: bool = False) -> Any:
        new = OLD
        for before, after in edits:
            assert before in new
            new = new.replace(before, after)
        old_path, new_path = tmp_path / "old.yaml", tmp_path / "new.yaml"
        old_path.write_text(OLD)
        new_path.write_text(new)
        return gatekeeper("diff", *argv, str(old_path), str(new_path), terminal=terminal)

    return compare


def document(files: Any, *edits: tuple[str, str], argv: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON of a comparison that finds something."""
    done = files(*edits, argv=("--json", *argv))
    assert (done.code, done.err) == (1, "")
    found = json.loads(done.out)
    assert isinstance(found, dict)
    return found


def test_the_same_file_is_0(files: Any) -> None:
    """Nothing changes: exit code 0, one sentence, and empty lists for programs."""
    assert (files().code, files().out) == (0, "nothing changes\n")
    done = files(argv=("--json",))
    assert (done.code, json.loads(done.out)) == (
        0, {"changes": [], "opened": [], "closed": [], "moved": [], "settings": []}
    )  # fmt: skip


def test_another_wording_of_the_same_is_no_change(files: Any) -> None:
    """A set written in another way, a rule that cannot match, a comment: what is compared is what holds."""
    done = files(("198.51.100.0/24", "198.51.100.128/25, 198.51.100.0-198.51.100.127"), ("default: deny", "default: deny # sic"))
    assert (done.code, done.out) == (0, "nothing changes\n")


def test_a_change_of_verdicts(files: Any) -> None:
    """Whoever gets another action is told as the fewest networks, with both verdicts and the rules behind them."""
    found = document(files, ("198.51.100.0/24", "198.51.100.0/25"), ('"2001:db8:42::/48"', '"2001:db8:42::/47"'))
    assert found["changes"] == [
        {
            "protocol": "tcp", "ports": [[22, 22]], "hosts": ["::"], "listeners": ["ssh"],
            "sources": ["2001:db8:43::/48"],
            "before": {"action": "deny", "rule": None}, "after": {"action": "allow", "rule": "office-ssh"},
        },
        {
            "protocol": "tcp", "ports": [[22, 22]], "hosts": ["0.0.0.0"], "listeners": ["ssh"],
            "sources": ["198.51.100.128/25"],
            "before": {"action": "allow", "rule": "office-ssh"}, "after": {"action": "deny", "rule": None},
        },
    ]  # fmt: skip


def test_people_see_who_gets_in_first(files: Any) -> None:
    """Openings stand first, the text names port, listener, both verdicts and the networks."""
    done = files(("198.51.100.0/24", "198.51.101.0/24"), ("to: app", "to: range"))
    assert done.code == 1
    assert done.out == (
        "tcp 22 (ssh): deny by default -> allow by office-ssh\n  198.51.101.0/24\n"
        "tcp 8000-8010 (range): deny by default -> allow by on-this-machine\n"
        "  0.0.0.0/5\n  8.0.0.0/7\n  11.0.0.0/8\n  12.0.0.0/6\n  16.0.0.0/4\n  32.0.0.0/3\n  64.0.0.0/2\n  128.0.0.0/1\n"
        "unix:/run/app.sock (app): allow by on-this-machine -> deny by default\n  local peers\n"
        "tcp 22 (ssh): allow by office-ssh -> deny by default\n  198.51.100.0/24\n"
    )
    assert "another rule decides" in done.err  # for 10.0.0.0/8


def test_colour_is_for_terminals(files: Any) -> None:
    """A terminal gets colour, a pipe gets none."""
    edit = ("to: app", "to: range")
    assert "\033[" in files(edit, terminal=True).out
    assert "\033[" not in files(edit).out


def test_only_another_rule(files: Any) -> None:
    """A rule with a new name changes nothing for anybody: told with --rules only."""
    edit = ("name: web,", "name: internal-web,")
    done = files(edit)
    assert (done.code, done.out) == (0, "nothing changes\n")
    assert "--rules" in done.err
    (change,) = document(files, edit, argv=("--rules",))["changes"]
    assert (change["before"], change["after"]) == (
        {"action": "allow", "rule": "web"}, {"action": "allow", "rule": "internal-web"}
    )  # fmt: skip
    assert change["sources"] == ["10.0.0.0/8"]


def test_local_peers(files: Any) -> None:
    """Peers of unix sockets are a source of their own."""
    (change,) = document(files, ("name: on-this-machine, action: allow", "name: on-this-machine, action: drop"))["changes"]
    assert (change["hosts"], change["ports"], change["sources"]) == (["unix:/run/app.sock"], [], ["unix"])
    assert (change["before"]["action"], change["after"]["action"]) == ("allow", "drop")


def test_listeners_that_are_opened_closed_and_moved(files: Any) -> None:
    """Addresses that one file alone has, and those with another backend, are told; for programs each with its verdicts."""
    edits = ('"0.0.0.0:53", backend: "10.0.0.1:5353"', '"0.0.0.0:54", backend: "10.0.0.1:5353"'), (":2222", ":2223")
    found = document(files, *edits)
    assert found["opened"] == [{"protocol": "udp", "address": "0.0.0.0:54", "listener": "dns", "backend": "10.0.0.1:5353"}]
    assert found["closed"] == [{"protocol": "udp", "address": "0.0.0.0:53", "listener": "dns", "backend": "10.0.0.1:5353"}]
    assert [(one["address"], one["before"]["backend"], one["after"]["backend"]) for one in found["moved"]] == [
        (address, "127.0.0.1:2222", "127.0.0.1:2223") for address in ("0.0.0.0:22", "[::]:22")
    ]
    nothing = {"action": None, "rule": None}
    assert [(one["ports"], one["before"], one["after"]) for one in found["changes"]] == [
        ([[53, 53]], {"action": "deny", "rule": None}, nothing),
        ([[54, 54]], nothing, {"action": "deny", "rule": None}),
    ]
    done = files(*edits)
    assert done.out.splitlines() == [
        "moved   ssh  0.0.0.0:22/tcp  127.0.0.1:2222 -> 127.0.0.1:2223",
        "moved   ssh  [::]:22/tcp     127.0.0.1:2222 -> 127.0.0.1:2223",
        "opened  dns  0.0.0.0:54/udp  10.0.0.1:5353",
        "closed  dns  0.0.0.0:53/udp  10.0.0.1:5353",
    ]


def test_ranges_of_ports_are_told_as_ranges(files: Any) -> None:
    """A listener of many ports that keeps the port is one line, and one change."""
    done = files(("0.0.0.0:8000-8010", "0.0.0.0:8005-8020"))
    assert "opened  range  0.0.0.0:8011-8020/tcp  10.0.0.1\n" in done.out
    assert "closed  range  0.0.0.0:8000-8004/tcp  10.0.0.1\n" in done.out
    # The rule still says 8000-8010, so the new ports are closed to everybody, and the old ones lose 10.0.0.0/8.
    assert "tcp 8000-8004 (range): allow by web -> closed\n  10.0.0.0/8\n" in done.out


def test_settings(files: Any) -> None:
    """Settings of a listener and of the file are told, and which of them take a restart."""
    edits = ('"0.0.0.0:53",', '"0.0.0.0:53", idle_timeout: 20s, max_sessions: 7,'), ("default: deny", "default: deny\nworkers: 3")
    done = files(*edits)
    assert (done.code, done.out) == (
        1, "dns: idle_timeout: 60s -> 20s\ndns: max_sessions: 10000 -> 7\nworkers: auto -> 3 (takes a restart)\n"
    )  # fmt: skip
    assert document(files, *edits)["settings"][2] == {
        "listener": None, "key": "workers", "before": None, "after": 3, "restart": True
    }  # fmt: skip


def test_many_networks_are_cut_short_for_people(files: Any) -> None:
    """People see the first networks and how many there are; --limit says how many, and JSON has all."""
    many = [f"192.0.2.{number}" for number in range(0, 256, 2)]
    edit = ("198.51.100.0/24", f"198.51.100.0/24, {', '.join(many)}")
    lines = files(edit).out.splitlines()
    assert lines[1:] == [*(f"  {network}" for network in many[:10]), "  and 118 more; in all 128 IPv4 networks with 128 addresses"]
    assert len(files(edit, argv=("--limit", "0")).out.splitlines()) == 1 + len(many)
    assert document(files, edit)["changes"][0]["sources"] == many


def test_a_long_list(files: Any, tmp_path: Path) -> None:
    """65,536 networks more: every one of them is in the JSON, and the text stays short."""
    (tmp_path / "list.txt").write_text("".join(f"{number >> 8}.{number & 255}.7.0/25\n" for number in range(65536)))
    edit = ("office: [", "blocked: {file: list.txt}\n  office: ["), ("rules:", "rules:\n  - {name: blocked, action: drop, from: blocked}")
    found = document(files, *edit)
    sources = {tuple(change["before"].values()): change["sources"] for change in found["changes"] if change["ports"] == [[22, 22]]}
    assert len(sources["deny", None]) == 65536
    assert sources["deny", None][300] == "1.44.7.0/25"
    assert len(files(*edit).out.splitlines()) < 60


def test_a_file_with_errors_is_1(files: Any) -> None:
    """Its problems are printed on standard error, and nothing on standard output."""
    done = files(("default: deny", "default: maybe"), argv=("--json",))
    assert (done.code, done.out) == (1, "")
    assert "new.yaml:9:" in done.err


def test_an_unreadable_file_is_3(tmp_path: Path) -> None:
    """A file that is not there: exit code 3 and its name."""
    (tmp_path / "old.yaml").write_text(OLD)
    done = gatekeeper("diff", str(tmp_path / "old.yaml"), str(tmp_path / "missing.yaml"))
    assert (done.code, done.out) == (3, "")
    assert "missing.yaml" in done.err


def test_standard_input(tmp_path: Path) -> None:
    """One of the two can be standard input, not both."""
    (tmp_path / "old.yaml").write_text(OLD)
    assert gatekeeper("diff", str(tmp_path / "old.yaml"), "-", stdin=OLD).code == 0
    assert gatekeeper("diff", "-", str(tmp_path / "old.yaml"), stdin=OLD.replace("deny", "drop")).code == 1
    assert gatekeeper("diff", "-", "-", stdin=OLD).code == 2
