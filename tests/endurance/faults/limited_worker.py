"""A worker under limits of its own: `limited_worker.py '{"RLIMIT_NOFILE": 40}' --channel FD`.

After SIGUSR1 it gets no more memory than it has.
"""

from __future__ import annotations

import json
import resource
import runpy
import signal
import sys
from pathlib import Path


def keep_what_there_is(*_signal: object) -> None:
    """Limit the address space to its present size."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    for name, most in json.loads(sys.argv.pop(1)).items():
        resource.setrlimit(getattr(resource, name), (most, most))
    signal.signal(signal.SIGUSR1, keep_what_there_is)
    runpy.run_module("gatekeeper.proxy", run_name="__main__", alter_sys=True)
