"""What comes in: the workers' event sockets and the supervisor's control channel, read inside the event loop."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from gatekeeper.errors import ChannelClosed, SnapshotError
from gatekeeper.kernel.channel import Channel
from gatekeeper.observer.audit import MAX_MESSAGE_BYTES, Renderer, service_event
from gatekeeper.observer.say import say
from gatekeeper.observer.sink import FileTarget, JournalTarget, Sink
from gatekeeper.observer.state import NotCounters, Service
from gatekeeper.observer.tails import Outlets

MESSAGES_A_TURN = 8  # of one worker: 2,048 records, a few milliseconds


class Events:
    """The workers' event sockets. Owns them."""

    def __init__(self, sockets: Sequence[socket.socket], renderer: Renderer, outlets: Outlets) -> None:
        self._sockets = list(sockets)
        self._renderer = renderer
        self._outlets = outlets
        # One byte more than a message may have, so that a longer one is told from a full one.
        self._buffer = memoryview(bytearray(MAX_MESSAGE_BYTES + 1))
        self._rendering = False

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read whenever something arrives."""
        for sock in self._sockets:
            sock.setblocking(False)
            loop.add_reader(sock.fileno(), self._ready, loop, sock)

    def add(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        """Read one more, until it ends."""
        self._sockets.append(sock)
        sock.setblocking(False)
        loop.add_reader(sock.fileno(), self._ready, loop, sock)

    def unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Leave what arrives from now on to `read_all`, or to a successor who reads there, too."""
        for sock in self._sockets:
            loop.remove_reader(sock.fileno())

    def read_all(self) -> None:
        """Read what has arrived so far; bounded, because a worker may go on writing."""
        if self._rendering:
            return  # a record made us look at the control channel, and that made us look here
        for sock in self._sockets:
            for _ in range(64):
                if not self._read(sock):
                    break

    def _ready(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        for _ in range(MESSAGES_A_TURN):
            if not self._read(sock):
                if _hung_up(sock):
                    while self._read(sock):  # its last words may have come after we looked for some
                        pass
                    loop.remove_reader(sock.fileno())
                    self._sockets.remove(sock)
                    sock.close()
                return

    def _read(self, sock: socket.socket) -> bool:
        """Read one message; say whether there was one."""
        try:
            length = sock.recv_into(self._buffer)
        except BlockingIOError:
            return False
        except OSError as err:
            say(f"the events of a worker cannot be read: {err}")
            return False
        if length == 0:
            # The end, or a message without content, which no honest worker sends.
            if _hung_up(sock):
                return False
            self._renderer.malformed += 1
            return True
        self._rendering = True
        try:
            lines = self._renderer.render(self._buffer[:length])
        finally:
            self._rendering = False
        if lines:
            self._outlets.put(lines)
        return True


class Control:
    """The supervisor's channel. Owns it. `ended`: the supervisor is gone. `told`: it has said all it had to say, or ended."""

    def __init__(self, channel: Channel, service: Service, renderers: Sequence[Renderer], outlets: Outlets) -> None:
        self.ended = asyncio.Event()
        self.told = asyncio.Event()
        self.before_event: Callable[[], None] = lambda: None
        self.more_events: Callable[[int], None] = os.close  # takes over a descriptor
        self._channel = channel
        self._service = service
        self._renderers = renderers
        self._outlets = outlets
        channel.sock.setblocking(False)

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read whenever something arrives."""
        loop.add_reader(self._channel.fileno(), self.catch_up)

    def catch_up(self) -> None:
        """Act on every message that has arrived."""
        while not self.ended.is_set():
            try:
                message, fds = self._channel.receive()
            except BlockingIOError:
                return
            except ChannelClosed:
                self.end()
                return
            except (ValueError, RecursionError) as err:
                say(f"unreadable message of the supervisor: {err}")
                continue
            try:
                self._act(message, fds)
            except (NotCounters, SnapshotError, LookupError, TypeError, ValueError, AttributeError) as err:
                say(f"message {message.get('op')!r} of the supervisor cannot be used: {err!r}")
            finally:
                for fd in fds:
                    os.close(fd)

    def end(self) -> None:
        """Let everybody who waits know that it is over."""
        self.ended.set()
        self.told.set()

    def _act(self, message: dict[str, Any], fds: list[int]) -> None:
        """Act on one message; descriptors that are left in ``fds`` are closed by the caller."""
        match message.get("op"):
            case "counters" | "leaving" | "retired" | "kernel" as op:
                self._map(op, message, fds)
            case "policy":
                self._service.adopt(message["generation"], fds[0], fds[1])
                for renderer in self._renderers:
                    renderer.rename(self._service.bindings)
            case "state":
                self._service.state = message["state"]
                self.told.set()
            case "event":
                self.before_event()  # what workers reported earlier comes first
                self._outlets.put([service_event(message["event"], time.time())])
            case "audit":
                if self._outlets.sink is not None:
                    self._outlets.sink.swap(FileTarget(fds[0]))
                    del fds[0]
            case "tail":
                self._outlets.add(fds.pop(0))
            case other:
                say(f"unknown message of the supervisor: {other!r}")


    def _map(self, op: str, message: dict[str, Any], fds: list[int]) -> None:
        """Read counters from another place from now on."""
        if op == "kernel":
            self._service.map_kernel(fds[0])
        elif op == "retired":
            self._service.map_retired(message["workers"], fds[0])
        else:
            self._service.map_counters(message["worker"], fds[0])
            if op == "leaving":  # a worker of before an upgrade: what it reports is still to be read, too
                self.more_events(fds.pop(1))


def open_sink(kind: str, fds: list[int]) -> Sink | None:
    """Return the audit log of the start message, taking its descriptor from ``fds``; ``None`` when it is off."""
    if kind == "off":
        return None
    fd = fds.pop(0)
    return Sink(JournalTarget(fd) if kind == "journald" else FileTarget(fd))


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))
