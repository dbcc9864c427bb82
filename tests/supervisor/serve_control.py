"""A control socket and nothing else: `serve_control.py PATH '{"group": null, "limits": {...}}'`. Serves until SIGTERM.

    echo     answer with the arguments, who asked, and how many descriptors came along
    rows     send `rows` rows of `size` bytes each, then answer
    hang     never answer; `hung` says how many of these still have somebody waiting
    crash    raise what no handler should
    bad      say that the request makes no sense
    give     answer with a descriptor of a file that holds "given"
    written  write "thanks" to the descriptor that came along
    state    answer with clients dropped, descriptors open, and the peak of memory
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from gatekeeper.kernel import memfd
from gatekeeper.supervisor.control import BadRequest, Control, Limits, Request
from gatekeeper.supervisor.control_place import ControlError, Place
from gatekeeper.supervisor.log import Log
from gatekeeper.supervisor.loop import Loop


class Server:
    """The handlers."""

    def __init__(self, loop: Loop, limits: dict[str, Any]) -> None:
        self.control = Control(loop, Log(), Limits(**limits))
        self.hanging: list[Request] = []
        for name in ("echo", "rows", "hang", "hung", "crash", "bad", "give", "written", "state", "late"):
            self.control.handlers[name] = getattr(self, name)
        self._loop = loop

    def echo(self, request: Request) -> None:
        peer = request.peer
        request.done({
            "args": request.args, "uid": peer.uid, "pid": peer.pid, "privileged": peer.privileged, "fds": len(request.fds)
        })  # fmt: skip

    def rows(self, request: Request) -> None:
        for number in range(request.args["rows"]):
            request.rows([{"number": number, "filling": "x" * request.args["size"]}])
        request.done({"gone": request.gone})

    def hang(self, request: Request) -> None:
        self.hanging.append(request)
        request.progress("hanging")

    def hung(self, request: Request) -> None:
        request.done({"waiting": sum(not each.gone for each in self.hanging)})

    def late(self, request: Request) -> None:
        self._loop.later(request.args["after_s"], lambda: request.done({"late": True}))

    def crash(self, _request: Request) -> None:
        raise KeyError("no handler should do this")

    def bad(self, _request: Request) -> None:
        raise BadRequest("that makes no sense")

    def give(self, request: Request) -> None:
        fd = memfd.from_bytes("given", b"given")
        request.done({}, [fd])
        os.close(fd)

    def written(self, request: Request) -> None:
        os.write(request.fds[0], b"thanks")
        request.done({})

    def state(self, request: Request) -> None:
        request.done({
            "dropped": self.control.dropped, "fds": len(os.listdir("/proc/self/fd")),
            "peak_kib": peak_kib(),
        })  # fmt: skip


def peak_kib() -> int:
    """Return the most memory this process has had; what getrusage says includes the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


def main() -> int:
    """Serve."""
    options = json.loads(sys.argv[2])
    loop = Loop(lambda _number: loop.stop(0))
    server = Server(loop, options.get("limits", {}))
    with loop:
        try:
            server.control.open(Place(sys.argv[1], options.get("group")))
        except ControlError as err:
            sys.stderr.write(f"{err}\n")
            return 3
        sys.stderr.write("serving\n")
        sys.stderr.flush()
        code = loop.run()
        server.control.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
