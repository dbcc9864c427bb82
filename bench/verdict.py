"""What a verdict costs a worker, by the number of networks in the policy.

    python bench/verdict.py [--turns N]

For each size: a list of that many isolated IPv4 networks, compiled, written to shared memory and mapped as a worker maps
it; then 100,000 look-ups of random sources, as `lookup_v4` and one cell of the matrix, the loop's own cost taken off.
Processor time. The turns rotate through the sizes, because the speed of a shared machine wanders. IPv6 likewise, with as many /64.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gatekeeper.policy.model import (
    Action,
    Backend,
    Config,
    Endpoint,
    Listener,
    Place,
    Policy,
    Protocol,
    Rule,
    Settings,
    Sources,
)
from gatekeeper.policy.ranges import LOW64, AddressSet, Ranges, Wide
from gatekeeper.snapshot import encode
from gatekeeper.snapshot.reader import Snapshot

SIZES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
LOOKUPS = 100_000
SEED = 7


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    dice = random.Random(SEED)
    v4 = [dice.getrandbits(32) for _ in range(LOOKUPS)]
    v6 = [(dice.getrandbits(64), dice.getrandbits(64)) for _ in range(LOOKUPS)]
    snapshots = {size: shared(policy(size, dice)) for size in SIZES}
    times: dict[tuple[int, int], list[float]] = {(size, family): [] for size in SIZES for family in (4, 6)}
    for _ in range(turns):
        for size in SIZES:
            times[size, 4].append(per_lookup_us(lambda one: verdicts_v4(one, v4), snapshots[size]))
            times[size, 6].append(per_lookup_us(lambda one: verdicts_v6(one, v6), snapshots[size]))
    print(f"{'networks':>9} {'ranges':>9}   IPv4: best, median   IPv6: best, median   validation   (us, us, us, us, ms)")
    for size in SIZES:
        started = time.process_time()
        snapshots[size].validate()
        validation_ms = 1e3 * (time.process_time() - started)
        columns = [f"{min(one):8.2f} {statistics.median(one):9.2f}" for one in (times[size, 4], times[size, 6])]
        print(f"{size:>9} {len(snapshots[size].v4):>9}   {'   '.join(columns)}   {validation_ms:10.1f}")


def policy(size: int, dice: random.Random) -> Policy:
    """Return a policy that refuses ``size`` networks of each family, none touching another."""
    v4 = array("I", (number * (1 << 32) // size & ~0xFF | dice.getrandbits(3) for number in range(size)))
    v6 = Wide([(number * (1 << 64) // size) << 64 for number in range(size)])
    addresses = AddressSet(Ranges.joined(4, v4, v4), Ranges.joined(6, v6, Wide([first | LOW64 for first in v6])))
    place = Place("bench", 1, 1)
    endpoint = Endpoint(Protocol.TCP, 4, "127.0.0.1", 80)
    web = Listener("web", Protocol.TCP, (endpoint,), Backend(4, "127.0.0.1", 81), 5.0, 60.0, 30.0, None, None, place)
    refused = Rule("refused", Action.DENY, Sources(addresses, AddressSet.EMPTY, False, "list", ""), None, place)
    return Policy((web,), (refused,), Action.ALLOW, place)


def shared(compiled: Policy) -> Snapshot:
    """Return a snapshot in a mapped memfd."""
    fd = os.memfd_create("bench")
    encode.write(Config(compiled, Settings(), "0" * 64), fd)
    memory = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    os.close(fd)
    return Snapshot(memoryview(memory))


def verdicts_v4(snapshot: Snapshot, addresses: list[int]) -> None:
    """Judge every address."""
    for address in addresses:
        snapshot.verdict(0, snapshot.lookup_v4(address))


def verdicts_v6(snapshot: Snapshot, addresses: list[tuple[int, int]]) -> None:
    """Judge every address."""
    for high, low in addresses:
        snapshot.verdict(0, snapshot.lookup_v6(high, low))


def per_lookup_us(judge: Callable[[Snapshot], None], snapshot: Snapshot) -> float:
    """Return microseconds for one verdict, the empty loop taken off."""
    started = time.process_time()
    judge(snapshot)
    taken = time.process_time() - started
    started = time.process_time()
    for _ in repeat(None, LOOKUPS):
        pass
    return 1e6 * (taken - (time.process_time() - started)) / LOOKUPS


if __name__ == "__main__":
    main()
