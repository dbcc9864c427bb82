"""An observer under attack: from the network, from a worker that somebody has taken over, and from nonsense on its channel."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gatekeeper.proxy.events import MAX_RECORDS, RECORD
from tests.endurance.faults.watch import Steady, open_policy
from tests.observer.stage import Stage
from tests.support.backends import TcpBackend
from tests.support.gate import Gate
from tests.support.load import Load
from tests.support.ports import free_port
from tests.support.wait import until

SILENT = 500
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
ATTACKS: dict[str, bytes] = {
    "huge header": b"GET / HTTP/1.1\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: y\r\n" % number for number in range(20_000)) + b"\r\n",
    "no end of a line": b"G" * (1 << 20),
    "huge target": b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "many names": b"GET /metrics?" + b"name[]=x&" * 1_500 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "pipeline": REQUEST * 2_000,
    "pipeline of scrapes": b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 200,
    "body that never ends": b"GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5\r\nhello\r\n" * 10_000,
    "length that lies": b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "two lengths": b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
    "upgrade": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n",
    "zeros": bytes(100_000),
    "other lines' ends": REQUEST.replace(b"\r\n", b"\n"),
    "accept": b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: " + b"application/openmetrics-text;version=x;q=1e999," * 200 + b"\r\n\r\n",
}  # fmt: skip


@pytest.fixture
def backend() -> Iterator[TcpBackend]:
    """Echo streams."""
    with TcpBackend() as made:
        yield made


def push(client: socket.socket, data: bytes) -> None:
    """Send as much as the other side takes without being read from."""
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError, ConnectionError):
        while data:
            data = data[client.send(data) :]


@pytest.mark.timeout(180)
def test_whatever_comes_over_http_the_data_path_does_not_notice(run_gate: Callable[..., Gate], backend: TcpBackend, long: bool) -> None:
    """500 silent connections, dribbled and huge heads, pipelines that are not read: sessions go on, and scrapes are answered."""
    port = free_port()
    gate = run_gate(open_policy(port, backend.address), workers=2)
    observer = gate.observer_pid()
    with Steady(port) as steady, Load("127.0.0.1", port, ["127.0.0.5"]) as load, contextlib.ExitStack() as ends:

        def connect() -> socket.socket:
            return ends.enter_context(socket.create_connection(("127.0.0.1", gate.metrics_port), timeout=10))

        silent = [connect() for _ in range(SILENT)]
        assert gate.get("/metrics")[0] == 200
        for client in silent[::5]:
            push(client, REQUEST[:10])
        for attack in ATTACKS.values():
            for _ in range(10 if long else 3):
                push(connect(), attack)
            assert gate.get("/healthz")[0] == 200
        dribbling = [connect() for _ in range(40)]
        for at in range(20):  # one byte of the head after the other
            for client in dribbling:
                push(client, REQUEST[at : at + 1])
            assert gate.get("/healthz")[0] == 200
        steady.go_on()
        assert gate.get("/metrics")[0] == 200
        load.wait_for_more(50)
        assert load.failures == []
    assert gate.observer_pid() == observer
    until(lambda: gate.scrape().value("process_open_fds") < 80, "what was opened is closed")
    assert "Traceback" not in gate.output()


# ---------------------------------------------------------------------- from a worker


def nonsense(chooser: random.Random, stage: Stage) -> bytes:
    """Return a message that no honest worker sends, or hardly any."""
    kind = chooser.randrange(7)
    if kind == 0:
        return chooser.randbytes(chooser.choice([1, 7, RECORD.size - 1, RECORD.size, RECORD.size + 1, 5_000]))
    if kind == 1:
        return b"".join(chooser.randbytes(RECORD.size) for _ in range(chooser.choice([1, MAX_RECORDS, MAX_RECORDS + 5])))
    if kind == 2:
        return b"\n" * chooser.randrange(1, 500) + b'{"event_type":"forged"}\n'
    if kind == 3:
        return stage.record(start=chooser.choice([float("nan"), float("inf"), -1.0, 1e300]), duration=chooser.choice([float("nan"), -1.0, 1e20]))
    if kind == 4:
        return stage.record(kind=chooser.randrange(256))
    if kind == 5:
        return stage.record(slot=chooser.choice([0, 1, 2**31, 2**32 - 1]), endpoint=chooser.choice([0, 1, 2**32 - 1]))
    return stage.record(flow=2**64 - 1, bytes_in=2**64 - 1, bytes_out=2**64 - 1, source=bytes(range(16)), family=chooser.choice([0, 6, 9]))


@pytest.mark.timeout(300)
def test_hostile_records_neither_forge_nor_hide_a_line(folder: Path, long: bool) -> None:
    """Among thousands of senseless messages of one worker, every record of another is in the log, in order, and every line is whole."""
    rounds = 200 if long else 20
    chooser = random.Random(1)
    with Stage(folder) as stage:
        stage.start()
        flow = 0
        for _ in range(rounds):
            for _ in range(50):
                with contextlib.suppress(BlockingIOError):
                    stage.events[0].send(nonsense(chooser, stage), socket.MSG_DONTWAIT)
            for _ in range(5):
                flow += 1
                stage.report(stage.record(flow=flow, source=socket.inet_aton("203.0.113.9")), worker=1)
            until(lambda flow=flow: seen(stage) == flow, "the honest worker's records are in the log")  # type: ignore[misc]
        assert stage.value('gatekeeper_events_lost_total{class="malformed"}') > rounds
        assert stage.value('gatekeeper_events_lost_total{class="audit"}') == 0
        lines = stage.lines()
        assert {line["event_type"] for line in lines} <= {"connection", "refusal", "refusals_suppressed"}
        flows = [line["flow_id"] for line in lines if line.get("src_ip") == "203.0.113.9"]
        assert flows == list(range(1, flow + 1))
        assert stage.stderr() == ""


def seen(stage: Stage) -> int:
    """Return the latest flow of the honest worker that is in the log."""
    return max((line["flow_id"] for line in stage.lines() if line.get("src_ip") == "203.0.113.9"), default=0)


# ---------------------------------------------------------------------- on the channel


SENSELESS: list[bytes] = [
    b"{}", b"[]", b"1", b'"x"', b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"op":' + b"[" * 50_000, b'{"op":"start"}', b'{"op":["counters"]}',
    b'{"op":"counters"}', b'{"op":"counters","worker":[]}', b'{"op":"counters","worker":0}', b'{"op":"policy"}', b'{"op":"policy","generation":9}',
    b'{"op":"audit"}', b'{"op":"event"}', b'{"op":"event","event":[]}', b'{"op":"event","event":null}', b'{"op":"state"}', b'{"op":"x\\u001b[31m\\n"}',
]  # fmt: skip


def test_nonsense_on_the_channel_changes_nothing(folder: Path) -> None:
    """Messages that are no messages, and descriptors that are not what they should be, are said in one line each and forgotten."""
    with Stage(folder) as stage:
        stage.start()
        before = stage.value("process_open_fds")
        assert stage.channel is not None
        null = os.open("/dev/null", os.O_RDWR)
        try:
            for data in SENSELESS:
                for fds in ([], [null], [null, null, null]):
                    if fds and data == b'{"op":"audit"}':
                        continue  # any file will do for that
                    socket.send_fds(stage.channel.sock, [data], fds)
        finally:
            os.close(null)
        stage.tell_state(last_reload_timestamp=1750000099.0)
        until(lambda: stage.value("gatekeeper_config_last_reload_success_timestamp_seconds") == 1750000099.0, "it listens on")
        stage.report(stage.record())
        assert stage.wait_for_lines(1)[-1]["event_type"] == "connection"
        assert stage.value("process_open_fds") <= before + 2
        lines = stage.stderr().splitlines()
        assert all(line.startswith("gatekeeper: observer: ") and line.isprintable() for line in lines), [x for x in lines if not x.isprintable()]


def test_time_that_jumps_breaks_no_line(folder: Path) -> None:
    """Records from before 1970, of this moment and far ahead give whole lines or none."""
    with Stage(folder) as stage:
        stage.start()
        for start in (-1.0, 0.0, time.time(), 253402300799.0, 253402300800.0):
            stage.report(stage.record(start=start, duration=0.0))
        lines = stage.wait_for_lines(3)
        assert [json.dumps(line["timestamp"])[:5] for line in lines] == ['"1970', f'"{time.gmtime().tm_year}', '"9999']
