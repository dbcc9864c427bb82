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
from tests.support.gate import ROOT

USER = "nobody"


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
        return PlainUser((), sys.executable, {"PYTHONPATH": str(ROOT)})
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
    own = PlainUser(become, sys.executable, {"PYTHONPATH": str(ROOT)})
    if _works(own):
        return own
    # The checkout or the interpreter may be root's alone. Copies of the code do for the one, the system's interpreter of
    # the same version, which understands the same compiled modules, does for the other.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    code, libraries = folder / "code", folder / "libraries"
    shutil.copytree(ROOT / "gatekeeper", code / "gatekeeper")
    shutil.copytree(sysconfig.get_paths()["purelib"], libraries)
    for python in (sys.executable, shutil.which(version, path="/usr/bin:/usr/local/bin") or sys.executable):
        copied = PlainUser(become, python, {"PYTHONPATH": os.pathsep.join([str(code), str(libraries)])})
        if _works(copied):
            return copied
    pytest.skip(f"{USER} may not read {sys.executable}, and there is no {version} in /usr/bin")


def _works(user: PlainUser) -> bool:
    done = subprocess.run(
        [*user.prefix, user.python, "-c", "import gatekeeper.config, pydantic_core, prometheus_client, uvicorn"],
        cwd="/",
        env={**os.environ, **user.env},
        capture_output=True,
        check=False,
    )
    return done.returncode == 0
