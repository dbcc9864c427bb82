"""The program gives the verdicts of `decide`: on made-up connections by the hundred thousand, and on real ones."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import select
import socket
import struct
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from gatekeeper.kernel import bans, bpf, lookup
from gatekeeper.kernel.asm import R0, R1, Assembler
from gatekeeper.kernel.judge import REPORTS_BURST, Common, Judge
from gatekeeper.policy.decide import decide
from gatekeeper.policy.model import (
    Action,
    Backend,
    Config,
    Endpoint,
    Listener,
    Policy,
    Protocol,
    Rule,
    Settings,
    Sources,
    Target,
)
from gatekeeper.policy.ranges import LOW64, AddressSet, normalize
from gatekeeper.snapshot.bindings import Bindings
from gatekeeper.snapshot.encode import encode
from gatekeeper.snapshot.reader import Snapshot
from tests.policy.generated import NOWHERE, UNIVERSE, WrittenRule, policies
from tests.support.namespace import Namespace
from tests.support.wait import until

pytestmark = pytest.mark.needs_root

MADE_UP, REAL = 20_000, 20_000  # connections
DROP, PASS = 0, 1
KIND = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
NUMBER = {Protocol.TCP: socket.IPPROTO_TCP, Protocol.UDP: socket.IPPROTO_UDP}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


@pytest.fixture
def common() -> Iterator[Common]:
    """What all programs share."""
    made = Common()
    yield made
    made.close()


def snapshot_of(policy: Policy) -> tuple[Snapshot, Bindings]:
    """The policy as the supervisor has it."""
    snapshot = Snapshot(b"".join(encode(Config(policy, Settings(), "0" * 64))))
    return snapshot, Bindings().bind(1, snapshot.meta)


def judge(policy: Policy, common: Common) -> Judge:
    """The policy in the kernel, not attached to anything."""
    snapshot, bindings = snapshot_of(policy)
    return Judge(snapshot, bindings.details, bindings.rows, common)


def context(protocol: Protocol, family: int, source: int, host: str, port: int) -> bytes:
    """A struct bpf_sk_lookup: a connection that might be."""
    v4 = family == 4
    remote = source.to_bytes(4 if v4 else 16, "big")
    local = socket.inet_pton(FAMILY[family], host)
    return struct.pack(
        "=QII4s16sHxx4s16sIII", 0, FAMILY[family], NUMBER[protocol], remote if v4 else b"", b"" if v4 else remote,
        socket.htons(40000), local if v4 else b"", b"" if v4 else local, port, 0, 0,
    )  # fmt: skip


def answer(loaded: Judge, *connection: object) -> Action:
    """What the program does with a made-up connection."""
    passed, hole, _ns = bpf.try_out(loaded.program, context(*connection))  # type: ignore[arg-type]
    if passed == DROP:
        return Action.DENY
    return Action.DROP if hole else Action.ALLOW


def listener(name: str, *endpoints: Endpoint) -> Listener:
    """A listener with these endpoints."""
    return Listener(name, endpoints[0].protocol, endpoints, Backend(4, "127.0.0.1", 9), 5.0, 60.0, 30.0, None, None, NOWHERE)


def tcp(host: str, port: int) -> Endpoint:
    """An endpoint."""
    return Endpoint(Protocol.TCP, 6 if ":" in host else 4, host, port)


def from_(*pairs: tuple[int, int], family: int = 4) -> Sources:
    """The sources in these ranges."""
    chosen = AddressSet.of(v4=pairs) if family == 4 else AddressSet.of(v6=pairs)
    return Sources(chosen, AddressSet.EMPTY, False, "", "")


# ---------------------------------------------------------------------- made-up connections


@pytest.mark.timeout(120)
def test_the_program_gives_the_verdict_of_decide(common: Common) -> None:
    """At and around every bound, IPv4, IPv6 and IPv4-mapped, wildcard and specific listeners, TCP and UDP."""
    compared = 0

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(policies())
    def compare(case: tuple[Policy, list[WrittenRule]]) -> None:
        nonlocal compared
        policy = case[0]
        loaded = judge(policy, common)
        ours = {endpoint: one for one in policy.listeners for endpoint in one.endpoints if endpoint.family}
        for endpoint, one in ours.items():
            hosts = {endpoint.host, "127.0.0.9" if endpoint.family == 4 else "::9"} if endpoint.host in {"0.0.0.0", "::"} else {endpoint.host}
            for host in hosts:
                sources = [(endpoint.family, number) for number in UNIVERSE[endpoint.family]]
                if endpoint.family == 6:
                    sources += [(6, 0xFFFF << 32 | number) for number in UNIVERSE[4]]
                for family, source in sources:
                    expected = decide(policy, one, endpoint, *normalize(family, source)).action
                    assert answer(loaded, endpoint.protocol, family, source, host, endpoint.port) == expected
                    compared += 1
        loaded.close()

    while compared < MADE_UP:
        compare()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("networks", [40, 70, 3000, 12_000])
def test_a_search_through_several_levels_finds_every_range(family: int, networks: int, common: Common) -> None:
    """At the bounds of ranges all over a big table, crowded and spread out, several of IPv6 in one /64; and at both ends."""
    rng = random.Random(networks)
    width = 32 if family == 4 else 128
    crowded = {(0xC6 << width - 8) + number * 3 for number in range(networks // 2)}
    bounds = sorted({rng.getrandbits(width) for _ in range(networks)} | crowded)
    pairs = list(zip(bounds[0::2], bounds[1::2], strict=False))
    rule = Rule("r", Action.DROP, from_(*pairs, family=family), None, NOWHERE)
    host = "0.0.0.0" if family == 4 else "::"
    web = listener("web", tcp(host, 80))
    loaded = judge(Policy((web,), (rule,), Action.ALLOW, NOWHERE), common)
    tried = {0, (1 << width) - 1} | {bound + step for bound in rng.sample(bounds, min(len(bounds), 700)) for step in (-1, 0, 1)}
    for source in tried:
        if 0 <= source < 1 << width:
            expected = Action.DROP if in_one_of(pairs, bounds, source) else Action.ALLOW
            assert answer(loaded, Protocol.TCP, family, source, host, 80) is expected
    loaded.close()


def in_one_of(pairs: list[tuple[int, int]], bounds: list[int], source: int) -> bool:
    """Whether the source lies in one of the ranges whose bounds are given in order."""
    at = max(bisect_right(bounds, source) - 1, 0) // 2
    return any(first <= source <= last for first, last in pairs[max(at - 1, 0) : at + 1])


def test_bans_stand_above_the_policy(common: Common) -> None:
    """Addresses and networks of both families, mapped ones too; counted as bans; lifted ones are judged by the policy again."""
    allow_all = Rule("r", Action.ALLOW, Sources(AddressSet.EVERYTHING, AddressSet.EMPTY, True, "", ""), None, NOWHERE)
    policy = Policy((listener("web", tcp("0.0.0.0", 80), tcp("::", 80)),), (allow_all,), Action.DENY, NOWHERE)
    loaded = judge(policy, common)
    seen = {
        "address": (4, 0x0A000001), "mapped": (6, 0xFFFF << 32 | 0x0A000001), "in range": (4, 0x0A000105), "past it": (4, 0x0A000107),
        "address 6": (6, 0x20010DB8 << 96 | 7), "in network 6": (6, 0x20010DB8 << 96 | 5 << 64 | 9), "other": (6, 0x20010DB8 << 96 | 8),
    }  # fmt: skip

    def refused() -> set[str]:
        return {
            name for name, (family, source) in seen.items()
            if answer(loaded, Protocol.TCP, family, source, "0.0.0.0" if family == 4 else "::", 80) is Action.DENY
        }  # fmt: skip

    assert refused() == set()
    first = 0x20010DB8 << 96 | 5 << 64
    common.bans.hold([
        (4, 0x0A000001, 0x0A000001), (4, 0x0A000101, 0x0A000106),
        (6, 0x20010DB8 << 96 | 7, 0x20010DB8 << 96 | 7), (6, first, first | LOW64),
    ])  # fmt: skip
    assert refused() == {"address", "mapped", "in range", "address 6", "in network 6"}
    again = judge(policy, common)  # the next policy knows them, too
    loaded.close()
    loaded = again
    common.bans.hold([(4, 0x0A000107, 0x0A000107)])
    assert refused() == {"past it"}
    snapshot, _bindings = snapshot_of(policy)
    news = {snapshot.meta["details"][detail][3]: attempts for detail, (attempts, _reported) in loaded.news().items()}
    assert news == {"ban": 1, "rule": len(seen) - 1}
    common.bans.hold([])
    assert refused() == set()
    loaded.close()


def test_any_bans_are_held_exactly(common: Common) -> None:
    """Whatever was banned before, and also where there are more addresses than the hash takes."""
    common.bans.close()
    common.bans = bans.Bans(most_addresses=5)
    loaded = judge(Policy((listener("web", tcp("0.0.0.0", 80)),), (), Action.DROP, NOWHERE), common)
    rng = random.Random(3)
    for _ in range(60):
        ranges = []
        for _ in range(rng.randrange(14)):
            first = rng.randrange(64)
            ranges.append((4, first, min(first + rng.choice((0, 0, 0, 1, 6, 20)), 63)))
        common.bans.hold(ranges)
        for source in range(64):
            banned = any(first <= source <= last for _family, first, last in ranges)
            assert answer(loaded, Protocol.TCP, 4, source, "0.0.0.0", 80) is (Action.DENY if banned else Action.DROP)
    loaded.close()


def test_a_range_is_the_fewest_networks() -> None:
    """Exactly its addresses, each network as large as its place allows."""
    for first, last, expected in ((0, 0, 1), (0, 255, 1), (1, 255, 8), (0, 254, 8), (77, 77, 1), (3, 200, None)):
        found = list(bans.prefixes(first, last, 8))
        covered = [number for bits, network in found for number in range(network, network + (1 << 8 - bits))]
        assert covered == list(range(first, last + 1))
        assert all(network % (1 << 8 - bits) == 0 for bits, network in found)
        assert expected in (None, len(found))


def test_an_exact_address_comes_before_the_wildcard_and_strangers_pass(common: Common) -> None:
    """The listener at the very address judges; the wildcard's judges the others; what is nobody's is left alone."""
    exact, everywhere = listener("exact", tcp("10.0.0.1", 22)), listener("everywhere", tcp("0.0.0.0", 22))
    allow_exact = Rule("r", Action.ALLOW, Sources(AddressSet.EVERYTHING, AddressSet.EMPTY, True, "", ""), (Target("exact"),), NOWHERE)
    loaded = judge(Policy((everywhere, exact), (allow_exact,), Action.DENY, NOWHERE), common)
    assert answer(loaded, Protocol.TCP, 4, 7, "10.0.0.1", 22) is Action.ALLOW
    assert answer(loaded, Protocol.TCP, 4, 7, "10.0.0.2", 22) is Action.DENY
    assert answer(loaded, Protocol.TCP, 4, 7, "10.0.0.2", 23) is Action.ALLOW
    assert answer(loaded, Protocol.UDP, 4, 7, "10.0.0.2", 22) is Action.ALLOW
    assert answer(loaded, Protocol.TCP, 6, 7, "::9", 22) is Action.ALLOW
    assert not [detail for detail, (attempts, _) in loaded.news().items() if attempts > 1], "strangers are not counted"
    loaded.close()


def test_every_attempt_is_counted_and_a_burst_of_refusals_is_reported(common: Common) -> None:
    """Counts are exact; reports stop where the budget of their verdict ends, and say who came and where to."""
    loaded = judge(Policy((listener("web", tcp("0.0.0.0", 80)),), (), Action.DENY, NOWHERE), common)
    times = REPORTS_BURST * 4
    for source in range(times):
        answer(loaded, Protocol.TCP, 4, 0x0A000000 + source, "10.0.0.1", 80)
    ((attempts, reported),) = loaded.news().values()
    assert attempts == times
    assert REPORTS_BURST <= reported < times // 2
    assert loaded.news() == {}
    reports = [lookup.REPORT.unpack(record) for record in common.ring.read()]
    assert len(reports) == reported
    at, slot, number, port, to_port, family, protocol, source, target = reports[1]
    assert slot == loaded.slots[0] and number == 0
    assert (socket.ntohs(port), to_port, family, protocol) == (40000, 80, socket.AF_INET, socket.IPPROTO_TCP)
    assert source[:4] == bytes((10, 0, 0, 1)) and target[:4] == bytes((10, 0, 0, 1))
    assert 0 <= time.clock_gettime_ns(time.CLOCK_BOOTTIME) - at < 60_000_000_000
    loaded.close()


def test_the_ring_is_read_around_its_end(common: Common) -> None:
    """Thousands of reports come out as they went in, although the buffer holds fewer."""
    seen = 0
    for _ in range(200):
        fresh = judge(Policy((listener("web", tcp("0.0.0.0", 80)),), (), Action.DENY, NOWHERE), common)
        for source in range(REPORTS_BURST):
            answer(fresh, Protocol.TCP, 4, source, "10.0.0.1", 80)
        for record in common.ring.read():
            fields = lookup.REPORT.unpack(record)
            assert int.from_bytes(fields[7][:4], "big") == seen % REPORTS_BURST
            seen += 1
        fresh.close()
    assert seen == 200 * REPORTS_BURST


def test_a_table_cannot_be_changed_once_it_is_filled() -> None:
    """Not through the descriptor, not through a mapping, not even by root."""
    fd = bpf.table(8, 4, memoryview(bytes(32)))
    with pytest.raises(PermissionError):
        bpf.update(fd, struct.pack("=I", 0), bytes(8))
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 32)
    os.close(fd)


def test_what_the_verifier_refuses_comes_with_its_words_and_the_listing() -> None:
    """An error names the instruction as the listing numbers it."""
    code = Assembler()
    code.load(4, R0, R1, 4000)
    code.exit()
    with pytest.raises(bpf.Refused) as refused:
        bpf.load(code.assemble({}), code.listing())
    assert "invalid bpf_context access off=4000" in str(refused.value)
    assert refused.value.listing == "    0  r0 = *(u32 *)(r1 +4000)\n    1  return r0"


def test_nothing_stays_open(common: Common) -> None:
    """A judge that is closed leaves no descriptor, nor does one that cannot be made."""
    policy = Policy((listener("web", tcp("0.0.0.0", 80)),), (), Action.DENY, NOWHERE)
    judge(policy, common).close()
    before = os.listdir("/proc/self/fd")
    judge(policy, common).close()
    snapshot, bindings = snapshot_of(policy)
    ring, common.ring_map = common.ring_map, 4000
    with pytest.raises(OSError):
        Judge(snapshot, bindings.details, bindings.rows, common)
    common.ring_map = ring
    assert len(os.listdir("/proc/self/fd")) == len(before)


# ---------------------------------------------------------------------- real ones

PREFIXES = ("10.0.0.0/8", "198.18.0.0/15", "2001:db8::/32")
NEAR = {4: (0x0A000100, 0xC6120000, 0xC6130080), 6: (0x20010DB8 << 96 | 1 << 64, 0x20010DB8 << 96 | 1 << 80)}
POOL = {family: [near + step for near in anchors for step in range(1, 25)] for family, anchors in NEAR.items()}
PORT = 7000


def random_policy(rng: random.Random) -> Policy:
    """A policy over addresses that are at home in the namespace."""
    places = [(4, "0.0.0.0"), (4, "10.0.0.1"), (6, "::"), (6, "2001:db8::1")]
    listeners = tuple(
        listener(f"{protocol}-{index}", *(
            Endpoint(protocol, family, host, PORT + more) for family, host in places[index::2] for more in range(2)
        ))
        for protocol in Protocol for index in range(2)
    )  # fmt: skip
    rules = []
    for index in range(rng.randrange(1, 8)):
        family = rng.choice((4, 6))
        bounds = sorted(rng.sample(POOL[family], 2 * rng.randrange(1, 5)))
        sources = from_(*zip(bounds[0::2], bounds[1::2], strict=True), family=family)
        target = rng.choice((None, (Target(rng.choice(listeners).name),), (Target(None, PORT, PORT, rng.choice((None, *Protocol))),)))
        rules.append(Rule(f"r{index}", rng.choice(list(Action)), sources, target, NOWHERE))
    return Policy(listeners, tuple(rules), rng.choice(list(Action)), NOWHERE)


class Services:
    """Something that listens at every endpoint of a policy, and at one port that is not in it."""

    def __init__(self, policy: Policy) -> None:
        self.tcp: list[socket.socket] = []
        self.udp: list[socket.socket] = []
        for one in policy.listeners:
            for endpoint in one.endpoints:
                self._open(endpoint)
        self._open(tcp("0.0.0.0", PORT + 9))

    def _open(self, endpoint: Endpoint) -> None:
        sock = socket.socket(FAMILY[endpoint.family], KIND[endpoint.protocol] | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if endpoint.family == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((endpoint.host, endpoint.port))
        if endpoint.protocol is Protocol.TCP:
            sock.listen(4096)
            self.tcp.append(sock)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            self.udp.append(sock)

    def datagrams(self) -> set[bytes]:
        """Return what has arrived."""
        found = set()
        for sock in self.udp:
            with contextlib.suppress(BlockingIOError):
                while True:
                    found.add(sock.recv(64))
        return found

    def accept_all(self) -> None:
        for sock in self.tcp:
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.accept()[0].close()

    def close(self) -> None:
        for sock in self.tcp + self.udp:
            sock.close()


def try_for_real(services: Services, attempts: list[tuple[Endpoint, str, int]], expected: list[Action]) -> list[Action]:
    """Connect from each source to each host; return what was seen. Silence is what is left when all others have answers."""
    sockets, seen = [], [Action.DROP] * len(attempts)
    for number, (endpoint, host, source) in enumerate(attempts):
        sock = socket.socket(FAMILY[endpoint.family], KIND[endpoint.protocol] | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((socket.inet_ntop(FAMILY[endpoint.family], source.to_bytes(4 if endpoint.family == 4 else 16, "big")), 0))
        result = sock.connect_ex((host, endpoint.port))
        if endpoint.protocol is Protocol.UDP:
            sock.send(str(number).encode())
        elif result == errno.ECONNREFUSED:
            seen[number] = Action.DENY
        sockets.append(sock)

    def look() -> bool:
        arrived = services.datagrams()
        for number, (endpoint, _host, _source) in enumerate(attempts):
            if endpoint.protocol is Protocol.UDP and str(number).encode() in arrived:
                seen[number] = Action.ALLOW
            elif seen[number] is Action.DROP:
                seen[number] = _state(sockets[number], endpoint.protocol)
        return all(one is not Action.DROP for one, want in zip(seen, expected, strict=True) if want is not Action.DROP)

    until(look, "everybody who is not dropped has an answer")
    look()
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    services.accept_all()
    return seen


def _state(sock: socket.socket, protocol: Protocol) -> Action:
    poll = select.poll()
    poll.register(sock, select.POLLOUT | select.POLLIN)
    events = dict(poll.poll(0)).get(sock.fileno(), 0)
    if events & select.POLLERR:
        return Action.DENY
    if protocol is Protocol.TCP and events & select.POLLOUT:
        return Action.ALLOW
    return Action.DROP


@pytest.mark.timeout(600)
def test_real_connections_meet_the_verdict_of_decide() -> None:
    """From many sources of both families, over TCP and UDP, to wildcard and specific listeners: the same as `decide`.

    Policies are swapped under one link, as a reload does; each attempt is counted under its rule; a port that is in no
    policy is never touched.
    """
    rng, done = random.Random(5), 0
    namespace = Namespace(PREFIXES)
    link = -1
    try:
        common = namespace.inside(Common)
        services = namespace.inside(Services, random_policy(rng))
        while done < REAL:
            policy = random_policy(rng)
            snapshot, bindings = snapshot_of(policy)
            loaded = namespace.inside(Judge, snapshot, bindings.details, bindings.rows, common)
            if link < 0:
                link = bpf.attach(loaded.program, namespace.fd)
            else:
                bpf.swap(link, loaded.program)
            attempts, expected, counted = [], [], Counter[tuple[str, str]]()
            for one in policy.listeners:
                for endpoint in one.endpoints:
                    host = {"0.0.0.0": "10.0.0.2", "::": "2001:db8::2"}.get(endpoint.host, endpoint.host)
                    for source in rng.sample(POOL[endpoint.family], 12):
                        verdict = decide(policy, one, endpoint, endpoint.family, source)
                        attempts.append((endpoint, host, source))
                        expected.append(verdict.action)
                        counted[one.name, verdict.rule.name if verdict.rule else ""] += 1
            assert namespace.inside(try_for_real, services, attempts, expected) == expected
            stranger = [(tcp("0.0.0.0", PORT + 9), "10.0.0.2", POOL[4][0])]
            assert namespace.inside(try_for_real, services, stranger, [Action.ALLOW]) == [Action.ALLOW]
            names = {detail: (policy.listeners[number].name, "" if rule is None else policy.rules[rule].name)
                     for detail, (number, rule, _action, _reason) in enumerate(snapshot.meta["details"])}  # fmt: skip
            found = Counter({names[detail]: attempts for detail, (attempts, _reported) in loaded.news().items()})
            assert found == counted
            done += len(attempts)
            loaded.close()
        services.close()
        common.close()
    finally:
        if link >= 0:
            os.close(link)
        namespace.close()
