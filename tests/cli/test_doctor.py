"""`gatekeeper doctor` tries things out and says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gatekeeper.cli import probes
from gatekeeper.cli.probes import State
from tests.cli.program import gatekeeper
from tests.support.plain_user import plain_user


def test_every_finding_says_why_and_how_to_mend_it() -> None:
    """The JSON has the documented keys; whatever is not ok has a fix, whatever is ok has none."""
    done = gatekeeper("doctor", "--json")
    report = json.loads(done.out)
    assert set(report) == {"healthy", "findings"}
    assert done.code == (0 if report["healthy"] else 1)
    assert len(report["findings"]) == len(probes.PROBES)
    for finding in report["findings"]:
        assert set(finding) == {"check", "state", "found", "why", "fix"}
        assert finding["why"]
        assert bool(finding["fix"]) == (finding["state"] != "ok")


def test_this_machine_can_do_what_the_tests_need() -> None:
    """Where the tests run, kernel, seals and steering are fine: the other tests stand on them."""
    assert {probe().state for probe in (probes.kernel, probes.seals, probes.steer, probes.splicing)} == {State.OK}


@pytest.mark.needs_root
def test_the_kernels_part_is_tried_out() -> None:
    """As root a program can be loaded; without a right to load any it says which capabilities are missing."""
    assert probes.refusing().state is State.OK
    done = subprocess.run(
        ["setpriv", "--bounding-set=-bpf,-sys_admin", sys.executable, "-m", "gatekeeper", "doctor", "--json"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    (finding,) = [one for one in json.loads(done.stdout)["findings"] if one["check"] == "sk_lookup"]
    assert finding["state"] == "warn"
    assert "CAP_BPF" in finding["fix"]


def test_for_people_each_finding_is_a_line() -> None:
    """Without --json there is one line for each finding, and no colour when nobody looks."""
    done = gatekeeper("doctor")
    assert "\033" not in done.out
    starts = [line.split()[0] for line in done.out.splitlines() if not line.startswith(" ")]
    assert len(starts) == len(probes.PROBES)
    assert set(starts) <= {"ok", "warn", "fail"}


def test_colour_is_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal gets colour; under NO_COLOR it does not."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\033[" in gatekeeper("doctor", terminal=True).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[" not in gatekeeper("doctor", terminal=True).out


@pytest.mark.needs_root
@pytest.mark.needs("setpriv")
def test_without_privileges_only_high_ports_are_promised(folder: Path) -> None:
    """An ordinary user is told from which port on it may listen, and what to do about the others."""
    user = plain_user(folder)
    code = (
        "import sys; from gatekeeper.cli.main import main;"
        "sys.exit(main(['doctor', '--json'], sys.stdin, sys.stdout, sys.stderr))"
    )
    done = subprocess.run(
        [*user.prefix, user.python, "-c", code], capture_output=True, text=True, timeout=50, cwd="/",
        env=os.environ | user.env | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    ports = next(finding for finding in json.loads(done.stdout)["findings"] if finding["check"] == "ports")
    first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if first > 1:
        assert (ports["state"], str(first) in ports["found"]) == ("warn", True)
        assert "CAP_NET_BIND_SERVICE" in ports["fix"]
