"""Two policies are swapped while sources knock: what each of them sees is what one of the two says, never a mixture."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gatekeeper.cli import daemon
from tests.support import need
from tests.support.backends import TcpBackend, UdpBackend
from tests.support.clients import Sources
from tests.support.gate import Gate
from tests.support.namespace import Namespace
from tests.support.ports import free_port
from tests.support.wait import until

BOTH, NEITHER, FIRST, SECOND = "127.1.0.1", "127.2.0.1", "127.3.0.1", "127.4.0.1"
# What a source may see: the number of the policy whose backend answers, or that it is refused.
MAY_SEE = {BOTH: {"1", "2"}, NEITHER: {"refused"}, FIRST: {"1", "refused"}, SECOND: {"2", "refused"}}
ROUNDS = 40


class Knocking:
    """A thread that asks from one source again and again, each time as a newcomer; ``seen`` are the answers."""

    def __init__(self, source: str, port: int, kind: socket.SocketKind) -> None:
        self.seen: dict[str, int] = {}
        self._stop = threading.Event()
        self._source, self._port, self._kind = source, port, kind
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            answer = self._ask()
            self.seen[answer] = self.seen.get(answer, 0) + 1

    def _ask(self) -> str:
        tcp = self._kind == socket.SOCK_STREAM
        try:
            with Sources().make(self._source, self._kind) as client:
                client.settimeout(10 if tcp else 0.2)  # a worker refuses a datagram with silence
                client.connect(("127.0.0.1", self._port))
                client.send(b"?")
                return client.recv(10).decode() or "refused"
        except (ConnectionError, TimeoutError):
            return "refused"

    def close(self) -> None:
        self._stop.set()
        self._thread.join(15)


def banner(number: str) -> Callable[[socket.socket], None]:
    """Return a service that answers with its number."""

    def serve(connection: socket.socket) -> None:
        if connection.recv(10):
            connection.sendall(number.encode())
            connection.recv(10)

    return serve


@pytest.fixture
def space() -> Iterator[Namespace]:
    """A network namespace of this test's own, where the kernel may refuse."""
    need.root("load programs into the kernel")
    made = Namespace()
    yield made
    made.close()


def here(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call ``work`` where the test itself runs."""
    return work(*arguments, **named)


def swap(where: Callable[..., Any], run_gate: Callable[..., Gate], kernel: str, swaps: int) -> None:
    """Let everybody knock while the policies are swapped; compare what was seen with what may be."""
    port = free_port()
    with contextlib.ExitStack() as ends:

        def start(kind: Any, *arguments: Any) -> Any:
            made = where(kind, *arguments)
            ends.callback(lambda: where(made.close))
            return made

        tcp = {number: start(TcpBackend, banner(number)) for number in "12"}
        udp = {number: start(UdpBackend, lambda _datagram, number=number: [number.encode()]) for number in "12"}

        def policy(number: str, friend: str) -> str:
            return (
                f"kernel: {kernel}\nlisteners:\n"
                f"  - {{name: web, listen: '127.0.0.1:{port}', backend: '{tcp[number].address}'}}\n"
                f"  - {{name: dns, protocol: udp, listen: '127.0.0.1:{port}', backend: '{udp[number].address}'}}\n"
                f"default: deny\nrules:\n  - {{name: friends, action: allow, from: [{BOTH}, {friend}]}}\n"
            )

        policies = [policy("1", FIRST), policy("2", SECOND)]
        gate = where(run_gate, policies[0], workers=2)
        knocking = {
            (source, kind): start(Knocking, source, port, kind)
            for source in MAY_SEE for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        }  # fmt: skip
        with daemon.connect(str(gate.control_path)) as gate_daemon:
            for number in range(1, swaps + 1):
                gate.write(policies[number % 2])
                assert gate_daemon.ask("reload").result["changed"] is True
            until(lambda: all(sum(one.seen.values()) >= ROUNDS for one in knocking.values()), "everybody knocks", 60)
        for one in knocking.values():
            one.close()
        wrong = {
            (source, kind.name): set(one.seen) - MAY_SEE[source]
            for (source, kind), one in knocking.items() if not set(one.seen) <= MAY_SEE[source]
        }  # fmt: skip
        # A datagram of somebody who may come in can be lost: its flow is made by one policy and revoked by the next.
        wrong = {who: what for who, what in wrong.items() if who != (BOTH, "SOCK_DGRAM") or what != {"refused"}}
        assert not wrong, {who: one.seen for who, one in knocking.items()}
        assert len(gate.worker_pids()) == 2


@pytest.mark.timeout(300)
def test_workers_swap(run_gate: Callable[..., Gate], long: bool) -> None:
    """In workers: each verdict and each backend is of one of the two policies, TCP and UDP."""
    swap(here, run_gate, "off", 200 if long else 12)


@pytest.mark.needs_root
@pytest.mark.timeout(300)
def test_the_kernel_swaps(space: Namespace, run_gate: Callable[..., Gate], long: bool) -> None:
    """With the kernel in front of the workers, too: it follows, and no gap opens between the two."""
    swap(space.inside, run_gate, "require", 200 if long else 6)
