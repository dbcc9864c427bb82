"""Servers that people run, behind the gate: they work for whom the policy allows, and are refused to all others."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.support import need
from tests.support.clients import Sources, ask
from tests.support.gate import Gate
from tests.support.network import RemoteNetwork
from tests.support.ports import free_port
from tests.support.services import Dnsmasq, Nginx, Postgres, Prometheus, Redis, Sshd
from tests.support.wait import until

FRIEND, STRANGER = "127.0.0.9", "127.0.9.9"
CURL_WAS_RESET = {7, 56}  # while it waited for the connection, or afterwards
RULES = """
listeners:
  - name: {name}
    protocol: {protocol}
    listen: {listen}
    backend: 127.0.0.1:{backend}
{more}
sets:
  friends: {friends}
default: deny
rules:
  - name: friends
    action: allow
    from: friends
tests:
  - {{from: friends, to: {name}, expect: allow}}
  - {{from: any, except: friends, to: {name}, expect: deny}}
"""
LOCAL_FRIENDS = "[127.0.0.0/28]"


def rules(name: str, backend: int, port: int, protocol: str = "tcp", more: str = "") -> str:
    """Return a policy that lets 127.0.0.0/28 in at 127.0.0.1:``port``."""
    return RULES.format(
        name=name, protocol=protocol, listen=f"127.0.0.1:{port}", backend=backend, friends=LOCAL_FRIENDS, more=more
    )


def remote_rules(name: str, backend: int, port: int, remote: RemoteNetwork) -> str:
    """Return a policy that lets in the first source of each family of the remote network."""
    listen = f'["127.0.0.1:{port}", "{remote.gate_v4}:{port}", "[{remote.gate_v6}]:{port}"]'
    friends = f'[{remote.sources_v4[0]}, "{remote.sources_v6[0]}", 127.0.0.1]'
    return RULES.format(name=name, protocol="tcp", listen=listen, backend=backend, friends=friends, more="")


def run(
    argv: Sequence[str], within_s: float = 30, prefix: Sequence[str] = (), cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a client to its end, with nothing on its stdin."""
    return subprocess.run(
        [*prefix, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within_s, cwd=cwd, check=False
    )


@pytest.mark.needs("nginx", "curl")
def test_nginx_serves_friends_and_never_hears_of_strangers(run_gate: Callable[..., Gate], folder: Path) -> None:
    """HTTP through the gate works from an allowed source; a denied one is reset and nginx does not see it."""
    port = free_port()
    with Nginx(folder) as nginx:
        (nginx.www / "page").write_text("behind the gate")
        gate = run_gate(rules("web", nginx.port, port))
        url = f"http://127.0.0.1:{port}/page"
        friend = run(["curl", "-sS", "--interface", FRIEND, url])
        assert (friend.returncode, friend.stdout) == (0, "behind the gate")
        seen = nginx.requests()
        stranger = run(["curl", "-sS", "--interface", STRANGER, url])
        assert stranger.returncode in CURL_WAS_RESET, stranger
        assert nginx.requests() == seen == 1
        verdicts = gate.scrape().verdicts()
        assert verdicts == {("web", "allow", "friends", "rule"): 1, ("web", "deny", "", "default"): 1}


@pytest.mark.needs_root
@pytest.mark.needs("nginx", "curl", "ip")
@pytest.mark.parametrize("family", [4, 6])
def test_nginx_from_a_remote_network(
    run_gate: Callable[..., Gate], folder: Path, remote: RemoteNetwork, family: int
) -> None:
    """Over a routed network, IPv4 and IPv6, one source gets the page and its neighbour is reset."""
    port = free_port()
    sources = remote.sources_v4 if family == 4 else remote.sources_v6
    host = remote.gate_v4 if family == 4 else f"[{remote.gate_v6}]"
    with Nginx(folder) as nginx:
        (nginx.www / "page").write_text("behind the gate")
        run_gate(remote_rules("web", nginx.port, port, remote), workers=2)
        curl = ["curl", "-sS", "--max-time", "10", f"http://{host}:{port}/page", "--interface"]
        friend = run([*curl, sources[0]], prefix=remote.exec_prefix())
        assert (friend.returncode, friend.stdout) == (0, "behind the gate"), friend
        stranger = run([*curl, sources[1]], prefix=remote.exec_prefix())
        assert stranger.returncode in CURL_WAS_RESET, stranger
        assert nginx.requests() == 1


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.needs("nginx", "curl")
def test_a_gigabyte_arrives_intact(run_gate: Callable[..., Gate], folder: Path) -> None:
    """1 GB downloaded through the gate has the digest it was made with, and the gate counted every byte of it."""
    port = free_port()
    blocks, block_bytes = 1000, 1_000_000
    block = random.Random(1).randbytes(block_bytes)
    made, got = hashlib.sha256(), hashlib.sha256()
    with Nginx(folder) as nginx:
        with (nginx.www / "big").open("wb") as file:
            for number in range(blocks):  # no two blocks are alike, so none can take another's place
                part = number.to_bytes(8, "big") + block[8:]
                file.write(part)
                made.update(part)
        gate = run_gate(rules("web", nginx.port, port))
        curl = ["curl", "-sS", "--interface", FRIEND, f"http://127.0.0.1:{port}/big"]
        with subprocess.Popen(curl, stdout=subprocess.PIPE) as download:
            assert download.stdout is not None
            while part := download.stdout.read(1 << 20):
                got.update(part)
        assert download.returncode == 0
        assert got.digest() == made.digest()
        (event,) = gate.wait_for_audit(1, "connection")
        body_bytes = blocks * block_bytes
        assert body_bytes < event["gatekeeper"]["bytes_out"] < body_bytes + 1000  # and a response header
        gate.wait_for_value(
            event["gatekeeper"]["bytes_out"], "gatekeeper_session_bytes_total", listener="web", direction="out"
        )


@pytest.mark.needs("sshd", "ssh", "scp", "ssh-keygen")
def test_ssh_login_and_scp(run_gate: Callable[..., Gate], folder: Path) -> None:
    """A real login and a copied file both ways through the gate; a denied source gets not even the banner."""
    port = free_port()
    with Sshd(folder) as sshd:
        run_gate(rules("ssh", sshd.port, port))
        options = sshd.client_options("127.0.0.1", port)
        login = run(["ssh", *options, f"-oBindAddress={FRIEND}", "127.0.0.1", "echo from; id -un"])
        assert (login.returncode, login.stdout) == (0, f"from\n{sshd.user}\n"), login
        (folder / "sent").write_bytes(content := os.urandom(3_000_000))
        scp = ["scp", "-q", *options, f"-oBindAddress={FRIEND}"]
        assert run([*scp, f"{folder}/sent", f"127.0.0.1:{folder}/there"]).returncode == 0
        assert run([*scp, f"127.0.0.1:{folder}/there", f"{folder}/back"]).returncode == 0
        assert (folder / "back").read_bytes() == content
        seen = sshd.connections()
        refused = run(["ssh", *options, f"-oBindAddress={STRANGER}", "127.0.0.1", "true"])
        assert refused.returncode == 255
        assert "reset by" in refused.stderr, refused
        assert sshd.connections() == seen > 0


@pytest.mark.needs("dnsmasq", "dig")
def test_dns_over_udp_and_tcp_on_one_port(run_gate: Callable[..., Gate], folder: Path) -> None:
    """Dig is answered over UDP, over TCP, and over both when the answer is truncated; a denied source gets nothing."""
    port = free_port()
    also_tcp = f"""
  - name: dns-tcp
    listen: 127.0.0.1:{port}
    backend: 127.0.0.1:%d
"""
    with Dnsmasq(folder) as dnsmasq:
        gate = run_gate(
            rules("dns", dnsmasq.port, port, "udp", "    max_responses: 1" + also_tcp % dnsmasq.port), workers=2
        )

        def dig(source: str, *words: str) -> subprocess.CompletedProcess[str]:
            return run(["dig", "@127.0.0.1", "-p", str(port), "-b", source, "+tries=1", "+time=2", *words])

        assert dig(FRIEND, "gate.test", "A", "+short").stdout == "192.0.2.7\n"
        assert dig(FRIEND, "gate.test", "AAAA", "+short", "+tcp").stdout == "2001:db8::7\n"
        long = dig(FRIEND, "long.test", "TXT")
        assert "retrying in TCP mode" in long.stdout
        assert all(text in long.stdout for text in dnsmasq.LONG_TXT)
        assert gate.scrape().verdicts() == {
            ("dns", "allow", "friends", "rule"): 2,
            ("dns-tcp", "allow", "friends", "rule"): 2,
        }
        gate.wait_for_value(0, "gatekeeper_sessions", listener="dns")  # one reply each, as max_responses says
        asked = dnsmasq.queries()
        assert dig(STRANGER, "gate.test", "A").returncode == 9  # dig: no reply from the server
        assert dig(STRANGER, "gate.test", "A", "+tcp").returncode == 9
        assert dnsmasq.queries() == asked


@pytest.mark.needs("redis-server", "redis-benchmark")
def test_redis_benchmark(run_gate: Callable[..., Gate], folder: Path) -> None:
    """redis-benchmark with 50 clients and pipelines finishes through the gate without an error; strangers are reset."""
    port = free_port()
    with Redis(folder) as redis:
        gate = run_gate(rules("redis", redis.port, port), workers=2)
        benchmark = ["redis-benchmark", "-h", "127.0.0.1", "-p", str(port), "-c", "50", "-n", "10000", "-t", "set,get,lrange_100"]
        for pipeline in ("1", "16"):
            done = run([*benchmark, "-d", "200", "-P", pipeline, "--csv"], within_s=60)
            assert done.returncode == 0, done
            assert '"SET"' in done.stdout and '"GET"' in done.stdout
            assert "error" not in (done.stdout + done.stderr).lower()
        assert Sources().is_refused(STRANGER, "127.0.0.1", port)
        gate.wait_for_value(0, "gatekeeper_sessions", listener="redis")
        scrape = gate.scrape()
        assert scrape.value("gatekeeper_connections_total", action="deny") == 1
        assert scrape.value("gatekeeper_backend_failures_total") == 0


@pytest.mark.timeout(120)
@pytest.mark.needs("initdb", "postgres", "psql", "setpriv")
def test_postgresql(run_gate: Callable[..., Gate], folder: Path) -> None:
    """Psql works through the gate, bulk results included; a denied source is reset before PostgreSQL hears of it."""
    port = free_port()
    with Postgres(folder) as postgres:
        gate = run_gate(rules("database", postgres.port, port))

        def psql(sql: str) -> subprocess.CompletedProcess[str]:
            return run([need.program("psql"), "-h", "127.0.0.1", "-p", str(port), "-U", "gate", "-Atc", sql, "postgres"])

        assert psql("create table t as select generate_series(1, 100000) as n; select sum(n) from t").stdout.endswith(
            "5000050000\n"
        )
        rows = psql("select n, repeat(md5(n::text), 4) from t order by n").stdout.splitlines()
        assert len(rows) == 100_000
        assert rows[-1] == "100000|" + hashlib.md5(b"100000").hexdigest() * 4
        assert Sources().is_refused(STRANGER, "127.0.0.1", port)
        assert gate.scrape().verdicts() == {
            ("database", "allow", "friends", "rule"): 2,
            ("database", "deny", "", "default"): 1,
        }


@pytest.mark.needs_root
@pytest.mark.timeout(120)
@pytest.mark.needs("initdb", "postgres", "psql", "redis-server", "redis-cli", "ssh", "sshd", "ssh-keygen", "ip", "setpriv")
def test_remote_clients_of_ssh_redis_and_postgresql(
    run_gate: Callable[..., Gate], folder: Path, remote: RemoteNetwork
) -> None:
    """The same services from a routed network over IPv6: the real clients work, and fail once their source is denied."""
    ports = {name: free_port() for name in ("ssh", "redis", "database")}
    folders = {name: folder / f"{name}-server" for name in ports}
    for home in folders.values():
        home.mkdir()
    with Sshd(folders["ssh"]) as sshd, Redis(folders["redis"]) as redis, Postgres(folders["database"]) as postgres:
        backends = {"ssh": sshd.port, "redis": redis.port, "database": postgres.port}
        listeners = "".join(
            f"  - {{name: {name}, listen: '[{remote.gate_v6}]:{ports[name]}', backend: '127.0.0.1:{backends[name]}'}}\n"
            for name in ports
        )
        policy = f"listeners:\n{listeners}default: deny\nrules:\n  - {{name: remote, action: %s, from: '2001:db8::/32'}}\n"
        gate = run_gate(policy % "allow")
        host = remote.gate_v6
        options = sshd.client_options(host, ports["ssh"])
        commands = {
            "ssh": ["ssh", *options, host, "echo fine"],
            "redis": ["redis-cli", "-h", host, "-p", str(ports["redis"]), "echo", "fine"],
            "database": ["psql", "-h", host, "-p", str(ports["database"]), "-U", "gate", "-Atc", "select 'fine'", "postgres"],
        }
        for command in commands.values():
            done = run(command, prefix=remote.exec_prefix())
            assert (done.returncode, done.stdout) == (0, "fine\n"), done
        assert gate.reload(policy % "deny")["success"]
        for command in commands.values():
            done = run(command, prefix=remote.exec_prefix())
            assert done.returncode != 0, done
            assert "fine" not in done.stdout


@pytest.mark.timeout(120)
@pytest.mark.needs("prometheus", "promtool")
def test_prometheus_scrapes_the_gate(run_gate: Callable[..., Gate], folder: Path) -> None:
    """A real Prometheus finds the gate up and stores its counters; promtool finds nothing to complain about."""
    port = free_port()
    with Redis(folder) as redis:
        gate = run_gate(rules("redis", redis.port, port))
        with Sources().connect(FRIEND, "127.0.0.1", port) as friend:
            assert ask(friend, b"PING\r\n").startswith(b"+PONG")
        assert Sources().is_refused(STRANGER, "127.0.0.1", port)
        lint = subprocess.run(
            ["promtool", "check", "metrics"], input=gate.scrape().text, capture_output=True, text=True, check=False
        )
        assert (lint.returncode, lint.stderr) == (0, ""), lint
        with Prometheus(folder, gate.metrics_port) as prometheus:
            until(lambda: prometheus.query("up == 1"), "Prometheus finds the gate up", within_s=30)
            (stored,) = prometheus.query('gatekeeper_connections_total{listener="redis",action="deny",reason="default"}')
            assert stored["value"][1] == "1"
            assert prometheus.query('gatekeeper_connections_total{action="allow",rule="friends"}')
