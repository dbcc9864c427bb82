"""The HTTP side: readiness, the status page, and clients that mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import html.parser
import json
import os
import re
import signal
import socket
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from gatekeeper.errors import ChannelClosed
from gatekeeper.observer.state import Service
from gatekeeper.observer.web import (
    FIRST_REQUEST_S,
    MOST_CONNECTIONS,
    NEXT_REQUEST_S,
    BoundedProtocol,
    make_app,
    make_server,
    serve,
)
from gatekeeper.snapshot.counters import ListenerSlot, WorkerSlot
from tests.observer.stage import Stage, make_meta, on_stage
from tests.support.wait import until


@pytest.fixture
def stage(folder: Path) -> Iterator[Stage]:
    """An observer that serves."""
    with on_stage(folder) as running:
        yield running


def ready(stage: Stage) -> tuple[int, str]:
    """Return what /readyz says."""
    stage.beat()
    status, _headers, body = stage.get("/readyz")
    return status, body.decode().strip()


def test_ready_when_everything_is(stage: Stage) -> None:
    """All workers alive and turning, a policy in force, no drain: 200."""
    assert ready(stage) == (200, "ready")
    assert stage.get("/healthz")[::2] == (200, b"ok\n")


def test_not_ready_says_why(stage: Stage) -> None:
    """Each thing that is missing is a 503 with its reason; liveness stays 200 all the while."""
    stage.tell_state(ready=False)
    until(lambda: ready(stage) == (503, "starting: no policy is in force in every worker yet"), "not ready")
    stage.tell_state(ready=True, draining=True)
    until(lambda: ready(stage) == (503, "draining: no new connections are accepted"), "draining")
    stage.tell_state(draining=False, workers=[{"index": 0, "alive": True}, {"index": 1, "alive": False}])
    until(lambda: ready(stage) == (503, "degraded: 1 of 2 workers alive"), "a worker is gone")
    stage.tell_state(workers=[{"index": 0, "alive": True}, {"index": 1, "alive": True}])
    until(lambda: ready(stage) == (200, "ready"), "ready again")
    stage.counters[1][WorkerSlot.HEARTBEAT_MS] -= 60_000
    status, _headers, body = stage.get("/readyz")
    assert (status, body.startswith(b"degraded: worker 1 has not answered for 60 s")) == (503, True)
    assert stage.get("/healthz")[0] == 200


def test_status_tells_what_is_in_force(stage: Stage) -> None:
    """The JSON has the policy, listeners with their traffic, each rule's verdicts in file order, and the last reload."""
    stage.counters[0][stage.slot()] = 5
    stage.counters[1][stage.block("web", ListenerSlot.SESSIONS_OPENED)] = 2
    stage.counters[1][stage.block("web", ListenerSlot.BYTES_OUT)] = 3 << 20
    stage.bind(make_meta(listeners=("web", "dns"), rules=("office", "night")))
    stage.tell_policy()
    stage.tell_state(last_reload_successful=False, last_reload_error="rules.yaml:3:1: no such key <b>")
    until(lambda: "no such key" in stage.text("/status.json"), "the failed reload is shown")
    status = json.loads(stage.text("/status.json"))
    assert status["ready"] is True
    assert status["policy"]["hash"] == "ab" * 32
    assert status["policy"]["ranges"] == {"ipv4": 5, "ipv6": 3}
    listeners = {item["name"]: item for item in status["listeners"]}
    assert list(listeners) == ["web", "dns", "ssh"]
    assert (listeners["web"]["sessions"], listeners["web"]["bytes_out"]) == (2, 3 << 20)
    assert listeners["web"]["addresses"] == ["0.0.0.0:8000"]
    assert (listeners["ssh"]["in_policy"], listeners["dns"]["in_policy"]) == (False, True)
    current = [(item["rule"], item["listener"]) for item in status["verdicts"] if item["in_policy"]]
    assert current == [(rule, listener) for rule in ("office", "night", "") for listener in ("web", "dns")]
    assert status["verdicts"][0]["count"] == 5
    assert status["reload"]["successful"] is False
    assert [worker["pid"] for worker in status["workers"]] == [100, 101]
    assert status["events_lost"] == {"refusal": 0, "connection": 0, "audit": 0, "malformed": 0}

    page = stage.text("/")
    assert "no such key &lt;b&gt;" in page
    assert "3.0 MiB" in page
    assert "failed; the policy of 2025-06-15" in page


def test_rules_that_decide_nothing_are_named(stage: Stage) -> None:
    """A rule that no connection can reach has no counter; the page says so instead of hiding it."""
    meta = make_meta()
    meta["rules"].append({"name": "shadowed", "action": "deny", "file": "rules.yaml", "line": 30})
    stage.bind(meta)
    stage.tell_policy()
    until(lambda: "Rules that decide nothing" in stage.text("/"), "the page names it")
    assert json.loads(stage.text("/status.json"))["policy"]["rules_without_effect"] == ["shadowed"]


