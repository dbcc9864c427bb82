"""docs/plan.md is run as it stands, and the object that it shows is one that `diff` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.program import gatekeeper
from tests.docs import sessions

PAGE = (sessions.ROOT / "docs/plan.md").read_text()
SESSION_S = 100
OLD = """\
version: 1
listeners: [{name: ssh, listen: "*:22", backend: "127.0.0.1:2222"}]
sets: {office: [198.51.100.0/24, "2001:db8:42::/48"]}
default: deny
rules: [{name: office-ssh, action: allow, from: office}]
"""


@pytest.mark.timeout(120)
@pytest.mark.needs("unshare", "ip", "bash")
def test_the_session_to_paste(folder: Path) -> None:
    """Pasted into a shell, the session of the page prints what the page shows, command by command."""
    wanted = [step for session in sessions.blocks("console", PAGE) for step in sessions.steps(session)]
    assert len(wanted) > 10
    sessions.run(wanted, folder, "ip link set lo up\n", SESSION_S)


def test_the_object_shown_is_one_of_diff(tmp_path: Path) -> None:
    """The JSON of the page is what `diff --json` writes for such a change."""
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(OLD)
    new.write_text(OLD.replace('198.51.100.0/24, "2001:db8:42::/48"', "198.51.100.0/25"))
    (shown,) = sessions.blocks("json", PAGE)
    assert json.loads(gatekeeper("diff", "--json", str(old), str(new)).out)["changes"] == [json.loads(shown)]
