"""What all tests share: promises about skips, folders, the remote network, gates, and the output of programs on failure."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import need
from tests.support.gate import Gate
from tests.support.network import RemoteNetwork
from tests.support.process import RUNNING

OUTPUT_LINES = 60
PROMISED = "GATEKEEPER_PROMISED"


def pytest_configure() -> None:
    """Let nothing that tests write be writable for others, whatever the umask: gatekeeper would refuse it.

    And keep the gates of tests apart from one that serves this host.
    """
    os.umask(0o022)
    os.environ["GATEKEEPER_CONTROL"] = "off"  # the place by default is the host's; a test names one of its own


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--long``: the endurance tests in full size, for minutes instead of seconds."""
    parser.addoption("--long", action="store_true", help="run the endurance tests in full size")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the endurance tests run in full size."""
    return bool(request.config.getoption("--long"))


# ---------------------------------------------------------------------- what may be skipped


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this host cannot run, and say what is missing."""
    if item.get_closest_marker("needs_root"):
        need.root("run this test")
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            need.program(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where every test is promised; show what started programs printed when a test fails."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("may_skip"):
        _refuse_skip(report)
    if report.failed:
        for process in RUNNING:
            with contextlib.suppress(OSError):
                lines = process.output().splitlines()[-OUTPUT_LINES:]
                report.sections.append((f"{process.name} ({process.pid}) printed", "\n".join(lines)))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A whole file that skips itself breaks the promise too."""
    report = yield
    if report.skipped:
        _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get(PROMISED) == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{PROMISED}=1: this test must run here, but was skipped ({reason})"


# ---------------------------------------------------------------------- what tests are given


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder with a short path (unix sockets need that), which other users may enter."""
    path = Path(tempfile.mkdtemp(prefix="gk-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def remote() -> Iterator[RemoteNetwork]:
    """A network one router away, with many IPv4 and IPv6 sources; needs root."""
    need.root("make network namespaces")
    network = RemoteNetwork()
    yield network
    network.close()


@pytest.fixture
def run_gate(folder: Path) -> Iterator[Callable[..., Gate]]:
    """Start the gate on a rule text, ``run_gate(text, workers=2, ...)``, wait until it serves, and end it after the test.

    ``before_ready`` is called in between, ``folder`` is its home instead of a new one; all else is `Gate`'s.
    """
    started: list[Gate] = []

    def start(text: str, **options: Any) -> Gate:
        home = options.pop("folder", None) or folder / f"gate{len(started)}"
        home.mkdir(exist_ok=True)
        before_ready = options.pop("before_ready", None)
        gate = Gate(home, text, **options)
        started.append(gate)
        if before_ready is not None:
            before_ready()
        gate.wait_ready()
        return gate

    yield start
    with contextlib.ExitStack() as ends:
        for gate in started:
            ends.callback(gate.stop)
