"""The kernel's part in enforcing: one program per policy, swapped on one link, and what it counts and reports.

    attach ──► in force ──reload: workers first, then one swap──► in force ──► close: nothing is left

The link lives in this process alone: when the supervisor is gone, however it went, so is the program. Only guarded
listeners that stay closed then have it pinned in the bpf file system, and the next start takes it over from there. To the observer the
kernel looks like one more worker: it has counters in shared memory and a socket for events.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import time
from typing import TYPE_CHECKING

from gatekeeper.errors import KernelError
from gatekeeper.kernel import bpf, lookup, memfd
from gatekeeper.kernel.judge import Common, Judge
from gatekeeper.proxy.events import MAX_RECORDS, RECORD, REFUSAL, SUPPRESSED
from gatekeeper.snapshot.counters import CAPACITY_BYTES, End, WorkerSlot
from gatekeeper.snapshot.reader import Snapshot
from gatekeeper.supervisor.guarded import GuardedSessions
from gatekeeper.supervisor.handover import Fd, Kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.loop import Loop

COUNT_EVERY_S = 1.0
LINGER_S = 1.0  # a packet that is being judged while programs are swapped is counted by the old one
NAMESPACE = "/proc/self/ns/net"
NO_ADDRESS = bytes(16)
_OTHERS = "another sk_lookup program judges in this network namespace (`bpftool net`), and may let in what we refuse"
PINS = "/sys/fs/bpf/gatekeeper"


class Enforcer:
    """Owns the link, the program in force, ``counters_fd``, and both ends of the events (``events_out`` for the observer)."""

    def __init__(
        self, loop: Loop, warn: Callable[[str], None] = lambda _text: None, left: Kernel | None = None
    ) -> None:
        """Make what lives as long as the service. Nothing is judged before `attach`, unless ``left`` goes on with it.

        ``left``: what `left_behind` of a predecessor in our place has returned; its descriptors are ours now.

        Raises:
            KernelError: what is missing, and how to mend it.
        """
        self.others = 0  # programs in our namespace that are not ours
        self.others_changed: Callable[[], None] = lambda: None
        self._loop = loop
        self._warn = warn
        self._succeeds = left is not None
        self._held: tuple[int, ...] = ()  # what the predecessor's program needs
        self._namespace = self._link = -1
        self._judge: Judge | None = None
        self._policy: Accepted | None = None
        self._leaving: list[tuple[Judge, Accepted]] = []  # swapped out, not counted to the end yet
        self._kept: list[tuple[Judge, Accepted]] = []  # swapped out, and may come back
        # Workers' flow ids begin twice as high.
        self._flow = int(time.time()) << 21 if left is None else left.flow
        try:
            self._namespace = os.open(NAMESPACE, os.O_RDONLY)
            self._pin = pin_path(self._namespace)
            self._link = self._left_behind() if left is None else left.link
            self.others = self._count_others()
            self._common = Common()
        except OSError as err:
            for fd in (self._namespace, self._link):
                if fd >= 0:
                    os.close(fd)
            raise KernelError(_why_not(err)) from err
        self.counters_fd = memfd.create("gatekeeper-kernel", CAPACITY_BYTES)
        self._memory = mmap.mmap(self.counters_fd, CAPACITY_BYTES)
        memfd.seal_against_new_writers(self.counters_fd)
        if left is not None:
            _go_on_counting(self._memory, left.counters)
            os.close(left.counters)
            self._held = left.held
        self._counters = memoryview(self._memory).cast("Q")
        self.events_out, self._events_in = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._events_in.setblocking(False)
        self.sessions = GuardedSessions(loop, self._common.bans, self._counters, self._tell, warn)

    @classmethod
    def begin(
        cls, loop: Loop, policy: Accepted, *, alone: bool, warn: Callable[[str], None],
        left: Kernel | None = None, banned: Iterable[tuple[int, int, int]] = (),
    ) -> Enforcer:  # fmt: skip
        """Return an enforcer that has a policy in force, and bans above it. ``alone``: nobody else's program may have a say.

        ``left``: what a predecessor in our place left behind; its program is in force until ours is, and then others
        have no say in whether we go on.

        Raises:
            KernelError: what is missing, and how to mend it; nothing is left behind.
        """
        enforcer = cls(loop, warn, left)
        try:
            judge = enforcer.load(policy, alone=alone)
            if enforcer.others:
                warn(_OTHERS)
            enforcer.ban(banned)
            enforcer.attach(judge, policy)
        except KernelError:
            enforcer.close()
            raise
        return enforcer

    def load(self, policy: Accepted, *, alone: bool = False) -> Judge:
        """Return the program for a policy, loaded but not in force. The caller puts it in force or discards it.

        ``alone``: it must not be if somebody else's program judges here too; for one that guards that goes without saying.

        Raises:
            KernelError: the kernel does not take it, or it guards and cannot be relied on.
        """
        # One that has come while we guarded was told of; now the next policy is better than the one before it for ever.
        if self.others and not self._succeeds and not self.guards() and (alone or how_guarded(policy)):
            raise KernelError(_OTHERS)
        try:
            # Not closed by hand: the mapping goes with the last view of it.
            snapshot = Snapshot(memoryview(mmap.mmap(policy.snapshot_fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)))
            judge = Judge(snapshot, policy.bindings.details, policy.bindings.rows, self._common)
        except OSError as err:
            raise KernelError(_why_not(err)) from err
        if self._judge is not None:
            try:
                self._keep(policy)
            except KernelError:
                judge.close()
                raise
        return judge

    def attach(self, judge: Judge, policy: Accepted) -> None:
        """Put the first program in force, and begin to count.

        Raises:
            KernelError: the kernel refuses.
        """
        try:
            if self._link >= 0:
                bpf.swap(self._link, judge.program)
            else:
                self._link = bpf.attach(judge.program, self._namespace)
            self._keep(policy)
        except OSError as err:
            judge.close()
            raise KernelError(_why_not(err)) from err
        except KernelError:
            judge.close()
            raise
        self._judge, self._policy = judge, policy
        self.sessions.follow(judge.snapshot, policy)
        self._let_go_of_predecessor()
        self._settle()
        self._loop.watch(self._common.ring.fileno(), self._hear)
        self._loop.later(COUNT_EVERY_S, self._tick)

    def swap(self, judge: Judge, policy: Accepted, *, keep: bool = False) -> Judge:
        """Let another program take over at once; return the one before it.

        ``keep``: that one stays ready; the caller puts it in force again by `swap`, or gives it up by `let_go`.

        Raises:
            KernelError: the kernel refuses; the one before it stays in force.
        """
        assert self._judge is not None
        assert self._policy is not None
        try:
            bpf.swap(self._link, judge.program)
        except OSError as err:
            raise KernelError(_why_not(err)) from err
        before = self._judge
        self._kept = [(kept, its) for kept, its in self._kept if kept is not judge]
        self._kept.append((before, self._policy))
        self._judge, self._policy = judge, policy
        self.sessions.follow(judge.snapshot, policy)
        if not keep:
            self.let_go(before)
        return before

    def let_go(self, judge: Judge) -> None:
        """Give up a program that was swapped out and kept."""
        self._leaving += [(kept, policy) for kept, policy in self._kept if kept is judge]
        self._kept = [(kept, policy) for kept, policy in self._kept if kept is not judge]
        self._loop.later(LINGER_S, self._see_off)
        self._settle()

    def discard(self, judge: Judge) -> None:
        """Let go of a program that will not be put in force."""
        judge.close()
        self._settle()

    def left_behind(self) -> Kernel:
        """Return what another program in our place needs, so that the program in force stays in force.

        What that refuses until the other one's takes over is not counted.
        """
        self._hear()
        self._count_all()
        return Kernel(Fd(self._link), Fd(self.counters_fd), self._flow, tuple(map(Fd, self._common.holes())))

    def ban(self, ranges: Iterable[tuple[int, int, int]], done: Callable[[int], None] = lambda _ended: None) -> None:
        """Refuse these (family, first, last) above all policies, and nobody else any more.

        ``done`` is told, now or later, how many live sessions of guarded listeners have ended.

        Raises:
            KernelError: that is not possible; whom it refused before is still refused.
        """
        try:
            self._common.bans.hold(ranges)
        except OSError as err:
            raise KernelError(f"the kernel does not take the bans: {err.strerror}") from err
        self.sessions.end_banned(done)

    def rejudge(self, done: Callable[[int, int], None]) -> None:
        """End the live sessions of guarded listeners that the policy in force or a ban refuses.

        ``done`` is told how many were judged and how many ended.
        """
        self.sessions.judge_again(done)

    def guards(self) -> bool:
        """Whether somebody else's listeners are under our policy."""
        return self._policy is not None and bool(how_guarded(self._policy))

    def detach(self) -> None:
        """Take the program out of force, unless it is pinned, and tell what is left to tell."""
        if self._link >= 0:
            os.close(self._link)
            self._link = -1
            if self._judge is not None:
                self._loop.unwatch(self._common.ring.fileno())
                self._hear()
                self._count_all()

    def close(self) -> None:
        """Leave nothing behind."""
        self.sessions.close()
        self.detach()
        for judge, _policy in [*self._leaving, *self._kept, *([(self._judge, None)] if self._judge is not None else [])]:
            judge.close()
        self._leaving, self._kept, self._judge = [], [], None
        self._let_go_of_predecessor()
        self._common.close()
        self._counters.release()
        self._memory.close()
        for fd in (self.counters_fd, self._namespace):
            os.close(fd)
        self._events_in.close()
        self.events_out.close()

    def _let_go_of_predecessor(self) -> None:
        for fd in self._held:
            os.close(fd)
        self._held = ()

    # -- what outlives us

    def _left_behind(self) -> int:
        """Return the link that an earlier run has pinned for this network namespace, -1 when there is none."""
        try:
            link = bpf.pinned(self._pin)
        except (FileNotFoundError, PermissionError):  # whoever may not look there has left nothing there
            return -1
        if bpf.namespace_of(link) == os.fstat(self._namespace).st_ino:
            return link
        os.close(link)  # of a namespace that is gone and had the same number
        os.unlink(self._pin)
        return -1

    def _keep(self, policy: Accepted) -> None:
        """Pin the link if the policy is to outlive us.

        Raises:
            KernelError: it cannot be pinned.
        """
        if "closed" not in how_guarded(policy) or os.path.exists(self._pin):
            return
        try:
            os.makedirs(PINS, mode=0o700, exist_ok=True)
            bpf.pin(self._link, self._pin)
        except OSError as err:
            raise KernelError(
                f"`on_exit: closed` cannot be kept: {err.strerror} ({PINS}); it takes the bpf file system "
                "(mount -t bpf bpf /sys/fs/bpf) and the right to write there"
            ) from err

    def _settle(self) -> None:
        """Take the pin away when neither the policy in force nor one that may come back has a use for it."""
        policies = [policy for _judge, policy in self._kept] + ([self._policy] if self._policy is not None else [])
        if policies and not any("closed" in how_guarded(policy) for policy in policies):
            with contextlib.suppress(OSError):
                os.unlink(self._pin)
            with contextlib.suppress(OSError):
                os.rmdir(PINS)

    # -- what it did

    def _count_others(self) -> int:
        ours = {bpf.program_of(self._link)} if self._link >= 0 else set()
        return len(set(bpf.attached(self._namespace)) - ours)

    def _look_for_others(self) -> None:
        """Say so when somebody else's program comes or goes: that is not ours to prevent, and may undo what we refuse."""
        try:
            others = self._count_others()
        except OSError:
            return
        if others != self.others:
            grown, self.others = others > self.others, others
            self._warn(_OTHERS if grown else f"{others or 'no'} other sk_lookup programs judge in this network namespace now")
            self.others_changed()

    def _tick(self) -> None:
        if self._link >= 0:
            self._count_all()
            self._look_for_others()
            self._loop.later(COUNT_EVERY_S, self._tick)

    def _see_off(self) -> None:
        if self._leaving:
            judge, policy = self._leaving.pop(0)
            self._count(judge, policy)
            judge.close()

    def _count_all(self) -> None:
        for judge, policy in [*self._leaving, *self._kept]:
            self._count(judge, policy)
        if self._judge is not None and self._policy is not None:
            self._count(self._judge, self._policy)

    def _count(self, judge: Judge, policy: Accepted) -> None:
        """Add what a program has counted since the last time; what was refused without a report is said in one record."""
        records = []
        now = time.time()
        for detail, (attempts, reported) in judge.news().items():
            slot = judge.slots[detail]
            self._counters[slot] += attempts
            listener, _rule, action, _reason = policy.meta["details"][detail]
            left_out = attempts - reported
            if action != "allow" and left_out > 0:
                self._counters[WorkerSlot.REFUSALS_SUPPRESSED] += left_out
                number = next(
                    number for endpoint, number in zip(policy.meta["endpoints"], policy.bindings.rows, strict=True)
                    if endpoint["listener"] == listener and endpoint["family"]
                )  # fmt: skip
                records.append(RECORD.pack(
                    SUPPRESSED, End.REFUSED, 0, slot, number, 0, 0, 0, now, 0.0, left_out, 0, NO_ADDRESS, NO_ADDRESS
                ))  # fmt: skip
        self._tell(records)

    def _hear(self) -> None:
        """Pass on what the program reports."""
        since_boot_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        records = []
        for report in self._common.ring.read():
            at_ns, slot, number, port, to_port, family, _protocol, source, target = lookup.REPORT.unpack(report)
            self._flow += 1
            records.append(RECORD.pack(
                REFUSAL, End.REFUSED, 4 if family == socket.AF_INET else 6, slot, number, socket.ntohs(port), to_port,
                self._flow, at_ns / 1e9 + since_boot_s, 0.0, 0, 0, source, target,
            ))  # fmt: skip
        self._tell(records)

    def _tell(self, records: list[bytes]) -> None:
        for first in range(0, len(records), MAX_RECORDS):
            batch = records[first : first + MAX_RECORDS]
            try:
                self._events_in.send(b"".join(batch))
            except OSError:  # the observer does not read, or it is being replaced
                self._counters[WorkerSlot.EVENTS_LOST_REFUSAL] += len(batch)


