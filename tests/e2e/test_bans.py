"""Bans by operators: in force at once, everywhere, until they are lifted or their time is up, whatever happens to the service."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gatekeeper.cli import daemon
from gatekeeper.supervisor import banlist
from tests.cli.program import Done, gatekeeper
from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.plain_user import plain_user
from tests.support.ports import free_port
from tests.support.wait import until

RunGate = Callable[..., Gate]


def at(gate: Gate, *argv: str, **more: Any) -> Done:
    """Run a command that asks this gate."""
    return gatekeeper(*argv, "--control", str(gate.control_path), **more)


def done(gate: Gate, *argv: str, **more: Any) -> Done:
    """Run a command that succeeds."""
    result = at(gate, *argv, **more)
    assert result.code == 0, result
    return result


def policy(port: int, tcp: TcpBackend, udp: UdpBackend, state: Path | None = None) -> str:
    """Return a policy that lets everybody in."""
    return (f"state: {state}\n" if state else "") + f"""
listeners:
  - {{name: web, listen: ["127.0.0.1:{port}", "[::1]:{port}"], backend: "{tcp.address}"}}
  - {{name: dns, protocol: udp, listen: ["127.0.0.1:{port}"], backend: "{udp.address}"}}
default: deny
rules:
  - {{name: everybody, action: allow}}
