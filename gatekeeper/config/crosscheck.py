"""What several values of a rule file say together: names given twice, sets in a circle, addresses in each other's way.

Works on the tree, not on the models, and skips what does not parse (that is reported where it stands), so that these errors
come in the same run as all others.
"""

from __future__ import annotations

import ipaddress
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gatekeeper.config import addresses
from gatekeeper.config.addresses import WILDCARDS, Span
from gatekeeper.config.files import Files
from gatekeeper.config.tree import Spot, Value
from gatekeeper.config.words import CONTROL, NAME, quote
from gatekeeper.policy.model import Backend, format_address

ENDPOINTS_MOST = 65536
CIRCLE_SHOWN = 12  # names in the message about a set that contains itself
TCP_ONLY = ("connect_timeout", "half_close_timeout")
UDP_ONLY = ("max_responses",)
METRICS = "the metrics"
NOT_GUARDED = {  # and why
    "backend": "the service has the address itself",
    "connect_timeout": "nothing is dialled",
    "idle_timeout": "its sessions do not pass through us",
    "half_close_timeout": "its sessions do not pass through us",
    "max_responses": "its sessions do not pass through us",
    "max_sessions": "its sessions do not pass through us",
}


@dataclass(frozen=True, slots=True)
class Watched:
    """A span that a listener watches, and where it is written. ``owner`` is how messages call it."""

    protocol: str
    span: Span
    spot: Spot
    owner: str


class _Ours:
    """What the listeners watch, by address, so that thousands of listeners can be compared with each other."""

    def __init__(self, watched: Iterable[Watched]) -> None:
        self._spans: dict[tuple[str, int, str], list[tuple[int, int, int, Watched]]] = {}
        for order, one in enumerate(watched):
            key = one.protocol, one.span.family, one.span.host
            self._spans.setdefault(key, []).append((one.span.first_port, one.span.last_port, order, one))
        for spans in self._spans.values():
            # Each stands where it starts, with the one that reaches farthest among those that start no later.
            spans.sort(key=lambda span: span[:3])
            for at in range(1, len(spans)):
                before, here = spans[at - 1], spans[at]
                if before[1] > here[1]:
                    spans[at] = (here[0], *before[1:])

    def reached(self, protocol: str, backend: Backend, ports: Iterable[tuple[int, int]]) -> Watched | None:
        """Return the first in the file that connections to a backend come to; ``ports`` are first and last ones.

        On a wildcard, only loopback is known to be this machine.
        """
        hosts = {backend.host}
        if backend.family and ipaddress.ip_address(backend.host).is_loopback:
            hosts.add(WILDCARDS[backend.family])
        found = []
        for host in hosts:
            spans = self._spans.get((protocol, backend.family, host), [])
            for first, last in ports:
                at = bisect_right(spans, last, key=lambda span: span[0])
                if at and spans[at - 1][1] >= first:
                    found.append(spans[at - 1][2:])
        return min(found, key=lambda each: each[0])[1] if found else None


def absolute(path: str, file: str) -> str:
    """Return a path as seen from the folder of the file that names it."""
    return os.path.abspath(os.path.join(os.path.dirname(file), path))


def crosscheck(root: Value, files: Files) -> None:
    """Record every error between values."""
    for section, kind in (("listeners", "listener"), ("rules", "rule")):
        _check_unique(root.get(section), kind, files)
    _check_circles(root.get("sets"), files)
    listeners = root.get("listeners")
    watched: list[Watched] = []
    for listener in listeners.items() if listeners else ():
        if isinstance(listener.data, dict):
            watched += _watched(listener, files)
    _check_count(watched, files)
    metrics = root.get("metrics")
    listen = metrics.get("listen") if metrics else None
    if listen is not None:
        watched += [Watched("tcp", span, listen.spot, METRICS) for span in _spans(listen)]
    _check_overlaps(watched, files)
    guarded = [listener for listener in listeners.items() if _is_guarded(listener)] if listeners else []
    owners = {METRICS, *map(_name, guarded)}  # a guarded address is a service's, and can be a backend
    ours = _Ours(one for one in watched if one.owner not in owners)
    for listener in listeners.items() if listeners else ():
        if isinstance(listener.data, dict) and not _is_guarded(listener):
            _check_backend(listener, ours, files)
            _check_on_exit(listener, files)
    _check_guarded(guarded, root, files)


