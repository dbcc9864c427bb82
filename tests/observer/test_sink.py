"""Where audit lines go when the reader is stuck, the disk is full, or the log is rotated."""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gatekeeper.observer.sink import FileTarget, JournalTarget, Sink
from tests.observer.stage import on_stage
from tests.support.wait import until

PIPE_BYTES = 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A small pipe: (read end, write end)."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def lines_of(data: bytes) -> list[dict[str, Any]]:
    """Return whole lines, parsed."""
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def waiting_in(reader: int) -> int:
    """Return the number of bytes in a pipe."""
    found = array.array("i", [0])
    fcntl.ioctl(reader, termios.FIONREAD, found)
    return found[0]


class Broken:
    """A target that takes ``room`` bytes and then fails, as a full disk does, until it is given more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.data = b""
        self.closed = False

    def write(self, lines: memoryview) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = bytes(lines[: self.room])
        self.data += taken
        self.room -= len(taken)
        return len(taken)

    def close(self) -> None:
        self.closed = True


def line(number: int, size: int = 100) -> str:
    """Return one audit line of ``size`` bytes."""
    head = f'{{"n":{number},"x":"'
    return head + "x" * (size - len(head) - 3) + '"}\n'


@pytest.mark.parametrize("blocking", [True, False])
def test_a_stuck_reader_stops_nothing_and_later_gets_whole_lines(
    folder: Path, pipe: tuple[int, int], *, blocking: bool
) -> None:
    """While nobody reads the pipe the observer serves; then whole lines come, and one that says how many are missing."""
    reader, writer = pipe
    os.set_blocking(writer, blocking)
    with on_stage(folder, audit="stdout", audit_fd=writer) as stage:
        message = [stage.record()] * 256
        sent = 0

        def lost() -> float:
            nonlocal sent
            stage.report(*message)
            sent += 256
            return stage.value('gatekeeper_events_lost_total{class="audit"}') > 0

        until(lost, "the buffer is full and lines are lost", within_s=40)
        assert stage.get("/healthz")[0] == 200
        assert stage.stderr().count("left out") == 1
        until(lambda: waiting_in(reader) > PIPE_BYTES // 2, "the pipe is full")
        os.set_blocking(reader, False)
        data = bytearray()

        def confessed() -> bool:
            while True:
                try:
                    data.extend(os.read(reader, 1 << 20))
                except BlockingIOError:
                    break
            return b'"events_lost"' in data and data.endswith(b"\n")

        until(confessed, "the log says that lines are missing", within_s=40)
        lines = lines_of(bytes(data))
        missing = [entry["gatekeeper"] for entry in lines if entry["event_type"] == "events_lost"]
        written = sum(entry["event_type"] == "connection" for entry in lines)
        counted = stage.value('gatekeeper_events_lost_total{class="audit"}')
        assert written + counted == sent
        assert sum(entry["count"] for entry in missing) == counted
        assert {entry["class"] for entry in missing} == {"audit"}
        stage.report(stage.record())
        until(lambda: waiting_in(reader) > 0, "writing goes on")


def test_being_killed_breaks_no_line_of_a_pipe(folder: Path, pipe: tuple[int, int]) -> None:
    """An observer killed while its reader was stuck leaves whole lines, and so does its successor."""
    reader, writer = pipe
    with on_stage(folder, audit="stdout", audit_fd=writer) as stage:
        data = b""
        for _ in range(3):
            stage.report(*[stage.record()] * 256)
            until(lambda: waiting_in(reader) > PIPE_BYTES // 2, "the pipe is full")
            stage.kill()
            data += os.read(reader, 1 << 16)
            stage.start()
        assert {event["flow_id"] for event in lines_of(data)} == {7}


def test_a_full_disk_stops_nothing(folder: Path) -> None:
    """A log on a full device is said once on stderr; metrics go on and the observer still ends when told to."""
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with on_stage(folder, audit_fd=full) as stage:
            for _ in range(5):
                stage.report(stage.record())
            until(lambda: "No space left" in stage.stderr(), "it is said")
            assert stage.get("/metrics")[0] == 200
            assert stage.hang_up() == 0
            assert stage.stderr().count("No space left") == 1
    finally:
        os.close(full)


def test_a_line_written_in_part_is_completed_first() -> None:
    """When space comes back, the rest of the broken line comes before anything else."""
    target = Broken(room=150)
    sink = Sink(target)
    sink.put([line(0), line(1), line(2)])
    sink.put([line(3)])
    until(lambda: len(target.data) == 150, "the disk is full in the middle of a line")
    target.room = 10_000
    assert sink.close(10)
    assert [entry["n"] for entry in lines_of(target.data)] == [0, 1, 2, 3]


def test_a_line_written_in_part_is_whole_in_the_new_file() -> None:
    """When the log is exchanged in the middle of a line, the new one begins with that line, whole."""
    old, new = Broken(room=150), Broken(room=10_000)
    sink = Sink(old)
    sink.put([line(0), line(1), line(2)])
    until(lambda: len(old.data) == 150, "the disk is full in the middle of a line")
    sink.swap(new)
    assert sink.close(10)
    assert [entry["n"] for entry in lines_of(new.data)] == [1, 2]
    assert old.closed


def test_what_does_not_fit_is_counted_once_and_confessed() -> None:
    """The buffer is bounded: lost lines are counted, and the log says so between what came before and after."""
    target = Broken(room=0)
    sink = Sink(target, most_waiting_bytes=1000)
    for number in range(20):
        sink.put([line(number)])
    assert sink.lost == 10
    target.room = 100_000
    until(lambda: b"events_lost" in target.data, "the log says that lines are missing")
    sink.put([line(99)])
    assert sink.close(10)
    lines = lines_of(target.data)
    assert [entry.get("n") for entry in lines] == [*range(10), None, 99]
    assert lines[10]["gatekeeper"] == {"class": "audit", "count": 10}


def test_the_log_moves_to_the_file_it_is_given(folder: Path) -> None:
    """After an audit message new lines are in the new file only, and no line is in both or in neither."""
    with on_stage(folder) as stage:
        for number in range(5):
            stage.report(*[stage.record(flow=number)] * 20)
            stage.tell({"op": "event", "event": {"event_type": "reload", "number": number}})
            fresh = os.open(folder / f"audit.{number}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            stage.tell({"op": "audit"}, [fresh])
            os.close(fresh)
        stage.report(stage.record(flow=5))
        stage.tell({"op": "event", "event": {"event_type": "stop"}})  # on the same channel, so surely after the exchange
        assert stage.hang_up() == 0
        found = []
        for path in (stage.audit_path, *(folder / f"audit.{number}" for number in range(5))):
            found += [event.get("flow_id") for event in stage.lines(path)]
        assert [flow for flow in found if flow is not None] == [number for number in range(5) for _ in range(20)] + [5]
        assert stage.lines(folder / "audit.4")[-1]["event_type"] == "stop"


def test_the_last_lines_are_written_when_the_supervisor_goes(folder: Path) -> None:
    """Records that were sent before the channel closed are in the log when the observer has ended."""
    with on_stage(folder) as stage:
        stage.report(*[stage.record()] * 200, worker=0)
        stage.report(*[stage.record()] * 200, worker=1)
        stage.tell({"op": "event", "event": {"event_type": "stop"}})
        assert stage.hang_up() == 0
        lines = stage.lines()
        assert [event["event_type"] for event in lines] == ["connection"] * 400 + ["stop"]


def test_a_stuck_log_does_not_keep_the_observer_from_ending(folder: Path, pipe: tuple[int, int]) -> None:
    """With a reader that never reads, the observer ends soon after the supervisor and says what is missing."""
    with on_stage(folder, audit="stdout", audit_fd=pipe[1]) as stage:
        stage.report(*[stage.record()] * 200)
        until(lambda: waiting_in(pipe[0]) > PIPE_BYTES // 2, "the pipe is full")
        assert stage.hang_up() == 0
        assert "last lines" in stage.stderr()


def test_the_journal_gets_one_datagram_a_line(folder: Path) -> None:
    """Lines reach a socket that speaks journald's protocol, with a priority and our name, also after it was restarted."""
    path = folder / "journal"
    journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    journal.bind(str(path))
    journal.settimeout(10)
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.connect(str(path))
    with on_stage(folder, audit="journald", audit_fd=ours.fileno()) as stage:
        stage.report(stage.record(flow=1), stage.record(flow=2))
        for flow in (1, 2):
            fields = dict(field.split(b"=", 1) for field in journal.recv(1 << 16).splitlines())
            assert json.loads(fields[b"MESSAGE"])["flow_id"] == flow
            assert (fields[b"PRIORITY"], fields[b"SYSLOG_IDENTIFIER"]) == (b"6", b"gatekeeper")
        journal.close()
        path.unlink()
        journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        journal.bind(str(path))
        journal.settimeout(10)
        stage.report(stage.record(flow=3))
        assert b'"flow_id":3' in journal.recv(1 << 16)
        assert stage.hang_up() == 0
    ours.close()
    journal.close()


