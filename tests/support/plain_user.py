"""Running the gate as somebody without any privilege, from code that this user may read."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import need
from tests.support.gate import PYTHON_PATH, ROOT

USER = "nobody"
IMPORTS = "import gatekeeper.config, pydantic_core, prometheus_client, uvicorn"


@dataclass(frozen=True)
class PlainUser:
    """``prefix`` becomes the user, ``python`` and ``env`` run code that the user can read."""

    prefix: tuple[str, ...]
    python: str
    env: dict[str, str]

    def own(self, path: Path) -> None:
        """Give a folder to the user."""
        if self.prefix:
            account = pwd.getpwnam(USER)
            os.chown(path, account.pw_uid, account.pw_gid)


def plain_user(folder: Path) -> PlainUser:
    """Return how to be an ordinary user: ourselves when we are one, else ``nobody``; ``folder`` may get copies of code."""
    if os.geteuid() != 0:
        return PlainUser((), sys.executable, {"PYTHONPATH": PYTHON_PATH})
    account = pwd.getpwnam(USER)
    become = (
        need.program("setpriv"),
        f"--reuid={account.pw_uid}",
        f"--regid={account.pw_gid}",
        "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--no-new-privs",
    )
    # The interpreter and the code may be root's alone. The system's interpreter of the same version, which understands the
    # same compiled modules, does for the one; copies do for the other.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    system = shutil.which(version, path="/usr/bin:/usr/local/bin") or sys.executable
    libraries = sysconfig.get_paths()["purelib"]
    attempts = [(sys.executable, PYTHON_PATH), (system, os.pathsep.join([PYTHON_PATH, libraries]))]
    for python, path in attempts:
        user = PlainUser(become, python, {"PYTHONPATH": path})
        if _works(user):
            return user
    shutil.copytree(ROOT / "gatekeeper", folder / "code" / "gatekeeper")
    shutil.copytree(libraries, folder / "libraries")
    user = PlainUser(become, system, {"PYTHONPATH": os.pathsep.join([f"{folder}/code", f"{folder}/libraries"])})
    if _works(user):
        return user
    pytest.skip(f"{USER} may not read {sys.executable}, and there is no {version} in /usr/bin")


def _works(user: PlainUser) -> bool:
    # By way of a shell: setpriv itself can still execute what only root may, the user's own processes could not.
    done = subprocess.run(
        [*user.prefix, "sh", "-c", 'exec "$0" "$@"', user.python, "-c", IMPORTS],
        cwd="/",
        env={**os.environ, **user.env},
        capture_output=True,
        check=False,
    )
    return done.returncode == 0
