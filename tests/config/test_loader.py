from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gatekeeper import config
from gatekeeper.policy.model import Action, Backend, Endpoint, Protocol, Settings, Target
from gatekeeper.policy.ranges import AddressSet
from tests.config.support import HEAD, accepted, messages, write


def test_a_whole_file_becomes_a_policy(tmp_path: Path) -> None:
    """Names become addresses, ranges endpoints; rules of other files stand where they are included."""
    write(tmp_path / "lists/scanners.txt", "192.0.2.0/24\n::ffff:203.0.113.9\n")
    write(tmp_path / "rules.d/b.yaml", "- {name: second, action: deny, from: 192.0.2.1}\n")
    write(tmp_path / "rules.d/B.yaml", "- {name: first, action: allow, to: [22, 8000-8010/tcp]}\n")
    path = write(
        tmp_path / "rules.yaml",
        """\
version: 1
workers: 3
metrics: {listen: 127.0.0.1:9180}
audit: logs/audit.jsonl
state: state
listeners:
  - name: ssh
    listen: ["*:22", 127.0.0.1:8000-8001, unix:run/ssh.sock]
    backend: unix:sshd.sock
    idle_timeout: 1.5h
    max_sessions: 7
  - {name: dns, protocol: udp, listen: 0.0.0.0:53, backend: 10.0.0.1, max_responses: 0}
sets:
  staff: [office, 10.0.0.0/31]
  office: 198.51.100.0/24
  scanners: {file: lists/scanners.txt}
default: drop
rules:
  - name: scanners
    action: drop
    from: [scanners]
  - include: rules.d/*.yaml
  - name: last
    action: allow
    from: [staff, 2001:db8::1]
    except: office
    to: [ssh, 53/udp]
tests:
  - {from: any, to: dns, expect: deny}
""",
    )
    loaded = config.load(str(path))
    assert loaded.problems == []
    assert loaded.config is not None
    policy = loaded.config.policy

    ssh, dns = policy.listeners
    folder = str(tmp_path)
    assert [endpoint.key for endpoint in ssh.endpoints] == [
        "tcp:0.0.0.0:22", "tcp:[::]:22", "tcp:127.0.0.1:8000", "tcp:127.0.0.1:8001", f"tcp:unix:{folder}/run/ssh.sock",
    ]  # fmt: skip
    assert ssh.backend == Backend(0, f"{folder}/sshd.sock", 0)
    assert (ssh.connect_timeout_s, ssh.idle_timeout_s, ssh.half_close_timeout_s) == (5.0, 5400.0, 30.0)
    assert (ssh.max_responses, ssh.max_sessions) == (None, 7)
    assert (dns.protocol, dns.backend) == (Protocol.UDP, Backend(4, "10.0.0.1", 0))
    assert (dns.idle_timeout_s, dns.max_responses, dns.max_sessions) == (60.0, 0, 10_000)

    assert [rule.name for rule in policy.rules] == ["scanners", "first", "second", "last"]  # "B" is before "b" in bytes
    scanners, first, second, last = policy.rules
    assert scanners.sources.included == AddressSet.of(v4=[(0xC0000200, 0xC00002FF), (0xCB007109, 0xCB007109)])
    assert (first.targets, first.sources.anyone) == ((Target(None, 22, 22), Target(None, 8000, 8010, Protocol.TCP)), True)
    assert str(second.place) == f"{folder}/rules.d/b.yaml:1:3"
    assert last.sources.included == AddressSet.of(
        v4=[(0xC6336400, 0xC63364FF), (0x0A000000, 0x0A000001)], v6=[(0x20010DB8 << 96 | 1, 0x20010DB8 << 96 | 1)]
    )
    assert last.sources.excluded == AddressSet.of(v4=[(0xC6336400, 0xC63364FF)])
    assert (last.sources.from_text, last.sources.except_text) == ("staff, 2001:db8::1", "office")
    assert last.targets == (Target("ssh"), Target(None, 53, 53, Protocol.UDP))
    assert (policy.default, policy.default_place.line) == (Action.DROP, 17)
    assert [(test.expect, test.sources.anyone) for test in policy.tests] == [(Action.DENY, True)]
    assert loaded.config.settings == Settings(
        workers=3, metrics=Endpoint(Protocol.TCP, 4, "127.0.0.1", 9180), audit=f"{folder}/logs/audit.jsonl", state=f"{folder}/state"
    )
    assert [os.path.relpath(file, tmp_path) for file in loaded.config.files] == [
        "rules.yaml", "rules.d/B.yaml", "rules.d/b.yaml", "lists/scanners.txt",
    ]  # fmt: skip


