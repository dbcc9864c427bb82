"""What stands at one endpoint: the policy in force there, and the accounting of its verdicts."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gatekeeper.policy.model import Action
from gatekeeper.proxy.loop import Failing, Loop, say
from gatekeeper.snapshot.counters import ListenerSlot
from gatekeeper.snapshot.layout import ACTION_MASK, DETAIL_SHIFT, LOCAL_CLASS, LOW64

if TYPE_CHECKING:
    from gatekeeper.proxy.pipes import PipePool
    from gatekeeper.proxy.report import Reporter
    from gatekeeper.snapshot.bans import Bans
    from gatekeeper.snapshot.bindings import Bindings
    from gatekeeper.snapshot.counters import End
    from gatekeeper.snapshot.reader import Snapshot

ALLOW = int(Action.ALLOW)
DENY = int(Action.DENY)
DROP = int(Action.DROP)

CACHED_PEERS = 4096  # verdicts remembered per gate; a flood from random sources only costs the memory of this many
CALM_S = 2.0  # without want, until it is said to be over
UNIX_PEER = bytes(16)
MAPPED = b"\0" * 10 + b"\xff\xff"

EPHEMERAL_PORTS = "/proc/sys/net/ipv4/ip_local_port_range"


class Session(Failing, Protocol):
    """A TCP connection or UDP flow, as the worker sees it. Times are monotonic."""

    gate: Any  # `Gate`
    terms: Terms
    slot: int
    flow: int
    source: tuple[int, bytes, int]
    destination: tuple[bytes, int]
    began_s: float

    def live(self) -> bool:
        """Say whether it has not ended yet."""

    def state(self) -> str:
        """Return where it stands, in a word."""

    def moved(self) -> tuple[int, int]:
        """Return how many bytes came from the client and from the backend."""

    def idle_s(self, now: float) -> float:
        """Return for how long nothing has moved, to the last sweep."""

    def tcp_details(self) -> tuple[dict[str, int] | None, dict[str, int] | None]:
        """Return what the kernel knows of the connections to the client and to the backend."""

    def sweep(self, now: float) -> None:
        """Account for what moved since the last sweep, and end the session when it idles too long."""

    def finish(self, end: End) -> None:
        """End the session at once: release everything, count, report."""


class Due(Failing, Protocol):
    """Something that waits for a moment rather than for a descriptor."""

    def check(self, now: float) -> None:
        """Go on if the moment has come."""


@dataclass(slots=True)
class Shared:
    """What all gates and sessions of a worker use. ``open_fds`` counts the descriptors that sessions hold."""

    loop: Loop
    counters: memoryview
    report: Reporter
    pipes: PipePool
    siblings: list[memoryview]
    sessions: dict[int, Session]  # by a descriptor of the session
    due: dict[int, Due]  # what must be looked at every few milliseconds, by descriptor
    max_fds: int
    bans: Bans | None = None
    open_fds: int = 0
    starved_s: float | None = None  # when descriptors or memory were last found wanting; ``None``: it is said that they suffice

    def starve(self, what: str) -> None:
        """Note that descriptors or memory have run out, and say so once."""
        first = self.starved_s is None
        self.starved_s = self.loop.now
        if first:
            say(what)

    def recover(self) -> None:
        """Say so once when nothing was found wanting for a while. Not sooner, or a crowd would fill the log by turns."""
        if self.starved_s is not None and self.loop.now - self.starved_s >= CALM_S:
            self.starved_s = None
            say("descriptors and memory suffice again")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A policy as a worker holds it. ``dynamic_ports``: what the kernel chooses from for those who do not ask for a port."""

    generation: int
    snapshot: Snapshot
    bindings: Bindings
    dynamic_ports: range


class Terms:
    """What one policy says about one endpoint; sessions keep the terms they began under."""

    __slots__ = (
        "backend_address",
        "backend_family",
        "block",
        "connect_timeout_s",
        "destination",
        "half_close_timeout_s",
        "idle_timeout_s",
        "max_responses",
        "max_sessions",
        "may_meet_itself",
        "number",
        "wildcard",
    )

    def __init__(self, policy: Prepared, index: int) -> None:
        snapshot, bindings = policy.snapshot, policy.bindings
        endpoint = snapshot.meta["endpoints"][index]
        listener = snapshot.meta["listeners"][endpoint["listener"]]
        backend = endpoint["backend"]
        self.number = bindings.rows[index]
        self.block = bindings.listeners[listener["name"]]
        self.max_sessions: int | None = listener["max_sessions"]
        self.max_responses: int | None = listener["max_responses"]
        self.connect_timeout_s: float = listener["connect_timeout_s"]
        self.idle_timeout_s: float = listener["idle_timeout_s"]
        self.half_close_timeout_s: float = listener["half_close_timeout_s"]
        self.wildcard = endpoint["host"] in ("0.0.0.0", "::")
        self.destination = (pack_address(endpoint["family"], endpoint["host"]), endpoint["port"])
        self.backend_family = {0: socket.AF_UNIX, 4: socket.AF_INET, 6: socket.AF_INET6}[backend["family"]]
        self.backend_address: Any = backend["host"] if backend["family"] == 0 else (backend["host"], backend["port"])
        # Only a port that the kernel may also choose as the source of a dial can be connected to from itself.
        self.may_meet_itself = backend["family"] != 0 and backend["port"] in policy.dynamic_ports


