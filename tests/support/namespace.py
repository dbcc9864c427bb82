"""A network namespace of a test's own: only loopback, on which whole prefixes of addresses are at home."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tests.support import need

T = TypeVar("T")
CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000
PATIENCE_S = 300


class Namespace:
    """A thread that lives in a new network namespace, which ends with it. Every address of ``prefixes`` is local there.

    Sockets and programs that are made `inside` belong to the namespace; its descriptor is ``fd``. With ``pins`` it also has
    a bpf file system of its own at /sys/fs/bpf.
    """

    def __init__(self, prefixes: Sequence[str] = (), *, pins: bool = False) -> None:
        need.root("make network namespaces")
        self._thread = ThreadPoolExecutor(1)
        self.fd = self.inside(_enter, prefixes, pins=pins)

    def inside(self, work: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call ``work`` in the namespace and return what it returns."""
        return self._thread.submit(work, *arguments, **named).result(PATIENCE_S)

    def close(self) -> None:
        os.close(self.fd)
        self._thread.shutdown()


def _enter(prefixes: Sequence[str], *, pins: bool) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET | (CLONE_NEWNS if pins else 0)) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    ip = need.program("ip")
    for command in ("link set lo up", *(f"route add local {prefix} dev lo" for prefix in prefixes)):
        family = ["-6"] if ":" in command else []
        subprocess.run([ip, *family, *command.split()], check=True, capture_output=True)
    if pins:
        mount = need.program("mount")
        subprocess.run([mount, "--make-rprivate", "/"], check=True, capture_output=True)
        subprocess.run([mount, "-t", "bpf", "bpf", "/sys/fs/bpf"], check=True, capture_output=True)
    # IPv4 needs no leave to bind an address of a local prefix.
    with open("/proc/sys/net/ipv6/ip_nonlocal_bind", "w") as switch:
        switch.write("1")
    return os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
