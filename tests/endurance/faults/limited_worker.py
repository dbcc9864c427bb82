"""A worker under limits of its own: `limited_worker.py '{"RLIMIT_NOFILE": 40}' --channel FD`."""

from __future__ import annotations

import json
import resource
import runpy
import sys

if __name__ == "__main__":
    for name, most in json.loads(sys.argv.pop(1)).items():
        resource.setrlimit(getattr(resource, name), (most, most))
    runpy.run_module("gatekeeper.proxy", run_name="__main__", alter_sys=True)
