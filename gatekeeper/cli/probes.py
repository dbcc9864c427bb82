"""What this host and these privileges allow, tried out wherever that is possible. Nothing is left behind.

Each probe returns one `Finding`. Only what really stops gatekeeper is a failure; what makes it serve less is a warning.
"""

from __future__ import annotations

import enum
import mmap
import os
import platform
import pwd
import resource
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from gatekeeper.kernel import bpf, memfd, privileges, steering
from gatekeeper.kernel.asm import R0, Assembler

OLDEST_KERNEL = (5, 1)  # F_SEAL_FUTURE_WRITE: counters that only their own worker can write
BACKLOG = 4096  # what we ask for on each listening socket
UDP_RECEIVE_BYTES = 4 << 20  # likewise
FEW_DESCRIPTORS = 4096  # two for each session
DEFAULT_STATE = "/var/lib/gatekeeper"
PAGE_BYTES = mmap.PAGESIZE


class State(enum.StrEnum):
    """How a finding stands."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``why`` says what depends on it; ``fix`` is empty when there is nothing to mend."""

    check: str
    state: State
    found: str
    why: str
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def examine() -> list[Finding]:
    """Run every probe, in the order people should read them."""
    return [probe() for probe in PROBES]


def kernel() -> Finding:
    """The kernel's version."""
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    why = "Workers' counters are sealed against all other writers (memfd F_SEAL_FUTURE_WRITE, Linux 5.1)."
    if numbers >= OLDEST_KERNEL:
        return Finding("kernel", State.OK, f"Linux {release}", why)
    return Finding("kernel", State.FAIL, f"Linux {release}", why, "Use Linux 5.1 or newer.")


def user() -> Finding:
    """Who we are, and whether the processes that face the network can become somebody else."""
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid {uid}"
    held = privileges.effective_capabilities()
    capabilities = "every capability" if len(held) > 35 else f"{len(held)} capabilities" if held else "no capabilities"
    why = "Workers face strangers: started by root they change to the account gatekeeper (or nobody) first."
    if uid != 0:
        return Finding("user", State.OK, f"{name}, {capabilities}", why)
    becomes = privileges.who_to_become()
    if becomes is None:
        return Finding(
            "user", State.WARN, f"root, {capabilities}; workers would stay root", why,
            "Run as an ordinary user, or give root CAP_SETUID and CAP_SETGID and an account to change to.",
        )  # fmt: skip
    return Finding("user", State.OK, f"root, {capabilities}; workers become {becomes.name}", why)


def low_ports() -> Finding:
    """Which ports this process may listen on."""
    first = _sysctl("net/ipv4/ip_unprivileged_port_start", 1024)
    why = "Listening on a port below net.ipv4.ip_unprivileged_port_start needs CAP_NET_BIND_SERVICE."
    if privileges.CAP_NET_BIND_SERVICE in privileges.effective_capabilities() or first <= 1:
        return Finding("ports", State.OK, "every port can be listened on", why)
    return Finding(
        "ports", State.WARN, f"only ports from {first} can be listened on", why,
        "systemd: AmbientCapabilities=CAP_NET_BIND_SERVICE, or socket activation; "
        "or: sysctl net.ipv4.ip_unprivileged_port_start=22",
    )  # fmt: skip


def ipv6() -> Finding:
    """Whether IPv6 sockets can be bound."""
    why = 'Listeners on "[::]:port" and "*:port" need it.'
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError as err:
        return Finding(
            "ipv6", State.WARN, f"not here: {err.strerror}", why,
            "sysctl net.ipv6.conf.all.disable_ipv6=0 (in a container: enable IPv6 for its network).",
        )  # fmt: skip
    return Finding("ipv6", State.OK, "present", why)


def descriptors() -> Finding:
    """The limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = hard if hard != resource.RLIM_INFINITY else 1 << 30
    why = "A session holds two descriptors, more while it carries bulk data; at the limit new connections wait."
    found = f"{soft} (may be raised to {hard if hard != resource.RLIM_INFINITY else 'any number'})"
    if limit < FEW_DESCRIPTORS:
        return Finding("nofile", State.WARN, found, why, "systemd: LimitNOFILE=1048576; in a shell: ulimit -Hn 1048576")
    return Finding("nofile", State.OK, found, why)


def accept_queue() -> Finding:
    """How long a listening socket's queue may be."""
    allowed = _sysctl("net/core/somaxconn", BACKLOG)
    why = f"Connections wait here for a worker ({BACKLOG} are asked for); what does not fit is dropped by the kernel."
    if allowed < BACKLOG:
        return Finding("somaxconn", State.WARN, str(allowed), why, f"sysctl net.core.somaxconn={BACKLOG}")
    return Finding("somaxconn", State.OK, str(allowed), why)


