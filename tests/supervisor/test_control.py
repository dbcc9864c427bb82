"""The control socket: what it answers, what it bears, whom it lets in, and what it does to the file system."""

from __future__ import annotations

import array
import contextlib
import grp
import json
import os
import pwd
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.supervisor.service import HERE, PATH
from tests.support import need
from tests.support.plain_user import USER, plain_user
from tests.support.process import Process
from tests.support.wait import until

MOST_BYTES = 1 << 16
NEVER_S = 600.0


class Server(Process):
    """A running `serve_control.py`."""

    def __init__(self, folder: Path, path: Path | None = None, prefix: tuple[str, ...] = (), **options: Any) -> None:
        self.path = path or folder / "control.sock"
        python, env = options.pop("python", sys.executable), options.pop("env", PATH)
        super().__init__(
            [python, str(options.pop("script", HERE / "serve_control.py")), str(self.path), json.dumps(options)],
            folder,
            "control",
            env=env,
            prefix=prefix,
        )

    def ready(self) -> Server:
        """Wait until it serves."""

        def serves() -> bool:
            self.assert_alive()
            return "serving" in self.output()

        until(serves, "the control socket is there", 20)
        return self

    def refuses(self) -> str:
        """Wait until it has ended with 3; return why."""
        assert self.wait() == 3
        return self.output()

    def client(self) -> Client:
        """Return a new connection."""
        return Client(self.path)

    def ask(self, op: str, **args: Any) -> dict[str, Any]:
        """Return the result of one request, on a connection of its own."""
        with self.client() as client:
            answer = client.ask(op, **args)
            assert answer["ok"] is True, answer
            result: dict[str, Any] = answer["result"]
            return result


