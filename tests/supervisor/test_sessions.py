"""Questions about sessions: what operators may ask for, and what becomes of answers that workers make up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gatekeeper.cli import daemon
from gatekeeper.snapshot.bindings import Bindings, EndpointKey, VerdictKey
from gatekeeper.supervisor.control import BadRequest
from gatekeeper.supervisor.sessions import Names, Wanted, parse_source
from tests.supervisor.service import Service, listener, rules, stand_in
from tests.supervisor.stand_in_worker import WRONG
from tests.support.ports import free_port
from tests.support.wait import until

BINDINGS = Bindings(
    listeners={"ssh": 64, "web": 160},
    verdicts={
        VerdictKey("ssh", "allow", "office", "rule"): 300,
        VerdictKey("web", "allow", "office", "rule"): 301,
        VerdictKey("web", "allow", "", "default"): 302,
        VerdictKey("web", "deny", "crawlers", "rule"): 303,
    },
    endpoints={
        EndpointKey("ssh", "tcp", "0.0.0.0:22", "127.0.0.1:2222"): 0,
        EndpointKey("web", "tcp", "unix:/run/web.sock", "127.0.0.1:8080"): 1,
    },
)
ROW: dict[str, Any] = {
    "flow": 7, "endpoint": 0, "slot": 300, "family": 4, "source": "198.51.100.7", "source_port": 50000,
    "destination": "203.0.113.1", "destination_port": 22, "began": 1000.0, "idle_s": 1.5, "bytes_in": 1, "bytes_out": 2,
    "state": "open", "client": None, "backend": {"rtt_us": 20, "retransmits": 0, "unsent": 5, "unacked": 6},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("198.51.100.7", (4, 0xC6336407, 0xC6336407)),
        ("198.51.100.0/24", (4, 0xC6336400, 0xC63364FF)),
        ("198.51.100.7-198.51.100.9", (4, 0xC6336407, 0xC6336409)),
        ("0.0.0.0/0", (4, 0, 0xFFFFFFFF)),
        ("::/0", (6, 0, (1 << 128) - 1)),
        ("2001:db8::7", (6, 0x20010DB8 << 96 | 7, 0x20010DB8 << 96 | 7)),
        ("2001:db8::-2001:db8::ff", (6, 0x20010DB8 << 96, 0x20010DB8 << 96 | 0xFF)),
        ("::ffff:198.51.100.7", (4, 0xC6336407, 0xC6336407)),
        ("::ffff:198.51.100.0/120", (4, 0xC6336400, 0xC63364FF)),
    ],
)
def test_sources(text: str, expected: tuple[int, int, int]) -> None:
    """A source is an address, a network or a range; what IPv6 says of IPv4 is IPv4."""
    assert parse_source(text) == expected


@pytest.mark.parametrize(
    "text", ["", "office", "198.51.100.300", "198.51.100.7/33", "1.2.3.4-::1", "1.2.3.9-1.2.3.4", "7", "1.2.3.4-", "-", "x" * 5000]
)
def test_sources_that_are_none(text: str) -> None:
    """What is no source is an error that repeats it, in part."""
    with pytest.raises(BadRequest) as caught:
        parse_source(text)
    assert len(str(caught.value)) < 400


def test_host_bits_suggest_the_network() -> None:
    """A network with host bits is an error that says what would be right."""
    with pytest.raises(BadRequest, match=r'did you mean "198.51.100.0/24"'):
        parse_source("198.51.100.7/24")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, {}),
        ({"listener": ["web"]}, {"slots": [301, 302]}),
        ({"rule": ["office"]}, {"slots": [300, 301]}),
        ({"rule": ["default", "office"], "listener": ["web"]}, {"slots": [301, 302]}),
        ({"rule": ["crawlers"]}, {"slots": []}),
        ({"flow": [1, 2]}, {"flows": [1, 2]}),
        ({"flow": []}, {"flows": []}),
        ({"older_s": 5, "younger_s": 60.5, "idle_s": 0}, {"older_s": 5.0, "younger_s": 60.5, "idle_s": 0.0}),
        ({"state": ["open"], "stuck": True, "details": False}, {"states": ["open"], "stuck": True}),
        ({"source": ["10.0.0.0/8"]}, {"sources": [(4, 10 << 24, (11 << 24) - 1)]}),
    ],
)
def test_what_operators_mean_in_numbers(args: dict[str, Any], expected: dict[str, Any]) -> None:
    """Names become the numbers that workers know; what is not given is no condition, and an empty list matches nothing."""
    assert Wanted.from_args(args).to_filter(BINDINGS) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"listener": ["nobody"]}, 'no listener "nobody"; there are: ssh, web'),
        ({"rule": ["nobody"]}, 'no rule "nobody"; there are: crawlers, default, office'),
        ({"listener": "web"}, '"listener" is a list'),
        ({"listener": [1]}, '"listener" is a list'),
        ({"flow": [True]}, '"flow" is a list'),
        ({"flow": [-1]}, '"flow" is a list'),
        ({"flow": [1 << 64]}, '"flow" is a list'),
        ({"flow": list(range(1001))}, "at most 1000"),
        ({"state": ["asleep"]}, 'no state "asleep"'),
        ({"older_s": "1h"}, '"older_s" is a number'),
        ({"older_s": -1}, '"older_s" is a number'),
        ({"older_s": 1e400}, '"older_s" is a number'),
        ({"idle_s": True}, '"idle_s" is a number'),
        ({"stuck": 1}, '"stuck" is true or false'),
    ],
)
def test_filters_that_make_no_sense(args: dict[str, Any], message: str) -> None:
    """Each mistake has a message of its own; none is taken for "everything"."""
    with pytest.raises(BadRequest) as caught:
        Wanted.from_args(args).to_filter(BINDINGS)
    assert message in str(caught.value)


def test_a_row_in_words() -> None:
    """Numbers become names, as in the audit log."""
    assert Names(1, BINDINGS).translate(ROW, 1060.0) == {
        "flow_id": 7, "path": "relay", "listener": "ssh", "rule": "office", "reason": "rule", "proto": "TCP",
        "src_ip": "198.51.100.7", "src_port": 50000, "dest_ip": "203.0.113.1", "dest_port": 22,
        "endpoint": "0.0.0.0:22", "backend": "127.0.0.1:2222", "state": "open", "began": 1000.0, "age_s": 60.0, "idle_s": 1.5,
        "bytes_in": 1, "bytes_out": 2, "client_tcp": None,
        "backend_tcp": {"rtt_us": 20, "retransmits": 0, "unsent": 5, "unacked": 6},
    }  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_rows_that_are_none(wrong: dict[str, Any]) -> None:
    """A row with one thing in it that cannot be is no row: nothing of it is shown."""
    assert Names(1, BINDINGS).translate(ROW | wrong, 1060.0) is None


def test_what_tcp_says_must_be_numbers() -> None:
    """Of a connection of which a worker says nonsense nothing is said."""
    sound = {"rtt_us": 1, "retransmits": 2, "unsent": 3, "unacked": 4}
    nonsense: list[Any] = [7, [], {}, sound | {"rtt_us": -1}, sound | {"unsent": "many"}, sound | {"unacked": 1 << 63}]
    for wrong in nonsense:
        row = Names(1, BINDINGS).translate(ROW | {"client": wrong, "backend": sound | {"more": 1}}, 1060.0)
        assert row is not None
        assert (row["client_tcp"], row["backend_tcp"]) == (None, sound)


def test_a_row_of_a_unix_socket() -> None:
    """A peer without an address has none."""
    row = Names(1, BINDINGS).translate(ROW | {"endpoint": 1, "slot": 302, "family": 0, "source": "", "destination": ""}, 1060.0)
    assert row is not None
    assert (row["src_ip"], row["src_port"], row["dest_ip"], row["dest_port"]) == (None, None, None, None)
    assert (row["endpoint"], row["rule"]) == ("unix:/run/web.sock", "")


# ---------------------------------------------------------------------- workers that lie


@pytest.fixture
def lying(folder: Path) -> Iterator[Callable[..., Service]]:
    """Start a service whose workers lie in some way."""
    services: list[Service] = []

    def start(how: str, workers: int = 1) -> Service:
        services.append(
            Service(folder, rules(listener(free_port(), free_port())), worker=stand_in(f"lie:{how}"), workers=workers)
        )
        return services[-1].ready()

    yield start
    for service in services:
        service.stop()


def test_rows_that_are_garbage(lying: Callable[..., Service]) -> None:
    """Rows of the wrong shape are left out and counted, answers of the wrong shape are zero, and the daemon goes on."""
    service = lying("garbage")
    with daemon.connect(str(service.control_path)) as gate:
        rows: list[Any] = []
        result = gate.ask("sessions", rows=rows.extend).result
        assert (rows, result["matched"], result["shown"], result["missing_workers"]) == ([], 0, 0, [])
        assert result["unreadable"] > 30
        assert gate.ask("cut", all=True).result["ended"] == 0
        assert gate.ask("status").result["state"] == "serving"


def test_more_than_was_asked_for(lying: Callable[..., Service]) -> None:
    """Rows beyond those that were asked for, answers to other questions and second answers are not heard."""
    service = lying("flood", workers=2)
    with daemon.connect(str(service.control_path)) as gate:
        for _ in range(3):
            result = gate.ask("sessions", most=10).result
            assert result["unreadable"] <= 20  # ten of each worker
            assert result["matched"] == 0  # they claimed to know more sessions than there are numbers for
        assert gate.ask("status").result["state"] == "serving"


def test_a_worker_that_dies_instead_of_answering(lying: Callable[..., Service]) -> None:
    """Nobody waits for the dead: the answer says whose sessions are missing."""
    service = lying("end")
    with daemon.connect(str(service.control_path)) as gate:
        assert gate.ask("sessions").result["missing_workers"] == [0]


def test_a_worker_that_never_answers(lying: Callable[..., Service]) -> None:
    """A question that is open when its worker is replaced is answered without it."""
    service = lying("mute")
    (worker,) = service.workers()
    results: list[dict[str, Any]] = []

    def ask() -> None:
        with daemon.connect(str(service.control_path)) as gate:
            results.append(gate.ask("sessions").result)

    asking = threading.Thread(target=ask)
    asking.start()
    with daemon.connect(str(service.control_path)) as gate:
        until(lambda: gate.ask("status").result["state"] == "serving", "others are answered meanwhile")
    os.kill(worker, signal.SIGKILL)
    asking.join(20)
    # The successor may have been asked in place of the one that was killed; it does not answer either.
    assert [result["missing_workers"] for result in results] == [[0]]
