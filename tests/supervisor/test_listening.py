"""Opening what strangers connect to."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from gatekeeper.errors import ListenError
from gatekeeper.kernel import privileges, steering
from gatekeeper.kernel.inherit import Inherited
from gatekeeper.policy.model import Endpoint, Protocol
from gatekeeper.supervisor import listening
from gatekeeper.supervisor.listening import Opened, Opener
from tests.support.ports import free_port

KEY = (1, 2, 3)
ROOT = Path(__file__).parents[2]
TCP, UDP = Protocol.TCP, Protocol.UDP


@pytest.fixture
def opener() -> Iterator[Callable[..., Opener]]:
    """Make openers whose sockets are closed after the test."""
    made: list[Opener] = []
    opened: list[Opened] = []

    class Recording(Opener):
        def open_all(self, wanted: Iterable[Endpoint], existing: Mapping[str, Opened]) -> dict[str, Opened]:
            new = super().open_all(wanted, existing)
            opened.extend(new.values())
            return new

    def make(shards: int = 1, inherited: list[Inherited] | None = None) -> Opener:
        made.append(Recording(shards, KEY, inherited or []))
        return made[-1]

    yield make
    for one in opened:
        one.close()
    for each in made:
        for item in each.inherited:
            item.sock.close()


def v4(port: int, host: str = "127.0.0.1", protocol: Protocol = TCP) -> Endpoint:
    """Return an IPv4 endpoint."""
    return Endpoint(protocol, 4, host, port)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize(("family", "host"), [(4, "127.0.0.1"), (6, "::1"), (4, "0.0.0.0"), (6, "::")])
def test_each_worker_gets_a_socket(
    opener: Callable[..., Opener], shards: int, protocol: Protocol, family: int, host: str
) -> None:
    """An endpoint is one socket per worker, bound to exactly its address, listening, non-blocking, not inheritable."""
    endpoint = Endpoint(protocol, family, host, free_port())
    opened = opener(shards).open_all([endpoint], {})[endpoint.key]
    assert not opened.shared
    assert len(opened.sockets) == shards
    for index, sock in enumerate(opened.sockets):
        assert opened.for_worker(index) is sock
        assert sock.getsockname()[:2] == (host, endpoint.port)
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == (shards > 1)
        if family == 6:
            assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        if protocol is TCP:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
    assert opened.for_worker(shards) is None


@pytest.mark.parametrize(("family", "host", "wanted"), [(4, "0.0.0.0", True), (4, "127.0.0.1", False), (6, "::", True)])
def test_only_wildcards_ask_for_the_destination(
    opener: Callable[..., Opener], family: int, host: str, wanted: bool
) -> None:
    """Datagrams tell which address they came to exactly where it is not known beforehand."""
    endpoint = Endpoint(UDP, family, host, free_port())
    (sock,) = opener().open_all([endpoint], {})[endpoint.key].sockets
    level, option = (socket.IPPROTO_IP, 8) if family == 4 else (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO)
    assert bool(sock.getsockopt(level, option)) is wanted


def test_a_source_meets_the_worker_that_owns_it(opener: Callable[..., Opener]) -> None:
    """Connections arrive at the socket whose place in the list is their owner's number."""
    endpoint = v4(free_port())
    opened = opener(4).open_all([endpoint], {})[endpoint.key]
    arrived: Counter[bool] = Counter()
    for last in range(1, 61):
        with socket.create_connection(("127.0.0.1", endpoint.port), 5, (f"127.0.0.{last}", 0)):
            index = steering.owner(KEY, 4, 0x7F000000 + last, 4)
            accepted, peer = opened.sockets[index].accept()
            accepted.close()
            arrived[peer[0] == f"127.0.0.{last}"] += 1
    assert arrived == {True: 60}


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("generous", [False, True])
def test_a_second_owner_is_an_error_that_names_the_first(
    opener: Callable[..., Opener], protocol: Protocol, shards: int, generous: bool
) -> None:
    """An address that somebody has, even one who would share it (SO_REUSEPORT), is refused; the owner is named."""
    endpoint = v4(free_port(), protocol=protocol)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol is TCP else socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(generous))
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(generous))
        other.bind((endpoint.host, endpoint.port))
        if protocol is TCP:
            other.listen()
        holder = subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=[other.fileno()], stdin=subprocess.PIPE)
    try:
        with pytest.raises(ListenError, match=f"{endpoint.address} .*in use by pid {holder.pid} "):
            opener(shards).open_all([endpoint], {})
    finally:
        holder.kill()
        holder.communicate()


def test_all_or_nothing(opener: Callable[..., Opener]) -> None:
    """When one endpoint cannot be opened, none stays open, and every one that cannot is named in its own line."""
    good = v4(free_port())
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        taken = [v4(sock.getsockname()[1]) for sock in (one, two)]
        with pytest.raises(ListenError) as caught:
            opener(2).open_all([taken[0], good, taken[1]], {})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(endpoint.address in line for endpoint, line in zip(taken, lines, strict=True))
    socket.create_server(("127.0.0.1", good.port)).close()


