"""`gatekeeper plan` says beforehand exactly what the reload then does: to verdicts, to listeners and to live sessions."""

from __future__ import annotations

import grp
import ipaddress
import json
import os
import pwd
import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import Done, gatekeeper
from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.namespace import Namespace
from tests.support.plain_user import USER, plain_user
from tests.support.ports import free_port
from tests.support.wait import until

RunGate = Callable[..., Gate]
SOURCES = [f"127.{net}.0.{host}" for net in (10, 11, 12) for host in (1, 2)]


def plan(gate: Gate, *argv: str) -> Done:
    """Ask this gate."""
    return gatekeeper("plan", *argv, "--control", str(gate.control_path))


def planned(gate: Gate, *argv: str) -> tuple[int, dict[str, Any]]:
    """Return exit code and JSON."""
    done = plan(gate, *argv, "--json")
    return done.code, json.loads(done.out)


@pytest.fixture
def backends() -> Iterator[tuple[TcpBackend, UdpBackend]]:
    """An echo for each protocol."""
    with TcpBackend() as tcp, UdpBackend() as udp:
        yield tcp, udp


class Site:
    """Listeners that policies of one test are made of, and what happens at them."""

    def __init__(self, folder: Path, tcp: TcpBackend, udp: UdpBackend) -> None:
        self.ports = {name: free_port() for name in ("web", "shop", "dns", "ntp")}
        self.socket = folder / "app.sock"
        self._backends = {"web": tcp.address, "shop": tcp.address, "app": tcp.address, "dns": udp.address, "ntp": udp.address}

    def policy(self, listeners: list[str], rules: list[str], more: str = "") -> str:
        """Return the text of a policy that denies by default."""
        where = {name: f"127.0.0.1:{port}" for name, port in self.ports.items()} | {"app": f"unix:{self.socket}"}
        protocol = {"dns": "protocol: udp, ", "ntp": "protocol: udp, "}
        lines = [
            f"  - {{name: {name}, {protocol.get(name, '')}listen: '{where[name]}', backend: '{self._backends[name]}'}}"
            for name in listeners
        ]
        return f"{more}listeners:\n" + "\n".join(lines) + "\ndefault: deny\nrules:\n" + "\n".join(f"  - {rule}" for rule in rules)

    def random(self, chance: random.Random) -> str:
        """Return any policy."""
        listeners = chance.sample([*self.ports, "app"], chance.randint(2, 5))
        rules = ["{name: everyone, action: allow, to: app}"] if "app" in listeners and chance.random() < 0.5 else []
        for number in range(chance.randint(2, 5)):
            source = f"127.{chance.choice((10, 11, 12))}.0.{chance.choice(('1', '2', '0/24'))}"
            to = chance.choice(["any", *listeners])
            rules.append(f"{{name: r{number}, action: {chance.choice(('allow', 'allow', 'deny', 'drop'))}, from: {source}, to: {to}}}")
        chance.shuffle(rules)
        return self.policy(listeners, rules)

    def seen(self, gate: Gate, text: str) -> dict[tuple[str, str], bool]:
        """Return whom the gate lets in where, as seen from outside; UDP by what it counts, since refusals are silent."""
        found: dict[tuple[str, str], bool] = {}
        for name, port in self.ports.items():
            for source in SOURCES:
                if name in {"web", "shop"}:
                    try:
                        found[name, source] = not Sources().is_refused(source, "127.0.0.1", port)
                    except ConnectionRefusedError:  # nobody listens
                        found[name, source] = False
                elif f"name: {name}," not in text:
                    found[name, source] = False
                else:
                    found[name, source] = self._lets_in_datagrams(gate, name, source)
        return found

    def _lets_in_datagrams(self, gate: Gate, name: str, source: str) -> bool:
        def count() -> tuple[float, float]:
            scrape = gate.scrape()
            every, allowed = ({"listener": name}, {"listener": name, "action": "allow"})
            return (
                scrape.value("gatekeeper_connections_total", **every),
                scrape.value("gatekeeper_connections_total", **allowed),
            )

        before = count()
        with Sources().make(source, socket.SOCK_DGRAM) as client:
            client.sendto(b"who is it?", ("127.0.0.1", self.ports[name]))
            until(lambda: count()[0] > before[0], "the datagram is judged")
        return count()[1] > before[1]

    def connect(self, ends: ExitStack, seen: dict[tuple[str, str], bool]) -> list[socket.socket]:
        """Open a session wherever somebody is let in."""
        sessions = []
        for (name, source), let_in in seen.items():
            if let_in:
                kind = socket.SOCK_STREAM if name in {"web", "shop"} else socket.SOCK_DGRAM
                client = ends.enter_context(Sources().make(source, kind))
                client.connect(("127.0.0.1", self.ports[name]))
                sessions.append(client)
        if self.socket.exists():
            client = ends.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(15)
            client.connect(str(self.socket))
            sessions.append(client)
        open_now = []
        for client in sessions:
            try:
                if ask(client) == b"are you there?":
                    open_now.append(client)
            except (ConnectionResetError, BrokenPipeError):  # the unix socket is closed to everybody here
                assert client.family == socket.AF_UNIX
        return open_now


