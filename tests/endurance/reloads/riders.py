"""Programs that ride through reloads, each in a process of its own, so that none waits for another or for the test.

`python -m tests.endurance.reloads.riders backend`: echoes TCP and tells over UDP which port asked; prints both ports.
`... short PORT RATE SOURCE...`: one short session after the other, RATE a second if the machine gives that, from each source in turn.
`... long PORT SOURCE...`: from each source one long TCP session and one UDP flow, which speak now and then.

Lines on stdin are orders: `pause` (finish what was begun, say "paused"), `go` (speak again; "went" follows once everybody
has), and `stop`, after which all is closed and what happened is printed as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import json
import os
import random
import resource
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[3]
PATIENCE_S = 20.0
SPEAK_S = (0.05, 0.5)  # a long session's pause between two exchanges
AGAIN_S = 2.0  # a datagram without an answer is repeated after that
LARGEST = 3000


class Backend:
    """Echoes, counts bytes both ways, and ends when told to."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind(("127.0.0.1", 0))
        self.datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.held: dict[int, socket.socket] = {}
        self.counts: Counter[str] = Counter()
        self.poller = select.epoll()
        for sock in (self.listener, self.datagrams):
            sock.setblocking(False)
            self.poller.register(sock.fileno(), select.EPOLLIN)
        self.poller.register(0, select.EPOLLIN)

    def run(self) -> None:
        """Serve until a line comes."""
        print(self.listener.getsockname()[1], self.datagrams.getsockname()[1], flush=True)
        while True:
            for fd, _mask in self.poller.poll():
                if fd == 0:
                    sys.stdin.readline()
                    print(json.dumps(self.counts), flush=True)
                    return
                if fd == self.listener.fileno():
                    self.accept()
                elif fd == self.datagrams.fileno():
                    self.answer()
                else:
                    self.echo(fd)

    def accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _peer = self.listener.accept()
                self.held[sock.fileno()] = sock
                self.poller.register(sock.fileno(), select.EPOLLIN)
                self.counts["connections"] += 1

    def answer(self) -> None:
        with contextlib.suppress(OSError):  # no more, or ICMP about an earlier answer
            while True:
                words, peer = self.datagrams.recvfrom(1 << 16)
                self.counts["udp_in"] += len(words)
                answer = words + b" " + str(peer[1]).encode()
                self.datagrams.sendto(answer, peer)
                self.counts["udp_out"] += len(answer)

    def echo(self, fd: int) -> None:
        sock = self.held[fd]
        try:
            data = sock.recv(1 << 16)
            if data:
                self.counts["tcp_in"] += len(data)
                sock.sendall(data)  # small enough for every buffer
                self.counts["tcp_out"] += len(data)
                return
        except OSError:
            pass
        del self.held[fd]
        sock.close()


def is_due(orders: select.poll) -> bool:
    """Say whether an order has come."""
    return bool(orders.poll(0))


def short(port: int, rate: float, sources: list[str]) -> None:
    """One short session after the other."""
    orders = select.poll()
    orders.register(0, select.POLLIN)
    outcomes: dict[str, Counter[str]] = {source: Counter() for source in sources}
    total: Counter[str] = Counter()
    wrong: list[str] = []
    chance = random.Random(1)
    began, turn = time.monotonic(), 0
    while not is_due(orders):
        ahead_s = began + turn / rate - time.monotonic()
        if ahead_s > 0:
            orders.poll(ahead_s * 1000)
            if is_due(orders):
                break
        source = sources[turn % len(sources)]
        turn += 1
        words = chance.randbytes(int(LARGEST ** chance.random()))
        outcome, detail = one_session(source, port, words, total)
        outcomes[source][outcome] += 1
        if outcome == "broken" and len(wrong) < 20:
            wrong.append(f"{source}: {detail}")
    sys.stdin.readline()
    print(json.dumps({"outcomes": outcomes, "total": total, "wrong": wrong, "seconds": time.monotonic() - began}), flush=True)


