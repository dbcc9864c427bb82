"""From the parts of a running service to the state that is handed over, and back."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

from gatekeeper import __version__
from gatekeeper.errors import GatekeeperError
from gatekeeper.kernel.inherit import Inherited
from gatekeeper.policy.model import Endpoint, Protocol
from gatekeeper.snapshot.bindings import Bindings
from gatekeeper.supervisor.accepted import Accepted, revive
from gatekeeper.supervisor.handover import Fd, HandoverError, OpenEndpoint, Spare, State
from gatekeeper.supervisor.listening import Opened, Opener

if TYPE_CHECKING:
    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.enforcing import Enforcer
    from gatekeeper.supervisor.handover import ControlSocket
    from gatekeeper.supervisor.standing import Standing


def capture(
    crew: Crew,
    opener: Opener,
    standing: Standing,
    settings: dict[str, Any],
    enforcer: Enforcer | None,
    control: ControlSocket | None,
    lock: int | None,
    drain_timeout_s: float,
) -> State:
    """Return everything that another program in our place needs. The descriptors stay ours."""
    policy, observer = crew.policy, crew.observer
    assert policy is not None
    assert observer is not None
    workers = [worker.left_behind() for worker in crew.workers]
    return State(
        writer=__version__,
        generation=policy.generation,
        snapshot=Fd(policy.snapshot_fd),
        bindings=json.loads(policy.bindings_json),
        settings=settings,
        shards=opener.shards,
        key=opener.key,
        opened=tuple(map(_leave, policy.opened.values())),
        spare=tuple(Spare(item.name, Fd(item.sock.fileno())) for item in opener.inherited),
        http=_maybe(observer.http_fd),
        audit=_maybe(observer.audit_fd),
        lock=_maybe(lock),
        control=control,
        kernel=None if enforcer is None else enforcer.left_behind(),
        retired=crew.leaving.retired(),
        bygone=tuple(
            Fd(worker.counters_fd) for worker, left in zip(crew.workers, workers, strict=True)
            if left is None and worker.counters_fd is not None
        ),
        workers=(*(worker for worker in workers if worker is not None), *crew.leaving.left_behind()),
        observer=observer.left_behind(),
        past=standing.past(crew),
        drain_timeout_s=drain_timeout_s,
    )


def policy_of(state: State) -> Accepted:
    """Return the policy in force, with its sockets.

    Raises:
        GatekeeperError: this version cannot use it.
    """
    try:
        bindings = Bindings.from_json(json.dumps(state.bindings).encode())
    except (LookupError, TypeError, ValueError) as err:
        raise HandoverError(f"the names in force cannot be read: {err!r}") from err
    policy = revive(int(state.snapshot), state.generation, bindings)
    policy.opened = {opened.endpoint.key: opened for opened in map(_take, state.opened)}
    return policy


def opener_of(state: State) -> Opener:
    """Return who opens further endpoints, by the same key and for as many workers."""
    if len(state.key) != 3:
        raise HandoverError("the key that steers sources to workers is not one")
    first, second, third = state.key
    spare = [Inherited(item.name, _socket(item.socket)) for item in state.spare]
    return Opener(state.shards, (first, second, third), spare)


def http_of(state: State) -> socket.socket | None:
    """Return the socket of the metrics."""
    return None if state.http is None else _socket(state.http)


def _leave(opened: Opened) -> OpenEndpoint:
    endpoint, came = opened.endpoint, opened.came_with_us
    return OpenEndpoint(
        str(endpoint.protocol), endpoint.family, endpoint.host, endpoint.port,
        tuple(Fd(sock.fileno()) for sock in opened.sockets), opened.shared, opened.unix_file,
        None if came is None else came.name,
    )  # fmt: skip


def _take(item: OpenEndpoint) -> Opened:
    try:
        endpoint = Endpoint(Protocol(item.protocol), item.family, item.host, item.port)
    except ValueError as err:
        raise HandoverError(str(err)) from err
    sockets = [_socket(fd) for fd in item.sockets]
    for sock in sockets:
        address: Any = sock.getsockname()
        if endpoint.family and address[:2] != (endpoint.host, endpoint.port):
            raise HandoverError(f"the socket of {endpoint.key} is bound to {address}")
    came = None if item.came_as is None else Inherited(item.came_as, sockets[0])
    file = item.unix_file
    if file is not None and len(file) != 2:
        raise HandoverError(f"the socket file of {endpoint.key} is not said to be one")
    return Opened(endpoint, sockets, item.shared, None if file is None else (file[0], file[1]), came)


def _socket(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=int(fd))
    except OSError as err:
        raise GatekeeperError(f"descriptor {fd}: {err}") from err
    sock.setblocking(False)
    return sock


def _maybe(fd: int | None) -> Fd | None:
    return None if fd is None else Fd(fd)