def let_in_afterwards(document: dict[str, Any], site: Site, seen: dict[tuple[str, str], bool]) -> dict[tuple[str, str], bool]:
    """Return whom the plan says will be let in, starting from who is."""
    names = {("udp" if name in {"dns", "ntp"} else "tcp", port): name for name, port in site.ports.items()}
    will = dict(seen)
    for change in document["changes"]:
        if not change["ports"]:
            continue
        networks = [ipaddress.ip_network(text) for text in change["sources"]]
        for first, last in change["ports"]:
            for port in range(first, last + 1):
                for source in SOURCES:
                    if any(ipaddress.ip_address(source) in network for network in networks):
                        key = names[change["protocol"], port], source
                        assert will[key] is (change["before"]["action"] == "allow"), (change, key)
                        will[key] = change["after"]["action"] == "allow"
    return will


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_planned_is_what_happens(
    run_gate: RunGate, folder: Path, backends: tuple[TcpBackend, UdpBackend], seed: int
) -> None:
    """For random policies: the sessions that the plan lists are those that the reload ends, no more and no fewer.

    Each ends as foretold (revoked, or removed with its listener), all others go on; everybody whose verdict the plan
    changes gets it, everybody else the one from before, as seen by connecting from many addresses.
    """
    site, chance = Site(folder, *backends), random.Random(seed)
    old, new = site.random(chance), site.random(chance)
    gate = run_gate(old, workers=2)
    before = site.seen(gate, old)
    with ExitStack() as ends:
        clients = site.connect(ends, before)
        # Datagrams that were counted above began flows, which are sessions as well; the connections have ended.
        udp = [one for one in before if before[one] and one[0] in {"dns", "ntp"}]
        expected = len(clients) + len(udp)
        gate.write(new)

        def settled() -> dict[str, Any]:
            listed = json.loads(gatekeeper("sessions", "--json", "--control", str(gate.control_path)).out)
            assert listed["matched"] == expected
            return listed  # type: ignore[no-any-return]

        live = {session["flow_id"] for session in until(settled, "only the live sessions are left")["sessions"]}
        code, document = planned(gate)
        assert document["valid"] is True
        assert code == int(any(document[key] for key in ("changes", "opened", "closed", "moved", "settings", "sessions")))
        fates = {session["flow_id"]: session["end"] for session in document["sessions"]}
        assert fates.keys() <= live
        assert gate.reload()["success"] is True
        ended = gate_ends(gate, live, len(fates))
        assert ended == fates
        doomed = {(one["src_ip"], one["src_port"]) for one in document["sessions"]}
        for client in clients:
            if client.family == socket.AF_UNIX:
                goes_on = (None, None) not in doomed
            else:
                goes_on = client.getsockname()[:2] not in doomed
            if goes_on:
                assert ask(client) == b"are you there?"
            elif client.type == socket.SOCK_STREAM:
                with pytest.raises((ConnectionResetError, BrokenPipeError)):
                    ask(client)
        assert site.seen(gate, new) == let_in_afterwards(document, site, before)
        assert planned(gate)[0] == 0  # nothing is left to do
        assert gate_ends(gate, live, len(fates)) == fates  # and nobody else has ended meanwhile


def gate_ends(gate: Gate, flows: set[int], count: int) -> dict[int, str]:
    """Return how those of these flows ended that have, once there are ``count``."""

    def ended() -> dict[int, str]:
        events = [event for event in gate.audit("connection") if event["flow_id"] in flows]
        return {event["flow_id"]: event["gatekeeper"]["end"] for event in events}

    until(lambda: len(ended()) >= count, f"{count} sessions have ended")
    return ended()


@pytest.mark.timeout(120)
def test_sessions_of_every_kind(run_gate: RunGate, folder: Path, backends: tuple[TcpBackend, UdpBackend]) -> None:
    """Revoked are sessions that are refused now; a flow ends with its listener, a TCP session outlives it."""
    site = Site(folder, *backends)
    everybody = "{name: everybody, action: allow}"
    gate = run_gate(site.policy(["web", "shop", "dns", "ntp", "app"], [everybody]), workers=2)
    seen = {(name, source): True for name in site.ports for source in SOURCES[:3]}
    with ExitStack() as ends:
        clients = site.connect(ends, seen)
        assert len(clients) == 13
        only = "{name: some, action: allow, from: 127.10.0.0/24, to: any}"
        gate.write(site.policy(["web", "dns", "app"], [only]))
        code, document = planned(gate)
        assert code == 1
        told = {(one["listener"], one["src_ip"], one["end"], one["after"]["action"]) for one in document["sessions"]}
        assert len(document["sessions"]) == len(told)
        assert told == {
            ("app", None, "revoked", "deny"), ("web", "127.11.0.1", "revoked", "deny"), ("dns", "127.11.0.1", "revoked", "deny"),
            *(("ntp", source, "removed", None) for source in SOURCES[:3]),
        }  # fmt: skip
        text = plan(gate).out
        assert "6 live sessions would end:" in text
        assert "removed: the listener is closed" in text
        assert gate.reload()["ended"] == 3
        events = gate.wait_for_audit(6, "connection")
        assert sorted(event["flow_id"] for event in events) == sorted(one["flow_id"] for one in document["sessions"])