def _check_unique(section: Value | None, kind: str, files: Files) -> None:
    first: dict[str, Spot] = {}
    for item in section.items() if section else ():
        name = item.get("name")
        if name is None or not isinstance(name.data, str) or not NAME.fullmatch(name.data):
            continue
        known = first.setdefault(name.data, name.spot)
        if known is not name.spot:
            where = known.place if known.place.file != name.spot.place.file else f"line {known.place.line}"
            message = f"a {kind} is called {quote(name.data)} already, in {where}: give each its own name"
            files.error(name.spot, "duplicate-name", message)


def _check_circles(sets: Value | None, files: Files) -> None:
    """Report each set that contains itself, at the member that leads back to it."""
    if sets is None or not isinstance(sets.data, dict):
        return
    done: set[str] = set()
    for start in sets.data:
        path: dict[str, None] = {}  # in order, and asked quickly
        stack: list[tuple[str, Iterator[Value]]] = [] if start in done else [(start, sets.data[start].items())]
        if stack:
            path[start] = None
        while stack:
            member = next(stack[-1][1], None)
            if member is None:
                done.add(stack.pop()[0])
                path.popitem()
            elif isinstance(member.data, str) and member.data in path:
                names = list(path)
                names = [*names[names.index(member.data) :], member.data]
                if len(names) > CIRCLE_SHOWN:
                    names[CIRCLE_SHOWN // 2 : -CIRCLE_SHOWN // 2] = ["..."]
                circle = " > ".join(names)
                files.error(member.spot, "set", f"the set {quote(member.data)} contains itself: {circle}")
            elif isinstance(member.data, str) and member.data in sets.data and member.data not in done:
                path[member.data] = None
                stack.append((member.data, sets.data[member.data].items()))


def _protocol(listener: Value) -> str:
    protocol = listener.get("protocol")
    return "udp" if protocol is not None and protocol.data == "udp" else "tcp"


def _is_guarded(listener: Value) -> bool:
    path = listener.get("path")
    return path is not None and path.data == "guard"


def _check_on_exit(listener: Value, files: Files) -> None:
    if listener.get("on_exit") is not None:
        message = 'on_exit is for guarded listeners: what we listen at ourselves is closed when we are gone; remove it, or write "path: guard"'
        files.error(listener.keys["on_exit"], "listener.on_exit", message)


def _check_guarded(guarded: list[Value], root: Value, files: Files) -> None:
    """Report what cannot be had where the kernel refuses and steps aside."""
    first: Value | None = None
    for listener in guarded:
        for key, why in NOT_GUARDED.items():
            if listener.get(key) is not None:
                files.error(listener.keys[key], f"listener.{key}", f"{key} is nothing for a guarded listener: {why}; remove it")
        listen = listener.get("listen")
        for item in listen.items() if listen else ():
            if any(span.family == 0 for span in _spans(item)):
                files.error(item.spot, "listener.listen", "the kernel guards ports; a unix socket has none: use the rights of its file")
        on_exit = listener.get("on_exit")
        if on_exit is None:
            message = 'the key "on_exit" is missing here: closed (the last policy stays in force when gatekeeper is gone) or open (nobody is refused then)'
            files.error(listener.spot, "missing-key", message)
        elif first is None:
            first = on_exit
        elif on_exit.data != first.data and on_exit.data in {"closed", "open"}:
            message = f"one program guards all listeners, and line {first.spot.place.line} says {quote(first.text)}: write the same here"
            files.error(on_exit.spot, "listener.on_exit", message)
    kernel = root.get("kernel")
    if guarded and kernel is not None and kernel.data in {"auto", "off"}:
        message = f'{_name(guarded[0])} is guarded, which only the kernel can do: write "require", or leave the key out'
        files.error(kernel.spot, "kernel", message)


def _name(listener: Value) -> str:
    name = listener.get("name")
    return f"listener {quote(name.text)}" if name is not None and name.text else "a listener"


def _spans(item: Value) -> tuple[Span, ...]:
    """Return what an item of ``listen`` names, nothing when it is in error. Paths are absolute."""
    try:
        spans = addresses.parse_listen(item.text)
    except ValueError:
        return ()
    file = item.spot.place.file
    return tuple(Span(0, absolute(one.host, file), 0, 0) if one.family == 0 else one for one in spans)


def _watched(listener: Value, files: Files) -> Iterator[Watched]:
    """Yield what a listener watches; report what its protocol does not have."""
    protocol = _protocol(listener)
    for key in TCP_ONLY if protocol == "udp" else UDP_ONLY:
        if listener.get(key) is not None and isinstance(listener.data, dict):
            other = "tcp" if protocol == "udp" else "udp"
            files.error(listener.keys[key], f"listener.{key}", f"{key} is for {other} listeners, this one is {protocol}: remove it")
    listen = listener.get("listen")
    for item in listen.items() if listen else ():
        for span in _spans(item):
            if span.family == 0 and protocol == "udp":
                message = "a udp listener has addresses and ports, not unix sockets: write one like 0.0.0.0:53"
                files.error(item.spot, "listener.listen", message)
            elif span.family == 0:
                _check_path(span.host, item.spot, "listener.listen", files)
            yield Watched(protocol, span, item.spot, _name(listener))


def _check_path(path: str, spot: Spot, code: str, files: Files) -> None:
    """Report a relative path that is good for nothing once it is absolute."""
    if CONTROL.search(path):
        files.error(spot, code, f"the path is {quote(path)}, with a control character in it: move this file to another folder")
    if len(os.fsencode(path)) > addresses.PATH_MOST:
        message = f"the path is {quote(path)}, but the kernel takes at most {addresses.PATH_MOST} bytes: write a shorter one"
        files.error(spot, code, message)


def _check_count(watched: list[Watched], files: Files) -> None:
    total = 0
    for one in watched:
        total += one.span.last_port - one.span.first_port + 1
        if total > ENDPOINTS_MOST:
            files.error(one.spot, "listener.listen", f"with this range there are more than {ENDPOINTS_MOST} addresses to watch")
            return


def _check_overlaps(watched: list[Watched], files: Files) -> None:
    """Report what is watched twice, at the later place. A wildcard beside an exact address is fine: the exact one wins."""
    order = {id(one): number for number, one in enumerate(watched)}
    latest: dict[tuple[str, int, str], Watched] = {}
    for one in sorted(watched, key=lambda one: (one.span.first_port, order[id(one)])):
        key = (one.protocol, one.span.family, one.span.host)
        before = latest.get(key)
        if before is not None and one.span.first_port <= before.span.last_port:
            first, second = sorted((before, one), key=lambda each: order[id(each)])
            what = f"{one.protocol}:{format_address(one.span.family, one.span.host, one.span.first_port)}"
            line = f"line {first.spot.place.line}"
            files.error(second.spot, "listener.listen", f"{what} is watched already by {first.owner} ({line}): listen there once")
        if before is None or one.span.last_port > before.span.last_port:
            latest[key] = one


def _check_backend(listener: Value, ours: _Ours, files: Files) -> None:
    """Report a backend that cannot go with its listener, or that is one of our own listeners."""
    item = listener.get("backend")
    if item is None:
        return
    try:
        backend = addresses.parse_backend(item.text)
    except ValueError:
        return
    protocol = _protocol(listener)
    if backend.family == 0:
        backend = Backend(0, absolute(backend.host, item.spot.place.file), 0)
        _check_path(backend.host, item.spot, "listener.backend", files)
        if protocol == "udp":
            files.error(item.spot, "listener.backend", "a udp listener has a backend with an address, like 127.0.0.1:5353")
    listen = listener.get("listen")
    own = [span for each in (listen.items() if listen else ()) for span in _spans(each)]
    if backend.family and not backend.port and any(span.family == 0 for span in own):
        message = f"the backend needs a port, like {format_address(backend.family, backend.host, 8080)}: a unix socket has none to keep"
        files.error(item.spot, "listener.backend", message)
    ports = [(backend.port, backend.port)] if backend.port or not backend.family else [span[2:] for span in own if span.family]
    one = ours.reached(protocol, backend, ports)
    if one is not None:
        first = max(one.span.first_port, min(first for first, _ in ports))
        what = format_address(one.span.family, one.span.host, first)
        files.error(
            item.spot, "listener.backend",
            f"the backend is what {one.owner} watches itself ({what}, line {one.spot.place.line}): "
            "connections would come back to us; let the service listen elsewhere",
        )  # fmt: skip
