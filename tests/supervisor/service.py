"""The service under test: the supervisor, with stand-ins for its processes where a test asks for them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.process import Process, children, command_line, is_running
from tests.support.wait import until

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PATH = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
START_S = 30.0


def stand_in(mode: str) -> list[str]:
    """Return the command of a stand-in worker."""
    return [sys.executable, str(HERE / "stand_in_worker.py"), mode]


class Service(Process):
    """A running supervisor. ``options`` are those of `serve.py`; ``prefix`` starts it (socket activation)."""

    def __init__(
        self, folder: Path, text: str, prefix: Sequence[str] = (), metrics: str = "off", **options: Any
    ) -> None:
        self.rules = folder / "rules.yaml"
        self.control_path = folder / "control.sock"
        options.setdefault("control", str(self.control_path))
        self._metrics = metrics
        self.write(text)
        self.notified: list[str] = []
        self.may_print_tracebacks = False  # a test makes its processes fail
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(folder / "notify"))
        super().__init__(
            [sys.executable, str(HERE / "serve.py"), str(self.rules), json.dumps(options)],
            folder,
            "service",
            env={**PATH, "NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "1000000"},
            prefix=prefix,
        )

    def write(self, text: str) -> None:
        """Replace the rule file. The head is one that all tests share."""
        self.rules.write_text(f"version: 1\nmetrics: {self._metrics}\naudit: off\n{text}")

    def notifications(self) -> list[str]:
        """Return all that the service manager was told, one item a datagram."""
        while True:
            try:
                self.notified.append(self._manager.recv(4096, socket.MSG_DONTWAIT).decode())
            except BlockingIOError:
                return self.notified

    def ready(self) -> Service:
        """Wait until it says that it serves."""

        def told() -> bool:
            self.assert_alive()
            return any(item.startswith("READY=1") for item in self.notifications())

        until(told, "the service is ready", START_S)
        return self

    def says(self, pattern: str, times: int = 1) -> str:
        """Wait until it has printed a line that matches ``pattern`` so many times; return the last one."""

        def printed() -> list[str]:
            found = [line for line in self.output().splitlines() if re.search(pattern, line)]
            return found if len(found) >= times else []

        return until(printed, f"{pattern!r} is printed", START_S)[-1]

    def reload(self, text: str | None = None) -> None:
        """Replace the file when there is a text, and ask for a reload."""
        if text is not None:
            self.write(text)
        self.signal(signal.SIGHUP)

    def workers(self) -> list[int]:
        """Return the pids of its living workers."""
        return [
            pid
            for pid in children(self.pid)
            # A child that was not executed yet still has our own command line, which names the stand-in, too.
            if is_running(pid) and re.search(r"gatekeeper\.proxy|stand_in_worker\.py \w", command_line(pid))
        ]

    def stop(self) -> int:
        """End it; none of its children may outlive it, and nothing it printed may be a traceback."""
        offspring = children(self.pid)
        code = super().stop()
        self._manager.close()
        until(lambda: not any(map(is_running, offspring)), "all children are gone")
        assert self.may_print_tracebacks or "Traceback" not in self.output(), self.output()
        return code


def listener(port: int, backend: int, name: str = "web", host: str = "127.0.0.1", protocol: str = "tcp") -> str:
    """Return one listener as an item of `listeners`."""
    return f'  - {{name: {name}, protocol: {protocol}, listen: "{host}:{port}", backend: "127.0.0.1:{backend}"}}\n'


def rules(*listeners: str, more: str = "", default: str = "allow") -> str:
    """Return the text of a rule file without its head."""
    return f"{more}listeners:\n{''.join(listeners)}default: {default}\n"
