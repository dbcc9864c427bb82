"""What docs/robustness.md says, measured: gatekeeper, HAProxy and nginx with the same harness, one after the other.

    python -m tests.endurance.streams.figures

HAProxy and nginx run with the configurations of `bench/`; what is not installed is left out.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import System, raise_file_limit, start_gatekeeper, start_haproxy, start_nginx
from bench.processes import BenchError
from tests.endurance.streams.closing import CASES, Case, Sessions, backend_socket, run_all

STARTERS: dict[str, Callable[[Any, str, int], System]] = {
    "gatekeeper": start_gatekeeper,
    "HAProxy": start_haproxy,
    "nginx": start_nginx,
}
TRIES = 50


@dataclass
class Behind:
    """A backend of the test's own, as `bench.peers` takes it."""

    tcp: int
    udp: int = 9

    def close(self) -> None:
        """Nothing here is the system's to close."""


def ways(system: System) -> dict[str, int]:
    """Return the ports to drive: HAProxy has one more with forced splice."""
    return {name: system.ports[name] for name in ("tcp", "splice") if name in system.ports}


def refusals_ms(port: int) -> list[float]:
    """Return how long it took clients to learn that the backend is down; a second where they did not."""
    took = []
    for _ in range(TRIES):
        begun = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as client:
                client.recv(1)
        except OSError:
            pass
        took.append((time.monotonic() - begun) * 1e3)
    return sorted(took)


def comes_back_ms(port: int, behind: int) -> float:
    """Return how long after the backend listens again the first client is served; a client comes every few milliseconds."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", behind))
        listening = threading.Event()
        since = [0.0]

        def serve() -> None:
            time.sleep(0.3)
            since[0] = time.monotonic()
            listener.listen(128)
            listening.set()
            while True:
                try:
                    accepted = listener.accept()[0]
                except OSError:
                    return
                with accepted:
                    try:
                        accepted.sendall(accepted.recv(1))
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        while time.monotonic() - since[0] < 10 or not listening.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as client:
                    client.sendall(b"E")
                    if client.recv(1) == b"E":
                        break
            except OSError:
                time.sleep(0.002)
        took = (time.monotonic() - since[0]) * 1e3
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    return took


def measure(name: str, start: Callable[[Any, str, int], System]) -> dict[str, str]:
    """Return the column of one system: label -> text."""
    column: dict[str, str] = {}
    sessions = Sessions(backend_socket())
    behind: int = sessions.listener.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="gk-") as folder:
        Path(folder).chmod(0o755)
        system = start(Behind(behind), folder, 1)
        try:
            for way, port in ways(system).items():
                suffix = " (spliced)" if way == "splice" else ""
                results = run_all(port, sessions)
                column[f"close matrix{suffix}"] = f"{sum(what is None for what in results.values())} of {len(CASES)}"
                for label, wrong in by_kind(results).items():
                    column[f"{label}{suffix}"] = wrong
            sessions.close()
            took = refusals_ms(system.ports["tcp"])
            column["backend down: client knows after, median and worst of 50"] = f"{took[len(took) // 2]:.1f} / {took[-1]:.1f} ms"
            column["backend listens again: first client served after"] = f"{comes_back_ms(system.ports['tcp'], behind):.0f} ms"
        finally:
            system.close()
    print(f"{name} {system.version}: done", file=sys.stderr)
    return column


def by_kind(results: dict[Case, str | None]) -> dict[str, str]:
    """Return what went wrong, by kind of end."""
    table = {}
    for resets in (False, True):
        mine = {case: what for case, what in results.items() if case.resets == resets}
        good = sum(what is None for what in mine.values())
        problems = Counter(what for what in mine.values() if what is not None)
        text = f"{good} of {len(mine)}" + "".join(f"; {number} times {what}" for what, number in problems.items())
        table["RST arrives as RST after the data" if resets else "FIN arrives as FIN, the answer too"] = text
    return table


def main() -> None:
    """Print the table."""
    raise_file_limit()
    columns = {}
    for name, start in STARTERS.items():
        try:
            columns[name] = measure(name, start)
        except BenchError as err:
            print(f"left out: {err}", file=sys.stderr)
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for label in labels:
        print(f"| {label} | {' | '.join(column.get(label, '-') for column in columns.values())} |")


if __name__ == "__main__":
    main()
