"""A supervisor one of whose workers was taken over, and says whatever it likes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.endurance.hostile.rogue_worker import DEEDS
from tests.supervisor.service import Service
from tests.support import metrics
from tests.support.backends import TcpBackend
from tests.support.clients import Sources, ask
from tests.support.ports import free_port
from tests.support.process import children, command_line
from tests.support.wait import until

ROGUE = str(Path(__file__).parent / "rogue_worker.py")
QUICK = {4, 7, 9, *range(len(DEEDS) - 2, len(DEEDS))}  # one of each kind: unreadable, too deep, empty, poison, strange
SOURCES = [f"127.0.6.{number}" for number in range(1, 25)]  # with two workers, all of them at one: 1 in 16 million


@pytest.mark.timeout(180)
def test_a_worker_that_lies_harms_only_itself(folder: Path, long: bool) -> None:
    """Garbage, descriptors by the hundred and poisoned counters: the supervisor neither ends nor fills up, and a successor serves."""
    port, metrics_port, lives = free_port(), free_port(), folder / "lives"
    # Each life but the last costs a back-off of up to 5 s.
    deeds = [str(number) for number in range(len(DEEDS)) if long or number in QUICK]
    command = [sys.executable, ROGUE, str(lives), ",".join(deeds)]
    with TcpBackend() as backend:
        text = f'listeners:\n  - {{name: web, listen: "127.0.0.1:{port}", backend: "{backend.address}"}}\ndefault: allow\n'
        service = Service(folder, text, workers=2, metrics=f"{{listen: 127.0.0.1:{metrics_port}}}", worker=command)
        try:
            service.ready()
            until(lambda: lives.stat().st_size > len(deeds) - 1, "all was tried", within_s=120)
            before = descriptors(service)
            for source in SOURCES:
                with Sources().connect(source, "127.0.0.1", port) as client:
                    assert ask(client) == b"are you there?"

            def all_counted() -> bool:
                return metrics.scrape(metrics_port).value("gatekeeper_sessions") == 0

            until(all_counted, "the successor can count")
            assert metrics.scrape(metrics_port).value("gatekeeper_connections_total") >= len(SOURCES)
            assert descriptors(service) <= before
            assert descriptors(service) < 100, "none of the descriptors that came along was kept"
            assert all(character.isprintable() or character in "\n\t" for character in service.output())
            assert len([pid for pid in children(service.pid) if "rogue_worker" in command_line(pid)]) == 2
        finally:
            service.stop()


def descriptors(service: Service) -> int:
    """Return how many descriptors the supervisor holds."""
    return len(os.listdir(f"/proc/{service.pid}/fd"))