"""


def answers(source: str, port: int) -> bool:
    """Whether the gate lets this source in over TCP."""
    return not Sources().is_refused(source, "::1" if ":" in source else "127.0.0.1", port)


def banned(gate: Gate) -> list[str]:
    """Return the sources that are banned."""
    return [ban["source"] for ban in json.loads(done(gate, "bans", "--json").out)["bans"]]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_ban_is_in_force_when_the_command_returns(run_gate: RunGate, folder: Path, workers: int) -> None:
    """Sessions of the banned end, new ones are refused, others notice nothing; after `unban` all is as before."""
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp:
        gate = run_gate(policy(port, tcp, udp, folder / "state"), workers=workers)
        with (
            Sources().connect("127.0.7.1", "127.0.0.1", port) as victim,
            Sources().connect("127.0.8.1", "127.0.0.1", port) as other,
            Sources().make("127.0.7.2", socket.SOCK_DGRAM) as datagrams,
            Sources().make("127.0.8.2", socket.SOCK_DGRAM) as others_datagrams,
        ):
            assert ask(victim) == ask(other) == b"are you there?"
            for each in (datagrams, others_datagrams):
                each.connect(("127.0.0.1", port))
                assert ask(each) == b"are you there?"
            told = done(gate, "ban", "127.0.7.0/24", "--for", "1h", "--reason", "guesses passwords", "--json")
            result = json.loads(told.out)
            assert (result["banned"], result["ended"], result["missing"], result["kept"]) == (1, 2, 0, True), gate.output()
            with pytest.raises(ConnectionResetError):
                victim.recv(1)
            assert not answers("127.0.7.9", port)
            datagrams.send(b"still there?")
            assert ask(other) == ask(others_datagrams) == b"are you there?"
            assert answers("127.0.8.9", port)
            gate.wait_for_value(1, "gatekeeper_connections_total", listener="web", action="deny", rule="", reason="ban")
            gate.wait_for_value(1, "gatekeeper_connections_total", listener="dns", action="deny", rule="", reason="ban")
            gate.wait_for_value(1, "gatekeeper_bans")
            assert done(gate, "status").out.splitlines()[0].endswith(", 1 ban")
            assert done(gate, "unban", "127.0.7.0/24").out == "unbanned 127.0.7.0/24\n"
            assert answers("127.0.7.9", port)
            assert ask(datagrams) == b"are you there?"
            gate.wait_for_value(0, "gatekeeper_bans")
        ends = [event["gatekeeper"]["end"] for event in gate.wait_for_audit(2, "connection")]
        assert ends.count("banned") == 2
        refused = gate.wait_for_audit(1, "refusal")[0]
        assert refused["src_ip"].startswith("127.0.7.")
        assert (refused["gatekeeper"]["reason"], refused["gatekeeper"]["rule"]) == ("ban", "")
        (event,) = gate.audit("ban")
        assert event["gatekeeper"]["sources"] == ["127.0.7.0/24"]
        assert (event["gatekeeper"]["reason"], event["gatekeeper"]["by"]) == ("guesses passwords", os.geteuid())
        assert gate.audit("unban")[0]["gatekeeper"] == {"sources": ["127.0.7.0/24"], "cause": "lifted", "by": os.geteuid()}


def test_a_ban_holds_for_all_families_and_listeners(run_gate: RunGate) -> None:
    """IPv6, IPv4 written as IPv6, a range; and a reload or a new worker forgets none of them."""
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp:
        text = policy(port, tcp, udp)
        gate = run_gate(text, workers=2)
        done(gate, "ban", "::1", "::ffff:127.0.7.1", "127.0.9.1-127.0.9.5")
        assert banned(gate) == ["::1", "127.0.7.1", "127.0.9.1-127.0.9.5"]
        refused, let_in = ["::1", "127.0.7.1", "127.0.9.1", "127.0.9.5"], ["127.0.7.2", "127.0.9.6", "127.0.9.0"]

        def hold() -> bool:
            return not any(answers(source, port) for source in refused) and all(answers(source, port) for source in let_in)

        assert hold()
        assert gate.reload(text + "  - {name: more, action: deny}\n")["success"] is True
        assert hold()
        for victim in gate.worker_pids():
            os.kill(victim, signal.SIGKILL)
        until(lambda: all(answers(source, port) for source in let_in), "new workers serve")
        assert hold()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_bans_survive_the_service(run_gate: RunGate, folder: Path, end: signal.Signals) -> None:
    """After an orderly end or a sudden one, the next run refuses the same sources from its first connection on."""
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp:
        text = policy(port, tcp, udp, folder / "state")
        gate = run_gate(text, workers=2)
        done(gate, "ban", "127.0.7.1", "--reason", "one")
        done(gate, "ban", "127.0.8.0/24", "--for", "1h")
        before = json.loads(done(gate, "bans", "--json").out)
        gate.signal(end)
        gate.wait()
        gate = run_gate(text, workers=2)
        assert not answers("127.0.7.1", port)
        assert not answers("127.0.8.1", port)
        assert answers("127.0.9.1", port)
        assert json.loads(done(gate, "bans", "--json").out) == before
        done(gate, "unban", "127.0.7.1")
        gate.signal(end)
        gate.wait()
        gate = run_gate(text, workers=2)
        assert answers("127.0.7.1", port)
        assert banned(gate) == ["127.0.8.0/24"]


@pytest.mark.parametrize("kept", [True, False])
def test_bans_survive_an_upgrade(run_gate: RunGate, folder: Path, kept: bool) -> None:
    """With a state directory or without; and a ban that is made later also ends the sessions of workers of before."""
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp:
        gate = run_gate(policy(port, tcp, udp, folder / "state" if kept else None), workers=2)
        done(gate, "ban", "127.0.7.1", "--for", "1h")
        with Sources().connect("127.0.8.1", "127.0.0.1", port) as old, Sources().connect("127.0.9.1", "127.0.0.1", port) as other:
            assert ask(old) == ask(other) == b"are you there?"
            done(gate, "upgrade", "--no-wait")
            assert not answers("127.0.7.1", port)
            assert banned(gate) == ["127.0.7.1"]
            assert ask(old) == ask(other) == b"are you there?"
            assert json.loads(done(gate, "ban", "127.0.8.0/24", "--json").out)["ended"] == 1
            with pytest.raises(ConnectionResetError):
                old.recv(1)
            assert ask(other) == b"are you there?"
            done(gate, "unban", "127.0.7.1")
            assert answers("127.0.7.1", port)


def test_a_ban_ends_when_its_time_is_up(run_gate: RunGate, folder: Path) -> None:
    """Without a command; the audit log has it, and a restart does not bring it back."""
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp:
        gate = run_gate(policy(port, tcp, udp, folder / "state"))
        done(gate, "ban", "127.0.7.1", "--for", "1500ms")
        done(gate, "ban", "127.0.8.1", "--for", "1h")
        assert not answers("127.0.7.1", port)
        until(lambda: answers("127.0.7.1", port), "the ban ends")
        assert not answers("127.0.8.1", port)
        assert banned(gate) == ["127.0.8.1"]
        (event,) = gate.wait_for_audit(1, "unban")
        assert event["gatekeeper"] == {"sources": ["127.0.7.1"], "cause": "expired", "by": None}


def test_parts_of_a_ban_are_not_lifted(run_gate: RunGate) -> None:
    """`unban` lifts the bans inside what it is given, names those that reach further, and says so by its exit code."""
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp:
        gate = run_gate(policy(port, tcp, udp))
        done(gate, "ban", "127.0.7.0/24", "--reason", "all of them")
        done(gate, "ban", "127.0.7.1", "127.0.7.2")
        lifted = at(gate, "unban", "127.0.7.1")
        assert (lifted.code, lifted.out) == (1, "unbanned 127.0.7.1\nstill banned by 127.0.7.0/24 (all of them)\n")
        assert not answers("127.0.7.1", port)
        lifted = at(gate, "unban", "127.0.6.1")
        assert (lifted.code, lifted.out) == (1, "not banned: 127.0.6.1\n")
        lifted = at(gate, "unban", "127.0.0.0/16", "--json")
        assert lifted.code == 0
        assert [ban["source"] for ban in json.loads(lifted.out)["removed"]] == ["127.0.7.0/24", "127.0.7.2"]
        assert answers("127.0.7.1", port)
        assert done(gate, "unban", "--all").out.startswith("not banned")


def test_bans_are_listed_for_people(run_gate: RunGate) -> None:
    """Who, until when, why, by whom; and whether one source is banned."""
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp:
        gate = run_gate(policy(port, tcp, udp))
        assert done(gate, "bans").out == "nobody is banned\n"
        made = done(gate, "ban", "127.0.7.0/24", "--for", "1h", "--reason", "guesses \x1b[31mpasswords")
        assert made.out.startswith("banned 127.0.7.0/24 until ")
        assert "does not survive a restart" in made.err
        lines = done(gate, "bans").out.splitlines()
        assert lines[0].split() == ["SOURCE", "SINCE", "ENDS", "IN", "BY", "REASON"]
        assert lines[1].startswith("127.0.7.0/24")
        assert lines[1].endswith("guesses ?[31mpasswords")
        assert at(gate, "bans", "127.0.7.9").out.splitlines()[1].startswith("127.0.7.0/24")
        other = at(gate, "bans", "127.0.8.9")
        assert (other.code, other.out) == (1, "127.0.8.9 is not banned\n")
        again = json.loads(done(gate, "ban", "127.0.7.0/24", "--json").out)
        assert (again["replaced"], again["until"]) == (1, None)
        (ban,) = json.loads(done(gate, "bans", "--json").out)["bans"]
        assert (ban["until"], ban["reason"]) == (None, "")


SLIPS = [
    (["ban"], 2, "name what to ban"),
    (["ban", "nobody"], 2, '"nobody" is a host name'),
    (["ban", "10.0.0.5/8"], 2, 'did you mean "10.0.0.0/8"?'),
    (["ban", "10.0.0.1", "--for", "soon"], 2, "is not a duration"),
    (["ban", "10.0.0.0/8", "0.0.0.0/0"], 2, "0.0.0.0/0 is a large part of everybody"),
    (["ban", "12.0.0.0/7"], 2, "--force"),
    (["ban", "2000::/15"], 2, "--force"),
    (["ban", "--list", "/nowhere"], 3, "cannot read /nowhere"),
    (["ban", "2001:db8::/32"], 2, "is where you are connected from"),
    (["unban"], 2, "name whom to unban"),
    (["unban", "x"], 2, '"x" is a host name'),
    (["bans", "x"], 2, '"x" is a host name'),
]


def test_slips_are_refused(run_gate: RunGate, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be meant is an error that says why, and bans nobody."""
    monkeypatch.setenv("SSH_CONNECTION", "2001:db8::7 50000 2001:db8::1 22")
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp:
        gate = run_gate(policy(port, tcp, udp))
        for argv, code, says in SLIPS:
            result = at(gate, *argv)
            assert (result.code, result.out) == (code, ""), (argv, result)
            assert says in result.err, (argv, result)
        assert banned(gate) == []