class Elements(html.parser.HTMLParser):
    """Collects tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_escapes_everything(stage: Stage) -> None:
    """No script, no asset, a policy that allows only the page's own style; text from rule files stays text."""
    stage.bind(make_meta(backend='unix:/<script src="//x">&\'"'))
    stage.tell_policy()
    until(lambda: "&lt;script" in stage.text("/"), "the new policy is shown")
    _status, headers, body = stage.get("/")
    page = Elements(body.decode())
    assert page.open == []
    assert {tag for tag, _ in page.found}.isdisjoint({"script", "img", "link", "iframe"})
    assert all(set(attributes).isdisjoint({"style", "src", "onload"}) for _tag, attributes in page.found)
    (style,) = re.findall(r"<style>(.*?)</style>", body.decode(), re.DOTALL)
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert f"style-src 'sha256-{b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers


def test_only_reading_is_possible(stage: Stage) -> None:
    """Other methods, other paths and bodies are refused or ignored, and the observer goes on."""
    for path in ("/metrics", "/healthz", "/readyz", "/status.json", "/"):
        assert stage.get(path, method="HEAD")[2] == b""
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert stage.get(path, method=method)[0] == 405
    assert stage.get("/../etc/passwd")[0] == stage.get("/metrics/")[0] == stage.get("/x")[0] == 404
    with socket.create_connection(("127.0.0.1", stage.port), timeout=10) as client:
        client.sendall(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 1000)
        assert client.recv(100).startswith(b"HTTP/1.1 405")


@pytest.mark.parametrize("request_", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /%ff%00%0d%0aX:y HTTP/1.1\r\nHost: \xff\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text;version=a.b\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text;version=9.9;escaping=\xc3\r\n\r\n",
    b"GET /metrics?name[]=%ff%0a HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000,
])  # fmt: skip
def test_malformed_requests_hurt_only_themselves(stage: Stage, request_: bytes) -> None:
    """Whatever is sent is answered or ended; stderr stays free of tracebacks, and the next request is served."""
    with socket.create_connection(("127.0.0.1", stage.port), timeout=15) as client, contextlib.suppress(ConnectionError):
        client.sendall(request_)
        assert client.recv(1 << 16).startswith((b"HTTP/1.1 ", b""))
    assert stage.get("/metrics")[0] == 200
    assert "Traceback" not in stage.stderr()


def test_silent_clients_keep_nobody_out(stage: Stage) -> None:
    """With 300 connections that say nothing, each request is still served, and the observer holds few of them."""
    with contextlib.ExitStack() as clients:
        for _ in range(300):
            clients.enter_context(socket.create_connection(("127.0.0.1", stage.port), timeout=10))
        for _ in range(5):
            assert stage.get("/metrics")[0] == 200
        assert stage.value("process_open_fds") < MOST_CONNECTIONS + 40


def test_connections_have_deadlines() -> None:
    """A silent client, one that stops in its request head, and one that asks no second time are let go; others are not."""
    service = Service(1)

    async def story() -> None:
        server = make_server(make_app(service, list))
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        serving = asyncio.create_task(serve(server, listening))

        async def connect(said: bytes) -> asyncio.StreamReader:
            known = len(server.server_state.connections)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            writer.write(said)
            while len(server.server_state.connections) == known:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.001)
            return reader

        def sweep(later_s: float) -> None:
            for connection in list(server.server_state.connections):
                assert isinstance(connection, BoundedProtocol)
                connection.sweep(asyncio.get_running_loop().time() + later_s)

        async def ended(reader: asyncio.StreamReader) -> bool:
            try:
                return await asyncio.wait_for(reader.read(1), 10) == b""
            except ConnectionError:
                return True

        writers: list[asyncio.StreamWriter] = []
        silent, slow = await connect(b""), await connect(b"GET / HT")
        asked = await connect(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await asyncio.wait_for(asked.readuntil(b"ok\n"), 10)).startswith(b"HTTP/1.1 200")
        sweep(0)
        sweep(FIRST_REQUEST_S - 1)
        assert len(server.server_state.connections) == 3
        sweep(FIRST_REQUEST_S + 1)
        assert await ended(silent)
        assert await ended(slow)
        assert len(server.server_state.connections) == 1
        sweep(NEXT_REQUEST_S + 1)
        assert await ended(asked)
        for writer in writers:
            writer.close()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving

    asyncio.run(story())


def test_few_descriptors_are_enough(folder: Path) -> None:
    """With 48 descriptors and 300 silent clients requests are still served, and nothing is logged."""
    with Stage(folder, prefix=["prlimit", "--nofile=48"]) as stage, contextlib.ExitStack() as clients:
        stage.start()
        for _ in range(300):
            clients.enter_context(socket.create_connection(("127.0.0.1", stage.port), timeout=10))
        for _ in range(5):
            assert stage.get("/metrics")[0] == 200
        assert stage.stderr() == ""