class Client:
    """A connection, as raw as a test needs it."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(path))  # waits for room in the queue, which it would not with a timeout
        self.sock.settimeout(20)
        self._received = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def line(self) -> dict[str, Any] | None:
        """Return the next message, ``None`` when it hung up."""
        while b"\n" not in self._received:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message = json.loads(line)
        assert message.pop("v") == 1
        assert isinstance(message, dict)
        return message

    def answer(self) -> dict[str, Any]:
        """Return the next message that is an answer."""
        while True:
            message = self.line()
            assert message is not None, "it hung up"
            if "ok" in message:
                return message

    def ask(self, op: str, **args: Any) -> dict[str, Any]:
        """Send a request and return its answer."""
        self.send(request(op, **args))
        return self.answer()

    def is_closed(self) -> bool:
        """Whether the other side has hung up, by waiting for it."""
        return self.line() is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def request(op: str, **args: Any) -> bytes:
    """Return a request as bytes."""
    return json.dumps({"v": 1, "op": op, **args}).encode() + b"\n"


Serve = Callable[..., Server]


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    """Start servers and end them after the test; each must have lived until then and print no traceback."""
    servers: list[Server] = []

    def start(ready: bool = True, **options: Any) -> Server:
        home = folder / f"server{len(servers)}"
        home.mkdir()
        servers.append(Server(home, **options))
        return servers[-1].ready() if ready else servers[-1]

    yield start
    for server in servers:
        lived = server.exit_code() is None
        code = server.stop()
        assert (code == 0 and not server.path.exists()) or not lived, server.output()


# ---------------------------------------------------------------------- requests and answers


def test_a_request_is_answered(serve: Serve) -> None:
    """A line of JSON goes in, a line of JSON comes out, as often as wanted; arguments and the asker are known."""
    with serve().client() as client:
        for number in range(3):
            answer = client.ask("echo", number=number)
            assert answer == {
                "ok": True,
                "result": {"args": {"number": number}, "uid": os.geteuid(), "pid": os.getpid(), "privileged": True, "fds": 0},
            }


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_however_the_bytes_arrive(serve: Serve, size: int) -> None:
    """Requests are found whether they come byte by byte, cut anywhere, or all at once."""
    data = b"".join(request("echo", number=number) for number in range(4))
    with serve().client() as client:
        for first in range(0, len(data), size):
            client.send(data[first : first + size])
        assert [client.answer()["result"]["args"]["number"] for _ in range(4)] == [0, 1, 2, 3]


def test_requests_are_answered_one_after_the_other(serve: Serve) -> None:
    """A request that comes while another is being answered waits for it."""
    with serve().client() as client:
        client.send(request("late", after_s=0.3) + request("echo"))
        assert client.answer()["result"] == {"late": True}
        assert client.answer()["result"]["args"] == {}


def test_one_slow_request_keeps_nobody_else_waiting(serve: Serve) -> None:
    """While a request is being answered other clients are."""
    server = serve()
    with server.client() as slow:
        slow.send(request("hang"))
        assert slow.line() == {"progress": "hanging"}
        assert server.ask("hung") == {"waiting": 1}


def test_a_client_may_close_its_sending_side(serve: Serve) -> None:
    """Who has said all it wanted still gets its answers, and the connection ends behind them."""
    with serve().client() as client:
        client.send(request("late", after_s=0.2) + request("echo"))
        client.sock.shutdown(socket.SHUT_WR)
        assert client.answer()["result"] == {"late": True}
        assert client.answer()["ok"]
        assert client.is_closed()


def test_rows_come_before_the_answer(serve: Serve) -> None:
    """A long answer comes in parts, complete and in order, then its end."""
    with serve().client() as client:
        client.send(request("rows", rows=2000, size=1000))
        for number in range(2000):
            message = client.line()
            assert message is not None
            assert message["rows"][0]["number"] == number
        assert client.line() == {"ok": True, "result": {"gone": False}}


def test_descriptors_travel_both_ways(serve: Serve) -> None:
    """A request brings descriptors along and an answer does; none stays open on the other side."""
    server = serve()
    open_before = server.ask("state")["fds"]
    with server.client() as client:
        read_end, write_end = os.pipe()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write_end]))]
        client.sock.sendmsg([request("written")], rights)
        os.close(write_end)
        assert client.answer()["ok"]
        assert os.read(read_end, 100) == b"thanks"
        assert os.read(read_end, 100) == b""  # closed there
        os.close(read_end)
        client.send(request("give"))
        _data, fds, _flags, _address = socket.recv_fds(client.sock, 1000, 4)
        assert os.pread(fds[0], 100, 0) == b"given"
        os.close(fds[0])
    until(lambda: server.ask("state")["fds"] == open_before, "no descriptor is left")


# ---------------------------------------------------------------------- what makes no sense

LINES: list[tuple[bytes, int, str]] = [  # what is sent, the code of the answer, a part of its text
    (b"", 2, "not a JSON object"),
    (b"status", 2, "not a JSON object"),
    (b"[]", 2, "not a JSON object"),
    (b"17", 2, "not a JSON object"),
    (b"null", 2, "not a JSON object"),
    (b'{"v":1,"op":"echo"', 2, "not a JSON object"),
    (b'{"v":1,"op":"echo"}{"v":1,"op":"echo"}', 2, "not a JSON object"),
    (b'{"v":1,"op":"echo","x":NaN}', 2, "NaN is not JSON"),
    (b'{"v":1,"op":"echo","x":' + b"9" * 10_000 + b"}", 2, "not a JSON object"),
    (b'{"v":1,"op":"\xff\xfe"}', 2, "not a JSON object"),
    (b"\x00\x01\x02\x80", 2, "not a JSON object"),
    (b"[" * 60_000, 2, "not a JSON object"),
    (b'{"a":' * 12_000, 2, "not a JSON object"),
    (b'{"v":1,"op":"echo","x":' + b"[" * 20_000 + b"]" * 20_000 + b"}", 2, "not a JSON object"),
    (b"{}", 3, "speaks version 1"),
    (b'{"op":"echo"}', 3, "speaks version 1"),
    (b'{"v":2,"op":"echo"}', 3, "speaks version 1"),
    (b'{"v":"1","op":"echo"}', 3, "speaks version 1"),
    (b'{"v":true,"op":"echo"}', 3, "speaks version 1"),
    (b'{"v":1.0,"op":"echo"}', 3, "speaks version 1"),
    (b'{"v":1}', 2, "names what it wants"),
    (b'{"v":1,"op":7}', 2, "names what it wants"),
    (b'{"v":1,"op":["echo"]}', 2, "names what it wants"),
    (b'{"v":1,"op":"nonsense"}', 3, 'knows no "nonsense"; it knows bad, crash'),
    (b'{"v":1,"op":"__class__"}', 3, "knows no"),
    (b'{"v":1,"op":"' + b"x" * 50_000 + b'"}', 3, "knows no"),
    (b'{"v":1,"op":"bad"}', 2, "that makes no sense"),
]


def test_what_makes_no_sense_is_said_so(serve: Serve) -> None:
    """Each line that is no request gets an answer with a reason and a code, and the next request of the same client is served."""
    with serve().client() as client:
        for line, code, text in LINES:
            client.send(line + b"\n")
            answer = client.answer()
            assert (answer["ok"], answer["code"]) == (False, code), (line[:80], answer)
            assert text in answer["error"]
            assert len(answer["error"]) < 500
        assert client.ask("echo")["ok"]


@pytest.mark.parametrize("extra", [0, 1])
def test_the_longest_request(serve: Serve, extra: int) -> None:
    """A request of 64 KiB is served; one byte more is refused, and that client is hung up on."""
    bare = len(request("echo", text=""))
    with serve().client() as client:
        answer = client.ask("echo", text="x" * (MOST_BYTES - bare + extra))
        if extra:
            assert (answer["ok"], answer["code"]) == (False, 2)
            assert "65536 bytes" in answer["error"]
            assert client.is_closed()
        else:
            assert len(answer["result"]["args"]["text"]) == MOST_BYTES - bare


def test_a_line_without_an_end(serve: Serve) -> None:
    """Megabytes without a newline are not kept: the client is told and hung up on, and nobody else notices."""
    server = serve()
    peak_kib = server.ask("state")["peak_kib"]
    with server.client() as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(200):
                client.send(b"x" * (1 << 16))
        answer = client.line()
        assert answer is None or answer["code"] == 2
        assert client.is_closed()
    assert server.ask("state")["peak_kib"] < peak_kib + 4096


def test_a_handler_that_fails(serve: Serve) -> None:
    """A fault in one request is that request's: it is answered, the log has the traceback, the service goes on."""
    server = serve()
    with server.client() as client:
        answer = client.ask("crash")
        assert (answer["ok"], answer["code"]) == (False, 3)
        assert client.ask("echo")["ok"]
    assert "no handler should do this" in server.output()


