"""A flood of datagrams from tens of thousands of sources, while those who were there before go on talking."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.endurance.hostile import flooding
from tests.support.backends import UdpBackend
from tests.support.gate import ROOT, Gate
from tests.support.ports import free_port
from tests.support.wait import until

ASKED = "127.0.0.3"  # one of the addresses of a wildcard listener
AT_ONCE = 250  # datagrams of the flood between two rounds of questions
PATIENCE_S = 5.0
SESSION_BYTES = 4096  # of the worker, for one UDP session: four times what it takes


def resident_bytes(pid: int) -> int:
    """Return how much memory a process has of its own."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def policy(port: int, backend: UdpBackend, cap: int, idle: str, rules: str = "") -> str:
    """Return a policy with one UDP listener on every address."""
    return (
        f'listeners:\n  - {{name: dns, protocol: udp, listen: "0.0.0.0:{port}", backend: "{backend.address}", '
        f"max_sessions: {cap}, idle_timeout: {idle}}}\ndefault: allow\nrules:\n{rules or '  []'}\n"
    )


def flood(port: int, sources: int, ports: int, each: int) -> Iterator[None]:
    """Flood at the pace of those who listen: pause after a few hundred datagrams for whoever else wants to speak."""
    for sent in flooding.flood(ASKED, port, sources, ports, each):
        if sent % AT_ONCE < each:
            yield


class Talkers:
    """Clients with a session each. ``answers`` and ``questions`` count datagrams."""

    SIZES = (1, 0, 512, 1400, 9000)

    def __init__(self, port: int, count: int) -> None:
        self.questions = self.answers = 0
        self.sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
        for number, sock in enumerate(self.sockets):
            sock.bind((f"127.200.0.{number + 1}", 0))
            sock.connect((ASKED, port))  # takes answers from the address that was asked, and from nobody else
            sock.settimeout(PATIENCE_S)

    def talk(self, size: int | None = None) -> None:
        """Ask once from every client, and take the answers."""
        sent = []
        for number, sock in enumerate(self.sockets):
            length = self.SIZES[(self.questions + number) % len(self.SIZES)] if size is None else size
            sent.append((b"%d:" % self.questions + b"x" * length)[:length])
            sock.send(sent[-1])
            if length > 1500:  # one after the other: all at once would be more than a receive buffer holds
                self.hear(sock, sent[-1])
        for sock, words in zip(self.sockets, sent, strict=True):
            if len(words) <= 1500:
                self.hear(sock, words)

    def hear(self, sock: socket.socket, words: bytes) -> None:
        """Take one answer."""
        self.questions += 1
        with contextlib.suppress(TimeoutError):
            self.answers += sock.recv(1 << 16) == words

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def backend() -> Iterator[UdpBackend]:
    """Echo datagrams."""
    with UdpBackend() as made:
        yield made


@pytest.mark.timeout(600)
def test_a_flood_from_many_sources_takes_nothing_from_those_who_talk(
    run_gate: Callable[..., Gate], backend: UdpBackend, long: bool
) -> None:
    """The table never exceeds its cap, live sessions get their answers, memory stays bounded, and the table empties again."""
    cap, sources, ports, each = (10_000, 12_500, 4, 4) if long else (500, 1_000, 2, 4)
    port = free_port()
    gate = run_gate(policy(port, backend, cap, "1h"))
    (worker,) = gate.worker_pids()
    talkers = Talkers(port, 20)
    try:
        talkers.talk()
        talkers.talk(65_507)
        assert talkers.answers == talkers.questions
        before = resident_bytes(worker)
        most = 0.0
        for _ in flood(port, sources, ports, each):
            talkers.talk()
            most = max(most, gate.scrape().value("gatekeeper_sessions")) if talkers.questions % 400 < 20 else most
        talkers.talk(65_507)
        most = max(most, gate.scrape().value("gatekeeper_sessions"))
        assert most == cap
        assert talkers.answers >= 0.99 * talkers.questions, (talkers.answers, talkers.questions)
        assert resident_bytes(worker) - before <= cap * SESSION_BYTES + (8 << 20)
        scrape = gate.scrape()
        refused = scrape.value("gatekeeper_connections_total", action="deny", reason="max_sessions")
        allowed = scrape.value("gatekeeper_connections_total", action="allow")
        assert allowed == cap
        lost = scrape.value("gatekeeper_accept_overflows_total")
        assert refused + lost >= 0.9 * (sources * ports - cap) * each
        gate.reload(policy(port, backend, cap, "500ms"))  # sessions keep the terms they began under
        talkers.talk()
        assert gate.worker_pids() == [worker]
        print(f"{talkers.answers} of {talkers.questions} answers, {refused:.0f} refused, {lost:.0f} lost in the kernel,"
              f" {(resident_bytes(worker) - before) >> 10} KiB more")  # fmt: skip
    finally:
        talkers.close()


class Speakers:
    """Clients with a session each, who go on speaking whether they are answered or not, fifty times a second each."""

    EVERY_S = 0.02

    def __init__(self, port: int, count: int) -> None:
        self.questions = self.answers = 0
        self.sockets = []
        for number in range(count):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((f"127.201.0.{number + 1}", 0))
            sock.connect((ASKED, port))
            sock.setblocking(False)
            self.sockets.append(sock)

    def speak(self, over: Callable[[], bool]) -> None:
        """Speak until it is over, then listen for a moment."""
        due = time.monotonic()
        while not over():
            for sock in self.sockets:
                with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                    sock.send(b"%d" % self.questions)
                self.questions += 1
            due = max(due + self.EVERY_S, time.monotonic())
            self.listen(due)
        self.listen(time.monotonic() + 2)

    def listen(self, until_s: float) -> None:
        """Take answers until then."""
        while (left_s := until_s - time.monotonic()) > 0 and self.answers < self.questions:
            for sock in select.select(self.sockets, [], [], left_s)[0]:
                with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                    while sock.recv(100):
                        self.answers += 1

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