def test_kept_sessions_are_not_listed(run_gate: RunGate, folder: Path, backends: tuple[TcpBackend, UdpBackend]) -> None:
    """With `on_reload: keep` in the new file nobody is cut off, and the plan lists nobody; what changes is told anyway."""
    site = Site(folder, *backends)
    gate = run_gate(site.policy(["web"], ["{name: everybody, action: allow}"]))
    with Sources().connect(SOURCES[0], "127.0.0.1", site.ports["web"]) as client:
        assert ask(client) == b"are you there?"
        gate.write(site.policy(["web"], ["{name: nobody, action: deny}"], more="on_reload: keep\n"))
        code, document = planned(gate)
        assert (code, document["sessions"]) == (1, [])
        assert document["settings"] == [
            {"listener": None, "key": "on_reload", "before": "revoke", "after": "keep", "restart": False}
        ]
        assert len(document["changes"]) == 1
        assert gate.reload()["ended"] == 0
        assert ask(client) == b"are you there?"
        # The next reload that revokes ends it, although no verdict changes any more.
        gate.write(site.policy(["web"], ["{name: nobody, action: deny}"]))
        _, document = planned(gate)
        assert (len(document["sessions"]), document["changes"]) == (1, [])
        assert gate.reload()["ended"] == 1


def test_nothing_changes(run_gate: RunGate, folder: Path, backends: tuple[TcpBackend, UdpBackend]) -> None:
    """Exit code 0 for the file that is in force, as it stands and as another file of the same meaning."""
    site = Site(folder, *backends)
    gate = run_gate(site.policy(["web", "dns"], ["{name: some, action: allow, from: 127.10.0.0/24}"]))
    done = plan(gate)
    assert (done.code, done.out.splitlines()[1:]) == (0, ["nothing changes"])
    other = folder / "other.yaml"
    other.write_text(gate.rules_path.read_text().replace("127.10.0.0/24", "[127.10.0.0/25, 127.10.0.128/25]"))
    assert plan(gate, str(other)).code == 0
    assert gatekeeper("plan", "-", "--control", str(gate.control_path), stdin=other.read_text()).code == 0


def test_people_are_told_what_and_who(run_gate: RunGate, folder: Path, backends: tuple[TcpBackend, UdpBackend]) -> None:
    """The text says which policies, what changes, and which sessions would end, with what the file says of them."""
    site = Site(folder, *backends)
    gate = run_gate(site.policy(["web"], ["{name: some, action: allow, from: 127.10.0.0/24}"]))
    with Sources().connect(SOURCES[0], "127.0.0.1", site.ports["web"]) as client:
        assert ask(client) == b"are you there?"
        tests = "tests:\n  - {from: any, to: web, expect: deny}\n"
        gate.write(site.policy(["web"], ["{name: off, action: drop, from: 127.0.0.0/8}"], more=tests))
        done = plan(gate)
        assert done.code == 1
        lines = done.out.splitlines()
        assert lines[0].endswith(": 1 test proved")
        port = f"tcp {site.ports['web']} (web)"
        assert lines[1:4] == [f"{port}: allow by some -> drop by off", "  127.10.0.0/24", f"{port}: deny by default -> drop by off"]
        assert "1 live session would end:" in lines
        assert lines[-1].split()[1:3] == ["web", "{}:{}".format(*client.getsockname())]
        assert lines[-1].endswith("some  revoked: drop by off")


@pytest.mark.parametrize("edit", [("action: allow", "action: perhaps"), ("expect: allow", "expect: deny")])
def test_a_file_that_would_be_refused(
    run_gate: RunGate, folder: Path, backends: tuple[TcpBackend, UdpBackend], edit: tuple[str, str]
) -> None:
    """An error, or a test that does not hold: exit code 1, the problem with its place, and that nothing would change."""
    site = Site(folder, *backends)
    text = site.policy(["web"], ["{name: some, action: allow}"]) + "\ntests:\n  - {from: any, to: web, expect: allow}\n"
    gate = run_gate(text)
    gate.write(text.replace(*edit))
    done = plan(gate)
    assert done.code == 1
    assert done.out.startswith(f"{gate.rules_path}:")
    assert "is not valid: a reload would be refused" in done.err
    code, document = planned(gate)
    assert (code, document["valid"], document["policy"]) == (1, False, None)
    assert document["problems"][0]["severity"] == "error"
    assert (document["sessions"], document["changes"], document["opened"]) == ([], [], [])
    assert gate.reload()["success"] is False


