"""What a test needs of the host: each missing thing is a skip that says what to install or who to be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Debian's names of the packages that hold the programs; anything else is named after its program.
PACKAGES = {
    "nginx": "nginx-light",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "scp": "openssh-client",
    "ssh-keygen": "openssh-client",
    "dnsmasq": "dnsmasq-base",
    "dig": "bind9-dnsutils",
    "redis-server": "redis-server",
    "redis-cli": "redis-tools",
    "redis-benchmark": "redis-tools",
    "promtool": "prometheus",
    "psql": "postgresql-client",
    "initdb": "postgresql",
    "postgres": "postgresql",
    "ip": "iproute2",
    "setpriv": "util-linux",
    "prlimit": "util-linux",
}
# Daemons live where an ordinary user's PATH does not look; PostgreSQL keeps its own away from every PATH.
FOLDERS = ["/usr/sbin", "/sbin", "/usr/local/sbin"]


def find(program: str) -> str | None:
    """Return the path of a program, also of one that an ordinary PATH does not show, or ``None``."""
    postgres = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *FOLDERS, *map(str, postgres)]))


def program(name: str) -> str:
    """Return the path of a program, or skip the test and say which package has it."""
    path = find(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian package {PACKAGES.get(name, name)})")
    return path


def root(why: str) -> None:
    """Skip the test unless it runs as root."""
    if os.geteuid() != 0:
        pytest.skip(f"only root can {why}")
