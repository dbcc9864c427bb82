"""From the parts of a running service to the state that is handed over, and back."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatekeeper import __version__
from gatekeeper.errors import GatekeeperError
from gatekeeper.kernel.inherit import Inherited
from gatekeeper.policy.model import Endpoint, Protocol
from gatekeeper.snapshot.bindings import Bindings
from gatekeeper.supervisor.accepted import Accepted, revive
from gatekeeper.supervisor.handover import ControlSocket, Fd, HandoverError, OpenEndpoint, Spare, State
from gatekeeper.supervisor.listening import Opened, Opener

if TYPE_CHECKING:
    from gatekeeper.kernel.notify import Notifier
    from gatekeeper.supervisor.bans import Bans
    from gatekeeper.supervisor.control import Control
    from gatekeeper.supervisor.crew import Crew
    from gatekeeper.supervisor.enforcing import Enforcer
    from gatekeeper.supervisor.reloading import Reloader
    from gatekeeper.supervisor.standing import Standing

KILLED_WITHIN_S = 5.0


@dataclass(slots=True)
class Ground:
    """What the service stands on. ``settings`` are those of the start; ``directory`` is that of the state."""

    policy: Accepted
    opener: Opener
    http: socket.socket | None
    settings: dict[str, Any]
    directory: str | None

    @classmethod
    def of(cls, state: State) -> Ground:
        """Return what another program in our place stood on.

        Raises:
            GatekeeperError: this version cannot use it.
        """
        try:
            bindings = Bindings.from_json(json.dumps(state.bindings).encode())
        except (LookupError, TypeError, ValueError) as err:
            raise HandoverError(f"the names in force cannot be read: {err!r}") from err
        if len(state.key) != 3:
            raise HandoverError("the key that steers sources to workers is not one")
        policy = revive(int(state.snapshot), state.generation, bindings)
        policy.opened = {opened.endpoint.key: opened for opened in map(_take, state.opened)}
        first, second, third = state.key
        spare = [Inherited(item.name, _socket(item.socket)) for item in state.spare]
        opener = Opener(state.shards, (first, second, third), spare)
        return cls(policy, opener, None if state.http is None else _socket(state.http), state.settings, state.directory)


@dataclass(slots=True)
class Estate:
    """The parts of a service that leave something behind."""

    ground: Ground
    crew: Crew
    reloader: Reloader
    standing: Standing
    bans: Bans
    enforcer: Enforcer | None
    control: Control
    notifier: Notifier
    lock: int | None

    def capture(self, drain_timeout_s: float) -> State:
        """Return everything that another program in our place needs. The descriptors stay ours."""
        crew, ground = self.crew, self.ground
        policy, observer = crew.policy, crew.observer
        assert policy is not None
        assert observer is not None
        workers = [worker.left_behind() for worker in crew.workers]
        bygone = [
            Fd(worker.counters_fd) for worker, left in zip(crew.workers, workers, strict=True)
            if left is None and worker.counters_fd is not None
        ]  # fmt: skip
        return State(
            writer=__version__,
            generation=policy.generation,
            snapshot=Fd(policy.snapshot_fd),
            bindings=json.loads(policy.bindings_json),
            settings=ground.settings,
            directory=ground.directory,
            shards=ground.opener.shards,
            key=ground.opener.key,
            opened=tuple(map(_leave, policy.opened.values())),
            spare=tuple(Spare(item.name, Fd(item.sock.fileno())) for item in ground.opener.inherited),
            http=_maybe(observer.http_fd),
            audit=_maybe(observer.audit_fd),
            lock=_maybe(self.lock),
            control=self._control_socket(),
            kernel=None if self.enforcer is None else self.enforcer.left_behind(),
            bans=self.bans.dump(),
            retired=crew.leaving.retired(),
            bygone=tuple(bygone),
            workers=(*(worker for worker in workers if worker is not None), *crew.leaving.left_behind()),
            observer=observer.left_behind(),
            past=self.standing.past(crew, reload_wanted=self.reloader.wanted),
            drain_timeout_s=drain_timeout_s,
        )

    def restless(self) -> str | None:
        """Return what must come to an end before another program may take our place, ``None`` when nothing must."""
        if self.reloader.busy:
            return "a reload is under way"
        if self.reloader.trial is not None:
            return "a policy waits to be confirmed"
        if self.enforcer is not None and self.enforcer.restless():
            return "the kernel still counts for a policy that was replaced"
        if self.crew.change is not None:
            return "a reload is under way"
        for worker in (*self.crew.workers, *self.crew.leaving.workers):
            if worker.child is not None and worker.child.has_unsent():
                return f"worker {worker.index} does not take its orders"
        return None

    def settle(self) -> None:
        """End those that do not serve yet: the next program in our place could do nothing with them."""
        for worker in self.crew.workers:
            if worker.child is not None and worker.left_behind() is None:
                worker.child.kill()
                worker.child.wait(KILLED_WITHIN_S)

    def _control_socket(self) -> ControlSocket | None:
        fd, place = self.control.fileno(), self.control.place
        return None if fd is None or place is None else ControlSocket(place.path, place.group, Fd(fd))


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
