"""`gatekeeper run --watch`: saving a file is a reload."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.backends import TcpBackend
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.ports import free_port
from tests.support.wait import until

RunGate = Callable[..., Gate]


@pytest.fixture
def backend() -> Iterator[TcpBackend]:
    """An echo service."""
    with TcpBackend() as backend:
        yield backend


def refuses(port: int, source: str) -> bool:
    """Whether the policy in force refuses a source."""
    return Sources().is_refused(source, "127.0.0.1", port)


def policy(port: int, backend: TcpBackend, more: str = "") -> str:
    """Return a policy whose refused sources are in a list, and whose other rules are in files of their own."""
    return (
        f"listeners:\n  - {{name: web, listen: '127.0.0.1:{port}', backend: '{backend.address}'}}\ndefault: allow\n"
        f"sets: {{bad: {{file: bad.txt}}}}\nrules:\n  - include: rules.d/*.yaml\n  - {{name: bad, action: deny, from: bad}}\n{more}"
    )


def test_whatever_changes(run_gate: RunGate, backend: TcpBackend, folder: Path) -> None:
    """The rule file, a list, an included file that is new: each is in force soon, for live sessions too."""
    port = free_port()
    home = folder / "home"
    (home / "rules.d").mkdir(parents=True)
    (home / "bad.txt").write_text("127.0.0.2\n")
    gate = run_gate(policy(port, backend), folder=home, options=["--watch"])
    assert refuses(port, "127.0.0.2")
    with Sources().connect("127.0.0.3", "127.0.0.1", port) as session:
        assert ask(session) == b"are you there?"
        (home / "bad.txt").write_text("127.0.0.2\n127.0.0.3\n")
        (event,) = gate.wait_for_audit(1, "reload")
        assert (event["gatekeeper"]["cause"], event["gatekeeper"]["ended"]) == ("watch", 1)
        with pytest.raises(ConnectionResetError):
            session.recv(1)
    (home / "rules.d/more.yaml").write_text("- {name: more, action: deny, from: 127.0.0.4}\n")
    until(lambda: refuses(port, "127.0.0.4"), "the new file is in force")
    gate.write(policy(port, backend).replace("name: bad, action: deny", "name: bad, action: allow"))
    until(lambda: not refuses(port, "127.0.0.3"), "the rule file is in force")
    assert len(gate.wait_for_audit(3, "reload")) == 3


def test_what_has_the_same_content_is_no_reload(run_gate: RunGate, backend: TcpBackend, folder: Path) -> None:
    """A file that was touched or written anew is compiled and left at that; a failure that was mended is forgotten."""
    port = free_port()
    home = folder / "home"
    home.mkdir()
    (home / "bad.txt").write_text("127.0.0.2\n")
    gate = run_gate(policy(port, backend), folder=home, options=["--watch"])
    gate.write(policy(port, backend))
    gate.wait_notified("RELOADING=1")  # it has looked
    (home / "bad.txt").write_text("127.0.0\n")
    (failed,) = gate.wait_for_audit(1, "reload")
    assert failed["gatekeeper"]["success"] is False
    gate.wait_for_value(0, "gatekeeper_config_last_reload_successful")
    assert refuses(port, "127.0.0.2")
    (home / "bad.txt").write_text("127.0.0.2\n")
    gate.wait_for_value(1, "gatekeeper_config_last_reload_successful")
    assert [event["gatekeeper"]["success"] for event in gate.audit("reload")] == [False, True]


def test_a_config_map(run_gate: RunGate, backend: TcpBackend, folder: Path) -> None:
    """A whole directory behind a link is swapped, three times."""
    port = free_port()
    home = folder / "home"
    home.mkdir()

    def volume(number: int, rules: str) -> Path:
        made = home / f"..volume{number}"
        made.mkdir()
        (made / "bad.txt").write_text(f"127.0.0.{number}\n")
        (made / "rules.yaml").write_text(rules)
        return made

    def mount(rules_path: Path) -> None:
        text = rules_path.read_text()
        rules_path.unlink()
        volume(2, text)
        (home / "..data").symlink_to("..volume2")
        for name in ("rules.yaml", "bad.txt"):
            (home / name).symlink_to(f"..data/{name}")

    run_gate(policy(port, backend), folder=home, options=["--watch"], before_exec=mount)
    assert refuses(port, "127.0.0.2")
    for number in (3, 4, 5):
        volume(number, (home / "rules.yaml").read_text())
        (home / "..tmp").symlink_to(f"..volume{number}")
        os.replace(home / "..tmp", home / "..data")
        until(lambda number=number: refuses(port, f"127.0.0.{number}"), "the new volume is in force")  # type: ignore[misc]
        assert not refuses(port, f"127.0.0.{number - 1}")
        shutil.rmtree(home / f"..volume{number - 1}")


def test_the_last_good_policy_and_then_the_mended_file(run_gate: RunGate, backend: TcpBackend, folder: Path) -> None:
    """A service that started with the last good policy goes on by itself once the rule file is good again."""
    port, state, home = free_port(), folder / "state", folder / "home"
    home.mkdir()
    (home / "bad.txt").write_text("127.0.0.2\n")
    options = ["--watch", "--state", str(state)]
    gate = run_gate(policy(port, backend), folder=home, options=options)
    until((state / "last-good").exists, "it is saved")
    assert gate.stop() == 0
    again = run_gate(policy(port, backend, "nonsense"), folder=home, metrics_port=gate.metrics_port, options=options)
    assert refuses(port, "127.0.0.2")
    again.wait_for_value(1, "gatekeeper_config_from_last_good")
    (home / "bad.txt").write_text("127.0.0.3\n")
    again.write(policy(port, backend))
    until(lambda: refuses(port, "127.0.0.3"), "the mended file is in force")
    again.wait_for_value(0, "gatekeeper_config_from_last_good")