def udp_buffers() -> Finding:
    """How large a UDP socket's receive buffer may be."""
    allowed = _sysctl("net/core/rmem_max", UDP_RECEIVE_BYTES)
    why = "Datagrams wait here for a worker; a short buffer loses some in a burst."
    if privileges.CAP_NET_ADMIN in privileges.effective_capabilities():
        return Finding("rmem_max", State.OK, f"{allowed} bytes, which CAP_NET_ADMIN may exceed", why)
    if allowed < UDP_RECEIVE_BYTES:
        return Finding("rmem_max", State.WARN, f"{allowed} bytes", why, f"sysctl net.core.rmem_max={UDP_RECEIVE_BYTES}")
    return Finding("rmem_max", State.OK, f"{allowed} bytes", why)


def pipes() -> Finding:
    """How much pipe memory one user may have before pipes become small."""
    pages = _sysctl("fs/pipe-user-pages-soft", 16384)
    why = "Bulk data moves through pipes inside the kernel; past this limit pipes are small and cost more CPU."
    if 0 < pages < 16384:
        return Finding(
            "pipes", State.WARN, f"{pages * PAGE_BYTES >> 20} MiB a user", why, "sysctl fs.pipe-user-pages-soft=16384"
        )
    return Finding("pipes", State.OK, "no limit" if pages == 0 else f"{pages * PAGE_BYTES >> 20} MiB a user", why)


def steer() -> Finding:
    """Send datagrams from eight addresses to two steered sockets and see that each meets its owner."""
    why = "With several workers, each source belongs to one of them (SO_ATTACH_REUSEPORT_CBPF)."
    fix = "Allow the socket option in the seccomp profile of the container, or run with --workers 1."
    key = steering.new_key()
    try:
        with _udp(share=True) as first, _udp(share=True) as second:
            first.bind(("127.0.0.1", 0))
            second.bind(first.getsockname())
            steering.attach(first, key, 2)
            for last_byte in range(2, 10):
                _send_from(f"127.0.0.{last_byte}", first.getsockname())
            members = (first, second)
            wrong = [source for index, sock in enumerate(members) for source in _received(sock)
                     if steering.owner(key, 4, int.from_bytes(socket.inet_aton(source), "big"), 2) != index]
    except OSError as err:
        return Finding("steering", State.WARN, f"the kernel refuses: {err.strerror}", why, fix)
    if wrong:
        return Finding("steering", State.WARN, f"{len(wrong)} of 8 sources met the wrong worker", why, fix)
    return Finding("steering", State.OK, "8 of 8 sources met their worker", why)


def refusing() -> Finding:
    """Load a program that judges nothing, and see whether anybody else's judges here."""
    why = "With `kernel: auto` or `require` refusals happen in the kernel, before there is a connection (sk_lookup)."
    code = Assembler()
    code.do(R0, "=", 1)
    code.exit()
    try:
        os.close(bpf.load(code.assemble({}), code.listing()))
        os.close(bpf.create_map(bpf.ARRAY, 4, 8, 1, bpf.MMAPABLE))
        with open("/proc/self/ns/net", "rb") as namespace:
            others = len(bpf.attached(namespace.fileno()))
    except OSError as err:
        fix = bpf.advice(err) or "Look for the error in the kernel's log."
        return Finding("sk_lookup", State.WARN, f"workers refuse; the kernel cannot: {os.strerror(err.errno or 0)}", why, fix)
    if others:
        return Finding(
            "sk_lookup", State.WARN, f"the kernel can refuse, but {others} programs judge here already", why,
            "`bpftool net` shows whose they are: what they let in, a refusal of ours cannot keep out.",
        )  # fmt: skip
    if _sysctl("net/core/bpf_jit_enable", 1) == 0:
        return Finding("sk_lookup", State.WARN, "the kernel can refuse, slowly", why, "sysctl net.core.bpf_jit_enable=1")
    return Finding("sk_lookup", State.OK, "the kernel can refuse", why)


