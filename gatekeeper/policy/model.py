"""The words of a policy as immutable values: what `config` produces and everything else reads.

Pure: no I/O, no clock. Addresses are plain integers with their family; ports are integers.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gatekeeper.policy.ranges import AddressSet


class Action(enum.IntEnum):
    """What happens to a connection. The numbers are part of the snapshot format."""

    ALLOW = 1
    DENY = 2  # refused at once
    DROP = 3  # silence

    @property
    def label(self) -> str:
        """The word used in YAML, metrics and logs."""
        return self.name.lower()


class Reason(enum.StrEnum):
    """Why a verdict is what it is: a closed list, because it is a metric label."""

    RULE = "rule"
    DEFAULT = "default"
    BAN = "ban"  # above every rule
    MAX_SESSIONS = "max_sessions"


class Protocol(enum.StrEnum):
    """What a listener speaks."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where something was written; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address we watch: an IP address and port, or the path of a unix socket.

    ``family`` is 4, 6, or 0 for a unix socket (``host`` is then the path and ``port`` 0). ``host`` is canonical text.
    """

    protocol: Protocol
    family: int
    host: str
    port: int

    @property
    def key(self) -> str:
        """The identity of the socket: ``tcp:127.0.0.1:22``, ``udp:[::]:53``, ``tcp:unix:/run/x.sock``."""
        return f"{self.protocol}:{self.address}"

    @property
    def address(self) -> str:
        """The address as people write it."""
        return format_address(self.family, self.host, self.port)


@dataclass(frozen=True, slots=True)
class Backend:
    """What a listener protects. ``port`` 0 keeps the destination port; ``family`` 0 is a unix socket path in ``host``."""

    family: int
    host: str
    port: int

    def for_port(self, port: int) -> Backend:
        """Return the backend of a connection that came to ``port``."""
        return self if self.family == 0 or self.port else Backend(self.family, self.host, port)

    def __str__(self) -> str:
        return format_address(self.family, self.host, self.port)


def format_address(family: int, host: str, port: int) -> str:
    """Return ``host:port``, ``[host]:port`` or ``unix:path``."""
    if family == 0:
        return f"unix:{host}"
    return f"[{host}]:{port}" if family == 6 else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Listener:
    """A named group of endpoints in front of one backend. Times are in seconds; ``None`` means no limit.

    ``on_exit`` ``closed`` or ``open``: the listener is guarded, the backend has its addresses itself, and the kernel refuses;
    ``None``: we listen, and relay.
    """

    name: str
    protocol: Protocol
    endpoints: tuple[Endpoint, ...]
    backend: Backend
    connect_timeout_s: float
    idle_timeout_s: float
    half_close_timeout_s: float
    max_responses: int | None
    max_sessions: int | None
    place: Place
    on_exit: str | None = None

    def backend_of(self, endpoint: Endpoint) -> Backend:
        """Return where connections to one of its endpoints go."""
        if self.on_exit is not None:
            return Backend(endpoint.family, endpoint.host, endpoint.port)
        return self.backend.for_port(endpoint.port)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a rule applies: one listener by name, or a range of ports, of one protocol or (``None``) of both."""

    listener: str | None
    first_port: int = 0
    last_port: int = 0
    protocol: Protocol | None = None

    def matches(self, listener: Listener, endpoint: Endpoint) -> bool:
        """Say whether a connection that came to this endpoint of this listener is meant."""
        if self.listener is not None:
            return self.listener == listener.name
        return (
            endpoint.family != 0
            and self.first_port <= endpoint.port <= self.last_port
            and (self.protocol is None or self.protocol == endpoint.protocol)
        )

    def __str__(self) -> str:
        if self.listener is not None:
            return self.listener
        ports = str(self.first_port) if self.first_port == self.last_port else f"{self.first_port}-{self.last_port}"
        return f"{ports}/{self.protocol}" if self.protocol else ports


@dataclass(frozen=True, slots=True)
class Sources:
    """The sources a rule or test speaks of: ``from`` without ``except``.

    ``anyone`` is true when `from` is "any" and there is no `except`: only then are peers without an address
    (unix sockets) meant. ``from_text`` and ``except_text`` keep the words of the file for messages.
    """

    included: AddressSet
    excluded: AddressSet
    anyone: bool
    from_text: str
    except_text: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``targets`` ``None`` means every listener."""

    name: str
    action: Action
    sources: Sources
    targets: tuple[Target, ...] | None
    place: Place


@dataclass(frozen=True, slots=True)
class PolicyTest:
    """What a rule file claims about itself: every source that can reach the targets gets ``expect``.

    ``expect`` DENY holds for deny and drop.
    """

    sources: Sources
    targets: tuple[Target, ...] | None
    expect: Action
    place: Place


@dataclass(frozen=True, slots=True)
class Policy:
    """Ordered rules and a default, over the listeners they speak of."""

    listeners: tuple[Listener, ...]
    rules: tuple[Rule, ...]
    default: Action
    default_place: Place
    tests: tuple[PolicyTest, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """The top-level keys that concern processes rather than verdicts.

    ``workers`` ``None`` is one per CPU; ``metrics`` and ``state`` ``None`` are off; ``control`` is an absolute path,
    ``off`` or ``None`` (the usual place), and members of ``control_group`` may use it, too; ``audit`` is ``stdout``, ``journald``, ``off`` or an absolute path; ``kernel`` is ``auto``, ``off`` or ``require``; ``on_reload``
    is ``revoke`` or ``keep``: what happens to open sessions that a new policy refuses.
    """

    workers: int | None = None
    metrics: Endpoint | None = None
    control: str | None = None
    audit: str = "stdout"
    state: str | None = None
    kernel: str = "off"
    on_reload: str = "revoke"
    control_group: str | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """Everything one rule file and the files it names say, resolved. ``digest`` is the SHA-256 over all of them (hex)."""

    policy: Policy
    settings: Settings
    digest: str
    files: tuple[str, ...] = field(default=())
