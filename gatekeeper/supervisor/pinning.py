"""How the program in force outlives us: its link is pinned in the bpf file system, in a place for our network namespace.

Only listeners with `on_exit: closed` ask for that. The next start takes the link over from there.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from gatekeeper.errors import KernelError
from gatekeeper.kernel import bpf
from gatekeeper.supervisor.accepted import how_guarded

if TYPE_CHECKING:
    from gatekeeper.supervisor.accepted import Accepted

NAMESPACE = "/proc/self/ns/net"
PINS = "/sys/fs/bpf/gatekeeper"


class Pin:
    """The place for the link of one network namespace. ``namespace`` stays the caller's."""

    def __init__(self, namespace: int) -> None:
        self._namespace = os.fstat(namespace).st_ino
        self.path = f"{PINS}/netns-{self._namespace}"

    def take_over(self) -> int:
        """Return the link that an earlier run has pinned for this network namespace, -1 when there is none."""
        try:
            link = bpf.pinned(self.path)
        except (FileNotFoundError, PermissionError):  # whoever may not look there has left nothing there
            return -1
        if bpf.namespace_of(link) == self._namespace:
            return link
        os.close(link)  # of a namespace that is gone and had the same number
        os.unlink(self.path)
        return -1

    def keep(self, link: int, policy: Accepted) -> None:
        """Pin the link if the policy is to outlive us.

        Raises:
            KernelError: it cannot be pinned.
        """
        if "closed" not in how_guarded(policy) or os.path.exists(self.path):
            return
        try:
            os.makedirs(PINS, mode=0o700, exist_ok=True)
            bpf.pin(link, self.path)
        except OSError as err:
            raise KernelError(
                f"`on_exit: closed` cannot be kept: {err.strerror} ({PINS}); it takes the bpf file system "
                "(mount -t bpf bpf /sys/fs/bpf) and the right to write there"
            ) from err

    def settle(self, policies: list[Accepted]) -> None:
        """Take the pin away when none of these, the policy in force and those that may come back, has a use for it."""
        if policies and not any("closed" in how_guarded(policy) for policy in policies):
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            with contextlib.suppress(OSError):
                os.rmdir(PINS)


def leftover() -> str | None:
    """Return the path of a program that an earlier run left in force here, ``None`` when there is none."""
    with contextlib.suppress(OSError), open(NAMESPACE, "rb") as namespace:
        path = Pin(namespace.fileno()).path
        return path if os.path.exists(path) else None
    return None