# ---------------------------------------------------------------------- clients that keep us waiting


def test_a_client_that_says_nothing(serve: Serve) -> None:
    """A connection without a whole request for too long is closed, whether it has said half of one or nothing."""
    server = serve(limits={"idle_s": 0.5})
    with server.client() as silent, server.client() as half, server.client() as done:
        half.send(b'{"v":1,')
        assert done.ask("echo")["ok"]
        assert silent.is_closed()
        assert half.is_closed()
        assert done.is_closed()


def test_a_client_that_waits_is_not_idle(serve: Serve) -> None:
    """A request that takes longer than a client may be idle is answered."""
    with serve(limits={"idle_s": 0.3}).client() as client:
        assert client.ask("late", after_s=2.5)["result"] == {"late": True}


def test_a_client_that_does_not_read(serve: Serve) -> None:
    """Who takes nothing of its answer is dropped after a while; who asks for more than is kept, at once."""
    server = serve(limits={"stuck_s": 0.5, "unsent_bytes": 1 << 20})
    with server.client() as slow, server.client() as greedy:
        slow.send(request("rows", rows=50, size=10_000))
        greedy.send(request("rows", rows=1000, size=10_000))
        until(lambda: server.ask("state")["dropped"] == 2, "both are dropped")
        for client in (slow, greedy):
            assert not client.is_closed()  # what was sent is there to read
            with contextlib.suppress(AssertionError):
                while client.line() is not None:
                    pass
            assert client.is_closed()
    assert server.ask("state")["peak_kib"] < 100_000


def test_many_clients_that_do_not_read(serve: Serve) -> None:
    """All together they do not fill our memory either: whoever has most to read is dropped first."""
    server = serve(limits={"stuck_s": NEVER_S, "unsent_bytes": 4 << 20, "all_unsent_bytes": 6 << 20})
    with contextlib.ExitStack() as ends:
        sizes = [100, 390, 200, 300]  # times 10,000 bytes: together more than there is room for
        clients = [ends.enter_context(server.client()) for _ in sizes]
        for client, rows in zip(clients, sizes, strict=True):
            client.send(request("rows", rows=rows, size=10_000))
        assert server.ask("state")["dropped"] == 1
        lived = []
        for client, rows in zip(clients, sizes, strict=True):
            with contextlib.suppress(AssertionError):
                client.answer()
                lived.append(rows)
        assert lived == [100, 200, 300]


