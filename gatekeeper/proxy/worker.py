"""A worker: takes orders from the supervisor, watches its endpoints, keeps its sessions.

Orders arrive on a `Channel`; `ORDERS` lists them. A new snapshot is prepared first and put in force by a second order, so
that all workers change over or none does. Nothing but the supervisor, the observer, clients and backends is ever spoken to.
"""

from __future__ import annotations

import gc
import mmap
import os
import resource
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from gatekeeper.errors import ChannelClosed, GatekeeperError
from gatekeeper.kernel import privileges
from gatekeeper.proxy.census import Census
from gatekeeper.proxy.chores import Chores
from gatekeeper.proxy.gate import Prepared, Shared, ephemeral_ports
from gatekeeper.proxy.loop import IDLE_TICK_S, READ, TICK_S, Loop, say
from gatekeeper.proxy.pipes import MOST, PipePool
from gatekeeper.proxy.report import Reporter
from gatekeeper.proxy.tcp import TcpGate
from gatekeeper.proxy.udp import UdpGate
from gatekeeper.snapshot.bans import Bans
from gatekeeper.snapshot.bindings import Bindings
from gatekeeper.snapshot.counters import CAPACITY_BYTES, End, ListenerSlot, WorkerSlot
from gatekeeper.snapshot.reader import Snapshot

if TYPE_CHECKING:
    from gatekeeper.kernel.channel import Channel

HOUSEKEEPING_S = 1.0  # suppressed refusals, queue lengths, a new round of sweeps
COLLECTION_S = 60.0
SWEEP_S = 1.0  # how often sessions are looked at,
SWEEP_PART = 0.04  # or more often when the shortest limit asks for it: it is kept to within twice this part
SENT_WITH_POLICY = 2  # descriptors: the snapshot and the bindings
PIPES_SHARE = 8  # at most this part of all descriptors is kept for pipes
ORDERS_FDS = 8  # what an order may bring beside listening sockets, which are counted when they are there


