"""docs/control.md is run as it stands, and names what the daemon and its limits have."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gatekeeper.cli import daemon
from gatekeeper.supervisor.commands import MOST_TAILS
from gatekeeper.supervisor.control import Limits
from gatekeeper.supervisor.control_client import MOST_FDS, MOST_REQUEST_BYTES
from tests.docs import sessions
from tests.support.gate import Gate
from tests.support.ports import free_port

PAGE = (sessions.ROOT / "docs/control.md").read_text()
SESSION_S = 100


@pytest.mark.timeout(120)
@pytest.mark.needs("unshare", "ip", "bash")
def test_the_session_to_paste(folder: Path) -> None:
    """Pasted into a shell, the session of the page prints what the page shows, command by command."""
    wanted = [step for session in sessions.blocks("console", PAGE) for step in sessions.steps(session)]
    assert len(wanted) > 15
    sessions.run(wanted, folder, "ip link set lo up\n", SESSION_S)


def test_the_table_of_requests_is_complete(run_gate: Callable[..., Gate]) -> None:
    """The page has every request that the daemon knows, and no other."""
    gate = run_gate(f"listeners: [{{name: web, listen: '127.0.0.1:{free_port()}', backend: '127.0.0.1:9'}}]\ndefault: deny\n")
    with daemon.connect(str(gate.control_path)) as connection, pytest.raises(daemon.Refused) as caught:
        connection.ask("nonsense")
    known = set(str(caught.value).partition("it knows ")[2].split(", "))
    table = PAGE.partition("| `op` |")[2].partition("\n\n")[0]
    assert {name for cell in re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)} == known


def test_the_limits_are_those_of_the_code() -> None:
    """The table of limits has the numbers that are enforced."""
    table = PAGE.partition("## Limits")[2]
    usual = Limits()
    for text in (
        f"{MOST_REQUEST_BYTES >> 10} KiB, {MOST_FDS} descriptors",
        f"{usual.clients}, and {usual.reserved} more",
        f"{usual.rate_per_s:g} a second and {usual.burst:g} at once",
        f"| {usual.idle_s:g} s |",
        f"{usual.stuck_s:g} s, or {usual.unsent_bytes >> 20} MiB; {usual.all_unsent_bytes >> 20} MiB of all together",
        f"| tails | {MOST_TAILS} |",
    ):
        assert text in table
