"""`gatekeeper explain`: the verdict, the rule that decides and where it is, and what nearly matched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import Done, gatekeeper

RULES = """\
version: 1
listeners:
  - {name: ssh, listen: ["127.0.0.1:22", "[::1]:22"], backend: "127.0.0.1:2222"}
  - {name: dns, protocol: udp, listen: "127.0.0.1:53", backend: "127.0.0.1:5353"}
  - {name: dns-tcp, listen: "127.0.0.1:53", backend: "127.0.0.1:5353"}
  - {name: local, listen: "unix:/run/x.sock", backend: "127.0.0.1:5353"}
sets:
  office: [198.51.100.0/24, "2001:db8:42::/48"]
default: deny
rules:
  - name: scanners
    action: drop
    from: 203.0.113.0/24
  - name: office-ssh
    action: allow
    from: office
    except: 198.51.100.66
    to: ssh
  - name: public-dns
    action: allow
    to: "53/udp"
  - name: on-this-machine
    action: allow
    to: local
"""
KEYS = {"action", "rule", "reason", "listener", "address", "file", "line", "default", "trace", "others"}


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rule file of this table."""
    path = tmp_path_factory.mktemp("explain") / "rules.yaml"
    path.write_text(RULES)
    return path


def explain(rules: Path, *argv: str) -> tuple[int, dict[str, Any]]:
    """Return exit code and JSON."""
    done = gatekeeper("explain", str(rules), *argv, "--json")
    return done.code, json.loads(done.out)


@pytest.mark.parametrize(
    ("source", "port", "action", "rule", "listener"),
    [
        ("198.51.100.7", "22", "allow", "office-ssh", "ssh"),
        ("::ffff:198.51.100.7", "22", "allow", "office-ssh", "ssh"),
        ("2001:db8:42::9", "22/tcp", "allow", "office-ssh", "ssh"),
        ("198.51.100.66", "22", "deny", None, "ssh"),
        ("203.0.113.9", "22", "drop", "scanners", "ssh"),
        ("203.0.113.9", "53/udp", "drop", "scanners", "dns"),
        ("192.0.2.1", "53/udp", "allow", "public-dns", "dns"),
        ("192.0.2.1", "53", "deny", None, "dns-tcp"),  # without a protocol the port is TCP
    ],
)
def test_the_verdict(rules: Path, source: str, port: str, action: str, rule: str | None, listener: str) -> None:
    """Action, rule and listener are right, and only an allowed connection exits with 0."""
    code, answer = explain(rules, source, port)
    assert (answer["action"], answer["rule"], answer["listener"]) == (action, rule, listener)
    assert code == (0 if action == "allow" else 1)
    assert answer.keys() >= KEYS
    assert answer["reason"] == ("default" if rule is None else "rule")


def test_the_place_of_what_decides(rules: Path) -> None:
    """File and line are those of the rule, or of `default:`."""
    line = {text.strip(): number for number, text in enumerate(RULES.splitlines(), 1)}
    for source, wanted in (("198.51.100.7", line["- name: office-ssh"]), ("192.0.2.1", line["default: deny"])):
        _code, answer = explain(rules, source, "22")
        assert (answer["file"], answer["line"]) == (str(rules), wanted)


def test_the_trace_says_why_earlier_rules_did_not_decide(rules: Path) -> None:
    """Each earlier rule is there in order with the field on which it failed."""
    _code, answer = explain(rules, "198.51.100.66", "22")
    assert [(step["rule"], step["failed"]) for step in answer["trace"]] == [
        ("scanners", ["source"]),
        ("office-ssh", ["except"]),
        ("public-dns", ["to"]),
        ("on-this-machine", ["to"]),
    ]
    assert all(step["line"] for step in answer["trace"])


def test_to_chooses_a_listener(rules: Path) -> None:
    """--to names the listener; a unix socket is asked for with the source and the port "unix"."""
    assert explain(rules, "unix", "unix", "--to", "local")[1]["rule"] == "on-this-machine"
    assert explain(rules, "192.0.2.1", "53/udp", "--to", "dns")[0] == 0


def test_people_get_sentences(rules: Path) -> None:
    """The text names the verdict, the rule with file and line, and what nearly matched."""
    done = gatekeeper("explain", str(rules), "198.51.100.66", "22")
    assert done.code == 1
    assert "deny" in done.out
    assert f"{rules}:9" in done.out  # the default
    assert "office-ssh" in done.out
    assert "except" in done.out
    assert "\033" not in done.out


def test_where_nobody_listens(rules: Path) -> None:
    """A port without a listener is a no with the reason no_listener, and the text lists what there is."""
    code, answer = explain(rules, "192.0.2.1", "9999")
    assert (code, answer["action"], answer["reason"], answer["listener"]) == (1, None, "no_listener", None)
    assert "ssh" in gatekeeper("explain", str(rules), "192.0.2.1", "9999").out


@pytest.mark.parametrize(
    "argv",
    [
        ("300.1.1.1", "22"),
        ("198.51.100.0/24", "22"),
        ("198.51.100.7", "0"),
        ("198.51.100.7", "65536"),
        ("198.51.100.7", "22/sctp"),
        ("198.51.100.7", "ssh"),
        ("198.51.100.7", "22", "--to", "nonsense"),
    ],
)
def test_bad_usage_is_2(rules: Path, argv: tuple[str, ...]) -> None:
    """What is no single source, no port or no listener is bad usage, and the message repeats it."""
    done: Done = gatekeeper("explain", str(rules), *argv)
    assert (done.code, done.out) == (2, "")
    assert argv[-1].split("/")[-1] in done.err or argv[0] in done.err


def test_a_broken_file_is_1_and_its_problems_are_shown(tmp_path: Path) -> None:
    """Nothing can be explained by a file with errors: they are printed on standard error, exit code 1."""
    (tmp_path / "rules.yaml").write_text(RULES.replace("default: deny", "default: maybe"))
    done = gatekeeper("explain", str(tmp_path / "rules.yaml"), "192.0.2.1", "22")
    assert (done.code, done.out) == (1, "")
    assert "rules.yaml:9:" in done.err


def test_standard_input(rules: Path) -> None:
    """`-` reads the rules from standard input."""
    done = gatekeeper("explain", "-", "198.51.100.7", "22", stdin=RULES)
    assert (done.code, "<stdin>" in done.out) == (0, True)