class Worker:
    """One process of the data path. Owns everything it was sent."""

    shared: Shared
    report: Reporter
    census: Census

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.loop = Loop()
        self.index = 0
        self.own_fds = 0  # before there were sockets and sessions
        # By endpoint and shard: beside its own shard, a worker also serves those of siblings that cannot be started.
        self.gates: dict[tuple[str, int], TcpGate | UdpGate] = {}
        self.sockets: dict[tuple[str, int], tuple[socket.socket, bool]] = {}  # handed to us, not watched yet
        self.short = False  # sockets were on their way to us, and there was no room for them
        self.prepared: Prepared | None = None
        self.in_force: Prepared | None = None
        self.chores = Chores()
        self.sweep_every_s = SWEEP_S
        self.next_sweep_s = 0.0
        self.next_housekeeping_s = 0.0
        self.next_collection_s = 0.0
        self.drain_deadline_s: float | None = None
        self.running = True

    # -- the loop

    def run(self) -> None:
        """Work until drained. Returns when the supervisor is gone, too: it would have been killed anyway."""
        self.channel.sock.setblocking(True)
        while not hasattr(self, "shared"):  # nothing else can happen before `start`
            self.obey(*self.channel.receive())
        self.channel.sock.setblocking(False)
        self.loop.watch(self.channel.fileno(), READ, self)
        # Sessions leave no cycles behind, so the collector has nothing to find among them; with thousands of them it
        # would stop everybody for milliseconds to say so. It runs when there is nobody to stop.
        gc.collect()
        gc.freeze()
        gc.disable()
        turn, chores, tick_due_s = self.loop.turn, self.chores, 0.0
        while self.running:
            now = turn(self.patience())
            if now >= tick_due_s or chores.queue:
                if now >= tick_due_s:
                    tick_due_s = now + TICK_S
                    self.tick(now)
                chores.go_on()
                # What is due by the clock holds up sessions as much as what is due by events.
                self.loop.longest_turn_s = max(self.loop.longest_turn_s, time.monotonic() - now)
        self.report.flush()

    def patience(self) -> float:
        """Return how long the loop may wait for events, in seconds."""
        if self.chores.queue:
            return self.chores.patience(self.loop.now)
        return TICK_S if self.shared.due or self.report.batch else min(IDLE_TICK_S, self.sweep_every_s)

    def ready(self, _mask: int) -> None:
        """See `Handler.ready`: orders have arrived."""
        try:
            while True:
                self.obey(*self.channel.receive())
        except BlockingIOError:
            return
        except ChannelClosed:
            self.running = False

    def fail(self) -> None:
        """See `Failing.fail`: an order could not be carried out, so the supervisor must not count on this worker."""
        self.running = False

    def tick(self, now: float) -> None:
        """Do what is due."""
        shared = self.shared
        shared.counters[WorkerSlot.HEARTBEAT_MS] = int(now * 1000)
        if shared.due:
            for waiting in list(shared.due.values()):
                try:
                    waiting.check(now)
                except Exception:  # noqa: BLE001 - the loop's promise holds here, too
                    self.loop.give_up(waiting)
        if self.report.batch and now >= self.report.flush_due_s:
            self.report.flush()
        if now >= self.next_sweep_s and not self.census.sweeping:
            self.next_sweep_s = now + self.sweep_every_s
            self.census.sweep()
        if now >= self.next_housekeeping_s:
            self.next_housekeeping_s = now + HOUSEKEEPING_S
            self.keep_house(now)
        if self.drain_deadline_s is not None:
            self.go_on_draining(now)

    def keep_house(self, now: float) -> None:
        """Do what is due once a second."""
        loop, counters = self.loop, self.shared.counters
        loop.wall_offset = time.time() - time.monotonic()  # not the beginning of this turn: turns take their time
        counters[WorkerSlot.LOOP_TURNS] = loop.turns
        counters[WorkerSlot.LOOP_STALL_MAX_US] = int(loop.longest_turn_s * 1e6)
        self.report.renew_budgets()
        self.shared.recover()
        queued: dict[int, int] = {}
        for gate in self.gates.values():
            block = gate.terms.block
            queued[block] = queued.get(block, 0) + gate.measure()
        for block, length in queued.items():
            counters[block + ListenerSlot.ACCEPT_QUEUE] = length
        if not self.shared.sessions and now >= self.next_collection_s:
            self.next_collection_s = now + COLLECTION_S
            gc.collect()

    def limit_sessions(self) -> None:
        """Work out how many descriptors sessions may hold, so that accepting stops before everything else does."""
        limit = most_descriptors()
        pipes = self.shared.pipes
        pipes.most = min(MOST, limit // PIPES_SHARE // 2)
        ours = self.own_fds + len(self.shared.siblings) + len(self.gates) + len(self.sockets)
        self.shared.max_fds = limit - ours - 2 * pipes.most - ORDERS_FDS

    # -- orders

    def obey(self, order: dict[str, Any], fds: list[int]) -> None:
        """Carry out one order."""
        ORDERS[order["op"]](self, order, fds)

    def start(self, order: dict[str, Any], fds: list[int]) -> None:
        """Give up all privileges, then take the counters and the channel to the observer."""
        groups = order["groups"]
        privileges.drop(order["uid"], order["gid"], groups, order["supervisor_pid"])
        # Whoever takes this process over gets no second one that outlives it. (root alone is above the limit)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        counters_fd, events_fd = fds
        self.index = order["worker"]
        counters = memoryview(mmap.mmap(counters_fd, CAPACITY_BYTES)).cast("B").cast("Q")
        os.close(counters_fd)
        self.report = Reporter(self.loop, counters, socket.socket(fileno=events_fd), order["worker"], order["workers"])
        self.shared = Shared(
            loop=self.loop,
            counters=counters,
            report=self.report,
            pipes=PipePool(),
            siblings=[counters],
            sessions={},
            due={},
            max_fds=0,
        )
        self.census = Census(self.shared, self.channel, self.chores)
        self.own_fds = len(os.listdir("/proc/self/fd"))
        self.limit_sessions()
        self.channel.send({"op": "ready"})

    def meet_siblings(self, _order: dict[str, Any], fds: list[int]) -> None:
        """Take the counters of all workers, to be read only."""
        views = []
        for fd in fds:
            views.append(memoryview(mmap.mmap(fd, CAPACITY_BYTES, prot=mmap.PROT_READ)).cast("B").cast("Q"))
            os.close(fd)
        self.shared.siblings = views

    def take_sockets(self, order: dict[str, Any], fds: list[int]) -> None:
        """Keep listening sockets until a policy that names them is in force.

        ``shard`` says whose they are; without it they are our own. Those that did not arrive, because our descriptors
        are exhausted, are told of when the policy is to be prepared.
        """
        shard = order.get("shard", self.index)
        self.short |= len(fds) < len(order["keys"])
        for key, exclusive, fd in zip(order["keys"], order["shared"], fds, strict=False):
            old = self.sockets.pop((key, shard), None)
            if old is not None:
                old[0].close()
            self.sockets[key, shard] = (socket.socket(fileno=fd), exclusive)

    def prepare(self, order: dict[str, Any], fds: list[int]) -> None:
        """Map and check a snapshot; say whether it could be put in force."""
        generation = order["generation"]
        short, self.short = self.short, False
        if short or len(fds) != SENT_WITH_POLICY:
            for fd in fds:
                os.close(fd)
            self.channel.send({"op": "failed", "generation": generation, "error": "too few file descriptors"})
            return
        snapshot_fd, bindings_fd = fds
        try:
            # Private and read-only: even this process can not change a verdict by way of its mapping.
            snapshot = Snapshot(memoryview(mmap.mmap(snapshot_fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)))
            bindings = Bindings.numbers_from_json(os.pread(bindings_fd, os.fstat(bindings_fd).st_size, 0))
        except (GatekeeperError, OSError, ValueError, KeyError, MemoryError) as err:
            self.channel.send({"op": "failed", "generation": generation, "error": f"{type(err).__name__}: {err}"})
            return
        finally:
            os.close(snapshot_fd)
            os.close(bindings_fd)
        self.prepared = Prepared(generation, snapshot, bindings, ephemeral_ports())
        self.channel.send({"op": "prepared", "generation": generation})

    def commit(self, order: dict[str, Any], _fds: list[int]) -> None:
        """Put the prepared snapshot in force: from here on every verdict is the new policy's."""
        prepared = self.prepared
        if prepared is None or prepared.generation != order["generation"]:
            raise ValueError(f"generation {order['generation']} was not prepared")
        self.prepared, self.in_force = None, prepared
        endpoints = prepared.snapshot.meta["endpoints"]
        relayed = [listener["on_exit"] is None for listener in prepared.snapshot.meta["listeners"]]
        wanted = {endpoint["key"]: index for index, endpoint in enumerate(endpoints) if relayed[endpoint["listener"]]}
        for place in [place for place in self.gates if place[0] not in wanted]:
            self.gates.pop(place).close()
        for (key, _shard), gate in self.gates.items():
            gate.bind_policy(prepared, wanted[key])
        for place in [place for place in self.sockets if place[0] in wanted and self.drain_deadline_s is None]:
            sock, exclusive = self.sockets.pop(place)
            if place in self.gates:  # we have it already
                sock.close()
                continue
            index = wanted[place[0]]
            kind = TcpGate if endpoints[index]["protocol"] == "tcp" else UdpGate
            self.gates[place] = gate = kind(
                self.shared, place[0], sock, exclusive=exclusive, own=place[1] == self.index
            )
            gate.open(prepared, index)
        self.limit_sessions()
        listeners = prepared.snapshot.meta["listeners"]
        limits = [item[key] for item in listeners for key in ("idle_timeout_s", "half_close_timeout_s")]
        self.sweep_every_s = min(SWEEP_S, max(TICK_S, min(limits, default=SWEEP_S) * SWEEP_PART))
        self.next_sweep_s = min(self.next_sweep_s, self.loop.now + self.sweep_every_s)
        self.shared.counters[WorkerSlot.GENERATION] = prepared.generation
        self.channel.send({"op": "committed", "generation": prepared.generation})

    def abort(self, _order: dict[str, Any], _fds: list[int]) -> None:
        """Forget what was prepared, and the sockets that only it would have needed."""
        self.prepared = None
        self.short = False
        for sock, _exclusive in self.sockets.values():
            sock.close()
        self.sockets.clear()

    def relieve(self, order: dict[str, Any], _fds: list[int]) -> None:
        """Leave a sibling's shard to its own worker, which serves again. TCP sessions that we took there stay ours."""
        shard = order["shard"]
        for place in [place for place in self.sockets if place[1] == shard]:
            self.sockets.pop(place)[0].close()
        for place in [place for place in self.gates if place[1] == shard]:
            self.gates.pop(place).close()
        self.limit_sessions()

    def rejudge(self, order: dict[str, Any]) -> None:
        """Judge all sessions by the policy in force."""
        assert self.in_force is not None
        self.census.judge_again(order["query"], self.in_force.snapshot)

    def ban(self, order: dict[str, Any], fds: list[int]) -> None:
        """Put a table of bans in force: for new connections at once, for those there are one by one."""
        (fd,) = fds
        try:
            bans = Bans(memoryview(mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)))
        finally:
            os.close(fd)
        self.shared.bans = bans or None
        for gate in self.gates.values():
            gate.forget()
        self.census.end_banned(order["query"])

    def drain(self, order: dict[str, Any], _fds: list[int]) -> None:
        """Accept no more; let sessions end by themselves until the deadline.

        ``handover``: others serve the same sockets from now on, and what waits in their queues is theirs.
        """
        self.drain_deadline_s = self.loop.now + order["deadline_s"]
        handover = order.get("handover", False)
        for place, gate in list(self.gates.items()):
            if isinstance(gate, TcpGate):
                del self.gates[place]
                gate.close(judge_queued=not handover)
            else:
                gate.drain(receive=not handover)

    def go_on_draining(self, now: float) -> None:
        """Leave once all sessions have ended or the deadline has passed."""
        assert self.drain_deadline_s is not None
        sessions = self.shared.sessions
        if sessions and now < self.drain_deadline_s:
            return
        left = len(sessions)
        for session in list(sessions.values()):
            session.finish(End.DRAINED)
        self.report.renew_budgets()
        self.report.flush()
        self.channel.send({"op": "drained", "sessions": left})
        self.running = False


ORDERS = {
    "start": Worker.start,
    "siblings": Worker.meet_siblings,
    "listen": Worker.take_sockets,
    "prepare": Worker.prepare,
    "commit": Worker.commit,
    "abort": Worker.abort,
    "relieve": Worker.relieve,
    "rejudge": lambda worker, order, _fds: worker.rejudge(order),
    "sessions": lambda worker, order, _fds: worker.census.find(order),
    "cut": lambda worker, order, _fds: worker.census.find(order, End.CUT),
    "bans": Worker.ban,
    "drain": Worker.drain,
}


def most_descriptors() -> int:
    """Raise the limit of open files as far as allowed and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def main(channel: Channel) -> int:
    """Be a worker until told to leave; return the exit code."""
    try:
        Worker(channel).run()
    except ChannelClosed:
        say("the supervisor is gone")
        return 1
    return 0