def _go_on_counting(memory: mmap.mmap, before: int) -> None:
    """Start from what a predecessor has counted, without touching pages where nothing was."""
    for at in range(0, CAPACITY_BYTES, mmap.PAGESIZE):
        page = os.pread(before, mmap.PAGESIZE, at)
        if any(page):
            memory[at : at + len(page)] = page


def pin_path(namespace: int) -> str:
    """Return where the link of a network namespace is pinned."""
    return f"{PINS}/netns-{os.fstat(namespace).st_ino}"


def how_guarded(policy: Accepted) -> set[str]:
    """Return ``on_exit`` of the guarded listeners; empty when nothing is guarded."""
    return {listener["on_exit"] for listener in policy.meta["listeners"]} - {None}


def leftover() -> str | None:
    """Return the path of a program that an earlier run left in force here, ``None`` when there is none."""
    with contextlib.suppress(OSError):
        path = pin_path_here()
        return path if os.path.exists(path) else None
    return None


def pin_path_here() -> str:
    """Return where the link of our own network namespace would be pinned."""
    with open(NAMESPACE, "rb") as namespace:
        return pin_path(namespace.fileno())


def _why_not(err: OSError) -> str:
    advice = bpf.advice(err)
    return f"the kernel cannot refuse for us: {err.strerror}" + (f"; {advice}" if advice else "")
