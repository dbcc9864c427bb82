"""The units are sound, hardened, and agree with the program about signals and deadlines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gatekeeper.cli.main import COMMANDS

FOLDER = Path(__file__).parents[2] / "systemd"
SERVICES = ("gatekeeper.service", "gatekeeper-activated.service")
LARGEST_EXPOSURE = 2.0  # of 10; "OK" in systemd-analyze's words
DRAIN_S = 300

pytestmark = pytest.mark.needs("systemd-analyze")


def settings(unit: str) -> dict[str, list[str]]:
    """Return key -> values, in order, of one unit file."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / unit).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("unit", SERVICES)
def test_exposure_is_low(unit: str) -> None:
    """`systemd-analyze security` rates the unit at 2.0 or better."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(FOLDER / unit)],
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert level, done.stdout + done.stderr
    assert float(level[1]) <= LARGEST_EXPOSURE, done.stdout


def test_systemd_finds_nothing_to_say(tmp_path: Path) -> None:
    """`systemd-analyze verify` is silent about every unit, once the program is where the unit says."""
    for unit in (*SERVICES, "gatekeeper-activated.socket"):
        text = (FOLDER / unit).read_text().replace("/opt/gatekeeper/bin/gatekeeper", sys.executable)
        (tmp_path / unit).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", SERVICES)
def test_the_unit_agrees_with_the_program(unit: str) -> None:
    """The unit runs a command that exists, waits longer than a drain takes, and tells the supervisor alone to stop."""
    found = settings(unit)
    _program, command, *_rest = found["ExecStart"][0].split()
    assert command in COMMANDS
    assert found["Type"] == ["notify"]
    assert found["KillMode"] == ["mixed"]
    assert DRAIN_S < int(found["TimeoutStopSec"][0].removesuffix("s")) <= DRAIN_S + 30


@pytest.mark.parametrize("unit", SERVICES)
def test_the_manager_keeps_sockets_and_says_how_many(unit: str) -> None:
    """A systemd before 254 does not say itself how large the store is, so the unit does, and both numbers agree."""
    found = settings(unit)
    assert found["Environment"] == [f"FDSTORE={found['FileDescriptorStoreMax'][0]}"]


def test_the_units_differ_only_where_they_must() -> None:
    """Socket activation changes who opens the ports and drops every capability; all else is the same."""
    ordinary, activated = map(settings, SERVICES)
    differing = {key for key in ordinary.keys() | activated.keys() if ordinary.get(key) != activated.get(key)}
    assert differing <= {
        "Description", "Requires", "After", "Conflicts", "AmbientCapabilities", "CapabilityBoundingSet",
        "PrivateUsers", "Also",
    }  # fmt: skip
    assert activated["CapabilityBoundingSet"] == [""]


@pytest.mark.needs("systemd-sysusers", "systemd-tmpfiles")
def test_account_and_directories_are_made(tmp_path: Path) -> None:
    """The sysusers and tmpfiles fragments make the account and the directories in an empty root."""
    (tmp_path / "etc").mkdir()
    for program, folder in (("systemd-sysusers", "sysusers.d"), ("systemd-tmpfiles", "tmpfiles.d")):
        flags = ["--create"] if program == "systemd-tmpfiles" else []
        done = subprocess.run(
            [program, *flags, f"--root={tmp_path}", str(FOLDER / folder / "gatekeeper.conf")],
            capture_output=True, text=True, timeout=50,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "\ngatekeeper:" in "\n" + (tmp_path / "etc/passwd").read_text()
    for directory in ("etc/gatekeeper", "var/lib/gatekeeper", "var/log/gatekeeper", "run/gatekeeper"):
        assert (tmp_path / directory).is_dir()


def test_names_in_the_units_are_documented() -> None:
    """The README's systemd section names every file of the folder."""
    readme = (FOLDER.parent / "README.md").read_text()
    assert not [path.name for path in FOLDER.iterdir() if path.name not in readme]


def test_the_kernels_part_takes_two_more_capabilities() -> None:
    """The drop-in adds what loading the program takes, and nothing else; only the supervisor's unit has it."""
    more, unit = settings("gatekeeper.service.d/kernel.conf"), settings("gatekeeper.service")
    wanted = {*unit["AmbientCapabilities"][0].split(), "CAP_BPF", "CAP_NET_ADMIN"}
    assert set(more) == {"AmbientCapabilities", "CapabilityBoundingSet", "SystemCallFilter"}
    assert set(more["AmbientCapabilities"][0].split()) == set(more["CapabilityBoundingSet"][0].split()) == wanted
    assert more["SystemCallFilter"] == ["bpf"]
    assert "PrivateUsers" not in unit, "capabilities of a user namespace load no programs"
    places = settings("gatekeeper.service.d/guard-closed.conf")
    assert places["ReadWritePaths"] == ["/sys/fs/bpf"]
