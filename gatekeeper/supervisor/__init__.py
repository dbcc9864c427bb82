"""Processes, listeners, reload: the one part that lives as long as the service. Never reads from the network."""

from __future__ import annotations

from typing import TextIO


def run(path: str, *, workers: int | None = None, drain_timeout_s: float = 300.0, stderr: TextIO | None = None) -> int:
    """Serve the rule file at ``path`` in the foreground until SIGTERM or SIGINT; SIGHUP reloads it.

    ``workers`` ``None``: as the file says. ``drain_timeout_s`` is how long sessions may take to end after the first
    signal. What the service says goes to ``stderr`` (``None``: this process's). Takes over the process's signal
    handlers meanwhile, so it must be called from the main thread.

    Returns:
        0 after a stop that was asked for; 1 when the file is not a policy that can be applied; 3 when the file cannot
        be read, an address cannot be opened, or the processes cannot be started.
    """
    from gatekeeper.supervisor.log import Log  # noqa: PLC0415 - the compiler imports this package too, and nothing of it
    from gatekeeper.supervisor.supervisor import Options, Supervisor  # noqa: PLC0415

    return Supervisor(Options(path, workers, drain_timeout_s), Log(stderr)).run()
