"""A remote network made of namespaces: real sources, IPv4 and IPv6, one router away from this host.

    this host ── veth ── router namespace ── veth ── client namespace, which owns whole prefixes of source addresses

The router matters: a packet sent with TTL 1 dies there, as it does on the way to any real client.
"""

from __future__ import annotations

import ctypes
import ipaddress
import itertools
import os
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tests.support import need
from tests.support.ports import block

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
SOURCES_PER_FAMILY = 120
_numbers = itertools.count()


class RemoteNetwork:
    """Make the namespaces; `close` removes them. Names and addresses are this test process's own.

    ``gate_v4`` and ``gate_v6`` are this host's addresses towards it; ``sources_v4`` and ``sources_v6`` are client addresses,
    the IPv6 ones in order and by twos of one /64.
    """

    def __init__(self) -> None:
        number = block() * 4 + next(_numbers) % 4
        name = f"gkt{number}"
        self._router, self._client = f"{name}-router", f"{name}-client"
        self._link = f"{name}-out"
        # 198.18.0.0/15 is set aside for tests of network devices, 2001:db8::/32 for documentation.
        v4, v6 = f"198.18.{number}", f"2001:db8:{number:x}"
        self.gate_v4, self.gate_v6 = f"{v4}.1", str(ipaddress.ip_address(f"{v6}::1"))
        self.network_v4, self.network_v6 = f"{v4}.128/25", f"2001:db8:{0x1000 + number:x}::/48"
        first_v4 = ipaddress.IPv4Address(f"{v4}.129")
        first_v6 = ipaddress.IPv6Network(self.network_v6).network_address
        self.sources_v4 = [str(first_v4 + index) for index in range(SOURCES_PER_FAMILY)]
        self.sources_v6 = [str(first_v6 + (index // 2 << 64) + index + 1) for index in range(SOURCES_PER_FAMILY)]
        self._inside: ThreadPoolExecutor | None = None
        try:
            self._build(v4, v6)
            self._inside = ThreadPoolExecutor(1, initializer=_enter, initargs=(f"/run/netns/{self._client}",))
        except BaseException:
            self.close()
            raise

    def _build(self, v4: str, v6: str) -> None:
        self._remove()
        _ip(f"netns add {self._router}", f"netns add {self._client}")
        _ip(
            f"link add {self._link} type veth peer name toward-gate netns {self._router}",
            f"addr add {v4}.1/30 dev {self._link}",
            f"addr add {v6}::1/64 dev {self._link} nodad",
            f"link set {self._link} up",
            f"-n {self._router} link add to-client type veth peer name to-router netns {self._client}",
            f"-n {self._router} addr add {v4}.2/30 dev toward-gate",
            f"-n {self._router} addr add {v6}::2/64 dev toward-gate nodad",
            f"-n {self._router} addr add {v4}.5/30 dev to-client",
            f"-n {self._router} addr add {v6}:1::1/64 dev to-client nodad",
            f"-n {self._router} link set toward-gate up",
            f"-n {self._router} link set to-client up",
            f"-n {self._client} addr add {v4}.6/30 dev to-router",
            f"-n {self._client} addr add {v6}:1::2/64 dev to-router nodad",
            f"-n {self._client} link set to-router up",
            f"-n {self._client} link set lo up",
            # Every address of a local prefix can be bound without being listed one by one.
            f"-n {self._client} route add local {self.network_v4} dev lo",
            f"-n {self._client} -6 route add local {self.network_v6} dev lo",
            f"-n {self._client} route add default via {v4}.5",
            f"-n {self._client} -6 route add default via {v6}:1::1",
            f"-n {self._router} route add {self.network_v4} via {v4}.6",
            f"-n {self._router} -6 route add {self.network_v6} via {v6}:1::2",
            f"route add {v4}.4/30 via {v4}.2",
            f"-6 route add {v6}:1::/64 via {v6}::2",
            f"route add {self.network_v4} via {v4}.2",
            f"-6 route add {self.network_v6} via {v6}::2",
        )
        for namespace, switch in (
            (self._router, "ipv4/ip_forward"),
            (self._router, "ipv6/conf/all/forwarding"),
            (self._client, "ipv6/ip_nonlocal_bind"),  # IPv4 needs no leave to bind an address of a local prefix
        ):
            shell = ["sh", "-c", f"echo 1 > /proc/sys/net/{switch}"]
            _run([need.program("ip"), "netns", "exec", namespace, *shell])

    def exec_prefix(self) -> list[str]:
        """Return what to put before a command line so that it runs as a client."""
        return [need.program("ip"), "netns", "exec", self._client]

    def inside(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call ``work`` in a thread that lives in the client namespace. Sockets made there may be used anywhere."""
        assert self._inside is not None
        return self._inside.submit(work, *arguments).result(60)

    def make_socket(self, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        """Return a new socket of the client namespace."""
        return self.inside(socket.socket, family, kind)

    def close(self) -> None:
        if self._inside is not None:
            self._inside.shutdown()
        self._remove()

    def _remove(self) -> None:
        have = subprocess.run([need.program("ip"), "netns", "list"], capture_output=True, text=True, check=True).stdout
        names = {line.split()[0] for line in have.splitlines() if line}
        for name in (self._client, self._router):
            if name in names:
                _ip(f"netns del {name}")
        # Its veth goes with a namespace, but only once the kernel gets to it.
        if os.path.exists(f"/sys/class/net/{self._link}"):
            subprocess.run([need.program("ip"), "link", "del", self._link], capture_output=True, check=False)


def _ip(*commands: str) -> None:
    for command in commands:
        _run([need.program("ip"), *command.split()])


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"


def _enter(path: str) -> None:
    """Move the calling thread into the network namespace at ``path``."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path) as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {path}")
