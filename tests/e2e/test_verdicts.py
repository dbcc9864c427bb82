"""Every verdict as peers see it, against `decide`: over TCP and UDP, IPv4 and IPv6, counted exactly once."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from gatekeeper.config import load
from gatekeeper.policy.decide import Verdict, decide
from gatekeeper.policy.model import Action, Policy, Reason, format_address
from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources, ask, close_all, has_news, seen_over_tcp
from tests.support.gate import Gate
from tests.support.network import RemoteNetwork
from tests.support.ports import free_port
from tests.support.wait import until

LOCAL_SOURCES = [f"127.{first}.{second}.1" for first in range(1, 21) for second in range(10)]


@dataclass(frozen=True)
class Door:
    """Where to knock, and the address that listens there when it is a wildcard."""

    listener: str
    host: str
    port: int
    kind: socket.SocketKind
    wildcard: str | None = None

    @property
    def listens(self) -> str:
        return self.wildcard or self.host


def policy_text(doors: list[Door], backends: dict[str, str], rules: str, default: str) -> str:
    """Return a rule text with one listener for each name among the doors."""
    listeners = ""
    for name, backend in backends.items():
        own = [door for door in doors if door.listener == name]
        protocol = "tcp" if own[0].kind == socket.SOCK_STREAM else "udp"
        addresses = ", ".join(f'"{format_address(6 if ":" in door.host else 4, door.listens, door.port)}"' for door in own)
        listeners += f"  - {{name: {name}, protocol: {protocol}, listen: [{addresses}], backend: '{backend}'}}\n"
    return f"listeners:\n{listeners}default: {default}\nrules:\n{rules}"


def verdict_of(policy: Policy, door: Door, source: str) -> Verdict:
    """Return what `decide` says about one source at one door."""
    address = ipaddress.ip_address(source)
    protocol = "tcp" if door.kind == socket.SOCK_STREAM else "udp"
    for listener in policy.listeners:
        for endpoint in listener.endpoints:
            if (endpoint.host, endpoint.port, endpoint.protocol) == (door.listens, door.port, protocol):
                return decide(policy, listener, endpoint, address.version, int(address))
    raise AssertionError(f"no endpoint at {door}")


def as_counted(door: Door, verdict: Verdict) -> tuple[str, str, str, str]:
    """Return the labels a verdict is counted under."""
    rule = verdict.rule.name if verdict.rule else ""
    return door.listener, verdict.action.label, rule, str(Reason.RULE if rule else Reason.DEFAULT)


def knock_everywhere(
    gate: Gate, policy: Policy, doors: list[Door], sources: dict[int, list[str]], from_where: Sources, *, afar: bool
) -> dict[str, Counter[Action]]:
    """Knock once from each source at each door of its family, and compare what is seen and counted with `decide`.

    Return how often each verdict was given, by listener.
    """
    knocks = [(door, source) for door in doors for source in sources[6 if ":" in door.host else 4]]
    verdicts = [verdict_of(policy, door, source) for door, source in knocks]
    counted = Counter(as_counted(door, verdict) for (door, _), verdict in zip(knocks, verdicts, strict=True))
    with ExitStack() as ends:
        sockets: list[socket.socket] = []
        early: set[socket.socket] = set()  # reset before we could look
        ends.callback(lambda: close_all(sockets))
        for door, source in knocks:
            knocking = from_where.make(source, door.kind)
            sockets.append(knocking)
            if knocking.connect_ex((door.host, door.port)) == errno.ECONNRESET:
                early.add(knocking)
            if door.kind == socket.SOCK_DGRAM:
                knocking.send(b"knock")
        gate.wait_for_verdicts(counted)
        for (door, source), verdict, knocking in zip(knocks, verdicts, sockets, strict=True):
            if door.kind == socket.SOCK_STREAM:
                expected = {
                    Action.ALLOW: "allow",
                    Action.DENY: "reset",
                    # On this host nothing stands between us and the reset with TTL 1.
                    Action.DROP: "silence" if afar else "reset",
                }[verdict.action]
                if knocking in early:
                    assert expected == "reset", (door, source, verdict)
                    continue
                if expected == "reset":
                    until(lambda knocking=knocking: has_news(knocking), "the reset arrives")  # type: ignore[misc]
                assert seen_over_tcp(knocking) == expected, (door, source, verdict)
            elif verdict.action == Action.ALLOW:
                assert knocking.recv(100) == b"knock", (door, source, verdict)
            else:
                knocking.setblocking(False)
                with pytest.raises(BlockingIOError):
                    knocking.recv(100)
        gate.wait_for_verdicts(counted)  # what followed on the same sessions was not judged again
        text = gate.scrape().text
        assert not any(f'"{source}"' in text for _, source in knocks)  # a peer's address is never a label
    outcome: dict[str, Counter[Action]] = {}
    for (door, _), verdict in zip(knocks, verdicts, strict=True):
        outcome.setdefault(door.listener, Counter())[verdict.action] += 1
    return outcome


def load_policy(gate: Gate) -> Policy:
    """Return the policy that the gate was given."""
    loaded = load(str(gate.rules_path))
    assert loaded.config is not None, loaded.problems
    return loaded.config.policy


@pytest.fixture
def backends() -> Iterator[tuple[TcpBackend, UdpBackend]]:
    """An echo backend over TCP and one over UDP."""
    with TcpBackend() as tcp, UdpBackend() as udp:
        yield tcp, udp


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_local_verdict_is_right_and_counted_once(
    run_gate: Callable[..., Gate], backends: tuple[TcpBackend, UdpBackend], workers: int
) -> None:
    """200 sources of 127/8 meet allow, deny and drop at two listeners for each protocol, as `decide` says."""
    tcp, udp = backends
    ports = [free_port() for _ in range(3)]
    doors = [
        Door("web", "127.0.0.1", ports[0], socket.SOCK_STREAM),
        Door("web", "127.0.0.1", ports[1], socket.SOCK_STREAM),
        Door("other-web", "127.0.0.2", ports[0], socket.SOCK_STREAM),  # the same port, another address, its own rules
        Door("dns", "127.0.0.1", ports[0], socket.SOCK_DGRAM),
        Door("wild-dns", "127.0.0.3", ports[2], socket.SOCK_DGRAM, wildcard="0.0.0.0"),
    ]
    rules = f"""
  - {{name: noise, action: drop, from: [127.3.0.0/16, 127.17.0.0-127.18.255.255]}}
  - {{name: second-port, action: deny, from: 127.5.0.0/16, to: {ports[1]}}}
  - {{name: odd, action: allow, from: [127.1.0.0/16, 127.5.0.0/16, 127.7.0.0/16], except: [127.7.3.1, 127.7.5.0/24]}}
  - {{name: only-there, action: allow, from: [127.9.0.0/16], to: other-web}}
  - {{name: names, action: allow, from: 127.11.0.0/16, to: "{ports[0]}/udp"}}
  - {{name: wild, action: allow, from: 127.12.0.0/15, to: wild-dns}}
  - {{name: never-matches, action: allow, from: 192.0.2.0/24}}
