"""The systems under comparison, with equally many workers and equivalent configurations, on free ports of 127.0.0.1.

Peers carry no rules and log nothing: that is the cheapest they can be. gatekeeper runs as a default deployment does, with 1,000 rules,
idle timeouts, metrics and an audit log in a file.
"""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.native import Backend
from bench.processes import BenchError, echoes, family, free_port, stop, wait_until

RULES = 1000
RUN = "-m gatekeeper run {config}"
WORKER_ALONE = (
    "-m bench.worker_alone --tcp {tcp} --udp {udp} --refused {refused} "
    "--backend-tcp {backend_tcp} --backend-udp {backend_udp}"
)
HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NGINX_STREAM = ("/usr/lib/nginx/modules/ngx_stream_module.so", "/usr/lib64/nginx/modules/ngx_stream_module.so")


def _here(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)


@dataclass
class System:
    """One running proxy with a backend of its own. ``ports`` has the keys tcp, refused, and where it can: udp, splice."""

    name: str
    version: str
    backend: Backend
    ports: dict[str, int]
    process: subprocess.Popen[bytes] | None = None
    roles: frozenset[str] = frozenset()  # what must be running for a turn to count
    inside: Callable[..., Any] = _here  # calls something where the system can be reached from

    def pids(self) -> list[int]:
        """All its processes now; none for the direct way."""
        return family(self.process.pid) if self.process else []

    def close(self) -> None:
        if self.process:
            stop(self.process)
        self.backend.close()


def raise_file_limit(wanted: int = 65536) -> int:
    """Allow ourselves and what we start as many descriptors as we may; return how many that is."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (max(wanted, hard), hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return limit
        except (ValueError, OSError):
            continue
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def output(*command: str) -> str:
    """What ``command`` prints, on both streams."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError as err:
        raise BenchError(f"{command[0]}: {err.strerror}") from err
    return (done.stdout + done.stderr).strip()


def start(
    name: str, command: list[str], directory: str, port: int, cwd: str | None = None, ready: Callable[[], bool] | None = None
) -> subprocess.Popen[bytes]:
    """Start ``command`` and wait until it is ``ready`` (default: a byte comes back through ``port``); what it says goes to a file there."""
    said = os.path.join(directory, f"{name}.out")
    with open(said, "wb") as out:
        # Each in a session of its own, as services are: the kernel's autogroups treat them alike, and Ctrl-C is ours.
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd, start_new_session=True,
            env=os.environ | {"GATEKEEPER_CONTROL": "off"},  # this host's own gatekeeper keeps its place
        )  # fmt: skip
    try:
        wait_until(name, ready or (lambda: echoes(port)), process)
    except BenchError as err:
        stop(process)
        with open(said, errors="replace") as file:
            raise BenchError(f"{err}\n{file.read()[-3000:]}") from err
    return process


def write(directory: str, name: str, text: str) -> str:
    """Write a configuration that everybody may read; return its path."""
    path = os.path.join(directory, name)
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, 0o644)
    return path


def ports_for(*kinds: str) -> dict[str, int]:
    """A free port for each of ``kinds``."""
    return {kind: free_port(socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) for kind in kinds}


def start_direct(backend: Backend, directory: str, workers: int) -> System:
    """No proxy at all: what load generator and backend cost."""
    del directory, workers
    return System("direct", "", backend, {"tcp": backend.tcp, "udp": backend.udp})


def start_haproxy(backend: Backend, directory: str, workers: int) -> System:
    """A thread for each worker; a second listener with forced splice, a third that rejects."""
    if shutil.which("haproxy") is None:
        raise BenchError("haproxy is not installed (Debian package haproxy)")
    ports = ports_for("tcp", "splice", "refused")
    pipes = 256  # each two descriptors; plenty for the bulk streams here
    sessions = (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200 - 2 * pipes) // 2
    server = f"server backend 127.0.0.1:{backend.tcp}"
    text = f"""global
    nbthread {workers}
    maxconn {sessions}
    maxpipes {pipes}
defaults
    mode tcp
    maxconn {sessions}
    timeout connect 5s
    timeout client 1h
    timeout server 1h
listen tcp
    bind 127.0.0.1:{ports["tcp"]}
    {server}
listen splice
    bind 127.0.0.1:{ports["splice"]}
    option splice-request
    option splice-response
    {server}
listen refused
    bind 127.0.0.1:{ports["refused"]}
    tcp-request connection reject
    {server}
"""
    path = write(directory, "haproxy.cfg", text)
    process = start("haproxy", ["haproxy", "-db", "-f", path], directory, ports["tcp"])
    version = re.search(r"version (\S+)", output("haproxy", "-v"))
    return System("haproxy", version[1] if version else "unknown", backend, ports, process)