def test_requests_are_not_read_while_answers_are_not(serve: Serve) -> None:
    """A flood of requests whose answers nobody reads fills our memory with neither."""
    server = serve(limits={"stuck_s": NEVER_S, "rate_per_s": 1e9, "burst": 1e9})
    peak_kib = server.ask("state")["peak_kib"]
    with server.client() as client:
        client.sock.setblocking(False)
        sent, flood = 0, request("echo", text="x" * 10_000) * 100

        def is_full() -> bool:
            nonlocal sent
            try:
                sent += client.sock.send(flood)
            except BlockingIOError:
                return True
            return sent > 100 << 20

        until(is_full, "it takes no more")
        assert sent < 10 << 20
        assert server.ask("state")["peak_kib"] < peak_kib + 8192


def test_a_client_that_leaves_while_it_is_answered(serve: Serve) -> None:
    """Who asked and hung up is noticed, whatever it has sent behind its request."""
    server = serve()
    for behind in (b"", request("echo"), b"x" * 1000):
        with server.client() as client:
            client.send(request("hang") + behind)
            assert client.line() == {"progress": "hanging"}
            assert server.ask("hung") == {"waiting": 1}
        until(lambda: server.ask("hung") == {"waiting": 0}, "it is noticed")


# ---------------------------------------------------------------------- too many of them


@pytest.mark.timeout(120)
def test_a_thousand_clients(serve: Serve) -> None:
    """A thousand connections at once: as many as may be served are, the others are told, and their places are free again."""
    server = serve()
    open_before = server.ask("state")["fds"]
    with contextlib.ExitStack() as ends:
        clients = [ends.enter_context(server.client()) for _ in range(1000)]
        served = 0
        for client in clients:
            with contextlib.suppress(BrokenPipeError):
                client.send(request("echo"))
            answer = client.line()
            assert answer is not None
            if answer["ok"]:
                served += 1
            else:
                assert answer == {"ok": False, "error": "too many clients of the control socket", "code": 3}
        assert served == 72  # 64, and 8 more for root and the daemon's own user, who we are
    until(lambda: server.ask("state")["fds"] == open_before, "all are forgotten")


def test_connections_that_end_at_once(serve: Serve) -> None:
    """Whoever connects and leaves, with or without a word, leaves nothing behind."""
    server = serve()
    open_before = server.ask("state")["fds"]
    for number in range(300):
        with server.client() as client:
            client.send(request("echo") if number % 3 == 0 else b'{"v"' if number % 3 == 1 else b"")
            if number % 2:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: server.ask("state")["fds"] == open_before, "all are forgotten")


def test_a_user_who_asks_too_often_waits(serve: Serve) -> None:
    """Beyond its budget a user's requests are not read; nothing is lost, and nobody is told off."""
    server = serve(limits={"burst": 5.0, "rate_per_s": 0.0001})
    with server.client() as one, server.client() as other:
        one.send(request("echo") * 10)
        assert all(one.answer()["ok"] for _ in range(5))
        other.send(request("echo"))  # the same user: it has no budget either
        assert select.select([one.sock, other.sock], [], [], 0.3)[0] == []


def test_a_user_who_waited_goes_on(serve: Serve) -> None:
    """Requests beyond the budget are served as it fills again."""
    with serve(limits={"burst": 2.0, "rate_per_s": 20.0}).client() as client:
        client.send(request("echo") * 12)
        assert all(client.answer()["ok"] for _ in range(12))


def test_descriptors_that_nobody_asked_for(serve: Serve) -> None:
    """A client that sends descriptors by the dozen is dropped, and all of them are closed."""
    server = serve()
    open_before = server.ask("state")["fds"]
    with server.client() as client:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 100))]
        client.sock.sendmsg([b"x"], rights)
        assert client.is_closed()
    with server.client() as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(50):
            client.sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
    until(lambda: server.ask("state")["fds"] == open_before, "all are closed")


def test_descriptors_run_out(serve: Serve) -> None:
    """With no descriptor left clients wait; once there is one again they are served."""
    prlimit = need.program("prlimit")
    server = serve(prefix=(prlimit, "--nofile=24:24"))
    with contextlib.ExitStack() as ends:
        for _ in range(40):
            ends.enter_context(server.client())
    assert server.ask("echo")["privileged"]


# ---------------------------------------------------------------------- who may