"""
    names = {"web": tcp.address, "other-web": tcp.address, "dns": udp.address, "wild-dns": udp.address}
    gate = run_gate(policy_text(doors, names, rules, "deny"), workers=workers)
    outcome = knock_everywhere(gate, load_policy(gate), doors, {4: LOCAL_SOURCES}, Sources(), afar=False)
    assert all(count[Action.ALLOW] and count[Action.DENY] and count[Action.DROP] for count in outcome.values()), outcome
    assert tcp.connections == sum(outcome[name][Action.ALLOW] for name in ("web", "other-web"))
    assert udp.datagrams == sum(outcome[name][Action.ALLOW] for name in ("dns", "wild-dns"))


@pytest.mark.timeout(120)
@pytest.mark.needs_root
@pytest.mark.needs("ip")
@pytest.mark.parametrize("workers", [1, 2])
def test_every_remote_verdict_is_right_and_counted_once(
    run_gate: Callable[..., Gate], backends: tuple[TcpBackend, UdpBackend], remote: RemoteNetwork, workers: int
) -> None:
    """120 IPv4 and 120 IPv6 sources one router away: deny is a reset, drop is silence, each as `decide` says."""
    tcp, udp = backends
    port, v4, v6 = free_port(), remote.sources_v4, remote.sources_v6
    doors = [
        Door(name, host, port, kind)
        for name, kind in (("web", socket.SOCK_STREAM), ("dns", socket.SOCK_DGRAM))
        for host in (remote.gate_v4, remote.gate_v6)
    ]
    rules = f"""
  - {{name: noise, action: drop, from: [{v4[3]}-{v4[20]}, "{v6[3]}-{v6[20]}"]}}
  - {{name: refused, action: deny, from: [{v4[15]}-{v4[40]}, "{v6[30]}"]}}
  - {{name: most, action: allow, from: ["{remote.network_v6}", "{remote.network_v4}"], except: ["{v6[50]}-{v6[60]}", {v4[77]}]}}