@pytest.mark.parametrize(("taken", "said"), [(19, 19), (40, 21)])
def test_a_wide_range_that_is_taken_is_no_flood_of_messages(opener: Callable[..., Opener], taken: int, said: int) -> None:
    """Of the failures of a wide range only the first are named, so that they can be read."""
    host = "127.0.0.88"
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(socket.create_server((host, 0))).getsockname()[1] for _ in range(taken)]
        with pytest.raises(ListenError) as caught:
            opener().open_all([v4(port, host) for port in others], {})
    lines = str(caught.value).splitlines()
    assert len(lines) == said
    assert (lines[-1] == "(the rest was not tried)") == (taken > 20)


def test_finished_connections_are_no_owner(opener: Callable[..., Opener]) -> None:
    """A port whose last connections wait in TIME_WAIT can be opened at once: a restart must not wait for them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted = server.accept()[0]
            accepted.close()  # the server's side ends first, so TIME_WAIT is on our port
            assert client.recv(1) == b""
    assert opener(2).open_all([v4(port)], {})


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_wildcard_and_an_address_of_its_own_coexist(
    opener: Callable[..., Opener], shards: int, protocol: Protocol
) -> None:
    """One listener may have a port on every address while another has it on one of them, which then wins."""
    port = free_port()
    wildcard, single = v4(port, "0.0.0.0", protocol), v4(port, "127.0.0.1", protocol)
    new = opener(shards).open_all([wildcard, single], {})
    assert len(new) == 2
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol is TCP else socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", port))
        client.send(b"x")
        shard = steering.owner(KEY, 4, 0x7F000001, shards)
        sock = new[single.key].sockets[shard]
        sock.settimeout(5)
        if protocol is TCP:
            sock.accept()[0].close()
        else:
            assert sock.recv(10) == b"x"


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize(("before", "after"), [("0.0.0.0", "127.0.0.5"), ("127.0.0.5", "0.0.0.0")])
def test_a_listener_may_move_between_overlapping_addresses(
    opener: Callable[..., Opener], shards: int, protocol: Protocol, before: str, after: str
) -> None:
    """A reload opens what is new beside an overlapping address of our own; the more specific one gets what comes."""
    port = free_port()
    one = opener(shards)
    existing = one.open_all([v4(port, before, protocol)], {})
    new = one.open_all([v4(port, after, protocol)], existing)
    assert list(new) == [f"{protocol}:{after}:{port}"]
    everything = existing | new
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol is TCP else socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.1", 0))
        client.connect(("127.0.0.5", port))
        client.send(b"x")
        sock = everything[f"{protocol}:127.0.0.5:{port}"].sockets[steering.owner(KEY, 4, 0x7F000001, shards)]
        sock.settimeout(5)
        if protocol is TCP:
            sock.accept()[0].close()
        else:
            assert sock.recv(10) == b"x"


def test_an_address_that_is_not_here(opener: Callable[..., Opener]) -> None:
    """An address of another host is said to be one."""
    with pytest.raises(ListenError, match="this host has no such address"):
        opener().open_all([v4(80, "192.0.2.1")], {})


@pytest.mark.needs_root
def test_a_low_port_without_the_right(folder: Path) -> None:
    """Who may not open ports below 1024 is told what would help."""
    call = """
import os
from gatekeeper.kernel import privileges
from gatekeeper.policy.model import Endpoint, Protocol
from gatekeeper.supervisor.listening import Opener
privileges.drop(65534, 65534, [], os.getppid())
try:
    Opener(1, (1, 2, 3), []).open_all([Endpoint(Protocol.TCP, 4, "127.0.0.1", 81)], {})
except Exception as err:
    print(err)