def test_what_cannot_be_done_is_3(run_gate: RunGate, folder: Path, backends: tuple[TcpBackend, UdpBackend]) -> None:
    """No daemon, or a file that is not there: exit code 3, and which it is."""
    done = gatekeeper("plan", "--control", str(folder / "nobody.sock"))
    assert (done.code, done.out) == (3, "")
    assert "nobody.sock" in done.err
    gate = run_gate(Site(folder, *backends).policy(["web"], []).replace("rules:", ""))
    done = plan(gate, str(folder / "missing.yaml"))
    assert (done.code, "missing.yaml" in done.err) == (3, True)
    gate.rules_path.unlink()
    done = plan(gate)
    assert (done.code, str(gate.rules_path) in done.err) == (3, True)


@pytest.mark.needs_root
def test_the_file_is_read_with_the_rights_of_who_asks(
    run_gate: RunGate, folder: Path, backends: tuple[TcpBackend, UdpBackend]
) -> None:
    """A member of the control group sees what their own file would change, and reads none that is not theirs to read."""
    user = plain_user(folder)
    site = Site(folder, *backends)
    group = grp.getgrgid(pwd.getpwnam(USER).pw_gid).gr_name
    text = site.policy(["web"], ["{name: some, action: allow}"], more=f"control: {{group: {group}}}\n")
    gate = run_gate(text)

    def as_user(path: Path) -> subprocess.CompletedProcess[str]:
        argv = [*user.prefix, user.python, "-m", "gatekeeper", "plan", str(path), "--control", str(gate.control_path)]
        return subprocess.run(argv, env=os.environ | user.env, cwd=folder, capture_output=True, text=True)

    theirs = folder / "theirs.yaml"
    theirs.write_text(gate.rules_path.read_text().replace("action: allow", "action: drop"))
    done = as_user(theirs)
    assert (done.returncode, "allow by some -> drop by some" in done.stdout) == (1, True), done
    theirs.chmod(0o600)
    done = as_user(theirs)
    assert (done.returncode, done.stdout) == (3, ""), done
    assert "theirs.yaml: Permission denied" in done.stderr


@pytest.mark.needs_root
@pytest.mark.timeout(120)
def test_guarded_sessions(run_gate: RunGate) -> None:
    """Sessions of a service that has the port itself are foreseen, too, by the rule of the address that they came to."""
    space = Namespace(["10.0.0.0/8"], pins=True)
    with ExitStack() as ends:
        ends.callback(space.close)
        backend = space.inside(TcpBackend, host="0.0.0.0")
        ends.callback(space.inside, backend.close)

        def policy(allowed: str, inner: str = "") -> str:
            return f"""
listeners:
  - {{name: service, listen: "0.0.0.0:{backend.port}", path: guard, on_exit: open}}
{inner}
default: deny
rules:
  - {{name: inner, action: allow, to: {"inner" if inner else "any"}, from: 10.0.2.0/24}}
  - {{name: friends, action: allow, to: service, from: [{allowed}]}}
"""

        gate = space.inside(run_gate, policy("10.0.1.0/24, 10.0.2.0/24, 10.0.3.0/24"))
        clients = {}
        for source in ("10.0.1.1", "10.0.2.1", "10.0.3.1"):
            for host in ("10.0.0.1", "10.0.0.2"):
                client = ends.enter_context(space.inside(Sources().connect, source, host, backend.port))
                assert ask(client) == b"are you there?"
                clients[source, host] = client
        inner = f'  - {{name: inner, listen: "10.0.0.2:{backend.port}", path: guard, on_exit: open}}'
        gate.write(policy("10.0.1.0/24", inner))
        code, document = planned(gate)
        told = {(one["src_ip"], one["dest_ip"]): one["end"] for one in document["sessions"]}
        assert code == 1
        assert told == dict.fromkeys([
            ("10.0.1.1", "10.0.0.2"), ("10.0.2.1", "10.0.0.1"), ("10.0.3.1", "10.0.0.1"), ("10.0.3.1", "10.0.0.2")
        ], "revoked")  # fmt: skip
        assert gate.reload()["ended"] == len(told)
        for key, client in clients.items():
            if key in told:
                with pytest.raises((ConnectionResetError, BrokenPipeError, ConnectionAbortedError)):
                    ask(client)
            else:
                assert ask(client) == b"are you there?"
        space.inside(gate.stop)