def test_settings_have_defaults() -> None:
    """One worker per CPU, no metrics, audit on standard output, no state directory."""
    assert accepted(HEAD).settings == Settings()
    words = HEAD + "workers: auto\nmetrics: off\naudit: off\ncontrol: off\n"
    assert accepted(words).settings == Settings(audit="off", control="off")


@pytest.mark.parametrize(
    ("text", "socket", "group"),
    [
        ("/run/gatekeeper/control.sock", "/run/gatekeeper/control.sock", None),
        ("{socket: /run/x.sock, group: adm}", "/run/x.sock", "adm"),
        ("{group: adm}", None, "adm"),
        ("{socket: off}", "off", None),
    ],
)
def test_where_the_control_socket_is(text: str, socket: str | None, group: str | None) -> None:
    """`control` is a path, a path and a group, a group at the usual place, or off."""
    settings = accepted(f"{HEAD}control: {text}\n").settings
    assert (settings.control, settings.control_group) == (socket, group)


def test_a_relative_control_socket_is_beside_the_rule_file(tmp_path: Path) -> None:
    """A relative path starts at the folder of the file that names it, as everywhere."""
    rules = tmp_path / "rules.yaml"
    rules.write_text(f"{HEAD}control: ./control.sock\n")
    loaded = config.load(str(rules))
    assert loaded.config is not None
    assert loaded.config.settings.control == f"{tmp_path}/control.sock"


def test_anyone_is_any_without_except() -> None:
    """Peers without an address are meant by "any" alone."""
    rules = """\
sets: {office: [10.0.0.0/8]}
rules:
  - {name: a, action: allow}
  - {name: b, action: allow, from: any}
  - {name: c, action: allow, from: [any]}
  - {name: d, action: allow, from: any, except: office}
  - {name: e, action: allow, from: ["0.0.0.0/0", "::/0"]}
"""
    found = accepted(HEAD + rules).policy.rules
    assert [rule.sources.anyone for rule in found] == [True, True, True, False, False]
    assert found[3].sources.included is AddressSet.EVERYTHING


def test_equal_sources_are_one_object() -> None:
    """Rules that name the same set share it, so that a million networks are compiled once."""
    rules = "sets: {a: [10.0.0.0/8]}\nrules:\n" + "".join(f"  - {{name: r{i}, action: allow, from: a}}\n" for i in range(3))
    assert len({id(rule.sources.included) for rule in accepted(HEAD + rules).policy.rules}) == 1


def test_paths_start_from_the_file_that_names_them(tmp_path: Path) -> None:
    """Also in included files that include others, and from the working directory for standard input."""
    write(tmp_path / "etc/parts/one.yaml", "- include: more/two.yaml\n")
    write(tmp_path / "etc/parts/more/two.yaml", "- {name: deep, action: allow}\n")
    path = write(tmp_path / "etc/rules.yaml", HEAD + "rules:\n  - include: parts/one.yaml\n")
    loaded = config.load(str(path))
    assert loaded.config is not None
    assert [rule.name for rule in loaded.config.policy.rules] == ["deep"]