def test_a_client_that_does_not_read_its_answer_keeps_nobody_out(stage: Stage) -> None:
    """Connections with unread answers give way too."""
    stage.bind(make_meta(rules=tuple(f"rule-{number}" for number in range(2000))))
    stage.tell_policy()
    with contextlib.ExitStack() as clients:
        for _ in range(MOST_CONNECTIONS + 10):
            client = clients.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(10)
            client.connect(("127.0.0.1", stage.port))
            client.sendall(b"GET /status.json HTTP/1.1\r\nHost: x\r\n\r\n")
        assert stage.get("/healthz")[0] == 200


def test_it_ends_with_the_supervisor(stage: Stage) -> None:
    """When the control channel closes, the observer ends by itself, quietly, with clients connected."""
    with socket.create_connection(("127.0.0.1", stage.port), timeout=10):
        assert stage.hang_up() == 0
    assert stage.stderr() == ""


def test_it_ends_on_sigterm(stage: Stage) -> None:
    """SIGTERM ends it after the last records were written."""
    stage.report(*[stage.record()] * 100)
    assert stage.process is not None
    stage.process.send_signal(signal.SIGTERM)
    assert stage.process.wait(10) == 0
    assert len(stage.lines()) == 100


def test_without_metrics_it_keeps_the_audit_log_only(folder: Path) -> None:
    """With `metrics: off` there is no HTTP, and records are written all the same."""
    with on_stage(folder, metrics=False) as stage:
        stage.report(stage.record())
        stage.wait_for_lines(1)
        assert stage.hang_up() == 0


@pytest.mark.needs_root
def test_it_gives_up_its_privileges(folder: Path) -> None:
    """The observer runs as the user it is told to, without capabilities or the means to regain them, and works."""
    with Stage(folder) as stage:
        stage.start(uid=65534, gid=65534, groups=[])
        assert stage.process is not None
        status = Path(f"/proc/{stage.process.pid}/status").read_text()
        for wanted in (r"Uid:\s+65534\s+65534\s", r"Gid:\s+65534\s", r"CapEff:\s+0+$", r"CapPrm:\s+0+$", r"NoNewPrivs:\s+1$"):
            assert re.search(wanted, status, re.MULTILINE), (wanted, status)
        for task in os.listdir(f"/proc/{stage.process.pid}/task"):
            assert re.search(r"CapEff:\s+0+$", Path(f"/proc/{stage.process.pid}/task/{task}/status").read_text(), re.MULTILINE)
        stage.report(stage.record())
        stage.wait_for_lines(1)
        assert stage.value("process_open_fds") > 0
        for path in ("/", "/status.json", "/readyz"):
            assert stage.get(path)[0] == 200
        assert stage.get("/metrics", {"Accept-Encoding": "gzip", "Accept": "application/openmetrics-text"})[0] == 200
        stage.tell({"op": "nonsense"})
        until(lambda: "nonsense" in stage.stderr(), "it is said")
        assert stage.hang_up() == 0
        assert "Traceback" not in stage.stderr()


def test_nothing_is_imported_after_privileges_went(folder: Path) -> None:
    """A user who cannot read the libraries' files can run all of it: what is needed later is loaded before."""
    probe = """
import sys
from gatekeeper.kernel import privileges
import gatekeeper.observer.__main__ as observer
drop, before = privileges.drop, set()
def noting(*arguments):
    drop(*arguments)
    before.update(sys.modules)
privileges.drop = noting
code = observer.main(sys.argv[1:])
sys.stderr.write(" ".join(sorted(set(sys.modules) - before)))
sys.exit(code)
"""
    with Stage(folder, command=["-c", probe]) as stage:
        stage.start()
        for path in ("/", "/metrics", "/status.json", "/readyz", "/healthz", "/nothing"):
            assert stage.get(path)[0] in {200, 404}
            assert stage.get(path, method="POST")[0] in {405, 404}
        assert stage.get("/metrics?name[]=x", {"Accept-Encoding": "gzip", "Accept": "application/openmetrics-text"})[0] == 200
        stage.report(stage.record())
        stage.tell({"op": "event", "event": {"event_type": "reload"}})
        stage.wait_for_lines(2)
        assert stage.hang_up() == 0
        assert stage.stderr() == ""


def test_a_supervisor_that_is_gone_at_once_is_no_error(folder: Path) -> None:
    """When the channel closes right after the start message, the observer ends quietly."""
    with Stage(folder) as stage:
        with pytest.raises(ChannelClosed):
            stage.start(hang_up=True)
        assert stage.process is not None
        assert stage.process.wait(10) == 0
        assert stage.stderr() == ""


def test_the_first_message_must_be_start(folder: Path) -> None:
    """Anything else is an error, not a half-started observer."""
    with Stage(folder) as stage:
        with pytest.raises(ChannelClosed):
            stage.start(op="hello")
        assert stage.process is not None
        assert stage.process.wait(10) == 2
        assert "must be start" in stage.stderr()
