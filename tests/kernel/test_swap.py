"""Policies that change under one link at the full rate of connections, and what other processes can do to them."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections import Counter

import pytest

from gatekeeper.kernel import bpf
from gatekeeper.kernel.judge import Common, Judge
from gatekeeper.policy.model import Action, Policy, Rule
from tests.kernel.test_lookup import from_, listener, snapshot_of, tcp
from tests.policy.generated import NOWHERE
from tests.support.namespace import Namespace

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(180)]

SWAPS = 200
PORT = 7000
ALWAYS, NEVER, SOMETIMES = "10.0.1.1", "10.0.2.1", "10.0.3.1"


def policy(*more: tuple[int, int]) -> Policy:
    """One that allows 10.0.1.0/24, and more."""
    rule = Rule("friends", Action.ALLOW, from_((0x0A000100, 0x0A0001FF), *more), None, NOWHERE)
    return Policy((listener("web", tcp("10.0.0.1", PORT)),), (rule,), Action.DENY, NOWHERE)


def test_at_full_rate_no_verdict_is_neither_the_old_nor_the_new_ones() -> None:
    """Two hundred swaps: whom both policies allow always gets in, whom both refuse never does; none goes uncounted."""
    space = Namespace(["10.0.0.0/8"])
    common = space.inside(Common)
    service = space.inside(socket.create_server, ("10.0.0.1", PORT), backlog=4096)
    over = threading.Event()
    seen: Counter[tuple[str, int]] = Counter()

    def connect(source: str) -> None:
        while not over.is_set():
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.bind((source, 0))
                sock.settimeout(10)
                seen[source, sock.connect_ex(("10.0.0.1", PORT))] += 1

    def accept() -> None:
        service.settimeout(0.1)
        while not over.is_set():
            try:
                service.accept()[0].close()
            except TimeoutError:
                continue

    def begin() -> list[threading.Thread]:
        threads = [threading.Thread(target=connect, args=[source]) for source in (ALWAYS, NEVER, SOMETIMES)]
        threads.append(threading.Thread(target=accept))
        for thread in threads:
            thread.start()
        return threads

    compiled = [snapshot_of(policy()), snapshot_of(policy((0x0A000300, 0x0A0003FF)))]
    link, counted, tried = -1, 0, 0
    threads: list[threading.Thread] = []
    in_force: list[Judge] = []
    try:
        for number in range(SWAPS):
            snapshot, bindings = compiled[number % 2]
            judge = Judge(snapshot, bindings.details, bindings.rows, common)
            if link < 0:
                link = bpf.attach(judge.program, space.fd)
                threads = space.inside(begin)
            else:
                bpf.swap(link, judge.program)
            in_force.append(judge)
            if tried + 20 > sum(seen.values()):  # some for each of them
                over.wait(0.005)
            tried = sum(seen.values())
    finally:
        over.set()
        for thread in threads:
            thread.join()
        if link >= 0:
            os.close(link)
        service.close()
    counted = sum(attempts for judge in in_force for attempts, _reported in judge.news().values())
    for judge in in_force:
        judge.close()
    common.close()
    space.close()
    assert set(seen) <= {
        (ALWAYS, 0), (NEVER, errno.ECONNREFUSED), (SOMETIMES, 0), (SOMETIMES, errno.ECONNREFUSED),
    }  # fmt: skip
    assert min(seen[ALWAYS, 0], seen[NEVER, errno.ECONNREFUSED]) > SWAPS
    assert seen[SOMETIMES, 0] and seen[SOMETIMES, errno.ECONNREFUSED]
    assert counted >= sum(seen.values())  # a SYN that met a full queue comes again