def seals() -> Finding:
    """Seal shared memory and try to map it writable afterwards."""
    why = "A compiled policy is memory that nobody can change, and counters have one writer (memfd seals)."
    fix = "Use Linux 5.1 or newer, and allow memfd_create and fcntl seals in the seccomp profile."
    try:
        fd = memfd.create("gatekeeper-doctor", PAGE_BYTES)
    except OSError as err:
        return Finding("memfd", State.FAIL, f"the kernel refuses: {err.strerror}", why, fix)
    try:
        with mmap.mmap(fd, PAGE_BYTES) as kept:
            memfd.seal_against_new_writers(fd)
            kept[0] = 1
            try:
                mmap.mmap(fd, PAGE_BYTES).close()
            except PermissionError:
                return Finding("memfd", State.OK, "sealed memory cannot be mapped writable", why)
            return Finding("memfd", State.FAIL, "sealed memory could still be mapped writable", why, fix)
    except OSError as err:
        return Finding("memfd", State.FAIL, f"the kernel refuses: {err.strerror}", why, fix)
    finally:
        os.close(fd)


def splicing() -> Finding:
    """Move a byte from a socket to a socket without reading it."""
    why = "Bulk data is moved by splice(2) and never enters this program."
    left, right = socket.socketpair()
    reader, writer = os.pipe()
    try:
        right.send(b"x")
        moved = os.splice(left.fileno(), writer, 1)
    except OSError as err:
        return Finding("splice", State.WARN, f"the kernel refuses: {err.strerror}", why, "Allow splice in the seccomp profile.")
    finally:
        left.close()
        right.close()
        os.close(reader)
        os.close(writer)
    return Finding("splice", State.OK if moved == 1 else State.WARN, "works", why)


def state_directory() -> Finding:
    """Whether the state directory can be written."""
    directory = os.environ.get("STATE_DIRECTORY", DEFAULT_STATE).split(":")[0]
    why = "`state: DIR` in the rule file keeps what must outlive a restart; the unit files use this one."
    fix = f"install -d -o gatekeeper -g gatekeeper -m 0750 {directory}, or StateDirectory=gatekeeper in the unit."
    if not Path(directory).is_dir():
        return Finding("state", State.WARN, f"{directory} does not exist", why, fix)
    try:
        with tempfile.TemporaryFile(dir=directory):
            return Finding("state", State.OK, f"{directory} is writable", why)
    except OSError as err:
        return Finding("state", State.WARN, f"{directory}: {err.strerror}", why, fix)


def addresses() -> Finding:
    """Whether the sources we will see are likely to be the real ones."""
    why = "Rules judge the address that connects. Behind address translation that is the translator's."
    inside = next((mark for mark in ("/.dockerenv", "/run/.containerenv") if Path(mark).exists()), None)
    if inside is None:
        return Finding("sources", State.OK, "not in a Docker or Podman container", why)
    return Finding(
        "sources", State.WARN, f"in a container ({inside})", why,
        "Run with the host's network (docker run --network host), or see \"In a container\" in the README.",
    )  # fmt: skip


def python() -> Finding:
    """The interpreter."""
    return Finding("python", State.OK, f"{platform.python_version()} ({sys.executable})", "Python 3.11 or newer.")


PROBES: tuple[Callable[[], Finding], ...] = (
    kernel, python, user, low_ports, ipv6, descriptors, accept_queue, udp_buffers, pipes, steer, refusing, seals, splicing,
    state_directory, addresses,
)  # fmt: skip


def _sysctl(name: str, fallback: int) -> int:
    """Return the first number of a sysctl; ``fallback`` where the kernel does not show it (some containers)."""
    try:
        return int(Path("/proc/sys", name).read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return fallback


def _udp(*, share: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    if share:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return sock


def _send_from(source: str, destination: tuple[str, int]) -> None:
    with _udp() as sock:
        sock.bind((source, 0))
        sock.sendto(b"x", destination)


def _received(sock: socket.socket) -> list[str]:
    """Return the source of every datagram that waits; loopback delivers before `sendto` returns."""
    sources = []
    while True:
        try:
            sources.append(sock.recvfrom(16)[1][0])
        except BlockingIOError:
            return sources
