"""Addresses as people write them: sources, places to listen, backends. Pure; every refusal says what would be right.

An IPv4-mapped IPv6 address (``::ffff:198.51.100.7``) is the IPv4 address. Zone indices (``%eth0``) are refused.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from gatekeeper.config.words import CONTROL, quote
from gatekeeper.policy.model import Backend

MAPPED_FIRST = 0xFFFF << 32  # ::ffff:0.0.0.0
MAPPED_LAST = MAPPED_FIRST | 0xFFFFFFFF
PATH_MOST = 107  # bytes in sockaddr_un.sun_path, without the closing NUL
WILDCARDS = {4: "0.0.0.0", 6: "::"}

_HOST_NAME = re.compile(r"(?=.*[a-zA-Z])[a-zA-Z0-9_](?:[a-zA-Z0-9_-]*[a-zA-Z0-9_])?(?:\.[a-zA-Z0-9_-]+)*\.?")
_PORTS = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_SOURCE_SHAPES = "an address, a network like 10.0.0.0/8 or a range like 10.0.0.1-10.0.0.9"


class Span(NamedTuple):
    """Addresses to listen on: one host with a range of ports, or (family 0) the path of a unix socket."""

    family: int
    host: str
    first_port: int
    last_port: int


def parse_source(text: str) -> tuple[int, int, int]:
    """Return (family, first address, last address) of an address, a network or a range.

    Raises:
        ValueError: it is none of these; the message is for people.
    """
    if "/" in text:
        return _parse_network(text)
    if "-" in text:
        return _parse_range(text)
    family, address = _parse_address(text, _SOURCE_SHAPES)
    return family, address, address


def parse_ports(text: str, what: str) -> tuple[int, int]:
    """Return the first and last port of ``22`` or ``8000-8010``; ``what`` is the whole text, for messages.

    Raises:
        ValueError: it is neither.
    """
    shown = quote(what) if text == what else f"{quote(what)}: {quote(text)}"
    found = _PORTS.fullmatch(text)
    if not found or len(text) > 11:
        raise ValueError(f"{shown} is not a port or a range of ports like 8000-8010")
    for digits in filter(None, found.groups()):
        if digits.startswith("0") or int(digits) > 65535:
            shown = quote(what) if digits == what else f"{quote(what)}: {quote(digits)}"
            raise ValueError(f"{shown} is not a port: ports are 1 to 65535, without leading zeros")
    first, last = int(found[1]), int(found[2] or found[1])
    if first > last:
        raise ValueError(f'{quote(what)}: the ports run backwards, did you mean "{last}-{first}"?')
    return first, last


def parse_listen(text: str) -> tuple[Span, ...]:
    """Return what one item of ``listen`` names; ``*`` is both families.

    Raises:
        ValueError: it is no place to listen; the message is for people.
    """
    if text.startswith("unix:"):
        return (Span(0, _parse_path(text), 0, 0),)
    shapes = 'write an address and a port like 0.0.0.0:22, "[::]:22", "*:22" (both families) or unix:/run/x.sock'
    if _PORTS.fullmatch(text.removeprefix(":")):
        bare = text.removeprefix(":")
        raise ValueError(f'{quote(text)} does not say on which address, did you mean "*:{bare}" or "127.0.0.1:{bare}"?')
    host, port = _split(text, shapes)
    if port is None:
        raise ValueError(f"{quote(text)} has no port: {shapes}")
    first, last = parse_ports(port, text)
    if host == "*":
        return tuple(Span(family, WILDCARDS[family], first, last) for family in (4, 6))
    family, canonical = _parse_host(host, text, port, "listen on addresses only")
    return (Span(family, canonical, first, last),)


def parse_backend(text: str) -> Backend:
    """Return a backend; port 0 keeps the destination port.

    Raises:
        ValueError: it is no address or path; the message is for people.
    """
    if text.startswith("unix:"):
        return Backend(0, _parse_path(text), 0)
    shapes = 'write an address and a port like 127.0.0.1:2222 or "[::1]:2222", or unix:/run/app.sock'
    if _PORTS.fullmatch(text.removeprefix(":")):
        raise ValueError(f'{quote(text)} does not say on which address, did you mean "127.0.0.1:{text.removeprefix(":")}"?')
    host, port = _split(text, shapes)
    first, last = parse_ports(port, text) if port is not None else (0, 0)
    if first != last:
        raise ValueError(f"{quote(text)}: a backend has one port, or none to keep the port that the client came to")
    if host == "*":
        host = WILDCARDS[4]
    family, canonical = _parse_host(host, text, port, "names are never looked up while connections wait")
    address = ipaddress.ip_address(canonical)
    if address.is_unspecified or address.is_multicast:
        loopback = "127.0.0.1" if family == 4 else "::1"
        raise ValueError(f"{quote(text)} is not one machine's address, did you mean {quote(_join(loopback, port))}?")
    return Backend(family, canonical, first)


def _parse_path(text: str) -> str:
    """Return the path in ``unix:PATH``."""
    path = text.removeprefix("unix:")
    if path.startswith("@"):
        raise ValueError(f"{quote(text)} is an abstract socket, which anybody may take: use a path like unix:/run/app.sock")
    if not path:
        raise ValueError(f"{quote(text)} has no path: write unix:/run/app.sock")
    if CONTROL.search(path):
        raise ValueError(f"{quote(text)} has a control character in it: name the socket otherwise, like unix:/run/app.sock")
    if len(path.encode()) > PATH_MOST:
        raise ValueError(f"{quote(text)} is too long: the kernel takes at most {PATH_MOST} bytes")
    return path


def _split(text: str, shapes: str) -> tuple[str, str | None]:
    """Return host and port of ``host:port``, ``[host]:port``, ``host`` or a bare IPv6 address."""
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ValueError(f"{quote(text)} is not an address and a port: {shapes}")
        return host, rest[1:] if rest else None
    if text.count(":") > 1:
        host, _, port = text.rpartition(":")
        # "2001:db8::5:22" is an address, too: whether 22 is the port only brackets can tell.
        if _is_address(host) and _PORTS.fullmatch(port):
            raise ValueError(f'{quote(text)} needs brackets around its address, did you mean "[{host}]:{port}"?')
        return text, None
    host, colon, port = text.partition(":")
    return host, port if colon else None


def _parse_host(host: str, text: str, port: str | None, why: str) -> tuple[int, str]:
    """Return the family and the canonical text of an IP address that stands before a port."""
    if host == "localhost":
        raise ValueError(f"{quote(text)} is a host name, did you mean {quote(_join('127.0.0.1', port))}? ({why})")
    if _HOST_NAME.fullmatch(host) and not _is_address(host):
        raise ValueError(f"{quote(text)} is a host name: write its address ({why})")
    family, address = _parse_address(host, "an IP address")
    canonical = str(ipaddress.IPv4Address(address) if family == 4 else ipaddress.IPv6Address(address))
    if family == 4 and ":" in host:
        raise ValueError(f"{quote(text)} is an IPv4 address in IPv6 clothes, did you mean {quote(_join(canonical, port))}?")
    return family, canonical


def _join(host: str, port: str | None) -> str:
    if port is None:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _parse_address(text: str, shapes: str) -> tuple[int, int]:
    """Return family and number of one address, IPv4-mapped IPv6 as IPv4."""
    if "%" in text:
        zone = "%" + text.partition("%")[2]
        raise ValueError(f"{quote(text)} has a zone, which names a network card and no address: leave out {quote(zone)}")
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(_explain(text, shapes)) from None
    number = int(parsed)
    if parsed.version == 6 and MAPPED_FIRST <= number <= MAPPED_LAST:
        return 4, number - MAPPED_FIRST
    return parsed.version, number


def _explain(text: str, shapes: str) -> str:
    """Return why this text is no address."""
    if not text:
        return f"nothing stands here: write {shapes}"
    if text.isascii() and text.isdigit():
        return f"{quote(text)} is a bare number, which is never an address: write {shapes}"
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){3}", text):
        octets = [int(part) for part in text.split(".")]
        if max(octets) <= 255:
            return f"{quote(text)} has leading zeros, which some read as octal, did you mean {quote('.'.join(map(str, octets)))}?"
        return f"{quote(text)} is not an IPv4 address: {next(o for o in octets if o > 255)} is above 255"
    if re.fullmatch(r"[0-9]{1,3}(\.([0-9]{1,3}|\*)){1,3}", text) and "*" in text:
        octets_known = text[: text.index("*")].strip(".").split(".")
        network = ".".join(octets_known + ["0"] * (4 - len(octets_known))) + f"/{8 * len(octets_known)}"
        return f"{quote(text)} is not an address, did you mean the network {quote(network)}?"
    address, _, port = text.rpartition(":")
    if port.isdigit() and (address.startswith("[") or ":" not in address) and _is_address(address.strip("[]")):
        return f"{quote(text)} has a port, did you mean {quote(address.strip('[]'))}? (ports belong to listeners and to \"to\")"
    if _HOST_NAME.fullmatch(text):
        return f"{quote(text)} is a host name: write {shapes}"
    return f"{quote(text)} is not an address: write {shapes}"


def _parse_network(text: str) -> tuple[int, int, int]:
    host, _, prefix = text.partition("/")
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"{quote(text)} is not a network: {_explain(host, _SOURCE_SHAPES)}") from None
    if "%" in host:
        raise ValueError(f"{quote(text)} has a zone, which names a network card and no address: leave it out")
    bits = parsed.max_prefixlen
    if not (prefix.isascii() and prefix.isdigit() and len(prefix) <= 3 and str(int(prefix)) == prefix and int(prefix) <= bits):
        raise ValueError(f"{quote(text)}: {quote(prefix)} is not a prefix length (0 to {bits}){_netmask_hint(host, prefix)}")
    mask = (1 << (bits - int(prefix))) - 1
    first = int(parsed)
    if first & mask:
        network = type(parsed)(first & ~mask)
        raise ValueError(f'network {quote(text)} has host bits set, did you mean "{network}/{prefix}"?')
    if parsed.version == 6 and int(prefix) >= 96 and MAPPED_FIRST <= first <= MAPPED_LAST:
        return 4, first - MAPPED_FIRST, (first | mask) - MAPPED_FIRST
    return parsed.version, first, first | mask


def _netmask_hint(host: str, prefix: str) -> str:
    """Return what to write in place of ``10.0.0.0/255.0.0.0``."""
    try:
        return f', did you mean "{ipaddress.IPv4Network(f"{host}/{prefix}", strict=False)}"?'
    except ValueError:
        return ""


def _parse_range(text: str) -> tuple[int, int, int]:
    left, _, right = text.partition("-")
    if left != left.strip() or right != right.strip():
        raise ValueError(f"{quote(text)} has blanks in it, did you mean {quote(f'{left.strip()}-{right.strip()}')}?")
    if not _is_address(left) and _HOST_NAME.fullmatch(text):
        raise ValueError(f"{quote(text)} is a host name: write {_SOURCE_SHAPES}")
    if not left or not right:
        raise ValueError(f'{quote(text)} lacks an end: a range has an address on each side of the "-"')
    family, first = _parse_address(left, 'an address on each side of the "-"')
    family_of_last, last = _parse_address(right, 'an address on each side of the "-"')
    if family != family_of_last:
        raise ValueError(f"the range {quote(text)} starts in IPv{family} and ends in IPv{family_of_last}: write one for each")
    if first > last:
        raise ValueError(f'the range {quote(text)} runs backwards, did you mean "{right}-{left}"?')
    return family, first, last
