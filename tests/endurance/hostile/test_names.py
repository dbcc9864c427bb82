"""Names and bytes that strangers and rule files choose: no line of the audit log, the metrics, the page or the service log breaks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.support import need
from tests.support.backends import TcpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.ports import free_port
from tests.support.wait import until

DOORS = ['do"or', "do'or", "do\\nor", "{door}", "<b>door<b>", "döor\u200b\u202erood", "%s%d", "door, x=1", "a b", "\U0001f6aa"]
PEERS = [b"a\nb", b'{"event_type":"forged"}\n', b"\xff\xfe", b"\x1b[31m", b"\x00abstract\n", b"'\"\\", b"x" * 90]
WORDS = [b"", b"\n", b'"}\n{"event_type":"forged"}\n', b"\x1b]0;title\x07", bytes(range(256)), b"\r\n\r\nGET / HTTP/1.1", b"\xff" * 1000]


def test_unix_sockets_and_their_peers_may_be_called_anything(run_gate: Callable[..., Gate], folder: Path) -> None:
    """Listeners with strange paths, peers bound to stranger ones, and what they say: each session is one whole line, with the right name."""
    folder.chmod(0o777)
    backend_path = folder / 'back"end\\n'
    with TcpBackend(path=backend_path) as backend:
        listeners = "".join(
            f"  - {{name: door{number}, listen: {json.dumps(f'unix:{folder}/{name}', ensure_ascii=False)}, backend: {json.dumps(backend.address)}}}\n"
            for number, name in enumerate(DOORS)
        )
        gate = run_gate(f"listeners:\n{listeners}default: allow\nrules:\n  - {{name: closed, action: deny, to: door0}}\n")
        for number, name in enumerate(DOORS):
            for peer, words in zip(PEERS, WORDS, strict=True):
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(10)
                    address = peer if peer.startswith(b"\0") else os.fsencode(folder) + b"/" + peer
                    client.bind(address)
                    client.connect(f"{folder}/{name}")
                    if number:
                        assert ask(client, words) == words
                if not address.startswith(b"\0"):
                    os.unlink(address)
        count = len(PEERS)
        lines = gate.wait_for_audit(count * (len(DOORS) - 1), "connection")
        for number, name in enumerate(DOORS):
            mine = [line["gatekeeper"] for line in gate.audit() if line["gatekeeper"].get("listener") == f"door{number}"]
            assert len(mine) == count
            assert {line["endpoint"] for line in mine} == {f"unix:{folder}/{name}"}
            assert {line["backend"] for line in mine} == {f"unix:{backend_path}"}
        assert {line["src_ip"] for line in lines} == {None}
        nothing_is_broken(gate)


def test_what_peers_say_and_send_breaks_no_line(run_gate: Callable[..., Gate], long: bool) -> None:
    """Random bytes over TCP, from allowed and refused sources, resets included: the logs and the pages stay what they are."""
    chooser = random.Random(2)
    port = free_port()
    with TcpBackend() as backend:
        gate = run_gate(
            f'listeners:\n  - {{name: web, listen: "127.0.0.1:{port}", backend: "{backend.address}"}}\ndefault: allow\n'
            "rules:\n  - {name: no, action: deny, from: 127.0.9.0/24}\n"
        )
        tries = 500 if long else 50
        for number in range(tries):
            allowed = number % 5
            words = chooser.choice([*WORDS[1:], chooser.randbytes(chooser.randrange(1, 3000))])
            if allowed:
                with Sources().connect(f"127.0.{chooser.randrange(8)}.1", "127.0.0.1", port) as client:
                    assert ask(client, words) == words
            else:
                with contextlib.suppress(ConnectionError), Sources().connect("127.0.9.1", "127.0.0.1", port) as client:
                    client.sendall(words)
        gate.wait_for_audit(tries * 4 // 5, "connection")
        nothing_is_broken(gate)


def test_a_rule_file_may_be_called_anything(run_gate: Callable[..., Gate], folder: Path) -> None:
    """Included files with strange names, and a reload that fails because of one: each message is whole, and the old policy stays."""
    port = free_port()
    with TcpBackend() as backend:
        text = f'listeners:\n  - {{name: web, listen: "127.0.0.1:{port}", backend: "{backend.address}"}}\ndefault: deny\nrules:\n'
        home = folder / "home"
        (home / "rules.d").mkdir(parents=True)
        for number, name in enumerate([b'a"b.yaml', b"a\nb.yaml", b"\x1b[31m.yaml", b"\xff.yaml", "\u202e.yaml".encode()]):
            path = os.fsencode(home) + b"/rules.d/" + name
            with open(path, "w") as file:
                file.write(f"- {{name: rule{number}, action: allow, from: 127.0.{number}.0/24}}\n")
            os.chmod(path, 0o644)
        gate = run_gate(text + "  - include: rules.d/*.yaml\n", folder=home)
        nothing_is_broken(gate)
        bad = os.fsencode(home) + b"/rules.d/zz\n\x1b[31m\xff.yaml"
        with open(bad, "w") as file:
            file.write("- {name: BAD, action: allow}\n")
        os.chmod(bad, 0o644)
        assert gate.reload()["success"] is False
        nothing_is_broken(gate)
        os.unlink(bad)
        assert gate.reload()["success"] is True
        for number in range(5):
            with Sources().connect(f"127.0.{number}.1", "127.0.0.1", port) as client:
                assert ask(client) == b"are you there?"


def nothing_is_broken(gate: Gate) -> None:
    """Read everything that the gate shows to anybody, as its readers would."""
    known = {"start", "connection", "refusal", "refusals_suppressed", "reload"}
    assert {event["event_type"] for event in gate.audit()} <= known
    assert gate.audit_path.read_bytes().isascii()
    assert all(character.isprintable() or character == "\n" for character in gate.output()), gate.output()
    assert all(re.match(r"gatekeeper: |worker: |\S+:\d+:\d+: |\s*\d* \|", line) for line in gate.output().splitlines()), gate.output()
    scrape = gate.scrape().text
    assert not [line for line in scrape.splitlines() if not re.match(r"# (HELP|TYPE) |[a-z_]+(\{[^}]*\})? \S+$", line)]
    if promtool := need.find("promtool"):
        checked = subprocess.run([promtool, "check", "metrics"], input=scrape, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    status, page = gate.get("/")
    assert status == 200
    assert "<b>" not in page
    status, text = gate.get("/status.json")
    assert status == 200
    json.loads(text)
    until(lambda: gate.get("/readyz")[0] == 200, "it is ready")