def start_nginx(backend: Backend, directory: str, workers: int) -> System:
    """Workers and their master; half-closes forwarded, UDP with as large a receive buffer as the host allows."""
    if shutil.which("nginx") is None:
        raise BenchError("nginx is not installed (Debian packages nginx and libnginx-mod-stream)")
    module = next((path for path in NGINX_STREAM if os.path.exists(path)), None)
    ports = ports_for("tcp", "udp", "refused")
    connections = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200
    # As gatekeeper's: without it one worker gets nearly all connections.
    shared = " reuseport" if workers > 1 else ""
    to_backend = f"proxy_pass 127.0.0.1:{backend.tcp};"
    text = f"""{f"load_module {module};" if module else ""}
{"user root;" if os.geteuid() == 0 else ""}
daemon off;
worker_processes {workers};
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
events {{ worker_connections {connections}; }}
stream {{
    proxy_half_close on;
    proxy_timeout 1h;
    server {{ listen 127.0.0.1:{ports["tcp"]} backlog=4096{shared}; {to_backend} }}
    server {{ listen 127.0.0.1:{ports["refused"]} backlog=4096{shared}; deny all; {to_backend} }}
    server {{ listen 127.0.0.1:{ports["udp"]} udp rcvbuf=4m{shared}; proxy_timeout 60s; proxy_pass 127.0.0.1:{backend.udp}; }}
}}
"""
    path = write(directory, "nginx.conf", text)
    command = ["nginx", "-e", f"{directory}/nginx.log", "-p", directory, "-c", path]
    process = start("nginx", command, directory, ports["tcp"])
    return System("nginx", output("nginx", "-v").rpartition("/")[2], backend, ports, process)


def rule_file(ports: dict[str, int], backend: Backend, directory: str, workers: int) -> str:
    """A gatekeeper rule file with 1,000 rules, of which the last three decide what the benchmark sends."""
    rules = [
        f"  - {{name: net-{i:04}, action: {('allow', 'deny', 'drop')[i % 3]}, from: 10.{i // 200}.{i % 200}.0/24, "
        f"to: [streams, datagrams], except: [10.{i // 200}.{i % 200}.1]}}"
        for i in range(RULES - 2)
    ]
    return f"""version: 1
workers: {workers}
metrics: {{listen: 127.0.0.1:{ports["metrics"]}}}
audit: {directory}/audit.log
listeners:
  - {{name: streams, listen: 127.0.0.1:{ports["tcp"]}, backend: 127.0.0.1:{backend.tcp}}}
  - {{name: refused, listen: 127.0.0.1:{ports["refused"]}, backend: 127.0.0.1:{backend.tcp}}}
  - {{name: datagrams, protocol: udp, listen: 127.0.0.1:{ports["udp"]}, backend: 127.0.0.1:{backend.udp}}}
default: deny
rules:
{chr(10).join(rules)}
  - {{name: turned-away, action: deny, from: 127.0.0.0/8, to: refused}}
  - {{name: served, action: allow, from: 127.0.0.0/8, to: [streams, datagrams]}}
"""


def start_gatekeeper(backend: Backend, directory: str, workers: int, command: str | None = None) -> System:
    """Start ``command`` (default: `gatekeeper run` of this checkout, by this interpreter).

    In it ``{config}`` stands for the rule file's path, and ``{tcp}``, ``{udp}``, ``{refused}``, ``{metrics}``, ``{backend_tcp}``,
    ``{backend_udp}`` for the ports in it, so that a worker can be driven without reading YAML.
    """
    ports = ports_for("tcp", "udp", "refused", "metrics")
    path = write(directory, "gatekeeper.yaml", rule_file(ports, backend, directory, workers))
    line = shlex.split(command or f"{shlex.quote(sys.executable)} {RUN}")
    places = {"config": path, "backend_tcp": backend.tcp, "backend_udp": backend.udp, **ports}
    words = [re.sub(r"\{(\w+)\}", lambda found: str(places.get(found[1], found[0])), word) for word in line]
    process = start("gatekeeper", words, directory, ports["tcp"], cwd=HOME)
    told = "import gatekeeper, platform; print(gatekeeper.__version__, 'on Python', platform.python_version())"
    version = output(sys.executable, "-c", told)
    roles = frozenset() if command else frozenset({"supervisor", "worker", "observer"})
    return System("gatekeeper", version, backend, ports, process, roles)
