"""Free ports, and a number of its own for each test process: safe beside other test processes on this host."""

from __future__ import annotations

import itertools
import socket

FIRST_PORT, BLOCK_PORTS, BLOCKS = 10240, 350, 64  # all below 32768, where the kernel picks ports for outgoing connections

_claim: socket.socket | None = None
_block = 0
_offsets = itertools.cycle(range(BLOCK_PORTS))


def block() -> int:
    """Return this process's number, 0 to 63: no other living test process on this host has the same.

    It is held by a socket with an abstract name, which the kernel gives back however the process ends.
    """
    global _claim, _block
    if _claim is None:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        for number in range(BLOCKS):
            try:
                claim.bind(f"\0gatekeeper-tests-{number}")
            except OSError:
                continue
            _claim, _block = claim, number
            break
        else:
            claim.close()
            raise AssertionError(f"{BLOCKS} test processes are running already")
    return _block


def free_port() -> int:
    """Return a port that nothing on this host uses, over TCP and UDP, IPv4 and IPv6; not given out again for a while."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """Return the first of ``count`` neighbouring free ports."""
    base = FIRST_PORT + block() * BLOCK_PORTS
    run = 0
    for _ in range(2 * BLOCK_PORTS):
        port = base + next(_offsets)
        run = run + 1 if _is_free(port) and (run == 0 or port != base) else 0
        if run == count:
            return port - count + 1
    raise AssertionError(f"no {count} free ports from {base} to {base + BLOCK_PORTS - 1}")


def _is_free(port: int) -> bool:
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                try:
                    probe.bind((host, port))
                except OSError:
                    return False
    return True