"""
    # A namespace of its own: some hosts let everybody open low ports.
    ran = subprocess.run(
        ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" -c "$1"', sys.executable, call],
        cwd=ROOT, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert "cannot listen on 127.0.0.1:81 (tcp): permission denied: ports below 1024 need root or CAP_NET" in ran.stdout


class TestUnix:
    """Unix listeners."""

    def test_the_file_is_for_the_group_and_goes_with_the_listener(
        self, opener: Callable[..., Opener], folder: Path
    ) -> None:
        """The socket file has mode 0660, all workers share it, and it is removed at the end."""
        endpoint = Endpoint(TCP, 0, str(folder / "gate.sock"), 0)
        opened = opener(3).open_all([endpoint], {})[endpoint.key]
        assert stat.S_IMODE(os.stat(endpoint.host).st_mode) == 0o660
        assert opened.shared
        assert {opened.for_worker(index) for index in range(3)} == {opened.sockets[0]}
        opened.close()
        assert not os.path.exists(endpoint.host)

    def test_a_dead_owner_is_cleared_away(self, opener: Callable[..., Opener], folder: Path) -> None:
        """A socket file that nobody listens at does not keep a listener from being opened."""
        endpoint = Endpoint(TCP, 0, str(folder / "gate.sock"), 0)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(endpoint.host)
        assert opener().open_all([endpoint], {})

    def test_a_living_owner_is_an_error(self, opener: Callable[..., Opener], folder: Path) -> None:
        """A socket file that somebody listens at is refused; the file stays."""
        endpoint = Endpoint(TCP, 0, str(folder / "gate.sock"), 0)
        with socket.socket(socket.AF_UNIX) as alive:
            alive.bind(endpoint.host)
            alive.listen()
            with pytest.raises(ListenError, match="cannot listen on unix:"):
                opener().open_all([endpoint], {})
            assert os.path.exists(endpoint.host)

    def test_another_file_is_not_touched(self, opener: Callable[..., Opener], folder: Path) -> None:
        """A file that is no socket is never removed."""
        (folder / "precious").write_text("data")
        endpoint = Endpoint(TCP, 0, str(folder / "precious"), 0)
        with pytest.raises(ListenError, match="not a socket"):
            opener().open_all([endpoint], {})
        assert (folder / "precious").read_text() == "data"

    def test_a_successor_keeps_its_file(self, opener: Callable[..., Opener], folder: Path) -> None:
        """At the end only our own file is removed, not one that somebody has put in its place."""
        endpoint = Endpoint(TCP, 0, str(folder / "gate.sock"), 0)
        opened = opener().open_all([endpoint], {})[endpoint.key]
        os.rename(endpoint.host, folder / "moved")
        (folder / "gate.sock").write_text("somebody else's")
        opened.close()
        assert os.path.exists(endpoint.host)


class TestInherited:
    """Sockets that came with us."""

    def make(self, host: str, kind: socket.SocketKind, v6only: bool = True) -> tuple[Inherited, int]:
        """Return an inherited socket and its port."""
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
        if ":" in host:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
        sock.bind((host, 0))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        sock.setblocking(False)
        return Inherited("unit", sock), sock.getsockname()[1]

    def test_a_stream_is_shared_by_all(self, opener: Callable[..., Opener]) -> None:
        """One inherited TCP socket serves all workers, and nothing is bound."""
        item, port = self.make("127.0.0.1", socket.SOCK_STREAM)
        one = opener(2, [item])
        opened = one.open_all([v4(port)], {})[f"tcp:127.0.0.1:{port}"]
        assert (opened.sockets, opened.shared, one.inherited) == ([item.sock], True, [])

    def test_datagrams_go_to_one_worker(self, opener: Callable[..., Opener]) -> None:
        """One inherited UDP socket is worker 0's alone: a client's datagrams must not be dealt out."""
        item, port = self.make("127.0.0.1", socket.SOCK_DGRAM)
        opened = opener(2, [item]).open_all([v4(port, protocol=UDP)], {})[f"udp:127.0.0.1:{port}"]
        assert opened.for_worker(0) is item.sock
        assert opened.for_worker(1) is None

    def test_it_can_be_wanted_again(self, opener: Callable[..., Opener]) -> None:
        """A listener that is removed gives its inherited socket back, for a later reload to use."""
        item, port = self.make("127.0.0.1", socket.SOCK_STREAM)
        one = opener(2, [item])
        opened = one.open_all([v4(port)], {})[f"tcp:127.0.0.1:{port}"]
        one.close(opened)
        assert one.inherited == [item]
        assert one.open_all([v4(port)], {})[f"tcp:127.0.0.1:{port}"].sockets == [item.sock]

    def test_one_socket_for_both_wildcards(self, opener: Callable[..., Opener]) -> None:
        """An IPv6 wildcard that takes IPv4 too serves a listener on both, and is refused for one on IPv6 alone."""
        item, port = self.make("::", socket.SOCK_STREAM, v6only=False)
        both = [v4(port, "0.0.0.0"), Endpoint(TCP, 6, "::", port)]
        with pytest.raises(ListenError, match="it takes IPv4 too; set BindIPv6Only=ipv6-only"):
            opener(2, [item]).open_all(both[1:], {})
        assert list(opener(2, [item]).open_all(both, {})) == [f"tcp:[::]:{port}"]

    def test_one_that_does_not_listen(self, opener: Callable[..., Opener]) -> None:
        """A connection in the place of a listener (Accept=yes) is refused."""
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(ListenError, match="does not listen"):
            opener(1, [Inherited("unit", sock)]).open_all([v4(sock.getsockname()[1])], {})


def test_metrics_address_taken() -> None:
    """The message about a taken address for metrics says that it is about metrics."""
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ListenError, match=r"metrics: cannot listen on 127\.0\.0\.1:\d+"),
    ):
        listening.open_http(v4(other.getsockname()[1]), [])


def test_the_account_is_known() -> None:
    """Root finds somebody to become; nobody else does."""
    assert (privileges.who_to_become() is not None) == (os.geteuid() == 0)
