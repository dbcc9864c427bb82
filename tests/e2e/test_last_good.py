"""A service that was restarted while its rule file is of no use serves the last policy that was good."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import gatekeeper
from tests.support import need
from tests.support.backends import TcpBackend
from tests.support.clients import Sources
from tests.support.gate import PYTHON_PATH, Gate
from tests.support.plain_user import plain_user
from tests.support.ports import free_port
from tests.support.wait import until

RunGate = Callable[..., Gate]
OUT = "127.0.0.2"


@pytest.fixture
def backend() -> Iterator[TcpBackend]:
    """An echo service."""
    with TcpBackend() as backend:
        yield backend


def policy(port: int, backend: TcpBackend, refused: str = OUT, head: str = "") -> str:
    """Return a policy that refuses one source."""
    return (
        f"{head}listeners:\n  - {{name: web, listen: '127.0.0.1:{port}', backend: '{backend.address}'}}\n"
        f"default: allow\nrules:\n  - {{name: out, action: deny, from: {refused}}}\n"
    )


def refuses(port: int, source: str = OUT) -> bool:
    """Whether the policy in force refuses a source."""
    return Sources().is_refused(source, "127.0.0.1", port)


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a gate that cannot start."""
    command = [sys.executable, "-m", "gatekeeper", "run", "--control", "off", *argv]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": PYTHON_PATH}, capture_output=True, text=True, timeout=30)


def stopped(gate: Gate, state: Path) -> Gate:
    """Return a gate that has ended, and whose policy is saved."""
    until((state / "last-good").exists, "the policy is saved")
    assert gate.stop() == 0
    return gate


def again(run_gate: RunGate, gate: Gate, text: str, **more: Any) -> Gate:
    """Start a gate in the place of one that has ended."""
    return run_gate(text, folder=gate.rules_path.parent, metrics_port=gate.metrics_port, **more)


@pytest.mark.parametrize("named", ["in the file", "by the service manager", "on the command line"])
def test_a_broken_file(run_gate: RunGate, backend: TcpBackend, folder: Path, named: str) -> None:
    """The last good policy is in force, everybody is told, and a reload of a mended file ends it."""
    port, state = free_port(), folder / "state"
    state.mkdir(mode=0o700)
    head = f"state: {state}\n" if named == "in the file" else ""
    more: dict[str, Any] = {"env": {"STATE_DIRECTORY": str(state)}} if named == "by the service manager" else {}
    if named == "on the command line":
        more = {"options": ["--state", str(state)]}
    gate = stopped(run_gate(policy(port, backend, head=head), **more), state)
    serving = again(run_gate, gate, policy(port, backend, head=head) + "rules: [\n", **more)
    assert refuses(port)
    assert not refuses(port, "127.0.0.3")
    said = serving.output()
    assert "is not a policy that can be applied (1 problem): " in said
    assert "starting with the last good policy" in said
    until(lambda: any("the last good one: the rule file is of no use" in line for line in serving.notified), "the manager knows")
    serving.wait_for_value(0, "gatekeeper_config_last_reload_successful")
    serving.wait_for_value(1, "gatekeeper_config_from_last_good")
    status = gatekeeper("status", "--control", str(serving.control_path))
    assert status.code == 1
    assert "the rule file is of no use, the last good policy is in force" in status.out
    assert serving.reload(policy(port, backend, "127.0.0.3", head=head))["success"]
    assert refuses(port, "127.0.0.3")
    serving.wait_for_value(1, "gatekeeper_config_last_reload_successful")
    serving.wait_for_value(0, "gatekeeper_config_from_last_good")


@pytest.mark.parametrize("how", ["missing", "unreadable", "failed tests", "others may write it"])
def test_other_ways_to_be_of_no_use(run_gate: RunGate, backend: TcpBackend, folder: Path, how: str) -> None:
    """A file that is gone, or refused for any reason, is as good as a broken one."""
    port, state = free_port(), folder / "state"
    gate = stopped(run_gate(policy(port, backend), options=["--state", str(state)]), state)

    def spoil(rules: Path) -> None:
        if how in {"missing", "unreadable"}:
            rules.unlink()
        if how == "unreadable":
            rules.mkdir()
        if how == "others may write it":
            rules.chmod(0o666)

    text = policy(port, backend, "127.0.0.3")
    if how == "failed tests":
        text += "tests: [{from: any, to: web, expect: deny}]\n"
    serving = again(run_gate, gate, text, options=["--state", str(state)], before_exec=spoil)
    assert refuses(port)
    assert not refuses(port, "127.0.0.3")
    assert "starting with the last good policy" in serving.output()