def connects(path: Path, user: tuple[str, ...]) -> str:
    """Return what a user is told at the socket: "ok", the error of the answer, or the name of the error of connect."""
    code = (
        "import errno, json, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.settimeout(20)\n"
        "try: s.connect(sys.argv[1])\n"
        "except OSError as err: print(errno.errorcode[err.errno]); sys.exit()\n"
        "try: s.sendall(b'{\"v\":1,\"op\":\"echo\"}\\n')\n"
        "except BrokenPipeError: pass\n"
        "answer = json.loads(s.makefile().readline())\n"
        "print('ok' if answer['ok'] else answer['error'])\n"
    )
    done = subprocess.run(
        [*user, "/usr/bin/python3", "-c", code, str(path)], capture_output=True, text=True, cwd="/", timeout=50, check=True
    )
    return done.stdout.strip()


def become(uid: int, gid: int, *groups: int) -> tuple[str, ...]:
    """Return a prefix that runs a program as this user."""
    setpriv = need.program("setpriv")
    extra = [f"--groups={','.join(map(str, groups))}"] if groups else ["--clear-groups"]
    return (setpriv, f"--reuid={uid}", f"--regid={gid}", *extra, "--")


@pytest.mark.needs_root
def test_other_users_are_kept_out(serve: Serve) -> None:
    """The file's mode keeps strangers from connecting, and who comes in although it was changed is refused by name."""
    server = serve()
    stranger = become(4711, 4711)
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    assert connects(server.path, stranger) == "EACCES"
    server.path.chmod(0o666)
    assert "you may not" in connects(server.path, stranger)
    assert "you may not" in connects(server.path, become(4711, 0))
    assert connects(server.path, ()) == "ok"


@pytest.mark.needs_root
def test_members_of_the_group_come_in(serve: Serve) -> None:
    """With a group its members may, by their first group or a further one, and nobody else."""
    group = grp.getgrnam("adm")
    server = serve(group=group.gr_name)
    status = server.path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group.gr_gid)
    assert connects(server.path, become(4711, group.gr_gid)) == "ok"
    assert connects(server.path, become(4711, 4711, 4712, group.gr_gid)) == "ok"
    assert connects(server.path, become(4711, 4711, 4712)) == "EACCES"
    server.path.chmod(0o666)
    assert "you may not" in connects(server.path, become(4711, 4711, 4712))


