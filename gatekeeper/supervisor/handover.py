"""What one supervisor leaves to the next when it executes new code in its own place: facts as JSON, and descriptors.

    capture ──► write: a sealed memfd ──► execve, same process id, same descriptor numbers ──► read: checked, then used

The reader may be of another version than the writer, so nothing is guessed: a version it does not know, a key too many
or too few, a descriptor that is not what it should be, and it refuses. Whoever changes what is written here, or what
one of the fields means, raises `VERSION`.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import stat
import types
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from gatekeeper import __version__
from gatekeeper.errors import GatekeeperError
from gatekeeper.kernel import memfd

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

FORMAT = "gatekeeper-handover"
VERSION = 1
VARIABLE = "GATEKEEPER_HANDOVER"  # FD: take over; prove:FD:REPORT: say whether you could
MOST_BYTES = 64 << 20
_WHY_RESTART = "a restart applies it instead (docs/upgrade.md)"

T = TypeVar("T")


class HandoverError(GatekeeperError):
    """What a predecessor left cannot be taken over; the message says why."""


class Fd(int):
    """The number of a descriptor that is handed over."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class OpenEndpoint:
    """The sockets of one endpoint, in the order of their shards. See `listening.Opened`."""

    protocol: str
    family: int
    host: str
    port: int
    sockets: tuple[Fd, ...]
    shared: bool
    unix_file: tuple[int, ...] | None  # device and inode
    came_as: str | None  # the service manager's name for it


@dataclass(frozen=True, slots=True)
class Spare:
    """An inherited socket that no listener wants now."""

    name: str
    socket: Fd


@dataclass(frozen=True, slots=True)
class OldWorker:
    """A worker process that goes on with its sessions. Times are of the monotonic clock.

    ``serving``: it may accept until the new ones do; ``deadline``: it drains already, until then.
    """

    pid: int
    channel: Fd
    counters: Fd
    events: tuple[Fd, ...]  # the worker's end and the observer's
    started: float
    generation: int
    serving: bool
    deadline: float | None


@dataclass(frozen=True, slots=True)
class OldObserver:
    """The observer process, who leaves when there is another."""

    pid: int
    channel: Fd
    started: float


@dataclass(frozen=True, slots=True)
class Kernel:
    """The kernel's part: the link keeps the program in force, ``holes`` swallow what it drops; the rest is for accounts.

    ``counts`` is what the program counts, for ``cpus`` CPUs, and ``counted`` (zlib, base64) how much of it was taken
    into account; it reports in ``ring``. See `enforcing.Enforcer`.
    """

    link: Fd
    holes: tuple[Fd, ...]
    counters: Fd
    flow: int
    counts: Fd
    cpus: int
    counted: str
    ring: Fd


@dataclass(frozen=True, slots=True)
class ControlSocket:
    """The socket that operators' commands arrive at."""

    path: str
    group: str | None
    socket: Fd


@dataclass(frozen=True, slots=True)
class Past:
    """How the service stood. Times are Unix times."""

    started: float
    reloaded: float
    reload_error: str | None
    reload_wanted: bool  # it was asked for and has not begun
    restarts: int
    upgrades: int  # that worked, this one included
    upgrades_failed: int
    cut: int  # sessions that draining workers had to end
    last_good: bool
    save_failures: int
    save_error: str | None


@dataclass(frozen=True, slots=True)
class State:
    """Everything. ``snapshot`` is the policy in force, ``settings`` are those of the start, which a reload does not touch."""

    writer: str  # its version
    generation: int
    snapshot: Fd
    bindings: dict[str, Any]
    settings: dict[str, Any]
    directory: str | None  # of the state
    shards: int
    key: tuple[int, ...]
    opened: tuple[OpenEndpoint, ...]
    spare: tuple[Spare, ...]
    http: Fd | None
    audit: Fd | None
    lock: Fd | None
    control: ControlSocket | None
    kernel: Kernel | None
    bans: str  # see `bans.Bans.dump`
    retired: Fd | None  # counters of workers that are gone and have no successor
    bygone: tuple[Fd, ...]  # of workers that are gone and whose successor has not come
    workers: tuple[OldWorker, ...]
    observer: OldObserver | None
    past: Past
    drain_timeout_s: float

    def descriptors(self) -> list[int]:
        """Return every descriptor that is handed over."""
        return [int(fd) for fd in _fds_in(self)]


@dataclass(frozen=True, slots=True)
class Incoming:
    """What the environment asks of this process. ``report``: only say whether it could be done, there."""

    state: int
    report: int | None


