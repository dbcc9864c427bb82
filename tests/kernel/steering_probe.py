"""Run by test_steering in a network namespace of its own: send from many sources, print where each arrived.

Arguments: protocol (tcp, udp), family (4, 6), shards, seed. Output: JSON, one [address as a number, shard by `owner`,
shard by the kernel] for each source.
"""

from __future__ import annotations

import ipaddress
import json
import random
import select
import socket
import subprocess
import sys

from gatekeeper.kernel import steering

SOURCES = 300
IPV6_FREEBIND = 78


def main(protocol: str, family: int, shards: int, seed: int) -> None:
    """Open a group of ``shards`` sockets, send one connection or datagram from each source, and print what happened."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if family == 6:
        subprocess.run(["ip", "-6", "route", "add", "local", "2001:db8::/32", "dev", "lo"], check=True)
    domain = socket.AF_INET if family == 4 else socket.AF_INET6
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    key = steering.new_key()
    group = []
    port = 0
    for _ in range(shards):
        member = socket.socket(domain, kind)
        member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == 6:
            member.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            member.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        member.bind(("127.0.0.1" if family == 4 else "2001:db8::1", port))
        port = member.getsockname()[1]
        if protocol == "tcp":
            member.listen(64)
        group.append(member)
    steering.attach(group[0], key, shards)

    rng = random.Random(seed)
    rows = []
    for _ in range(SOURCES):
        if family == 4:
            source = str(ipaddress.IPv4Address(0x7F000000 | rng.randrange(1, 1 << 24)))
        else:
            source = str(ipaddress.IPv6Address(0x20010DB8 << 96 | rng.getrandbits(96)))
        number = int(ipaddress.ip_address(source))
        with socket.socket(domain, kind) as client:
            client.settimeout(10)
            if family == 6:
                client.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            client.bind((source, 0))
            client.connect(group[0].getsockname()[:2])
            if protocol == "udp":
                client.send(b"hello")
            readable, _, _ = select.select(group, [], [], 10)
            index = group.index(readable[0])
            if protocol == "tcp":
                readable[0].accept()[0].close()
            else:
                readable[0].recv(100)
        rows.append([number, steering.owner(key, family, number, shards), index])
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
