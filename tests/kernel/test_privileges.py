"""What a child can no longer do once it has given up its privileges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gatekeeper.kernel import privileges

ROOT = Path(__file__).parents[2]
REPORT = """
import json, os, sys
from gatekeeper.kernel import privileges
{call}
status = dict(line.rstrip().split(":", 1) for line in open("/proc/self/status"))
status = {{key: value.strip() for key, value in status.items()}}
status["resuid"] = os.getresuid()
status["resgid"] = os.getresgid()
status["groups"] = os.getgroups()
print(json.dumps(status))
"""

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or privileges.who_to_become() is None, reason="only root can change users"
)


def status_after(call: str) -> dict[str, object]:
    """Return /proc/self/status, by name, of a child that made this call."""
    ran = subprocess.run(
        [sys.executable, "-c", REPORT.format(call=call)],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert isinstance(report, dict)
    return report


def test_drop_leaves_no_capability() -> None:
    """After `drop` every capability set is empty and no_new_privs is set, whoever we were."""
    status = status_after("privileges.drop(None, None, None, os.getppid())")
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(str(status[name]), 16) == 0, name
    assert status["NoNewPrivs"] == "1"


@as_root
def test_drop_becomes_the_account() -> None:
    """Root turns into the account in all of real, effective and saved ids, with nothing left in the bounding set."""
    become = privileges.who_to_become()
    assert become is not None
    assert become.uid != 0
    status = status_after(f"privileges.drop({become.uid}, {become.gid}, {list(become.groups)}, os.getppid())")
    assert status["resuid"] == [become.uid] * 3
    assert status["resgid"] == [become.gid] * 3
    assert set(status["groups"]) <= {become.gid, *become.groups}  # type: ignore[call-overload]
    assert int(str(status["CapBnd"]), 16) == 0


@as_root
def test_dropped_child_cannot_come_back() -> None:
    """The way back to root is closed: setuid, a set-uid program, reading what is root's."""
    become = privileges.who_to_become()
    assert become is not None
    call = f"""
privileges.drop({become.uid}, {become.gid}, {list(become.groups)}, os.getppid())
for attempt in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: open("/etc/shadow"), lambda: os.setgroups([0])):
    try:
        attempt()
    except PermissionError:
        continue
    sys.exit("it worked")
"""
    assert status_after(call)["resuid"] == [become.uid] * 3


def test_confine_keeps_the_right_to_read_only() -> None:
    """The compiler keeps at most CAP_DAC_READ_SEARCH, which rule files of other users need."""
    status = status_after("privileges.confine(os.getppid())")
    assert int(str(status["CapEff"]), 16) & ~(1 << privileges.CAP_DAC_READ_SEARCH) == 0
    assert status["NoNewPrivs"] == "1"


def test_a_hardened_supervisor_keeps_what_it_uses() -> None:
    """The supervisor keeps no capability that it has no use for, and what it lacked it does not get."""
    status = status_after("privileges.harden()")
    allowed = sum(1 << number for number in privileges.SUPERVISOR_USES)
    held = sum(1 << number for number in privileges.effective_capabilities())
    assert int(str(status["CapEff"]), 16) == held & allowed
    assert int(str(status["CapPrm"]), 16) & ~allowed == 0
    assert status["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        assert int(str(status["CapBnd"]), 16) & ~allowed == 0


def test_drop_without_the_supervisor() -> None:
    """A child whose supervisor is gone already exits instead of going on alone."""
    call = "from gatekeeper.kernel import privileges; privileges.drop(None, None, None, 1 << 22)"
    ran = subprocess.run(
        [sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )  # fmt: skip
    assert ran.returncode == 1
    assert "supervisor is gone" in ran.stderr
