"""The kernel and `owner` give every source to the same shard."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gatekeeper.kernel import steering

PROBE = Path(__file__).with_name("steering_probe.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shards", [2, 3, 7])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_kernel_and_python_agree(protocol: str, family: int, shards: int) -> None:
    """Every connection and datagram arrives at the socket that `owner` names, and no shard is left out."""
    command = [sys.executable, str(PROBE), protocol, str(family), str(shards), "7"]
    ran = subprocess.run(
        ["unshare", "--map-root-user", "--net", *command],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)
    assert len(rows) >= 300
    assert [row for row in rows if row[1] != row[2]] == []
    assert {row[2] for row in rows} == set(range(shards))


def test_only_the_prefix_counts() -> None:
    """All addresses of an IPv6 /64 have one owner."""
    key = steering.new_key()
    network = 0x2001_0DB8_0042_0007 << 64
    owners = {steering.owner(key, 6, network | host, 64) for host in (0, 1, 0xFFFF, (1 << 64) - 1)}
    assert len(owners) == 1


@pytest.mark.parametrize("family", [4, 6])
def test_neighbours_spread_evenly(family: int) -> None:
    """Sources that differ in their lowest bits only share the work: no shard has twice its part."""
    key = (0x12345678, 0x9ABCDEF0, 0x0F1E2D3C)
    shards, sources = 8, 8000
    shift = 0 if family == 4 else 64
    counts = Counter(steering.owner(key, family, (0x0A000000 + n) << shift, shards) for n in range(sources))
    assert sorted(counts) == list(range(shards))
    assert max(counts.values()) < 2 * sources / shards


def test_the_key_decides() -> None:
    """Another key deals the same sources out differently, so nobody can choose a worker from outside."""
    one, two = (1, 2, 3), (4, 5, 6)
    sources = range(0x0A000000, 0x0A000400)
    same = sum(steering.owner(one, 4, n, 4) == steering.owner(two, 4, n, 4) for n in sources)
    assert same < len(sources) / 2