def one_session(source: str, port: int, words: bytes, total: Counter[str]) -> tuple[str, str]:
    """Return what became of it: allowed, refused (a reset before any answer), absent (nobody listened) or broken."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(PATIENCE_S)
        sock.bind((source, 0))
        answer = b""
        try:
            sock.connect(("127.0.0.1", port))
        except ConnectionResetError:
            total["connected"] += 1
            return "refused", ""
        except OSError as err:
            return ("absent" if err.errno == errno.ECONNREFUSED else "broken"), repr(err)
        total["connected"] += 1
        try:
            sock.sendall(words)
            while len(answer) < len(words) and (part := sock.recv(1 << 16)):
                answer += part
        except OSError as err:
            if isinstance(err, (ConnectionResetError, BrokenPipeError)) and not answer:
                return "refused", ""
            return "broken", repr(err)
        if answer != words:
            return "broken", f"{len(answer)} of {len(words)} bytes"
        total["bytes"] += len(words)
        return "allowed", ""


class Rider:
    """One long session or flow, and what it has seen so far."""

    def __init__(self, source: str, port: int, kind: socket.SocketKind) -> None:
        self.source, self.kind = source, kind
        self.sock = socket.socket(socket.AF_INET, kind)
        if kind == socket.SOCK_STREAM:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.settimeout(PATIENCE_S)
        self.sock.bind((source, 0))
        self.sock.connect(("127.0.0.1", port))
        self.sock.setblocking(False)
        self.exchanges = self.sent = self.received = self.repeated = 0
        self.asked = self.answer = b""
        self.spoke_s = 0.0
        self.before = (0, 0)
        self.ended: str | None = None
        self.wrong = False
        self.ports: set[int] = set()

    def speak(self, words: bytes) -> None:
        self.asked, self.answer, self.spoke_s = words, b"", time.monotonic()
        try:
            self.sock.send(words)
            self.sent += len(words)
        except OSError as err:
            self.end(err)

    def hear(self) -> bool:
        """Take what has come; say whether the answer is complete, or the session over."""
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError as err:
            return self.end(err)
        self.received += len(data)
        if self.kind == socket.SOCK_DGRAM:
            words, _space, port = data.rpartition(b" ")
            if words != self.asked:  # the answer to a repetition
                return False
            self.ports.add(int(port))
        else:
            if not data:
                self.ended = "end"
                return True
            self.answer += data
            if len(self.answer) < len(self.asked):
                return False
            self.wrong |= self.answer != self.asked
        self.asked = b""
        self.exchanges += 1
        return True

    def end(self, err: OSError) -> bool:
        """A reset ends a session; to a flow an ICMP message is nothing."""
        if self.kind == socket.SOCK_STREAM:
            self.ended = "reset" if isinstance(err, (ConnectionResetError, BrokenPipeError)) else repr(err)
        return self.ended is not None

    def told(self) -> dict[str, Any]:
        names = ("source", "exchanges", "sent", "received", "repeated", "ended", "wrong")
        kind = "tcp" if self.kind == socket.SOCK_STREAM else "udp"
        return {"kind": kind, "ports": sorted(self.ports), **{name: getattr(self, name) for name in names}}


class Long:
    """All riders, and when each speaks next."""

    def __init__(self, port: int, sources: list[str]) -> None:
        self.chance = random.Random(2)
        kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        self.riders = [Rider(source, port, kind) for source in sources for kind in kinds]
        self.poller = select.epoll()
        self.poller.register(0, select.EPOLLIN)
        self.by_fd = {rider.sock.fileno(): rider for rider in self.riders}
        for fd in self.by_fd:
            self.poller.register(fd, select.EPOLLIN)
        self.due: list[tuple[float, int]] = []
        self.paused = self.told_paused = False
        self.round = ""  # what is to be said once all have been heard again
        for rider in self.riders:
            self.later(rider)

    def later(self, rider: Rider) -> None:
        heapq.heappush(self.due, (time.monotonic() + self.chance.uniform(*SPEAK_S), rider.sock.fileno()))

    def run(self) -> None:
        """Ride until told to stop; say "open" once everybody has been answered."""
        self.go_round("open")
        while True:
            if self.round and all(map(self.went, self.riders)):
                print(self.round, flush=True)
                self.round = ""
            wait_s = max(0.0, self.due[0][0] - time.monotonic()) if self.due else 1.0
            for fd, _mask in self.poller.poll(wait_s):
                if fd == 0:
                    # As it comes: a line that Python has read ahead would never be reported.
                    orders = os.read(0, 4096).decode().split() or ["stop"]
                    if "stop" in orders:
                        self.stop()
                        return
                    self.paused, self.told_paused = orders[-1] == "pause", False
                    if not self.paused:
                        self.go_round("went")
                elif self.by_fd[fd].hear():
                    self.after(self.by_fd[fd])
            self.go_on()
            if self.paused and not self.told_paused and not any(map(self.waits, self.riders)):
                self.told_paused = True
                print("paused", flush=True)

    def after(self, rider: Rider) -> None:
        if rider.ended:
            self.poller.unregister(rider.sock.fileno())
        elif rider.kind == socket.SOCK_STREAM:
            self.later(rider)  # a flow's timer runs already

    def go_round(self, word: str) -> None:
        """Say this word once everybody has been answered, or has been seen to be over."""
        self.round = word
        for rider in self.riders:
            rider.before = rider.exchanges, rider.repeated

    def went(self, rider: Rider) -> bool:
        """Say whether it was answered since, or not for so long that it had to ask again."""
        exchanges, repeated = rider.before
        return rider.ended is not None or rider.exchanges > exchanges or rider.repeated > repeated

    def waits(self, rider: Rider) -> bool:
        """Say whether an answer is on its way. A flow that is not answered may have been refused: who knows."""
        late = rider.kind == socket.SOCK_DGRAM and time.monotonic() - rider.spoke_s > AGAIN_S
        return bool(rider.asked) and not rider.ended and not late

    def go_on(self) -> None:
        """Let those speak whose time has come."""
        now = time.monotonic()
        while self.due and self.due[0][0] <= now:
            rider = self.by_fd[heapq.heappop(self.due)[1]]
            if rider.ended:
                continue
            if rider.asked:  # a flow whose answer has not come: it is repeated when it is overdue
                if now - rider.spoke_s > AGAIN_S and not self.paused:
                    rider.repeated += 1
                    rider.speak(rider.asked)
            elif not self.paused:
                rider.speak(b"%d %d " % (rider.exchanges, rider.sock.fileno()) + b"x" * self.chance.randrange(1000))
            if rider.kind == socket.SOCK_DGRAM or not rider.asked:
                self.later(rider)

    def stop(self) -> None:
        for rider in self.riders:
            if rider.kind == socket.SOCK_STREAM and not rider.ended and rider.asked == b"":
                rider.hear()  # a reset that nobody has looked at
            rider.sock.close()
        print(json.dumps([rider.told() for rider in self.riders]), flush=True)


class Riding:
    """One of the programs above, from the outside; it is stopped with the context at the latest."""

    def __init__(self, *words: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.endurance.reloads.riders", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def line(self) -> str:
        """Return what it prints next."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, order: str) -> None:
        """Give it an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()

    def pause(self) -> None:
        """Return when nothing is on its way any more."""
        self.tell("pause")
        assert self.line() == "paused"

    def go(self) -> None:
        """Return when everybody has spoken again, and was answered or has ended."""
        self.tell("go")
        assert self.line() == "went"

    def stop(self) -> Any:
        """Stop it and return what happened."""
        self.tell("stop")
        return json.loads(self.line())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()


def main(words: list[str]) -> None:
    """Do what the words say, with as many descriptors as we may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    match words:
        case ["backend"]:
            Backend().run()
        case ["short", port, rate, *sources]:
            short(int(port), float(rate), sources)
        case ["long", port, *sources]:
            Long(int(port), sources).run()
        case _:
            raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