def test_a_line_too_long_for_the_journal_is_cut(folder: Path) -> None:
    """A datagram that the kernel refuses for its size does not stop the lines behind it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        journal.bind(str(folder / "journal"))
        journal.settimeout(10)
        ours.connect(str(folder / "journal"))
        sink = Sink(JournalTarget(os.dup(ours.fileno())))
        sink.put(["x" * 1_000_000 + "\n", "next\n"])
        assert len(journal.recv(1 << 20)) < 100_000
        assert journal.recv(1 << 20).startswith(b"MESSAGE=next\n")
        assert sink.close(10)


def test_a_terminal_that_is_gone_is_survived(folder: Path) -> None:
    """Writing to a pipe whose reader has gone is an error like any other."""
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as gone:
        assert gone.stdin is not None
        gone.wait(10)
        with on_stage(folder, audit="stdout", audit_fd=gone.stdin.fileno()) as stage:
            stage.report(stage.record())
            until(lambda: "Broken pipe" in stage.stderr(), "it is said")
            assert stage.get("/healthz")[0] == 200


def test_file_targets_own_their_descriptor(folder: Path) -> None:
    """A log is closed when it is exchanged, and when the sink is."""
    first, second = (os.open(folder / name, os.O_WRONLY | os.O_CREAT) for name in ("one", "two"))
    sink = Sink(FileTarget(first))
    sink.swap(FileTarget(second))
    assert sink.close(10)
    for fd in (first, second):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