def incoming(environment: MutableMapping[str, str]) -> Incoming | None:
    """Return what a predecessor left for us, or ``None``. The variable is removed, so that nothing we start sees it.

    Raises:
        HandoverError: it makes no sense.
    """
    text = environment.pop(VARIABLE, None)
    if text is None:
        return None
    words = text.split(":")
    try:
        if len(words) == 3 and words[0] == "prove":
            found = Incoming(int(words[1]), int(words[2]))
        else:
            found = Incoming(int(text), None)
        for fd in (found.state, found.report):
            if fd is not None:
                os.set_inheritable(fd, False)
    except (ValueError, OverflowError, OSError) as err:
        raise HandoverError(f"{VARIABLE}={text} is not for us; gatekeeper sets it itself") from err
    return found


def write(state: State) -> int:
    """Return a sealed memfd that holds ``state``. The caller closes it.

    Raises:
        OSError: no descriptors or no memory.
    """
    document = {"format": FORMAT, "version": VERSION, "state": dataclasses.asdict(state)}
    return memfd.from_bytes("gatekeeper-handover", json.dumps(document, separators=(",", ":")).encode())


def read(fd: int) -> State:
    """Return what `write` wrote, whoever's `write` it was; every descriptor in it is open and of the right kind.

    They are close-on-exec from here on.

    Raises:
        HandoverError: it is of another version, or not sound.
    """
    try:
        size = os.fstat(fd).st_size
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE or size > MOST_BYTES:
            raise HandoverError("the state that was left is not sealed, or too large")
        document = json.loads(os.pread(fd, size, 0))
    except (OSError, ValueError, RecursionError) as err:
        raise HandoverError(f"the state that was left cannot be read: {err}") from err
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise HandoverError("what was left is not the state of a gatekeeper")
    if document.get("version") != VERSION:
        raise HandoverError(
            f"the state that was left has version {document.get('version')}, and this is gatekeeper {__version__}, "
            f"which knows version {VERSION}: {_WHY_RESTART}"
        )
    state = _decode(State, document.get("state"), "state")
    _check(state)
    return state


# -- checking

_SOCKETS, _MEMORY = "socket", "memfd"


def _check(state: State) -> None:
    """See that every descriptor is there once, and is what it is said to be."""
    _check_descriptors(state)
    for worker in state.workers:
        if len(worker.events) != 2:
            raise HandoverError(f"worker process {worker.pid} has no events socket")
    if state.shards < 1 or any(len(item.sockets) not in {1, state.shards} for item in state.opened):
        raise HandoverError("the number of sockets does not fit the number of workers")


def _check_descriptors(state: State) -> None:
    fds = state.descriptors()
    if len(set(fds)) != len(fds):
        raise HandoverError("a descriptor is handed over twice")
    for fd in fds:
        try:
            os.set_inheritable(fd, False)
        except OSError as err:
            raise HandoverError(f"descriptor {fd} did not arrive: {err.strerror}") from err
    workers = state.workers
    sockets = [*_fds_in(state.opened), *_fds_in(state.spare), *_fds_in((state.http, state.observer, state.control))]
    sockets += [fd for worker in workers for fd in (worker.channel, *worker.events)]
    memory = [state.snapshot, *state.bygone, *_fds_in((state.retired, *(worker.counters for worker in workers)))]
    for fd in sockets:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise HandoverError(f"descriptor {fd} is not a socket")
    for fd in memory:
        try:
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as err:
            raise HandoverError(f"descriptor {fd} is not memory that can be sealed") from err


def _fds_in(value: Any) -> Iterator[Fd]:
    if isinstance(value, Fd):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _fds_in(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _fds_in(getattr(value, field.name))


def _decode(wanted: type[T], raw: Any, where: str) -> T:
    """Return ``raw`` as the dataclass ``wanted``: exactly its keys, exactly its types."""
    if not isinstance(raw, dict):
        raise HandoverError(f"{where} is not an object")
    hints = typing.get_type_hints(wanted)
    names = {field.name for field in dataclasses.fields(wanted)}  # type: ignore[arg-type]  # every caller's is one
    if raw.keys() != names:
        odd = ", ".join(sorted(raw.keys() ^ names))
        raise HandoverError(f"{where} does not have the keys that this version knows: {odd}; {_WHY_RESTART}")
    return wanted(**{name: _value(hints[name], raw[name], f"{where}.{name}") for name in names})


def _value(wanted: Any, raw: Any, where: str) -> Any:
    origin, inside = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        return None if raw is None else _value(inside[0], raw, where)
    if origin is tuple and isinstance(raw, list):
        return tuple(_value(inside[0], item, f"{where}[{index}]") for index, item in enumerate(raw))
    if origin is dict and isinstance(raw, dict):
        return raw
    if dataclasses.is_dataclass(wanted):
        return _decode(typing.cast("type[Any]", wanted), raw, where)
    if wanted is Fd and type(raw) is int and raw > 2:
        return Fd(raw)
    if wanted is float and type(raw) in {int, float}:
        return float(raw)
    if wanted in {int, str, bool} and type(raw) is wanted:
        return raw
    raise HandoverError(f"{where} is not what this version expects")
