"""`gatekeeper demo`: all it claims is observed, on free ports, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.wait import until

COMMAND = [sys.executable, "-m", "gatekeeper", "demo"]


@pytest.fixture
def environment(folder: Path) -> dict[str, str]:
    """An environment whose temporary files can be counted."""
    return os.environ | {"TMPDIR": str(folder)}


def test_everything_is_as_promised(environment: dict[str, str], folder: Path) -> None:
    """It exits with 0, shows all three verdicts and a reload that changes one, and removes its files, under any umask."""
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=55, env=environment, umask=0o002)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "NOT AS PROMISED" not in done.stdout
    assert "All as promised." in done.stdout
    for word in ('"action":"allow"', '"action":"deny"', '"action":"drop"', '"event_type":"reload"'):
        assert word in done.stdout.replace(": ", ":")
    assert "gatekeeper_connections_total{" in done.stdout
    assert not list(folder.iterdir())


@pytest.fixture
def kept(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A demonstration that keeps running."""
    with subprocess.Popen([*COMMAND, "--keep"], stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_keep_runs_until_it_is_told_to_stop(kept: subprocess.Popen[str], number: signal.Signals, folder: Path) -> None:
    """With --keep the gate goes on serving until Ctrl-C or SIGTERM; then it is gone, and so are its files."""
    assert kept.stdout is not None
    seen = ""
    while "Ctrl-C ends it" not in seen:
        line = kept.stdout.readline()
        assert line, seen
        seen += line
    address = re.search(r"http://127\.0\.0\.1:\d+", seen)
    assert address
    assert urllib.request.urlopen(address[0] + "/readyz", timeout=10).read() == b"ready\n"
    kept.send_signal(number)
    rest = kept.stdout.read()
    assert kept.wait(20) == 0, rest
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address[0] + "/readyz", timeout=10)
    until(lambda: not list(folder.iterdir()), "its files are gone")
