"""Run the supervisor with other processes than the real ones: `serve.py FILE '{"worker": [...], "stuck_after_s": 1}'`."""

from __future__ import annotations

import json
import sys

from gatekeeper.supervisor.child import Commands
from gatekeeper.supervisor.log import Log
from gatekeeper.supervisor.supervisor import Options, Supervisor

if __name__ == "__main__":
    more = json.loads(sys.argv[2])
    commands = Commands(**{name: more.pop(name) for name in ("worker", "observer", "compiler") if name in more})
    sys.exit(Supervisor(Options(sys.argv[1], commands=commands, **more), Log()).run())