"""
    gate = run_gate(policy_text(doors, {"web": tcp.address, "dns": udp.address}, rules, "drop"), workers=workers)
    outcome = knock_everywhere(gate, load_policy(gate), doors, {4: v4, 6: v6}, Sources(remote), afar=True)
    assert all(count[Action.ALLOW] and count[Action.DENY] and count[Action.DROP] for count in outcome.values()), outcome
    assert tcp.connections == outcome["web"][Action.ALLOW]
    assert udp.datagrams == outcome["dns"][Action.ALLOW]


@pytest.mark.needs_root
@pytest.mark.needs("ip")
def test_a_dual_stack_listener_knows_ipv4_peers(
    run_gate: Callable[..., Gate], backends: tuple[TcpBackend, UdpBackend], remote: RemoteNetwork
) -> None:
    """At "*:PORT" an IPv4 peer is judged by IPv4 rules and an IPv6 peer by IPv6 rules, over TCP and UDP."""
    tcp, udp = backends
    port = free_port()
    gate = run_gate(f"""
listeners:
  - {{name: web, listen: "*:{port}", backend: "{tcp.address}"}}
  - {{name: dns, protocol: udp, listen: "*:{port}", backend: "{udp.address}"}}
default: deny
rules:
  - {{name: four, action: allow, from: [{remote.sources_v4[0]}]}}
  - {{name: six, action: allow, from: ["{remote.sources_v6[0]}"]}}
""")
    sources = Sources(remote)
    expected: Counter[tuple[str, str, str, str]] = Counter()
    with ExitStack() as ends:
        for source, host, rule in (
            (remote.sources_v4[0], remote.gate_v4, "four"),
            (remote.sources_v6[0], remote.gate_v6, "six"),
            (remote.sources_v4[1], remote.gate_v4, ""),
            (remote.sources_v6[1], remote.gate_v6, ""),
        ):
            action, reason = ("allow", "rule") if rule else ("deny", "default")
            expected["web", action, rule, reason] += 1
            expected["dns", action, rule, reason] += 1
            datagrams = ends.enter_context(sources.make(source, socket.SOCK_DGRAM))
            datagrams.connect((host, port))
            datagrams.send(b"hello")
            if rule:
                assert ask(ends.enter_context(sources.connect(source, host, port))) == b"are you there?"
                assert datagrams.recv(100) == b"hello"
            else:
                assert sources.is_refused(source, host, port)
            gate.wait_for_verdicts(expected)
    told = {event["src_ip"] for kind in ("connection", "refusal") for event in gate.wait_for_audit(2, kind)}
    assert told >= {remote.sources_v4[0], remote.sources_v6[0], remote.sources_v4[1], remote.sources_v6[1]}


def test_deny_costs_the_backend_nothing(
    run_gate: Callable[..., Gate], backends: tuple[TcpBackend, UdpBackend]
) -> None:
    """After 500 refused connections and datagrams, many with data, the backend has seen no connection and no datagram."""
    tcp, udp = backends
    port = free_port()
    gate = run_gate(f"""
