"""A worker that cannot start while a file exists: `worker_or_not.py FILE --channel FD`."""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    if os.path.exists(sys.argv.pop(1)):
        sys.exit(7)
    runpy.run_module("gatekeeper.proxy", run_name="__main__", alter_sys=True)
