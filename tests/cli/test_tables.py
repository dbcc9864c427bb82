"""What people read in tables: sizes, durations, places, and sessions in the order they asked for."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from gatekeeper.cli import daemon
from gatekeeper.cli.log_lines import describe
from gatekeeper.cli.session_table import cells, place
from gatekeeper.cli.sessions import ORDERS, in_order
from gatekeeper.cli.tables import duration, several, size
from gatekeeper.cli.terminal import Terminal
from gatekeeper.cli.top import frame
from tests.cli.program import Screen, gatekeeper

ROW: dict[str, Any] = {
    "flow_id": 7531059713409026, "path": "relay", "listener": "web", "rule": "", "reason": "default", "proto": "TCP",
    "src_ip": "2001:db8::7", "src_port": 50000, "dest_ip": "2001:db8::1", "dest_port": 443, "endpoint": "[::]:443",
    "backend": "127.0.0.1:8443", "state": "open", "began": 1000.0, "age_s": 75.0, "idle_s": 0.26, "bytes_in": 999, "bytes_out": 1_234_567,
    "client_tcp": {"rtt_us": 210, "retransmits": 0, "unsent": 4096, "unacked": 1}, "backend_tcp": {"rtt_us": 104_500, "retransmits": 3, "unsent": 0, "unacked": 0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (1, "1"), (999, "999"), (999.4, "999"), (1000, "1.0k"), (1234, "1.2k"), (9949, "9.9k"), (9951, "10k"), (999_499, "999k"),
        (999_500, "1.0M"), (12_345_678, "12M"), (10**9, "1.0G"), (10**12, "1.0T"), (2**64, "18E"), (10**22, "10000E"),
    ],
)  # fmt: skip
def test_sizes(number: float, text: str) -> None:
    """A number of bytes in a few characters, rounded to two or three digits."""
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"), (-1, "0.0s"), (0.26, "0.3s"), (9.94, "9.9s"), (9.96, "10s"), (59.4, "59s"), (59.6, "1m00s"), (61, "1m01s"),
        (3599, "59m59s"), (3600, "1h00m"), (86_399, "23h59m"), (86_400, "1d00h"), (90_000_000, "1041d16h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    """A duration in at most two units."""
    assert duration(seconds) == text


def test_places_and_lists() -> None:
    """Addresses of IPv6 are in brackets; of several things the first is named."""
    assert (place("1.2.3.4", 5), place("::1", 5), place(None, None)) == ("1.2.3.4:5", "[::1]:5", "")
    assert (several([]), several(["a"]), several(["a", "b", "c"])) == ("", "a", "a and 2 more")


def test_a_session_in_cells() -> None:
    """The default has a name; what TCP says is of the client and of the backend, and a dash where it says nothing."""
    assert cells(ROW, details=True) == (
        "7531059713409026", "web", "default", "[2001:db8::7]:50000", "127.0.0.1:8443", "open", "1m15s", "0.3s", "999", "1.2M",
        "210us/104ms", "0/3", "4.1k/0", "1/0",
    )  # fmt: skip
    assert cells(ROW | {"client_tcp": None, "backend_tcp": None, "src_ip": None, "path": "guard"}, details=True)[3:] == (
        "unix", "guarded", "open", "1m15s", "0.3s", "999", "1.2M", "-/-", "-/-", "-/-", "-/-",
    )  # fmt: skip


@pytest.mark.parametrize("most", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("order", list(ORDERS))
def test_orders(order: str, most: int) -> None:
    """Each order sorts, both ways, and a limit leaves what would have come first."""
    rows = [
        ROW | {"src_ip": "192.0.2.10", "began": 30.0, "age_s": 1.0, "idle_s": 3.0, "bytes_in": 2, "bytes_out": 0, "client_tcp": None, "backend_tcp": None},
        ROW | {"src_ip": "192.0.2.9", "began": 20.0, "age_s": 9.0, "idle_s": 2.0, "bytes_in": 1, "bytes_out": 0},
        ROW | {"src_ip": None, "began": 10.0, "age_s": 99.0, "idle_s": 1.0, "bytes_in": 0, "bytes_out": 0, "backend_tcp": None},
    ]  # fmt: skip
    forward = {"age": [2, 1, 0], "idle": [0, 1, 2], "bytes": [0, 1, 2], "rate": [0, 1, 2], "rtt": [1, 2, 0], "source": [1, 0, 2]}[order]
    expected = [rows[index] for index in forward]
    length = most or 3
    assert in_order(rows, order, reverse=False, most=most) == expected[:length]
    assert in_order(rows, order, reverse=True, most=most) == expected[::-1][:length]


def status(pid: int, clock_s: float, opened: int, refused: int, moved: int) -> dict[str, Any]:
    """Return a sample of `top`."""
    listener = {
        "name": "web", "sessions": 1, "allowed": opened, "refused": refused, "kernel_refused": 0, "bytes_in": moved, "bytes_out": 0,
        "accept_queue": 0,
    }  # fmt: skip
    verdict = {"listener": "web", "action": "drop", "rule": "bad", "reason": "rule", "count": refused, "kernel_attempts": 0}
    return {
        "pid": pid, "started": 1.0, "clock_s": clock_s, "uptime_s": 10.0, "listeners": [listener], "verdicts": [verdict],
        "rows": [ROW | {"bytes_in": moved, "bytes_out": 0}],
    }  # fmt: skip


def test_rates_are_of_the_time_in_between() -> None:
    """What grew between two samples, by the daemon's own clock; a daemon that was restarted begins at zero; never less than nothing."""
    now = frame(status(1, 100.0, 5, 10, 1000), status(1, 102.0, 15, 50, 5000), 8)
    (web,) = now["listeners"]
    assert (web["new_per_s"], web["refused_per_s"], web["in_per_s"], now["refusals"][0]["per_s"]) == (5.0, 20.0, 2000.0, 20.0)
    assert now["busiest"][0]["per_s"] == 2000.0
    (web,) = frame(status(1, 100.0, 500, 0, 0), status(2, 5.0, 20, 0, 0), 8)["listeners"]
    assert web["new_per_s"] == 2.0
    (web,) = frame(status(1, 100.0, 500, 0, 0), status(1, 101.0, 20, 0, 0), 8)["listeners"]
    assert web["new_per_s"] == 0.0


