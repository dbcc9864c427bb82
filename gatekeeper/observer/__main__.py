"""The observer process: ``python -m gatekeeper.observer --channel FD``, started by the supervisor.

It reads counters and events and serves HTTP. It holds nothing that the data path needs: if it is attacked, hangs or
dies, no connection notices, and its successor learns everything anew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gatekeeper.errors import ChannelClosed
from gatekeeper.kernel import privileges
from gatekeeper.kernel.channel import Channel
from gatekeeper.observer.audit import Renderer
from gatekeeper.observer.feed import Control, Events, open_sink
from gatekeeper.observer.say import say, take_over_logging
from gatekeeper.observer.sink import Sink
from gatekeeper.observer.state import Service
from gatekeeper.observer.tails import Outlets
from gatekeeper.observer.web import finish_requests, make_app, make_server, serve

# What libraries would import when they first need it: by then we may be a user who cannot read their files.
NEEDED_LATER = ("concurrent.futures.thread", "encodings.ascii", "encodings.idna", "encodings.latin_1", "uvicorn.lifespan.off")
LAST_REQUESTS_S = 1.0
PATIENCE_S = 3.0  # with an audit log that does not take the last lines; the supervisor kills after 5


def main(argv: list[str]) -> int:
    """Run until the supervisor is gone."""
    parser = argparse.ArgumentParser(prog="python -m gatekeeper.observer", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, metavar="FD", help="our end of the control channel")
    channel = Channel(socket.socket(fileno=parser.parse_args(argv).channel))
    for module in NEEDED_LATER:
        importlib.import_module(module)
    try:
        start, fds = channel.receive()
    except ChannelClosed:
        return 0
    if start.get("op") != "start":
        say(f"the first message must be start, not {start.get('op')!r}")
        return 2
    privileges.drop(start["uid"], start["gid"], start["groups"], start["supervisor_pid"])
    take_over_logging()
    gc.freeze()
    asyncio.run(_run(channel, start, fds))
    return 0


async def _run(channel: Channel, start: dict[str, Any], fds: list[int]) -> None:
    loop = asyncio.get_running_loop()
    service = Service(workers=start["workers"])
    sink = open_sink(start["audit"], fds)  # its thread starts here: after the privileges went
    listening = socket.socket(fileno=fds.pop(0)) if start["metrics"] else None
    outlets = Outlets(sink)
    renderer = Renderer()
    renderers, sources = [renderer], []
    if start.get("kernel"):
        renderers.append(Renderer("kernel"))
        sources.append(Events([socket.socket(fileno=fds.pop(0))], renderers[1], outlets))
    sources.append(Events([socket.socket(fileno=fd) for fd in fds], renderer, outlets))
    control = Control(channel, service, renderers, outlets)
    control.before_event = lambda: _read_all(sources)
    control.more_events = lambda fd: sources[-1].add(socket.socket(fileno=fd), loop)
    control.watch(loop)
    for each in renderers:
        each.catch_up = control.catch_up
    for events in sources:
        events.watch(loop)
    loop.add_signal_handler(signal.SIGTERM, control.end)
    with contextlib.suppress(ChannelClosed):  # reading from the channel ends us then
        channel.send({"op": "ready"})

    def lost() -> list[tuple[str, int]]:
        return [("audit", sink.lost if sink is not None else 0), ("malformed", sum(each.malformed for each in renderers))]

    try:
        await _serve_until_ended(service, control, listening, lost)
    finally:
        for events in sources:
            events.unwatch(loop)  # the loop may turn after this, and nobody writes what would be read then
        _finish(sources, sink)


async def _serve_until_ended(
    service: Service, control: Control, listening: socket.socket | None, lost: Callable[[], list[tuple[str, int]]]
) -> None:
    # A scrape in the first moments would see counters that are smaller than what a predecessor has shown.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(control.told.wait(), 5.0)
    if listening is not None:
        app = make_app(service, lost)
        server = make_server(app)
        serving = asyncio.get_running_loop().create_task(serve(server, listening))
        serving.add_done_callback(lambda _task: control.ended.set())
        await control.ended.wait()
        if serving.done() and not serving.cancelled() and serving.exception() is not None:
            raise RuntimeError("the HTTP server ended") from serving.exception()
        await finish_requests(server, LAST_REQUESTS_S)
        serving.cancel()
    await control.ended.wait()


def _read_all(sources: Sequence[Events]) -> None:
    for events in sources:
        events.read_all()


def _finish(sources: Sequence[Events], sink: Sink | None) -> None:
    """Write what was reported to the end, as far as the audit log takes it."""
    _read_all(sources)
    if sink is not None and not sink.close(PATIENCE_S):
        say("the audit log did not take the last lines")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