NONSENSE: list[dict[str, Any]] = [
    {}, {"sources": []}, {"sources": "10.0.0.1"}, {"sources": [7]}, {"sources": [None]}, {"sources": [["10.0.0.1"]]},
    {"sources": ["10.0.0.1 "]}, {"sources": ["10.0.0.1"], "for_s": 0}, {"sources": ["10.0.0.1"], "for_s": -1},
    {"sources": ["10.0.0.1"], "for_s": True}, {"sources": ["10.0.0.1"], "for_s": "1h"}, {"sources": ["10.0.0.1"], "for_s": 1e300},
    {"sources": ["10.0.0.1"], "reason": 7}, {"sources": ["0.0.0.0/0"], "force": "yes"}, {"sources": ["fe80::1%lo"]},
]  # fmt: skip


def test_requests_that_make_no_sense_are_refused(run_gate: RunGate) -> None:
    """Whoever speaks to the socket without the command gets the same answers, and the daemon goes on."""
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp:
        gate = run_gate(policy(port, tcp, udp))
        with daemon.connect(str(gate.control_path)) as asked:
            for args in NONSENSE:
                with pytest.raises(daemon.Refused) as refused:
                    asked.ask("ban", **args)
                assert refused.value.exit_code == 2, args
            for skip in (-1, True, "1", 1.5):
                with pytest.raises(daemon.Refused):
                    asked.ask("bans", skip=skip)
            assert asked.ask("bans", skip=10**30).result == {"bans": 0, "next": None, "kept": False}
        assert banned(gate) == []


