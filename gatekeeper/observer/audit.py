"""Event records become lines of the audit log: one JSON object each, in the manner of Suricata's EVE.

    timestamp    RFC 3339, UTC, microseconds: when it was over (a connection's end, a refusal's moment)
    event_type   connection, refusal, refusals_suppressed; of the service itself: start, reload, worker_restart, stop;
                 of this log: events_lost
    flow_id, src_ip, src_port, dest_ip, dest_port, proto      addresses and ports are null on unix sockets
    gatekeeper   connection and refusal: listener, action, rule ("" for the default), reason, peer_ip, backend,
                 bytes_in, bytes_out, duration_s, end, enforced_by; endpoint where there is no dest_ip
                 refusals_suppressed: listener, action, rule, reason, endpoint, count, enforced_by

A worker talks to strangers, so its records are hostile until they are rendered: numbers are checked, addresses are
formatted from bytes, and all text comes from the supervisor's names, escaped once and kept.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

from gatekeeper.proxy.events import CAUSE_SHIFT, CONNECTION, END_MASK, MAX_RECORDS, RECORD, REFUSAL, SUPPRESSED
from gatekeeper.snapshot.bindings import Bindings, EndpointKey, VerdictKey
from gatekeeper.snapshot.counters import Cause, End

MAX_MESSAGE_BYTES = RECORD.size * MAX_RECORDS
LATEST_S = 253402300800.0  # the year 10000, which RFC 3339 cannot write
LONGEST_S = 1e10
CACHED_SECONDS = 64
CACHED_SHAPES = 1 << 16  # (kind, end, family, slot, endpoint)

EVENT_TYPES = {CONNECTION: "connection", REFUSAL: "refusal", SUPPRESSED: "refusals_suppressed"}
ENDS = {int(end): end.label for end in End}
CAUSES = {0: ""} | {cause + 1: f',"cause":"{cause.label}"' for cause in Cause}
IPV4, IPV6 = int(socket.AF_INET), int(socket.AF_INET6)

Shape = tuple[str, str, str, str]


class Renderer:
    """Turns records into lines. ``malformed`` counts those that could not be."""

    def __init__(self, enforced_by: str = "worker") -> None:
        self.malformed = 0
        self._enforced_by = _json(enforced_by)
        # Reads what the supervisor has said in the meantime: a record may be here before its policy.
        self.catch_up: Callable[[], None] = lambda: None
        self._verdicts: dict[int, VerdictKey] = {}
        self._endpoints: dict[int, EndpointKey] = {}
        self._shapes: dict[tuple[int, int, int, int, int], Shape | None] = {}
        self._seconds: dict[int, str] = {}

    def rename(self, bindings: Bindings) -> None:
        """Use the names of these bindings from now on."""
        self._verdicts = {slot: key for key, slot in bindings.verdicts.items()}
        self._endpoints = {number: key for key, number in bindings.endpoints.items()}
        self._shapes.clear()

    def render(self, message: memoryview) -> list[str]:
        """Return the lines of one message of a worker, each with its newline."""
        if len(message) % RECORD.size:
            self.malformed += len(message) // RECORD.size + 1
            return []
        lines: list[str] = []
        shapes, seconds, inet_ntop, add = self._shapes, self._seconds, socket.inet_ntop, lines.append
        records = RECORD.iter_unpack(message)
        for kind, end, family, slot, number, port, to_port, flow, start, duration, moved_in, moved_out, src, dst in records:
            shape = shapes.get((kind, end, family, slot, number))
            if shape is None:
                shape = self._shape(kind, end, family, slot, number)
            # Written so that NaN fails too.
            if shape is None or not (0.0 <= start < LATEST_S and 0.0 <= duration < LONGEST_S and start + duration < LATEST_S):
                self.malformed += 1
                continue
            at = start + duration
            second = int(at)
            when = seconds.get(second)
            if when is None:
                when = self._second(second)
            head, middle, backend, tail = shape
            micros = int((at - second) * 1e6)
            if kind == SUPPRESSED:
                add(f"{when}{micros:06d}{head}{moved_in}{tail}")
                continue
            if family == 4:
                source, target = f'"{inet_ntop(IPV4, src[:4])}"', f'"{inet_ntop(IPV4, dst[:4])}"'
            elif family == 6:
                source, target = f'"{inet_ntop(IPV6, src)}"', f'"{inet_ntop(IPV6, dst)}"'
            else:
                source = target = port = to_port = "null"  # noqa: PLW2901 - unpacked anew for each record
            add(
                f'{when}{micros:06d}{head}{flow},"src_ip":{source},"src_port":{port},"dest_ip":{target},"dest_port":{to_port}'
                f'{middle}{source}{backend},"bytes_in":{moved_in},"bytes_out":{moved_out},"duration_s":{duration:.6f}{tail}'
            )
        return lines

    def _shape(self, kind: int, end: int, family: int, slot: int, number: int) -> Shape | None:
        """Return what lines of this shape share, ``None`` when no honest worker says such a thing."""
        if slot not in self._verdicts or number not in self._endpoints:
            self.catch_up()
        verdict, endpoint = self._verdicts.get(slot), self._endpoints.get(number)
        base, cause = end & END_MASK, CAUSES.get(end >> CAUSE_SHIFT)
        if cause is None or (cause and base != End.BACKEND_FAILED):
            return None
        known = kind in EVENT_TYPES and base in ENDS and family in (0, 4, 6)
        if verdict is None or endpoint is None or verdict.listener != endpoint.listener or not known:
            return None
        words = _labels(verdict)
        if kind == SUPPRESSED or family == 0:
            words += f',"endpoint":{_json(endpoint.address)}'
        if kind == SUPPRESSED:
            shape = _suppressed(words, endpoint, self._enforced_by)
        else:
            shape = _ended(kind, f'"{ENDS[base]}"{cause}', words, endpoint, self._enforced_by)
        if len(self._shapes) >= CACHED_SHAPES:
            self._shapes.clear()
        self._shapes[kind, end, family, slot, number] = shape
        return shape

    def _second(self, second: int) -> str:
        if len(self._seconds) >= CACHED_SECONDS:
            self._seconds.clear()
        text = self._seconds[second] = '{"timestamp":"' + _seconds_text(second)
        return text


def service_event(event: dict[str, Any], now_s: float) -> str:
    """Return the line of something the service itself did; ``event`` as the supervisor sends it, ``now_s`` Unix time.

    Everything beside ``event_type`` goes under ``gatekeeper``.
    """
    details = {key: value for key, value in event.items() if key not in ("event_type", "timestamp")}
    second = int(now_s)
    return _json({
        "timestamp": f"{_seconds_text(second)}{int((now_s - second) * 1e6):06d}Z",
        "event_type": str(event.get("event_type", "unknown")),
        "gatekeeper": details,
    }) + "\n"  # fmt: skip


def _ended(kind: int, end: str, words: str, endpoint: EndpointKey, enforced_by: str) -> Shape:
    return (
        f'Z","event_type":"{EVENT_TYPES[kind]}","flow_id":',
        f',"proto":"{endpoint.protocol.upper()}","gatekeeper":{{{words},"peer_ip":',
        f',"backend":{_json(endpoint.backend)}',
        f',"end":{end},"enforced_by":{enforced_by}}}}}\n',
    )


def _suppressed(words: str, endpoint: EndpointKey, enforced_by: str) -> Shape:
    return (
        f'Z","event_type":"refusals_suppressed","proto":"{endpoint.protocol.upper()}","gatekeeper":{{{words},"count":',
        "",
        "",
        f',"enforced_by":{enforced_by}}}}}\n',
    )


def _labels(verdict: VerdictKey) -> str:
    words = {"listener": verdict.listener, "action": verdict.action, "rule": verdict.rule, "reason": verdict.reason}
    return _json(words)[1:-1]


def _json(value: Any) -> str:
    # ASCII only: whatever a path holds, a line stays one line and valid UTF-8.
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


def _seconds_text(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