@pytest.mark.needs_root
def test_members_of_the_group_do_not_lock_out_root(serve: Serve) -> None:
    """When the group has taken every place, root still gets in."""
    group = grp.getgrnam("adm")
    server = serve(group=group.gr_name, limits={"clients": 3, "reserved": 1})
    code = (
        "import socket, sys\n"
        "held = []\n"
        "for _ in range(10):\n"
        "    s = socket.socket(socket.AF_UNIX)\n"
        "    s.connect(sys.argv[1])\n"
        "    held.append(s)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    crowd = subprocess.Popen(
        [*become(4711, group.gr_gid), "/usr/bin/python3", "-c", code, str(server.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
    )  # fmt: skip
    try:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == b"held\n"
        assert server.ask("echo")["privileged"]
    finally:
        crowd.communicate(timeout=20)


@pytest.mark.needs_root
def test_a_daemon_without_privileges(folder: Path) -> None:
    """An ordinary user's daemon lets in this user and root."""
    user = plain_user(folder)
    home = folder / "home"
    home.mkdir()
    user.own(home)
    script = folder / "serve_control.py"
    script.write_bytes((HERE / "serve_control.py").read_bytes())
    with Server(home, prefix=user.prefix, python=user.python, env=user.env, script=script).ready() as server:
        account = pwd.getpwnam(USER)
        assert connects(server.path, become(account.pw_uid, account.pw_gid)) == "ok"
        assert connects(server.path, ()) == "ok"
        assert connects(server.path, become(4711, 4711)) == "EACCES"


# ---------------------------------------------------------------------- the file


def test_the_folder_is_made(serve: Serve, folder: Path) -> None:
    """A folder that is missing is made, one level of it; it is no place of secrets, the socket has a mode of its own."""
    server = serve(path=folder / "run" / "control.sock")
    assert stat.S_IMODE((folder / "run").stat().st_mode) == 0o755
    assert server.ask("echo")["privileged"]
    assert "No such file or directory" in serve(ready=False, path=folder / "a" / "b" / "control.sock").refuses()


def test_the_file_is_removed_at_the_end(serve: Serve) -> None:
    """A daemon that ends takes its socket with it, but not what somebody has put in its place."""
    server = serve()
    server.path.unlink()
    server.path.write_text("mine")
    assert server.stop() == 0
    assert server.path.read_text() == "mine"
    server.path.unlink()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_socket_whose_file_is_gone_comes_back(serve: Serve, folder: Path, what: str) -> None:
    """Somebody has cleared the folder: the daemon can be commanded again soon, and who is connected notices nothing."""
    home = folder / "run"
    server = serve(path=home / "control.sock")
    with server.client() as connected:
        server.path.unlink()
        if what == "folder":
            home.rmdir()
        until(lambda: "is open again" in server.output(), "it is open again")
        assert server.ask("echo")["privileged"] is True
        assert connected.ask("echo")["ok"] is True
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600


def test_a_socket_that_cannot_come_back_is_said_once(serve: Serve, folder: Path) -> None:
    """The daemon goes on trying."""
    home = folder / "run"
    server = serve(path=home / "control.sock")
    server.path.unlink()
    home.rmdir()
    home.touch()
    until(lambda: "nobody can command this daemon" in server.output(), "it is said")
    home.unlink()
    until(lambda: "is open again" in server.output(), "it is open again")
    assert server.output().count("nobody can command") == 1
    assert server.ask("echo")["privileged"] is True


def test_a_dead_daemons_socket_is_taken_over(serve: Serve, folder: Path) -> None:
    """What a killed daemon leaves behind is no obstacle."""
    path = folder / "control.sock"
    first = serve(path=path)
    first.signal(signal.SIGKILL)
    first.wait()
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert serve(path=path).ask("echo")["privileged"]


def test_a_live_daemons_socket_is_not(serve: Serve, folder: Path) -> None:
    """A second daemon at the same place does not start, and the first one does not notice."""
    path = folder / "control.sock"
    first = serve(path=path)
    with first.client() as client:
        assert "another gatekeeper runs with it" in serve(ready=False, path=path).refuses()
        assert client.ask("echo")["ok"]
    assert first.ask("echo")["privileged"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling", "fifo", "datagrams", "stranger"])
def test_what_is_not_ours_stays(serve: Serve, folder: Path, kind: str) -> None:
    """Nothing else that has this name is touched: files, folders, links, pipes, sockets of another kind or another user."""
    path = folder / "control.sock"
    with contextlib.ExitStack() as ends:
        if kind == "file":
            path.write_text("precious")
        elif kind == "folder":
            path.mkdir()
        elif kind in {"link", "dangling"}:
            path.symlink_to(folder / "elsewhere")
            if kind == "link":
                (folder / "elsewhere").write_text("precious")
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "datagrams":
            ends.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).bind(str(path))
        else:
            need.root("own a file of somebody else")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                other.bind(str(path))
            os.chown(path, 4711, 4711)
        before = os.lstat(path)
        serve(ready=False, path=path).refuses()
        after = os.lstat(path)
        assert (before.st_ino, before.st_mtime_ns, before.st_mode) == (after.st_ino, after.st_mtime_ns, after.st_mode)
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()


def test_a_folder_that_everybody_may_write(serve: Serve, folder: Path) -> None:
    """Where anybody could replace the socket by one of their own there is none; a sticky folder like /tmp is fine."""
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    path = folder / "open" / "control.sock"
    assert "everybody may write" in serve(ready=False, path=path).refuses()
    (folder / "open").chmod(0o1777)
    serve(path=path)


def test_a_path_that_is_too_long(serve: Serve, folder: Path) -> None:
    """The kernel takes 107 bytes; more are an error that says so."""
    assert "longer than 107 bytes" in serve(ready=False, path=folder / ("x" * 120)).refuses()


def test_a_group_that_does_not_exist(serve: Serve) -> None:
    """A group that this system does not know is an error that names it."""
    assert 'no group "no-such-group"' in serve(ready=False, group="no-such-group").refuses()


def test_whatever_the_umask_is(serve: Serve) -> None:
    """The mode of the socket is ours, not the umask's."""
    for mask in ("000", "077", "027"):
        server = serve(prefix=("/bin/sh", "-c", f'umask {mask}; exec "$0" "$@"'))
        assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