def test_everybody_can_be_banned_by_force(run_gate: RunGate, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --force even all of IPv4, and oneself."""
    monkeypatch.setenv("SSH_CONNECTION", "127.0.7.7 50000 127.0.0.1 22")
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp:
        gate = run_gate(policy(port, tcp, udp))
        done(gate, "ban", "0.0.0.0/0", "--force")
        assert not answers("127.0.7.7", port)
        assert answers("::1", port)


def test_a_list_is_banned_as_a_whole_or_not_at_all(run_gate: RunGate, folder: Path) -> None:
    """Lists have comments and empty lines; one with errors names them all and bans nobody."""
    port = free_port()
    listed = folder / "attackers.txt"
    with TcpBackend() as tcp, UdpBackend() as udp:
        gate = run_gate(policy(port, tcp, udp))
        listed.write_text("127.0.7.1\n10.0.0.1/8\n\nnobody # really\n")
        wrong = at(gate, "ban", "--list", str(listed))
        assert (wrong.code, banned(gate)) == (1, [])
        assert f"{listed}:2: " in wrong.err
        assert f"{listed}:4: " in wrong.err
        listed.write_text("# night shift\n127.0.7.1\n\n127.0.8.0/24 # a whole network\n")
        assert done(gate, "ban", "--list", str(listed)).out.startswith("banned 127.0.7.1, 127.0.8.0/24 until unbanned")
        assert not answers("127.0.8.9", port)
        assert done(gate, "unban", "--list", "-", stdin=listed.read_text()).code == 0
        assert banned(gate) == []


@pytest.mark.parametrize("text", ["{", '{"version": 7, "bans": []}', "\0" * 5000])
def test_a_broken_file_is_kept_and_nobody_is_banned(run_gate: RunGate, folder: Path, text: str) -> None:
    """The service starts, says loudly what happened, and keeps the file for whoever wants to mend it."""
    port = free_port()
    state = folder / "state"
    state.mkdir()
    (state / banlist.FILE).write_text(text)
    with TcpBackend() as tcp, UdpBackend() as udp:
        gate = run_gate(policy(port, tcp, udp, state))
        assert f"error: {state / banlist.FILE} cannot be read, nobody is banned" in gate.output()
        assert (state / banlist.BROKEN).read_text() == text
        done(gate, "ban", "127.0.7.1")
        assert len(banlist.read(str(state))) == 1


def test_bans_that_cannot_be_saved_hold_until_the_restart(run_gate: RunGate, folder: Path) -> None:
    """A state directory that refuses the file is said to, once in the log and in each answer; the ban is in force."""
    port = free_port()
    state = folder / "state"
    with TcpBackend() as tcp, UdpBackend() as udp:
        gate = run_gate(policy(port, tcp, udp, state))
        (state / f"{banlist.FILE}.new").mkdir()  # stands in the way, also of root
        made = done(gate, "ban", "127.0.7.1")
        assert "does not survive a restart" in made.err
        done(gate, "ban", "127.0.8.1")
        assert not answers("127.0.7.1", port)
        assert gate.output().count("bans cannot be saved") == 1
        (state / f"{banlist.FILE}.new").rmdir()
        assert done(gate, "ban", "127.0.9.1").err == ""
        assert len(banlist.read(str(state))) == 3


@pytest.mark.timeout(120)
def test_an_unprivileged_service_bans_too(run_gate: RunGate, folder: Path) -> None:
    """An ordinary user's gate keeps its bans in a directory of that user, and root may command it."""
    user = plain_user(folder)
    home = folder / "home"
    home.mkdir()
    user.own(home)
    port = free_port()
    with TcpBackend() as tcp, UdpBackend() as udp:
        text = policy(port, tcp, udp, home / "state")
        options = {"prefix": user.prefix, "python": user.python, "env": user.env}
        for part in ("first", "second"):
            (home / part).mkdir()
            user.own(home / part)
        gate = run_gate(text, folder=home / "first", **options)
        result = json.loads(done(gate, "ban", "127.0.7.1", "--json").out)
        assert (result["kept"], answers("127.0.7.1", port)) == (True, False)
        gate.signal(signal.SIGKILL)
        gate.wait()
        run_gate(text, folder=home / "second", **options)
        assert not answers("127.0.7.1", port)
        assert answers("127.0.7.2", port)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_very_many_bans(run_gate: RunGate, folder: Path, long: bool) -> None:
    """A long list is banned, saved, listed, in force in every worker, and there again after a restart; 100,000 in the long form."""
    number = 100_000 if long else 10_000
    port = free_port()
    state = folder / "state"
    listed = folder / "attackers.txt"
    listed.write_text("".join(f"10.{at >> 16}.{at >> 8 & 255}.{at & 255}\n" for at in range(0, 4 * number, 4)) + "127.0.7.0/24\n")
    with TcpBackend() as tcp, UdpBackend() as udp:
        text = policy(port, tcp, udp, state)
        gate = run_gate(text, workers=2)
        result = json.loads(done(gate, "ban", "--list", str(listed), "--for", "1h", "--json").out)
        assert (result["banned"], result["kept"]) == (number + 1, True), gate.output()
        assert not answers("127.0.7.9", port)
        assert answers("127.0.8.9", port)
        gate.wait_for_value(number + 1, "gatekeeper_bans")
        shown = done(gate, "bans")
        assert (len(shown.out.splitlines()), shown.err) == (101, f"the latest 100 of {number + 1} bans; --limit 0 shows all\n")
        assert shown.out.splitlines()[-1].startswith("127.0.7.0/24")
        assert len(done(gate, "bans", "--limit", "0").out.splitlines()) == number + 2
        assert at(gate, "bans", "10.0.0.4").code == 0
        assert at(gate, "bans", "10.0.0.5").code == 1
        gate.signal(signal.SIGKILL)
        gate.wait()
        gate = run_gate(text, workers=2)
        assert not answers("127.0.7.9", port)
        assert len(banned(gate)) == number + 1
        done(gate, "unban", "--all")
        assert answers("127.0.7.9", port)
