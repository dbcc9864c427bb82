"""From a `Config` to the bytes of a snapshot; `gatekeeper.snapshot.layout` and `meta` say what they mean."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from gatekeeper.policy.compile import Table, compile_policy
from gatekeeper.policy.model import Backend, Config, Endpoint, Listener
from gatekeeper.snapshot.layout import HEADER, MAGIC

_ALIGNMENT = 8


def encode(config: Config) -> list[bytes | memoryview]:
    """Return a snapshot in parts that follow one another; the large ones are views, not copies."""
    table = compile_policy(config.policy)
    v6 = (table.v6_high, table.v6_low, table.v6_class, table.v6_index)
    sections: list[bytes | memoryview] = [
        memoryview(part).cast("B") for part in (table.v4, table.v4_index, *v6, table.matrix)
    ]
    sections.append(json.dumps(_meta(config, table), separators=(",", ":")).encode())
    places: list[int] = []
    parts: list[bytes | memoryview] = []
    at = HEADER.size
    for section in sections:
        places += at, len(section)
        padding = -len(section) % _ALIGNMENT
        parts += section, bytes(padding)
        at += len(section) + padding
    return [HEADER.pack(MAGIC, *places), *parts]


def write(config: Config, fd: int) -> None:
    """Write a snapshot into an empty file or memfd. The caller owns ``fd``.

    Raises:
        OSError: no room.
    """
    write_parts(encode(config), fd)


def write_parts(parts: Iterable[bytes | memoryview], fd: int) -> None:
    """Write what `encode` returned.

    Raises:
        OSError: no room.
    """
    for part in parts:
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(fd, rest) :]


def _meta(config: Config, table: Table) -> dict[str, Any]:
    policy, settings = config.policy, config.settings
    rows = iter(table.rows)
    return {
        "version": 1,
        "digest": config.digest,
        "counts": {
            "rules": len(policy.rules),
            "sets_ranges": table.sets_ranges,
            "v4_ranges": len(table.v4),
            "v6_ranges": len(table.v6_class),
            "classes": table.classes,
            "rows": len(table.matrix) // table.classes,
        },
        "default": {
            "action": policy.default.label,
            "file": policy.default_place.file,
            "line": policy.default_place.line,
        },
        "rules": [
            {"name": rule.name, "action": rule.action.label, "file": rule.place.file, "line": rule.place.line}
            for rule in policy.rules
        ],
        "listeners": [
            _listener(listener, over, ban)
            for listener, over, ban in zip(policy.listeners, table.over, table.ban, strict=True)
        ],
        "endpoints": [
            {"listener": index, "key": endpoint.key, "address": endpoint.address, "row": next(rows)}
            | _endpoint(endpoint)
            | {"backend": _backend(listener.backend_of(endpoint))}
            for index, listener in enumerate(policy.listeners)
            for endpoint in listener.endpoints
        ],
        "details": [
            [listener, rule, action.label, str(reason)] for listener, rule, action, reason in table.details
        ],
        "settings": {
            "workers": settings.workers,
            "metrics": None if settings.metrics is None else {
                "family": settings.metrics.family, "host": settings.metrics.host, "port": settings.metrics.port,
            },
            "control": {"socket": settings.control, "group": settings.control_group},
            "audit": settings.audit,
            "state": settings.state,
            "kernel": settings.kernel,
            "on_reload": settings.on_reload,
        },
        "files": list(config.files),
    }  # fmt: skip


def _listener(listener: Listener, over_detail: int, ban_detail: int) -> dict[str, Any]:
    return {
        "name": listener.name,
        "protocol": str(listener.protocol),
        "connect_timeout_s": listener.connect_timeout_s,
        "idle_timeout_s": listener.idle_timeout_s,
        "half_close_timeout_s": listener.half_close_timeout_s,
        "max_responses": listener.max_responses,
        "max_sessions": listener.max_sessions,
        "over_detail": over_detail,
        "ban_detail": ban_detail,
        "on_exit": listener.on_exit,
    }


def _endpoint(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "protocol": str(endpoint.protocol),
        "family": endpoint.family,
        "host": endpoint.host,
        "port": endpoint.port,
    }


def _backend(backend: Backend) -> dict[str, Any]:
    return {"family": backend.family, "host": backend.host, "port": backend.port, "text": str(backend)}
