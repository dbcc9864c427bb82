"""The layer of bans in the kernel, which all programs look up first.

Single addresses are in a hash, because a trie of ten thousand of them takes ten times as long to look up; networks are in
one trie for each family. How many each holds is beside them, so that looking costs nothing while there are none. This
process alone can write there. A pinned program goes on refusing whom it found there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice

from gatekeeper.kernel import bpf, lookup

MOST_ADDRESSES = 1 << 17  # of both families; more of them go into the tries, as networks of one address
MOST_NETWORKS = 1 << 20  # of one family
_WIDTHS = {4: 32, 6: 128}
_MAPPED = 0xFFFF << 32
_VALUE = 4  # bytes; what it is does not matter

Network = tuple[int, int, int]  # family, bits, first address


class Bans:
    """``maps``: what programs look up, by name. Owns them."""

    def __init__(self, most_addresses: int = MOST_ADDRESSES) -> None:
        """Make them, empty.

        Raises:
            OSError: the kernel refused; nothing is left behind.
        """
        self.maps: dict[str, int] = {}
        self._most = most_addresses
        self._addresses: set[int] = set()  # IPv4 as IPv4-mapped
        self._networks: set[Network] = set()
        self._lengths: dict[int, set[int]] = {4: set(), 6: set()}  # of the networks
        try:
            self.maps["bans"] = bpf.create_map(bpf.ARRAY, 4, lookup.BANS.size, 1)
            self.maps["banned"] = bpf.create_map(bpf.HASH, lookup.ADDRESS_BYTES, _VALUE, most_addresses, bpf.NO_PREALLOC)
            for family, key in ((4, lookup.BAN_KEY_V4), (6, lookup.BAN_KEY_V6)):
                self.maps[f"bans_v{family}"] = bpf.create_map(
                    bpf.LPM_TRIE, key.size, _VALUE, MOST_NETWORKS, bpf.NO_PREALLOC
                )
        except BaseException:
            self.close()
            raise

    def hold(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        """Ban these (family, first, last) and nobody else. Whom the old and the new bans name is banned throughout.

        Raises:
            OSError: there are too many, or no memory; whom the old bans name is still banned.
        """
        addresses, wide = set(), []
        for one in ranges:
            family, first, last = one
            if first == last:
                addresses.add(first | _MAPPED if family == 4 else first)
            else:
                wide.append(one)
        networks = {(family, *found) for family, first, last in wide for found in prefixes(first, last, _WIDTHS[family])}
        if len(addresses) > self._most:
            stay = addresses & self._addresses
            stay |= set(islice(addresses - stay, self._most - len(stay)))
            networks |= {_alone(address) for address in addresses - stay}
            addresses = stay
        fewer_addresses, fewer_networks = self._addresses - addresses, self._networks - networks
        room = self._most - len(addresses)
        # Those that stay banned first, then the others go: but where both do not fit, room is made before.
        self._remove(set(islice(fewer_addresses, max(len(fewer_addresses) - room, 0))), set())
        self._add(addresses - self._addresses, networks - self._networks)
        self._remove(fewer_addresses & self._addresses, fewer_networks)

    def __contains__(self, source: tuple[int, int]) -> bool:
        """Say whether a (family, address) is banned."""
        family, address = source
        if (address | _MAPPED if family == 4 else address) in self._addresses:
            return True
        width = _WIDTHS[family]
        return any(
            (family, bits, address >> width - bits << width - bits) in self._networks for bits in self._lengths[family]
        )

    def __bool__(self) -> bool:
        """Say whether anybody is banned."""
        return bool(self._addresses or self._networks)

    def _add(self, addresses: set[int], networks: set[Network]) -> None:
        # Noted before it is done: what is not there is taken away again without harm.
        self._addresses |= addresses
        self._networks |= networks
        keys = [address.to_bytes(lookup.ADDRESS_BYTES, "big") for address in addresses]
        bpf.update_many(self.maps["banned"], b"".join(keys), bytes(_VALUE * len(keys)), len(keys))
        for family in _WIDTHS:
            keys = [_key(network) for network in networks if network[0] == family]
            bpf.update_many(self.maps[f"bans_v{family}"], b"".join(keys), bytes(_VALUE * len(keys)), len(keys))
        self._tell_numbers()  # a program that sees them finds the elements

    def _remove(self, addresses: set[int], networks: set[Network]) -> None:
        for address in addresses:
            with contextlib.suppress(FileNotFoundError):
                bpf.delete(self.maps["banned"], address.to_bytes(lookup.ADDRESS_BYTES, "big"))
            self._addresses.discard(address)
        for network in networks:
            with contextlib.suppress(FileNotFoundError):
                bpf.delete(self.maps[f"bans_v{network[0]}"], _key(network))
            self._networks.discard(network)
        self._tell_numbers()

    def _tell_numbers(self) -> None:
        lengths = {family: [bits for one, bits, _first in self._networks if one == family] for family in _WIDTHS}
        self._lengths = {family: set(found) for family, found in lengths.items()}
        numbers = lookup.BANS.pack(len(self._addresses), len(lengths[4]), len(lengths[6]), 0)
        bpf.update(self.maps["bans"], bytes(4), numbers)

    def close(self) -> None:
        """Close them; programs that are in force keep them."""
        for fd in self.maps.values():
            os.close(fd)
        self.maps = {}


def prefixes(first: int, last: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the fewest networks (bits, first address) that are together the addresses from ``first`` to ``last``."""
    while first <= last:
        # As many addresses as the network's alignment allows, and no more than there are.
        free = min((first & -first).bit_length() - 1 if first else width, (last - first + 1).bit_length() - 1)
        yield width - free, first
        first += 1 << free


def _alone(address: int) -> Network:
    mapped = address >> 32 == _MAPPED >> 32
    return (4, 32, address & 0xFFFFFFFF) if mapped else (6, 128, address)


def _key(network: Network) -> bytes:
    family, bits, first = network
    if family == 4:
        return lookup.BAN_KEY_V4.pack(bits, first.to_bytes(4, "big"))
    return lookup.BAN_KEY_V6.pack(bits, first.to_bytes(16, "big"))