@pytest.mark.timeout(300)
def test_a_flood_at_full_speed(run_gate: Callable[..., Gate], backend: UdpBackend, long: bool) -> None:
    """Whoever talks is heard beside a flood that nothing slows down, as far as the kernel's buffer lets datagrams in at all.

    What the kernel drops, because the buffer is full, is dropped whoever sent it: so a share of the real ones too, and no more.
    """
    cap, sources, ports, each = (10_000, 12_500, 4, 4) if long else (500, 1_000, 2, 4)
    port = free_port()
    gate = run_gate(policy(port, backend, cap, "1h"))
    (worker,) = gate.worker_pids()
    speakers = Speakers(port, 20)
    try:
        speakers.speak(lambda: speakers.questions > 0)
        assert speakers.answers == speakers.questions
        before = resident_bytes(worker)
        command = [sys.executable, "-m", "tests.endurance.hostile.flooding", ASKED, *map(str, (port, sources, ports, each))]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as attack:
            speakers.speak(lambda: attack.poll() is not None)
            sent, a_second = attack.communicate()[0].split()
        scrape = gate.scrape()
        lost = scrape.value("gatekeeper_accept_overflows_total")
        share = lost / (int(sent) + speakers.questions)
        print(f"{sent} datagrams, {a_second} a second; {lost:.0f} dropped by the kernel ({share:.2%}); "
              f"{speakers.answers} of {speakers.questions} answers ({speakers.answers / speakers.questions:.2%}); "
              f"{(resident_bytes(worker) - before) >> 10} KiB more")  # fmt: skip
        assert scrape.value("gatekeeper_sessions") <= cap
        assert resident_bytes(worker) - before <= cap * SESSION_BYTES + (8 << 20)
        assert speakers.answers >= (0.99 - 1.5 * share) * speakers.questions
    finally:
        speakers.close()


@pytest.mark.timeout(180)
def test_a_table_that_was_full_empties(run_gate: Callable[..., Gate], backend: UdpBackend) -> None:
    """Once the flood has ended, its sessions idle out, newcomers are served, and every session that began has ended."""
    port = free_port()
    gate = run_gate(policy(port, backend, 200, "1s"))
    for _ in flood(port, 400, 1, 1):
        pass
    gate.wait_for_value(0, "gatekeeper_sessions")
    talkers = Talkers(port, 20)
    try:
        talkers.talk()
        assert talkers.answers == talkers.questions
    finally:
        talkers.close()
    gate.wait_for_value(0, "gatekeeper_sessions")
    scrape = gate.scrape()
    allowed = scrape.value("gatekeeper_connections_total", action="allow")
    assert scrape.value("gatekeeper_session_ends_total") == allowed


@pytest.mark.timeout(180)
def test_an_absence_of_the_backend_costs_nothing_afterwards(run_gate: Callable[..., Gate]) -> None:
    """What ICMP said about an absent backend is forgotten when it is back: every later question is answered, in the old sessions."""
    port = free_port()
    backend = UdpBackend()
    gate = run_gate(policy(port, backend, 1000, "60s"))
    talkers = Talkers(port, 20)
    try:
        for _ in range(3):
            talkers.talk()
            assert talkers.answers == talkers.questions
            away = backend.port
            backend.close()
            for _ in range(5):
                for sock in talkers.sockets:
                    sock.send(b"is anybody there?")
            until(lambda: gate.scrape().value("gatekeeper_backend_failures_total", cause="refused") > 0, "ICMP has come")
            backend = UdpBackend(port=away)
        talkers.talk()
        assert talkers.answers == talkers.questions
        assert gate.scrape().value("gatekeeper_connections_total") == len(talkers.sockets)
    finally:
        talkers.close()
        backend.close()


def test_a_hundred_thousand_sources_make_no_scrape_longer(run_gate: Callable[..., Gate], backend: UdpBackend, long: bool) -> None:
    """Who knocks leaves no trace but numbers: the scrape keeps its size, the worker its memory, and every knock is counted once."""
    sources = 100_000 if long else 10_000
    port = free_port()
    rules = "  - {name: nobody, action: deny, from: 127.0.0.0/9}\n"
    gate = run_gate(policy(port, backend, 100, "60s", rules))
    (worker,) = gate.worker_pids()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.bind(("127.200.1.1", 0))
        asker.settimeout(PATIENCE_S)
        asker.connect((ASKED, port))
        for _ in flood(port, 2_000, 1, 1):
            keep_up(asker)
        size, before = shape(gate), resident_bytes(worker)
        for _ in flood(port, sources, 1, 1):
            keep_up(asker)
    assert shape(gate) == size
    assert resident_bytes(worker) - before <= 8 << 20

    def all_counted() -> bool:
        scrape = gate.scrape()
        judged = scrape.value("gatekeeper_connections_total", rule="nobody")
        return judged + scrape.value("gatekeeper_accept_overflows_total") == 2_000 + sources

    until(all_counted, "every datagram was judged, or dropped by the kernel and counted")
    lines = len(gate.audit_path.read_bytes().splitlines())
    assert lines < 2_000, "the budget keeps a flood out of the log"
    assert len(backend.senders) == 1, "nobody but the one who asks reaches the backend"


def shape(gate: Gate) -> int:
    """Return how many lines a scrape has."""
    return len(gate.scrape().text.splitlines())


def keep_up(asker: socket.socket) -> None:
    """Wait until what was sent so far has been looked at: an answer comes behind it."""
    asker.send(b"?")
    assert asker.recv(10) == b"?"
