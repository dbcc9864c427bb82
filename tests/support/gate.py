"""The real gate on a rule text: `python -m gatekeeper run FILE`, watched from outside only."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support import metrics
from tests.support.ports import free_port
from tests.support.process import Process, children, command_line, is_running
from tests.support.wait import until

ROOT = Path(__file__).parents[2]
PYTHON_PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
START_S = 30.0
HURRY_S = 0.5


class Gate(Process):
    """A running gate. ``text`` is the rule file without version, workers, metrics and audit, which are set here.

    The folder must be one that the gate's user may enter and write; `tests/conftest.py` gives such folders.
    """

    def __init__(
        self,
        folder: Path,
        text: str,
        workers: int = 1,
        prefix: Sequence[str] = (),
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
        audit: str | None = None,
        options: Sequence[str] = (),
        metrics_port: int | None = None,
    ) -> None:
        self.rules_path = folder / "rules.yaml"
        self.audit_path = folder / "audit.jsonl"
        self.control_path = folder / "control.sock"
        self.metrics_port = metrics_port or free_port()
        self._head = (
            f"version: 1\nworkers: {workers}\nmetrics: {{listen: 127.0.0.1:{self.metrics_port}}}\n"
            f"audit: {audit or self.audit_path}\n"
        )
        self.workers = workers
        self.write(text)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            notify_path = folder / "notify"
            notify_path.unlink(missing_ok=True)  # of a gate that was started in this folder before
            self._notify.bind(str(notify_path))
            notify_path.chmod(0o777)
            self.notified: list[str] = []
            super().__init__(
                [python, "-m", "gatekeeper", "run", "--control", str(self.control_path), *options, str(self.rules_path)],
                folder,
                "gatekeeper",
                env={"PYTHONPATH": PYTHON_PATH, "NOTIFY_SOCKET": str(notify_path), **(env or {})},
                prefix=prefix,
            )
        except BaseException:
            self._notify.close()
            raise

    # ------------------------------------------------------------------ its life

    def wait_ready(self) -> None:
        """Return when it has said READY=1 to its service manager."""
        self.wait_notified("READY=1", START_S)

    def wait_notified(self, line: str, within_s: float = START_S) -> None:
        """Return when the service manager was told ``line``; lines told before this call count too."""

        def told() -> bool:
            self.notified += self._read_notifications()
            if line not in self.notified:
                self.assert_alive()
            return line in self.notified

        until(told, f"the gate tells its service manager {line}", within_s)

    def _read_notifications(self) -> list[str]:
        lines: list[str] = []
        while True:
            try:
                lines += self._notify.recv(4096, socket.MSG_DONTWAIT).decode().splitlines()
            except BlockingIOError:
                return lines

    def write(self, text: str) -> None:
        """Replace the rule file; nothing happens before a reload."""
        self.write_raw(self._head + text)

    def write_raw(self, text: str) -> None:
        """Replace the rule file, the head included, in one step."""
        fresh = self.rules_path.with_suffix(".new")
        fresh.write_text(text)
        fresh.chmod(0o644)
        fresh.rename(self.rules_path)

    def reload(self, text: str | None = None) -> dict[str, Any]:
        """Replace the file when ``text`` is given, send SIGHUP, and return what the audit log says about the outcome."""
        if text is not None:
            self.write(text)
        return self._reload()

    def reload_raw(self, text: str) -> dict[str, Any]:
        """Like `reload`, with the whole text of the file."""
        self.write_raw(text)
        return self._reload()

    def _reload(self) -> dict[str, Any]:
        before = len(self.audit("reload"))
        self.signal(signal.SIGHUP)
        until(lambda: len(self.audit("reload")) > before, "the reload is in the audit log", within_s=20)
        outcome: dict[str, Any] = self.audit("reload")[-1]["gatekeeper"]
        return outcome

    def stop(self) -> int:
        """End it, without patience for live sessions. A traceback in its output or a child that stays fails the test."""
        offspring = children(self.pid)
        if self.exit_code() is None:
            self.signal(signal.SIGTERM)
            try:
                self.wait(HURRY_S)
            except subprocess.TimeoutExpired:  # sessions are live: `Process.stop` signals again, which ends them
                pass
        code = super().stop()
        self._notify.close()
        for pid in offspring:
            until(lambda pid=pid: not is_running(pid), f"child {pid} of the gate is gone")  # type: ignore[misc]
        assert "Traceback (most recent call last)" not in self.output(), self.output()
        return code

    def worker_pids(self) -> list[int]:
        """Return the pids of its living workers."""
        return [pid for pid in children(self.pid) if is_running(pid) and "gatekeeper.proxy" in command_line(pid)]

    def observer_pid(self) -> int:
        """Return the pid of its observer."""
        (pid,) = [pid for pid in children(self.pid) if "gatekeeper.observer" in command_line(pid)]
        return pid

    # ------------------------------------------------------------------ what it says

    def get(self, path: str) -> tuple[int, str]:
        """Return status and body of a GET at its HTTP endpoint."""
        return metrics.get(self.metrics_port, path)

    def scrape(self) -> metrics.Scrape:
        """Return what /metrics says now."""
        return metrics.scrape(self.metrics_port)

    def wait_for_verdicts(self, expected: Counter[tuple[str, str, str, str]]) -> None:
        """Return when exactly these verdicts, (listener, action, rule, reason) -> number, have been counted."""

        def counted() -> bool:
            self.assert_alive()
            have = self.scrape().verdicts()
            assert have == expected, f"too many: {have - expected}; missing: {expected - have}"
            return True

        until(counted, "every verdict is counted exactly once")

    def wait_for_value(self, expected: float, name: str, **labels: str) -> None:
        """Return when the metric has this value."""

        def reached() -> bool:
            value = self.scrape().value(name, **labels)
            assert value == expected, f"{name}{labels or ''} is {value:g}, not {expected:g}"
            return True

        until(reached, f"{name}{labels or ''} becomes {expected:g}")

    def audit(self, event_type: str | None = None) -> list[dict[str, Any]]:
        """Return all complete lines of the audit log, or those of one event type; each must be a JSON object."""
        return [event for event in self._audit_lines() if event_type in {None, event["event_type"]}]

    def wait_for_audit(self, count: int, event_type: str) -> list[dict[str, Any]]:
        """Return the events of this type once there are at least ``count``."""
        until(lambda: len(self.audit(event_type)) >= count, f"{count} {event_type} events are in the audit log")
        return self.audit(event_type)

    def _audit_lines(self) -> Iterator[dict[str, Any]]:
        if not self.audit_path.exists():
            return
        text = self.audit_path.read_text()
        for line in text.split("\n")[:-1]:  # the last one is not complete yet
            event = json.loads(line)
            assert isinstance(event, dict), line
            yield event