def test_events_for_people() -> None:
    """Each kind of event is one line; a kind that is not known shows what it has."""
    terminal = Terminal(Screen(), Screen(), Screen())
    common = {"timestamp": "2026-11-24T09:00:03.250000Z", "src_ip": None, "src_port": None, "dest_ip": None, "dest_port": None}
    about = {"listener": "web", "action": "deny", "rule": "", "reason": "max_sessions", "endpoint": "unix:/run/x.sock", "count": 7}
    refusal = describe(terminal, common | {"event_type": "refusal", "gatekeeper": about})
    assert refusal.endswith("web unix -> unix:/run/x.sock deny by max_sessions")
    assert describe(terminal, common | {"event_type": "refusals_suppressed", "gatekeeper": about}).endswith("web 7 more, deny by max_sessions")
    assert describe(terminal, common | {"event_type": "future", "gatekeeper": {"a": 1, "b": None}}).endswith("a=1 b=None")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"", "hung up before it answered"),
        (b'{"v":1,"progress":"x"}\n', "hung up before it answered"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak our language"),
        (b"[1]\n", "does not speak our language"),
        (b'{"v":1,"ok":false,"error":"no","code":1}\n', "no"),
        (b'{"v":1,"ok":false,"error":"no","code":99}\n', "no"),
    ],
)
def test_whatever_answers(tmp_path: Path, said: bytes, message: str) -> None:
    """A daemon that says no, hangs up or is something else ends a command with a message, and one of its exit codes."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def answer() -> None:
            connection, _address = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(said)

        answering = threading.Thread(target=answer)
        answering.start()
        done = gatekeeper("status", "--control", str(path))
        answering.join(10)
    assert message in done.err
    assert (done.code, done.out) == (1 if b'"code":1}' in said else 3, "")


def test_answers_in_parts(tmp_path: Path) -> None:
    """Rows and progress are passed on as they come, however the bytes are cut; keys that are not known are ignored."""
    path = tmp_path / "s"
    lines = [
        {"v": 1, "progress": "half"}, {"v": 1, "rows": [1, 2]}, {"v": 1, "rows": [3]}, {"v": 1, "news": 1},
        {"v": 1, "ok": True, "result": {"n": 3}, "more": 1},
    ]  # fmt: skip
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        rows: list[int] = []
        progress: list[str] = []
        with daemon.connect(str(path)) as gate:
            connection, _address = listening.accept()

            def answer() -> None:
                with connection:
                    for position in range(len(data)):
                        connection.sendall(data[position : position + 1])

            answering = threading.Thread(target=answer)
            answering.start()
            result = gate.ask("x", rows.extend, progress.append).result
            answering.join(10)
    assert (rows, progress, result) == ([1, 2, 3], ["half"], {"n": 3})
