"""Real servers from Debian's packages, each with its own configuration, ports and folder."""

from __future__ import annotations

import getpass
import json
import os
import pwd
import shutil
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from tests.support import metrics, need
from tests.support.ports import free_port
from tests.support.process import Process
from tests.support.wait import until


class Nginx(Process):
    """Serves the files in ``folder/www`` at ``port`` and counts what reaches it: see `requests`."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.www = folder / "www"
        self.www.mkdir()
        user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
        (folder / "nginx.conf").write_text(f"""
            {user}
            daemon off;
            worker_processes 1;
            pid {folder}/nginx.pid;
            error_log stderr warn;
            events {{ worker_connections 512; }}
            http {{
                access_log {folder}/access.log;
                sendfile on;
                client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
                uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
                server {{ listen 127.0.0.1:{self.port}; root {self.www}; }}
            }}
        """)
        super().__init__(
            [need.program("nginx"), "-e", "stderr", "-p", str(folder), "-c", f"{folder}/nginx.conf"], folder, "nginx"
        )
        self.wait_for_port(self.port)

    def requests(self) -> int:
        """Return how many requests it has logged."""
        log = self.folder / "access.log"
        return len(log.read_text().splitlines()) if log.exists() else 0


class Sshd(Process):
    """Lets the test's own user log in with a key made for the test. `client_options` are what ssh and scp need."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.user = getpass.getuser()
        if not pwd.getpwnam(self.user).pw_shell.endswith("sh"):
            pytest.skip(f"{self.user} has no login shell")
        for key in ("host_key", "user_key"):
            make = [need.program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(folder / key)]
            subprocess.run(make, check=True)
        self._host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where a privileged sshd insists to confine its children
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        (folder / "sshd_config").write_text(f"""
Port {self.port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
LogLevel VERBOSE
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
Subsystem sftp internal-sftp
""")
        super().__init__([need.program("sshd"), "-D", "-e", "-f", f"{folder}/sshd_config"], folder, "sshd")
        self.wait_for_port(self.port)

    def connections(self) -> int:
        """Return how many connections have reached it."""
        return self.output().count("Connection from ")

    def client_options(self, gate_host: str, gate_port: int) -> list[str]:
        """Return ssh options that log in through the gate and insist on this server's own host key."""
        known = self.folder / "known_hosts"
        known.write_text(f"[{gate_host}]:{gate_port} {self._host_key}\n")
        options = {
            "IdentityFile": f"{self.folder}/user_key",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(known),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "Port": str(gate_port),
            "User": self.user,
        }
        return ["-F", "/dev/null", *(f"-o{key}={value}" for key, value in options.items())]


class Dnsmasq(Process):
    """Answers ``gate.test A 192.0.2.7`` and a TXT record of ``LONG_TXT`` that does not fit into a small datagram."""

    LONG_TXT = tuple(f"{number:03d}" + "x" * 240 for number in range(3))

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        (folder / "dnsmasq.conf").write_text(f"""
port={self.port}
listen-address=127.0.0.1
bind-interfaces
no-resolv
no-hosts
no-poll
edns-packet-max=512
host-record=gate.test,192.0.2.7,2001:db8::7
txt-record=long.test,{",".join(self.LONG_TXT)}
log-queries
pid-file={folder}/dnsmasq.pid
""" + (f"user={getpass.getuser()}\n" if os.geteuid() == 0 else ""))
        super().__init__(
            [need.program("dnsmasq"), "--keep-in-foreground", "--log-facility=-", f"--conf-file={folder}/dnsmasq.conf"],
            folder,
            "dnsmasq",
        )
        self.wait_for_port(self.port)

    def queries(self) -> int:
        """Return how many queries have reached it."""
        return self.output().count(" query[")


class Redis(Process):
    """An empty Redis that stores nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        options = {"port": str(self.port), "bind": "127.0.0.1", "save": "", "daemonize": "no", "dir": str(folder)}
        arguments = [word for key, value in options.items() for word in (f"--{key}", value)]
        super().__init__([need.program("redis-server"), *arguments], folder, "redis")
        self.wait_for_port(self.port)


class Postgres(Process):
    """A fresh cluster with the superuser ``gate`` and no password, run by ``postgres`` when the test is root's."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        data = folder / "postgres"
        data.mkdir(mode=0o700)
        prefix: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            owner = pwd.getpwnam("postgres")
            os.chown(data, owner.pw_uid, owner.pw_gid)
            prefix = [need.program("setpriv"), f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
        make = [need.program("initdb"), "-D", str(data), "-U", "gate", "-A", "trust", "-N", "--locale=C", "-E", "UTF8"]
        made = subprocess.run([*prefix, *make], cwd="/", capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        options = {"port": str(self.port), "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        arguments = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        super().__init__([need.program("postgres"), "-D", str(data), *arguments], folder, "postgres", prefix=prefix)
        self.wait_for_port(self.port)
        until(self._accepts_queries, "PostgreSQL answers queries", within_s=30)

    def _accepts_queries(self) -> bool:
        self.assert_alive()
        ask = [need.program("psql"), "-h", "127.0.0.1", "-p", str(self.port), "-U", "gate", "-Atc", "select 1", "postgres"]
        return subprocess.run(ask, capture_output=True, check=False).returncode == 0


class Prometheus(Process):
    """Scrapes one target every second."""

    def __init__(self, folder: Path, target_port: int) -> None:
        self.port = free_port()
        (folder / "prometheus.yml").write_text(json.dumps({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [
                {"job_name": "gatekeeper", "static_configs": [{"targets": [f"127.0.0.1:{target_port}"]}]}
            ],
        }))
        super().__init__(
            [
                need.program("prometheus"),
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/tsdb",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            folder,
            "prometheus",
        )
        self.wait_for_port(self.port)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the result vector of an instant query, empty while there is none."""
        status, body = metrics.get(self.port, "/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        if status != 200:  # it has started, but does not answer queries yet
            return []
        result: list[dict[str, Any]] = json.loads(body)["data"]["result"]
        return result