class Gate:
    """One endpoint: its socket, and how connections to it are judged and reported.

    Owns ``sock``. `bind_policy` may be called any number of times; sessions that exist keep their terms.
    """

    terms: Terms

    def __init__(self, shared: Shared, key: str, sock: socket.socket, *, exclusive: bool, own: bool) -> None:
        self.shared = shared
        self.key = key
        self.sock = sock
        self.exclusive = exclusive  # other workers hold this very socket too
        self.own = own  # not one of a worker that cannot be started

    def bind_policy(self, policy: Prepared, index: int) -> None:
        """Judge as endpoint ``index`` of this policy from now on."""
        snapshot, bindings = policy.snapshot, policy.bindings
        self.terms = Terms(policy, index)
        endpoint = snapshot.meta["endpoints"][index]
        first = endpoint["row"] * snapshot.classes
        self.snapshot = snapshot
        self.cells = snapshot.matrix[first : first + snapshot.classes]
        self.slots = bindings.details
        listener = snapshot.meta["listeners"][endpoint["listener"]]
        self.over_slot = bindings.details[listener["over_detail"]]
        self.ban_word = listener["ban_detail"] << DETAIL_SHIFT | DENY
        self.judged: dict[str, tuple[int, int, bytes]] = {}

    def judge(self, host: str) -> tuple[int, int, bytes]:
        """Return (verdict word, family, packed address) for a source as the kernel writes it; not counted yet.

        An IPv4-mapped source is IPv4. Equal sources are looked up once.
        """
        known = self.judged.get(host)
        if known is not None:
            return known
        packed = unmapped(host)
        family = 4 if len(packed) == 4 else 6
        if is_banned(self.shared.bans, family, packed):
            word = self.ban_word
        else:
            word = self.cells[classify(self.snapshot, family, packed)]
        if len(self.judged) >= CACHED_PEERS:
            self.judged.clear()
        answer = self.judged[host] = (word, family, packed)
        return answer

    def forget(self) -> None:
        """Look every source up again: the bans have changed."""
        self.judged.clear()

    def judge_local(self) -> tuple[int, int, bytes]:
        """Return what `judge` returns, for a peer without an address."""
        return self.cells[LOCAL_CLASS], 0, UNIX_PEER

    def has_room(self) -> bool:
        """Say whether the listener's ``max_sessions``, over all workers, permits another session."""
        limit = self.terms.max_sessions
        if limit is None:
            return True
        opened = self.terms.block + ListenerSlot.SESSIONS_OPENED
        closed = self.terms.block + ListenerSlot.SESSIONS_CLOSED
        # A sibling that somebody has taken over may write what it likes: less than nothing makes no room.
        return sum(max(0, view[opened] - view[closed]) for view in self.shared.siblings) < limit

    def refuse(self, word: int) -> int:
        """Count a refusal: by the verdict itself, or by ``max_sessions`` when the verdict would allow.

        Return the slot it was counted in if the audit log is to have it, else 0.
        """
        slot = self.over_slot if word & ACTION_MASK == ALLOW else self.slots[word >> DETAIL_SHIFT]
        self.shared.counters[slot] += 1
        return slot if self.shared.report.affords(slot, self.terms.number) else 0


def classify(snapshot: Snapshot, family: int, packed: bytes) -> int:
    """Return the class of a source."""
    if family == 0:
        return LOCAL_CLASS
    address = int.from_bytes(packed, "big")
    return snapshot.lookup_v4(address) if family == 4 else snapshot.lookup_v6(address >> 64, address & LOW64)


def is_banned(bans: Bans | None, family: int, packed: bytes) -> bool:
    """Say whether a source is banned; peers without an address never are."""
    if bans is None or family == 0:
        return False
    address = int.from_bytes(packed, "big")
    return bans.bans_v4(address) if family == 4 else bans.bans_v6(address >> 64, address & LOW64)


def pack_address(family: int, host: str) -> bytes:
    """Return an address as an audit record holds it: IPv4 in the first four bytes, zeros for a unix socket."""
    if family == 0:
        return UNIX_PEER
    return socket.inet_pton(socket.AF_INET if family == 4 else socket.AF_INET6, host)


def unmapped(host: str) -> bytes:
    """Return an address as the kernel writes it, packed; an IPv4-mapped one as IPv4, a scope is left out."""
    if ":" not in host:
        return socket.inet_aton(host)
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return packed[12:] if packed.startswith(MAPPED) else packed


def ephemeral_ports() -> range:
    """Return the ports that the kernel gives to sockets which did not ask for one."""
    with open(EPHEMERAL_PORTS, encoding="ascii") as file:
        first, last = file.read().split()
    return range(int(first), int(last) + 1)
