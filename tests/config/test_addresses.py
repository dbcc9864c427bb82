from __future__ import annotations

import ipaddress
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatekeeper.config.addresses import Span, parse_backend, parse_listen, parse_source
from gatekeeper.policy.model import Backend

V6_ALL = (6, 0, 2**128 - 1)


@pytest.mark.parametrize(("text", "first", "last"), [
    ("198.51.100.7", "198.51.100.7", "198.51.100.7"),
    ("198.51.100.0/24", "198.51.100.0", "198.51.100.255"),
    ("0.0.0.0/0", "0.0.0.0", "255.255.255.255"),
    ("198.51.100.7/32", "198.51.100.7", "198.51.100.7"),
    ("203.0.113.10-203.0.113.20", "203.0.113.10", "203.0.113.20"),
    ("203.0.113.10-203.0.113.10", "203.0.113.10", "203.0.113.10"),
    ("::1", "::1", "::1"),
    ("2001:DB8::/32", "2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"),
    ("2001:db8::1-2001:db8::9", "2001:db8::1", "2001:db8::9"),
    ("::ffff:198.51.100.7", "198.51.100.7", "198.51.100.7"),  # IPv4-mapped is IPv4
    ("::ffff:c633:6407", "198.51.100.7", "198.51.100.7"),
    ("::ffff:10.0.0.0/104", "10.0.0.0", "10.255.255.255"),
    ("::ffff:0:0/96", "0.0.0.0", "255.255.255.255"),
    ("::ffff:10.0.0.1-::ffff:10.0.0.9", "10.0.0.1", "10.0.0.9"),
    ("::/0", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),  # wider than the mapped block: stays IPv6
])  # fmt: skip
def test_a_source_is_a_family_and_its_first_and_last_address(text: str, first: str, last: str) -> None:
    """Addresses, networks and ranges of both families."""
    low, high = ip_address(first), ip_address(last)
    assert parse_source(text) == (low.version, int(low), int(high))


@given(st.sampled_from([ipaddress.IPv4Address, ipaddress.IPv6Address]), st.integers(0, 2**128 - 1), st.integers(0, 128))
def test_networks_are_what_the_standard_library_says(
    kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address], number: int, prefix: int
) -> None:
    """A network without host bits has the bounds that `ipaddress` gives; with host bits the message names that network."""
    address = kind(number % (2 ** kind(0).max_prefixlen))
    prefix = min(prefix, address.max_prefixlen)
    network = ipaddress.ip_network(f"{address}/{prefix}", strict=False)
    if network.network_address == address:
        family, first, last = parse_source(f"{address}/{prefix}")
        if family == network.version:  # not IPv4-mapped
            assert (first, last) == (int(network[0]), int(network[-1]))
    else:
        with pytest.raises(ValueError, match="host bits") as refused:
            parse_source(f"{address}/{prefix}")
        assert f'did you mean "{network}"?' in str(refused.value)


@given(st.text(st.sampled_from("0123456789abcdefx.:/-%[]* \x00é"), max_size=24))
def test_anything_else_is_refused_with_a_message(text: str) -> None:
    """No text makes a parser fail in any other way than with a ValueError for people."""
    for parse in (parse_source, parse_listen, parse_backend):
        message = ""
        try:
            parse(text)
        except ValueError as err:
            message = str(err)
        else:
            continue
        assert message
        assert message.isprintable()


@pytest.mark.parametrize(("text", "spans"), [
    ("0.0.0.0:22", [(4, "0.0.0.0", 22, 22)]),
    ("[::]:22", [(6, "::", 22, 22)]),
    ("*:22", [(4, "0.0.0.0", 22, 22), (6, "::", 22, 22)]),
    ("127.0.0.1:8000-8010", [(4, "127.0.0.1", 8000, 8010)]),
    ("*:1-65535", [(4, "0.0.0.0", 1, 65535), (6, "::", 1, 65535)]),
    ("[2001:DB8:0::1]:53", [(6, "2001:db8::1", 53, 53)]),  # canonical
    ("unix:/run/x.sock", [(0, "/run/x.sock", 0, 0)]),
])  # fmt: skip
def test_a_place_to_listen(text: str, spans: list[tuple[int, str, int, int]]) -> None:
    """One host and a range of ports for each family that is meant."""
    assert parse_listen(text) == tuple(Span(*span) for span in spans)


@pytest.mark.parametrize(("text", "backend"), [
    ("127.0.0.1:2222", Backend(4, "127.0.0.1", 2222)),
    ("127.0.0.1", Backend(4, "127.0.0.1", 0)),  # keeps the destination port
    ("[::1]:2222", Backend(6, "::1", 2222)),
    ("[::1]", Backend(6, "::1", 0)),
    ("::1", Backend(6, "::1", 0)),
    ("2001:db8:0:0:0:0:0:22", Backend(6, "2001:db8::22", 0)),  # eight groups: 22 can be no port
    ("unix:/run/app.sock", Backend(0, "/run/app.sock", 0)),
])  # fmt: skip
def test_a_backend(text: str, backend: Backend) -> None:
    """An address with or without a port, or the path of a unix socket."""
    assert parse_backend(text) == backend
