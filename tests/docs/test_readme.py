"""What the README and its companions say is run: sessions, rule files, commands, links."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from gatekeeper.cli.main import COMMANDS
from tests.cli.program import gatekeeper
from tests.docs.sessions import blocks, run, steps

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = (
    "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md",
    "docs/metrics.md", "docs/audit.md", "docs/kernel.md", "docs/plan.md", "docs/reload.md", "docs/runbook.md",
    "docs/control.md",
)  # fmt: skip
SESSION_S = 45


@pytest.mark.needs("unshare", "ip", "curl", "bash")
def test_the_session_to_paste(folder: Path) -> None:
    """Pasted into a shell, the README's session prints what the README shows, command by command."""
    wanted = [step for session in blocks("console", README) for step in steps(session)]
    run(wanted, folder, "ip link set lo up\n", SESSION_S)


@pytest.mark.parametrize("text", [block for block in blocks("yaml", README) if "version:" in block])
def test_rule_files_shown_are_good(text: str, folder: Path) -> None:
    """Every whole rule file in the README passes `check`, its tests included."""
    (folder / "lists").mkdir()
    (folder / "rules.d").mkdir()
    (folder / "lists/scanners.txt").write_text("192.0.2.0/24\n")
    (folder / "rules.d/10-extra.yaml").write_text("- {name: extra, action: deny, from: 192.0.2.7}\n")
    (folder / "rules.yaml").write_text(text)
    done = gatekeeper("check", str(folder / "rules.yaml"))
    assert done.code == 0, done.out


def test_the_table_of_commands_is_complete() -> None:
    """The README lists every command of the program, and no other."""
    assert re.findall(r"^\| `gatekeeper (\w+)", README, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    """Every relative link is a file that exists, every anchor a heading."""
    text = (ROOT / document).read_text()
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / document).parent.joinpath(path).exists(), target
        assert path or anchor in headings, target


def test_the_code_map_is_the_code() -> None:
    """The README's code map has every folder of the package."""
    folders = {path.parent.name for path in (ROOT / "gatekeeper").glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/ ", README, re.MULTILINE)) == folders


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_named_in_prose_exist(document: str) -> None:
    """Every make target and every gatekeeper command in a shell block is one that exists."""
    makefile = (ROOT / "Makefile").read_text()
    shell = "\n".join(blocks("sh", (ROOT / document).read_text()))
    targets = re.findall(r"^make (\w+)", shell, re.MULTILINE)
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)
    assert set(re.findall(r"gatekeeper (\w+)", shell)) <= set(COMMANDS) | {"conf", "service"}
    for path in re.findall(r"(?<!/)(?:systemd|rules)/[\w./-]+", shell):
        assert (ROOT / path).exists(), path


def test_documents_have_no_long_lines() -> None:
    """Prose is wrapped at 120 columns; tables and JSON may be longer."""
    for document in DOCUMENTS:
        for line in (ROOT / document).read_text().splitlines():
            assert len(line) <= 120 or line.startswith(("|", "{")), f"{document}: {line}"


@pytest.mark.skipif(not shutil.which("dpkg"), reason="not Debian")
@pytest.mark.may_skip
def test_the_license_is_apache_2() -> None:
    """LICENSE is the text that Debian ships as Apache-2.0."""
    assert (ROOT / "LICENSE").read_text() == Path("/usr/share/common-licenses/Apache-2.0").read_text()
