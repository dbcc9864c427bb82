"""The kernel's part in enforcing: one program per policy, swapped on one link, and what it counts and reports.

    attach ──► in force ──reload: workers first, then one swap──► in force ──► close: nothing is left

The link lives in this process alone: when the supervisor is gone, however it went, so is the program. Only guarded
listeners that stay closed then have it pinned (see pinning.py), and the next start takes it over from there. What
programs count and report goes to the observer through attempts.py.
"""

from __future__ import annotations

import base64
import mmap
import os
import zlib
from typing import TYPE_CHECKING

from gatekeeper.errors import KernelError
from gatekeeper.kernel import bpf
from gatekeeper.kernel.counts import Counts
from gatekeeper.kernel.judge import Common, Former, Judge
from gatekeeper.snapshot.reader import Snapshot
from gatekeeper.supervisor.accepted import how_guarded
from gatekeeper.supervisor.attempts import Attempts
from gatekeeper.supervisor.guarded import GuardedSessions
from gatekeeper.supervisor.handover import Fd, Kernel
from gatekeeper.supervisor.pinning import NAMESPACE, Pin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gatekeeper.supervisor.accepted import Accepted
    from gatekeeper.supervisor.loop import Loop

COUNT_EVERY_S = 1.0
LINGER_S = 1.0  # a packet that is being judged while programs are swapped is counted by the old one
_OTHERS = "another sk_lookup program judges in this network namespace (`bpftool net`), and may let in what we refuse"


class Enforcer:
    """Owns the link and the program in force; ``attempts`` is what the observer reads."""

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
        self._namespace = self._link = -1
        self._judge: Judge | None = None
        self._policy: Accepted | None = None
        self._leaving: list[tuple[Judge | Former, Accepted]] = []  # swapped out, not counted to the end yet
        self._kept: list[tuple[Judge, Accepted]] = []  # swapped out, and may come back
        try:
            self._namespace = os.open(NAMESPACE, os.O_RDONLY)
            self._pin = Pin(self._namespace)
            self._link = self._pin.take_over() if left is None else left.link
            self.others = self._count_others()
            self._common = Common()
        except OSError as err:
            for fd in (self._namespace, self._link):
                if fd >= 0:
                    os.close(fd)
            raise KernelError(_why_not(err)) from err
        self.attempts = Attempts(left)
        self.sessions = GuardedSessions(loop, self._common.bans, self.attempts.counters, self.attempts.tell, warn)

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
            if left is not None:
                enforcer._see_off_former(left, policy)
        except KernelError:
            enforcer.close()
            raise
        return enforcer

    def _see_off_former(self, left: Kernel, policy: Accepted) -> None:
        """Count and hear the program of a predecessor in our place to the end."""
        try:
            counted = zlib.decompress(base64.b64decode(left.counted))
            counts = Counts(left.counts, len(policy.bindings.details), left.cpus, counted)
            former = Former(policy.bindings.details, counts, left.ring, left.holes)
        except (OSError, ValueError, zlib.error) as err:
            self._warn(f"what the kernel refused during the upgrade is not counted: {err}")
            for fd in (left.counts, left.ring, *left.holes):
                os.close(fd)
            return
        self._leaving.append((former, policy))
        self._loop.later(LINGER_S, self._see_off)

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
                self._pin.keep(self._link, policy)
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
            self._pin.keep(self._link, policy)
        except OSError as err:
            judge.close()
            raise KernelError(_why_not(err)) from err
        except KernelError:
            judge.close()
            raise
        self._judge, self._policy = judge, policy
        self.sessions.follow(judge.snapshot, policy)
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
        """Return what another program in our place needs, so that the program in force stays in force."""
        assert self._judge is not None
        self._hear()
        self._count_all()
        counts = self._judge.counts
        return Kernel(
            Fd(self._link), tuple(map(Fd, self._common.holes())), Fd(self.attempts.counters_fd), self.attempts.flow,
            Fd(counts.fd), counts.cpus, base64.b64encode(zlib.compress(counts.counted)).decode(), Fd(self._common.ring_map),
        )  # fmt: skip

    def restless(self) -> bool:
        """Say whether programs that were swapped out are still to be counted."""
        return bool(self._leaving or self._kept)

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
        self._common.close()
        os.close(self._namespace)
        self.attempts.close()

    def _settle(self) -> None:
        self._pin.settle([policy for _judge, policy in self._kept] + ([self._policy] if self._policy is not None else []))

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

    def _hear(self) -> None:
        self.attempts.hear(self._common.ring)

    def _tick(self) -> None:
        if self._link >= 0:
            self._count_all()
            self._look_for_others()
            self._loop.later(COUNT_EVERY_S, self._tick)

    def _see_off(self) -> None:
        if self._leaving:
            judge, policy = self._leaving.pop(0)
            if isinstance(judge, Former):
                self.attempts.hear(judge.ring)
            self.attempts.count(judge, policy)
            judge.close()

    def _count_all(self) -> None:
        for judge, policy in [*self._leaving, *self._kept]:
            self.attempts.count(judge, policy)
        if self._judge is not None and self._policy is not None:
            self.attempts.count(self._judge, self._policy)


def _why_not(err: OSError) -> str:
    advice = bpf.advice(err)
    return f"the kernel cannot refuse for us: {err.strerror}" + (f"; {advice}" if advice else "")