def test_standard_input_starts_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``<stdin>`` is a name, not a path."""
    write(tmp_path / "list.txt", "192.0.2.1\n")
    monkeypatch.chdir(tmp_path)
    text = HEAD + "sets: {a: {file: list.txt}}\nrules: [{name: r, action: allow, from: a}]\n"
    assert bool(accepted(text).policy.rules[0].sources.included)


def test_the_digest_is_over_everything_that_was_read(tmp_path: Path) -> None:
    """A changed list or included file changes it; reading again does not."""
    listed = write(tmp_path / "list.txt", "192.0.2.1\n")
    included = write(tmp_path / "more.yaml", "- {name: a, action: allow}\n")
    path = write(tmp_path / "rules.yaml", HEAD + "sets: {s: {file: list.txt}}\nrules: [{include: more.yaml}]\n")

    def digest() -> str:
        loaded = config.load(str(path))
        assert loaded.config is not None
        return loaded.config.digest

    seen = [digest()]
    assert digest() == seen[0]
    for changed in (listed, included, path):
        changed.write_text(changed.read_text() + "# a comment\n")
        seen.append(digest())
    assert len(set(seen)) == 4


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    """The rule file, an included file and a list alike: whoever writes them decides who gets in."""
    listed = write(tmp_path / "list.txt", "192.0.2.1\n")
    included = write(tmp_path / "more.yaml", "- {name: a, action: allow}\n")
    path = write(tmp_path / "rules.yaml", HEAD + "sets: {s: {file: list.txt}}\nrules: [{include: more.yaml}]\n")
    assert config.load(str(path)).config is not None
    for file in (listed, included, path):
        file.chmod(mode)
        loaded = config.load(str(path))
        assert loaded.config is None
        [problem] = loaded.problems
        assert "could let anybody in: chmod go-w" in problem.message
        file.chmod(0o600)


def test_check_foresees_that_a_file_will_be_refused(tmp_path: Path) -> None:
    """Whoever brings the text is told, but not refused: the text may be a candidate."""
    path = write(tmp_path / "rules.yaml", HEAD)
    path.chmod(0o664)
    loaded = config.check(str(path), HEAD.encode())
    assert loaded.config is not None
    assert [problem.severity for problem in loaded.problems] == ["warning"]


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """A FIFO that nobody writes to must not hold up a reload."""
    target = tmp_path / "rules.yaml"
    if kind == "folder":
        target.mkdir()
    elif kind == "fifo":
        os.mkfifo(target, 0o600)
    loaded = config.load(str(target))
    assert loaded.config is None
    assert [problem.code for problem in loaded.problems] == ["file"]


def test_a_file_is_at_most_4_mib() -> None:
    """Both sides of the limit; larger ones are told where addresses belong."""
    room = 4 * 1024 * 1024 - len(HEAD) - 2
    assert config.load("x", (HEAD + "#" + "x" * room + "\n").encode()).config is not None
    [problem] = config.load("x", (HEAD + "#" + "x" * (room + 1) + "\n").encode()).problems
    assert "list file" in problem.message


def test_a_set_that_names_sets_is_resolved_in_any_order() -> None:
    """A set may name one that is written below it."""
    found = accepted(HEAD + "sets: {a: [b, c], b: [c], c: [10.0.0.1]}\nrules: [{name: r, action: allow, from: a}]\n")
    assert found.policy.rules[0].sources.included == AddressSet.of(v4=[(0x0A000001, 0x0A000001)])


def test_an_included_file_is_shown_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems are rendered with the line of the file that they are in."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "more.yaml", "- name: a\n  action: alow\n")
    loaded = config.load("rules.yaml", (HEAD + "rules: [{include: more.yaml}]\n").encode())
    [problem] = loaded.problems
    assert config.render(problem, loaded.texts) == (
        'more.yaml:2:11: "alow" is not one of allow, deny and drop, did you mean "allow"? [rule.action]\n'
        "  |\n2 |   action: alow\n  |           ^~~~"
    )
    assert config.as_json(problem) == {
        "file": "more.yaml", "line": 2, "column": 11, "severity": "error", "code": "rule.action",
        "message": '"alow" is not one of allow, deny and drop, did you mean "allow"?',
    }  # fmt: skip
    json.dumps(config.as_json(problem))


def test_of_too_many_problems_the_first_are_told() -> None:
    """A file of garbage is not answered with a hundred thousand lines."""
    text = HEAD + "rules:\n" + "  - {action: allow, name: X}\n" * 1500
    found = messages(config.load("x", text.encode()))
    assert len(found) == 1001
    assert found[-1].endswith("and more problems, which were not looked for")


def test_importing_the_package_imports_neither_yaml_nor_pydantic() -> None:
    """They are slow; who only asks for the version does not wait for them."""
    code = "import sys, gatekeeper.config; print(sorted({'yaml', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_functions_survive_an_import_of_their_modules() -> None:
    """``config.check`` is the function, whatever was imported before."""
    from gatekeeper.config import checking, loader, rendering

    assert (config.check, config.load, config.render) == (checking.check, loader.load, rendering.render)
    with pytest.raises(AttributeError):
        _ = config.nothing
