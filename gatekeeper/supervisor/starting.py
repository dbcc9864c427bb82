"""With what the service starts: the policy of its rule file or the last good one, and the kernel, if it can be had."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gatekeeper.errors import GatekeeperError, KernelError, SnapshotError
from gatekeeper.kernel import privileges
from gatekeeper.snapshot.bindings import Bindings, SlotsExhausted
from gatekeeper.supervisor import lastgood, places
from gatekeeper.supervisor.accepted import Accepted, accept
from gatekeeper.supervisor.enforcing import Enforcer
from gatekeeper.supervisor.pinning import leftover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from gatekeeper.supervisor.banlist import Source
    from gatekeeper.supervisor.compiling import Compiled
    from gatekeeper.supervisor.handover import Kernel
    from gatekeeper.supervisor.loop import Loop


class NothingToStartWith(GatekeeperError):
    """The rule file is of no use and there is no last good policy. ``refused``: the file was read, and is wrong."""

    def __init__(self, why: str, *, refused: bool) -> None:
        super().__init__(why)
        self.refused = refused


@dataclass(frozen=True, slots=True)
class First:
    """The policy to start with. ``directory`` is the state directory, ``None``: there is none.

    ``instead``: why it is the last good one and not the rule file's, in one line; ``None`` when it is the file's.
    """

    policy: Accepted
    directory: str | None
    instead: str | None = None


def choose(compiled: Compiled, why: str, option: str | None, environment: Mapping[str, str], warn: Callable[[str], None]) -> First:
    """Return what to start with. ``why`` is what is wrong with the rule file, if anything is.

    Raises:
        NothingToStartWith: there is nothing.
        SnapshotError, SlotsExhausted, OSError: the compiled policy cannot be used.
    """
    if compiled.snapshot_fd is None:
        directory = places.state_directory(option, compiled.state, environment)
        policy = _last_good(directory, warn)
        if policy is None:
            raise NothingToStartWith(why, refused=compiled.failure is None)
        return First(policy, directory, f"{why}: {compiled.first}".removesuffix(": "))
    policy = accept(compiled.snapshot_fd, 1, Bindings())
    directory = places.state_directory(option, policy.meta["settings"]["state"], environment)
    if directory is not None and lastgood.read_trial(directory) == policy.meta["digest"]:
        last_good = _last_good(directory, warn)
        if last_good is not None and last_good.meta["digest"] != policy.meta["digest"]:
            policy.close()
            why = f"the policy {policy.name} in the rule file was on trial and was never confirmed; a reload applies it"
            return First(last_good, directory, why)
        if last_good is not None:
            last_good.close()
    return First(policy, directory)


def enforce(
    mode: str, policy: Accepted, banned: Iterable[Source], loop: Loop, warn: Callable[[str], None], left: Kernel | None = None
) -> Enforcer | None:
    """Let the kernel refuse, if that is wanted (``mode`` is the key `kernel`); ``None``: workers do it.

    ``left``: what a predecessor in our place has left there.

    Raises:
        KernelError: it is required and cannot be had.
    """
    if mode != "off":
        try:
            return Enforcer.begin(loop, policy, alone=mode == "require", warn=warn, left=left, banned=banned)
        except KernelError as err:
            if mode == "require":
                raise
            warn(f"{err}; workers refuse instead")
    path = leftover()
    if path is not None:
        warn(f"the policy of an earlier run is still in force in the kernel; to end it, remove {path}")
    privileges.give_up(privileges.CAP_BPF)
    return None


def _last_good(directory: str | None, warn: Callable[[str], None]) -> Accepted | None:
    if directory is None:
        return None
    try:
        found = lastgood.read(directory)
        if found is None:
            return None
        policy = accept(found.snapshot_fd, 1, Bindings())
    except (lastgood.LastGoodError, SnapshotError, SlotsExhausted, OSError) as err:
        warn(f"the last good policy in {directory} cannot be used: {err}")
        return None
    saved = dt.datetime.fromtimestamp(found.saved, dt.UTC).astimezone().isoformat(" ", "seconds")
    warn(f"the last good policy is {policy.name}, saved {saved} in {directory}")
    return policy
