"""HTTP for people and Prometheus: few routes, few connections, and no way for silent clients to keep others out.

uvicorn bounds neither how long a client may take for its request nor, without refusing everybody, how many may
connect. So connections here have deadlines, and when there are too many the one that has waited longest makes room:
a client that says what it wants at once is always served.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from gatekeeper.observer import page
from gatekeeper.observer.exposition import Exposition
from gatekeeper.observer.state import Service

MOST_CONNECTIONS = 64
ACCEPTED_AT_ONCE = 16  # before they are looked at, so these come on top
QUEUE = 512  # in the kernel
SPARE_FDS = 32  # for everything else
MOST_HEAD_BYTES = 16 * 1024
FIRST_REQUEST_S = 10.0  # from connecting to a whole request head
NEXT_REQUEST_S = 75  # longer than the usual scrape intervals, so that a scraper keeps its connection
ANSWER_S = 30.0  # from a request head to the client having taken the whole answer
SWEEP_S = 1.0


class BoundedProtocol(H11Protocol):
    """One HTTP connection with deadlines."""

    most = MOST_CONNECTIONS
    since = 0.0  # when it began to do what it does now
    answering = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room if there are too many, the oldest waiting first."""
        super().connection_made(transport)
        self.since = self.loop.time()
        if len(self.connections) > self.most:
            others = [other for other in self.connections if isinstance(other, BoundedProtocol) and other is not self]
            oldest = min(others, key=lambda other: (other.busy(), other.since))
            oldest.connections.discard(oldest)
            oldest.transport.abort()

    def busy(self) -> bool:
        """Say whether a request is being answered."""
        cycle = self.latest()
        return cycle is not None and (not cycle.response_complete or self.transport.get_write_buffer_size() > 0)

    def latest(self) -> RequestResponseCycle | None:
        """Return the latest request, ``None`` before the first (which uvicorn's types leave out)."""
        return self.cycle

    def sweep(self, now_s: float) -> None:
        """End the connection if it takes too long for what it does; ``now_s`` is the loop's time."""
        busy = self.busy()
        if busy != self.answering:
            self.answering, self.since = busy, now_s
        limit_s = ANSWER_S if busy else FIRST_REQUEST_S if self.latest() is None else NEXT_REQUEST_S
        if now_s - self.since > limit_s:
            self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn without signal handlers: signals are the process's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving; the kernel's queue stays longer than what is accepted at once."""
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(QUEUE)

    async def sweep(self) -> None:
        """Watch the deadlines of all connections, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            for connection in list(self.server_state.connections):
                if isinstance(connection, BoundedProtocol):
                    connection.sweep(loop.time())


def make_server(app: Starlette) -> Server:
    """Return a server that holds as many connections as this process can afford."""
    soft_limit, _hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    affordable = soft_limit - len(os.listdir("/proc/self/fd")) - SPARE_FDS
    BoundedProtocol.most = max(4, min(MOST_CONNECTIONS, affordable))
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MOST_HEAD_BYTES,
        timeout_keep_alive=NEXT_REQUEST_S,
        backlog=min(ACCEPTED_AT_ONCE, BoundedProtocol.most),
    )
    return Server(config)


async def serve(server: Server, listening: socket.socket) -> None:
    """Serve until cancelled. Owns ``listening``."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve(sockets=[listening]))
            group.create_task(server.sweep())
    finally:
        for serving in getattr(server, "servers", ()):
            serving.close()
        listening.close()


async def finish_requests(server: Server, patience_s: float) -> None:
    """Take no more connections, and let requests that are being answered be answered, for a moment."""
    for serving in getattr(server, "servers", ()):
        serving.close()
    if server.server_state.tasks:
        await asyncio.wait(set(server.server_state.tasks), timeout=patience_s)


def make_app(service: Service, lost: Callable[[], Sequence[tuple[str, int]]]) -> Starlette:
    """Return the application: /metrics, /healthz, /readyz, / and /status.json, all read-only."""
    # What grows with the policy is made in a thread, so that the audit log need not wait for it; and one at a time.
    one_at_a_time = asyncio.Lock()
    exposition = Exposition(service, lost)

    async def metrics(request: Request) -> Response:
        wanted = request.query_params.getlist("name[]")
        accept, encodings = request.headers.get("accept", ""), request.headers.get("accept-encoding", "")
        async with one_at_a_time:
            body, content_type, encoding = await asyncio.to_thread(exposition.answer, accept, encodings, wanted)
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        if encoding:
            headers["Content-Encoding"] = encoding
        return Response(body, headers=headers)

    async def healthz(_request: Request) -> Response:
        # The observer ends when the supervisor's channel closes, so being able to answer is the answer.
        return PlainTextResponse("ok\n", headers=page.HEADERS)

    async def readyz(_request: Request) -> Response:
        why_not = service.not_ready()
        return PlainTextResponse(f"{why_not or 'ready'}\n", 503 if why_not else 200, headers=page.HEADERS)

    async def status_json(_request: Request) -> Response:
        async with one_at_a_time:
            body = await asyncio.to_thread(_status_json, service, lost())
        return Response(body, media_type="application/json", headers=page.HEADERS)

    async def status_page(_request: Request) -> Response:
        async with one_at_a_time:
            body = await asyncio.to_thread(_status_page, service, lost())
        return HTMLResponse(body, headers=page.HEADERS)

    handlers = {
        "/metrics": metrics,
        "/healthz": healthz,
        "/readyz": readyz,
        "/status.json": status_json,
        "/": status_page,
    }
    app = Starlette(routes=[Route(path, handler, methods=["GET"]) for path, handler in handlers.items()])
    app.router.redirect_slashes = False  # a redirect would repeat the Host that a stranger made up
    return app


def _status_json(service: Service, lost: Sequence[tuple[str, int]]) -> bytes:
    # ASCII: a path may hold what UTF-8 cannot say.
    return json.dumps(page.status(service, lost), ensure_ascii=True).encode()


def _status_page(service: Service, lost: Sequence[tuple[str, int]]) -> bytes:
    return page.render(page.status(service, lost)).encode("utf-8", "backslashreplace")
