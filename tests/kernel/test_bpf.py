"""bpf(2) itself: its number on each machine, and what whoever has no right gets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gatekeeper.kernel import bpf
from gatekeeper.kernel.bans import Bans
from tests.support import need

# From the kernel's tables: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
NUMBERS = {"x86_64": 321, "aarch64": 280}

WITHOUT_RIGHTS = """
import errno, os, struct, sys
from gatekeeper.kernel import bpf
ids = [int(number) for number in sys.argv[1:]]
for what in (
    *(lambda number=number: bpf.map_exists(number) for number in ids),
    lambda: bpf.create_map(bpf.SOCKMAP, 4, 8, 2),
    lambda: bpf.create_map(bpf.LPM_TRIE, 8, 4, 2, bpf.NO_PREALLOC),
    lambda: bpf.load(struct.pack("=BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0), "pass"),
    lambda: bpf.attached(os.open("/proc/self/ns/net", os.O_RDONLY)),
):
    try:
        what()
    except OSError as err:
        if err.errno == errno.EPERM:
            continue
    print("allowed")
print("asked")
"""


def test_the_system_call_has_its_number_on_each_machine() -> None:
    """x86-64 and arm64; anywhere else it is said that it cannot be had."""
    assert bpf.NUMBERS == NUMBERS


@pytest.mark.needs_root
def test_whoever_has_no_right_reaches_no_map() -> None:
    """A process as workers are, of another user and without capabilities: no map by its id, no new ones, no program."""
    made = Bans()
    made.hold([(4, 7, 7)])
    ids = [bpf.map_id(fd) for fd in made.maps.values()]
    assert all(map(bpf.map_exists, ids))
    argv = [
        need.program("setpriv"), "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs",
        sys.executable, "-c", WITHOUT_RIGHTS, *map(str, ids),
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "asked\n"
    assert (4, 7) in made
    made.close()