@pytest.mark.parametrize("spoil", ["truncated", "another version", "writable by others"])
def test_a_last_good_policy_that_cannot_be_used(run_gate: RunGate, backend: TcpBackend, folder: Path, spoil: str) -> None:
    """Then there is none: the service does not start, says both, and its exit code is that of the rule file."""
    port, state = free_port(), folder / "state"
    head = f"state: {state}\n"
    gate = stopped(run_gate(policy(port, backend, head=head)), state)
    saved = state / "last-good"
    if spoil == "truncated":
        saved.write_bytes(saved.read_bytes()[:-10])
    elif spoil == "another version":
        saved.write_bytes(saved.read_bytes().replace(b'"version": 1', b'"version": 9', 1))
    else:
        saved.chmod(0o666)
    gate.write(policy(port, backend, head=head) + "rules: [\n")
    done = run(str(gate.rules_path))
    assert done.returncode == 1
    why = {"truncated": "it is damaged", "another version": "another version of gatekeeper", "writable by others": "written by others"}
    assert f"the last good policy in {state} cannot be used: " in done.stderr
    assert why[spoil] in done.stderr
    assert "is not a policy that can be applied" in done.stderr


def test_without_one_a_broken_file_is_what_it_was(folder: Path) -> None:
    """The exit codes of a start that fails are the same with a state directory that is empty."""
    (folder / "rules.yaml").write_text(f"state: {folder / 'state'}\nnonsense\n")
    assert run(str(folder / "rules.yaml")).returncode == 1
    assert run("--state", str(folder), str(folder / "missing.yaml")).returncode == 3


@pytest.mark.needs_root
@pytest.mark.needs("mount", "umount")
def test_a_full_disk(run_gate: RunGate, backend: TcpBackend, folder: Path) -> None:
    """A policy that cannot be saved is in force all the same; that is said and counted, and the older one stays on disk."""
    port, state = free_port(), folder / "state"
    state.mkdir(mode=0o700)
    subprocess.run([need.program("mount"), "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(state)], check=True)
    try:
        gate = run_gate(policy(port, backend), options=["--state", str(state)])
        until((state / "last-good").exists, "the first policy is saved")
        first = (state / "last-good").read_bytes()
        with pytest.raises(OSError, match="No space left"):
            (state / "filler").write_bytes(bytes(1 << 20))
        gate.write(policy(port, backend, "127.0.0.3"))
        done = gatekeeper("reload", "--json", "--control", str(gate.control_path))
        assert (done.code, json.loads(done.out)["saved"]) == (0, False)
        assert refuses(port, "127.0.0.3")
        until(lambda: f"could not be saved in {state}: No space left on device" in gate.output(), "it is said")
        gate.wait_for_value(1, "gatekeeper_config_save_failures_total")
        gate.wait_for_value(1, "gatekeeper_config_last_reload_successful")
        assert "could not be saved" in gatekeeper("status", "--control", str(gate.control_path)).out
        assert (state / "last-good").read_bytes() == first
        on_trial = gatekeeper("reload", "--confirm", "1h", "--control", str(gate.control_path))
        assert "a service that is restarted before that starts with it: No space left on device" in on_trial.err
        confirmed = gatekeeper("confirm", "--control", str(gate.control_path))
        assert (confirmed.code, "it could not be saved: No space left on device" in confirmed.err) == (0, True)
        (state / "filler").unlink()
        assert gate.reload()["success"]
        until(lambda: (state / "last-good").read_bytes() != first, "the newer one is saved")
        gate.stop()
    finally:
        subprocess.run([need.program("umount"), "--lazy", str(state)], check=True)


def test_without_privileges(folder: Path, backend: TcpBackend) -> None:
    """A user of this host has a last good policy too."""
    user, port = plain_user(folder), free_port()
    user.own(folder)
    state = folder / "state"
    head = f"state: {state}\n"
    gate = Gate(folder, policy(port, backend, head=head), prefix=user.prefix, python=user.python, env=user.env)
    try:
        gate.wait_ready()
        until((state / "last-good").exists, "the policy is saved")
        gate.signal(signal.SIGKILL)
        gate.wait()
        text = policy(port, backend, head=head) + "rules: [\n"
        gate = Gate(folder, text, prefix=user.prefix, python=user.python, env=user.env, metrics_port=gate.metrics_port)
        gate.wait_ready()
        assert refuses(port)
    finally:
        gate.stop()