listeners:
  - {{name: web, listen: "127.0.0.1:{port}", backend: "{tcp.address}"}}
  - {{name: dns, protocol: udp, listen: "127.0.0.1:{port}", backend: "{udp.address}"}}
default: deny
rules:
  - {{name: noise, action: drop, from: 127.8.0.0/13}}
  - {{name: friends, action: allow, from: 127.0.0.1}}
""")
    sources = Sources()
    expected: Counter[tuple[str, str, str, str]] = Counter()
    for number in range(250):
        action, rule, reason = ("drop", "noise", "rule") if number % 2 else ("deny", "", "default")
        source = f"127.{8 if number % 2 else 1}.0.{number + 1}"
        assert sources.is_refused(source, "127.0.0.1", port)
        with sources.make(source, socket.SOCK_DGRAM) as datagrams:
            datagrams.sendto(b"query", ("127.0.0.1", port))
        expected["web", action, rule, reason] += 1
        expected["dns", action, rule, reason] += 1
    gate.wait_for_verdicts(expected)
    assert (tcp.connections, udp.datagrams) == (0, 0)
    with sources.connect("127.0.0.1", "127.0.0.1", port) as friend:
        assert seen_over_tcp(friend) == "allow"
    assert tcp.connections == 1


@pytest.mark.needs_root  # only root may look into workers
@pytest.mark.needs("ip")
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_one_source_always_meets_one_worker(
    run_gate: Callable[..., Gate],
    backends: tuple[TcpBackend, UdpBackend],
    remote: RemoteNetwork,
    kind: socket.SocketKind,
    family: int,
) -> None:
    """With two workers, all sessions of a source (an IPv6 /64 is one) live in one of them; sources are spread over both."""
    port, host = free_port(), remote.gate_v4 if family == 4 else remote.gate_v6
    door = Door("door", host, port, kind)
    backend, descriptors = (backends[0].address, 2) if kind == socket.SOCK_STREAM else (backends[1].address, 1)
    gate = run_gate(policy_text([door], {"door": backend}, "  - {name: everybody, action: allow}", "deny"), workers=2)
    from_afar = Sources(remote)
    pids = gate.worker_pids()
    assert len(pids) == 2
    met: dict[str, int] = {}  # network -> worker
    before = {pid: open_descriptors(pid) for pid in pids}
    with ExitStack() as ends:
        for source in (remote.sources_v4 if family == 4 else remote.sources_v6)[:24]:
            for _ in range(4):
                session = ends.enter_context(from_afar.make(source, kind))
                session.connect((host, port))
                assert ask(session) == b"are you there?"
            after = {pid: open_descriptors(pid) for pid in pids}
            grown = {pid: after[pid] - before[pid] for pid in pids}
            assert sorted(grown.values()) == [0, 4 * descriptors], (source, grown)
            network = str(ipaddress.ip_network(source).supernet(new_prefix=64)) if family == 6 else source
            worker = pids[0] if grown[pids[0]] else pids[1]
            assert met.setdefault(network, worker) == worker
            before = after
    assert len(met) == (12 if family == 6 else 24)
    assert set(met.values()) == set(pids)


def open_descriptors(pid: int) -> int:
    """Return how many sockets a process has open; pipes come and go with the traffic."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += link.readlink().name.startswith("socket:")
        except FileNotFoundError:  # closed meanwhile
            continue
    return count
