"""sock_diag: the TCP connections of this network namespace, whoever owns them, and how to end one.

A question is answered in parts of some 32 KiB; the kernel makes each when the one before was read, so that going through
very many connections can be done in slices. It shows connections to everybody; ending one takes CAP_NET_ADMIN.

Unconnected UDP sockets, which is what services have, know no connections, so there are none to see.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
_NETLINK_SOCK_DIAG = 4
_BY_FAMILY, _DESTROY = 20, 21
_DONE, _ERROR = 3, 2
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_QUESTION = struct.Struct("=BBBxI48s")  # family, protocol, extensions, states, connection
_ANSWER = struct.Struct("=BBBB48sIIIII")  # family, state, timer, retransmits, connection, expires, queues in and out, uid, inode
_CONNECTION = struct.Struct("=2s2s16s16sIII")  # ports in network order, addresses, interface, cookie
_BYTECODE = 1
_INFO = 2
_OPERATION = struct.Struct("=BBH")
_JUMP, _AT_LEAST, _AT_MOST = 1, 2, 3
_MOST_RANGES = 1000  # of ports; a jump leads 64 KiB far
_PART_BYTES = 1 << 16

# struct tcp_info
_LAST_DATA_SENT, _LAST_DATA_RECEIVED, _RTT = 44, 52, 68
_RETRANSMITS, _BYTES_ACKED, _BYTES_RECEIVED, _NOT_SENT = 100, 120, 128, 144
_INFO_BYTES = 148  # up to those

ESTABLISHED, SYN_RECEIVED, FIN_WAIT_1, FIN_WAIT_2 = 1, 3, 4, 5
CLOSE_WAIT, LAST_ACK, CLOSING = 8, 9, 11
_NEW_SYN_RECEIVED = 12
_ALIVE = sum(
    1 << state
    for state in (ESTABLISHED, SYN_RECEIVED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT, LAST_ACK, CLOSING, _NEW_SYN_RECEIVED)
)
_MAPPED = bytes(10) + b"\xff\xff"
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class Info:
    """What TCP knows of a connection. Bytes in are those that were received, bytes out those that were acknowledged."""

    rtt_us: int
    retransmits: int
    unsent: int
    unacked: int
    bytes_in: int
    bytes_out: int
    idle_s: float


@dataclass(frozen=True, slots=True)
class Connection:
    """One TCP connection, as the socket at this end has it; addresses are packed, IPv4-mapped ones are IPv4.

    ``cookie`` is a number that no other socket of this boot has. ``info`` is ``None`` while the handshake goes on.
    ``key`` is for `destroy`.
    """

    state: int
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    inode: int
    cookie: int
    info: Info | None
    key: bytes

    @property
    def family(self) -> int:
        """4 or 6."""
        return 4 if len(self.remote) == 4 else 6


class Dump:
    """One look at all connections of a family of sockets whose local port lies in one of ``ports`` (first, last).

    Sockets of IPv6 may have connections of IPv4.
    """

    def __init__(self, family: int, ports: Sequence[tuple[int, int]]) -> None:
        """Ask.

        Raises:
            OSError: the kernel does not answer such questions.
        """
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
        try:
            body = _QUESTION.pack(_FAMILIES[family], socket.IPPROTO_TCP, 1 << _INFO - 1, _ALIVE, bytes(48))
            code = only_ports(ports)
            body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(code), _BYTECODE) + code
            self._sock.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST | _DUMP, 1, 0) + body)
        except BaseException:
            self._sock.close()
            raise

    def read(self) -> list[Connection] | None:
        """Return the next part, ``None`` when there is no more.

        Raises:
            OSError: the kernel refused, or could not go on.
        """
        found: list[Connection] = []
        for kind, body in _messages(self._sock.recv(_PART_BYTES)):
            if kind == _DONE:
                return found or None
            if kind == _ERROR:
                _raise(body)
            one = _connection(body)
            if one is not None:
                found.append(one)
        return found

    def close(self) -> None:
        """Forget the rest."""
        self._sock.close()


def connections(ports: Sequence[tuple[int, int]]) -> Generator[list[Connection], None, None]:
    """Yield all connections at these local ports, a part at a time.

    Raises:
        OSError: the kernel does not answer such questions.
    """
    for family in _FAMILIES:
        dump = Dump(family, ports)
        try:
            while (part := dump.read()) is not None:
                yield part
        finally:
            dump.close()


def destroy(connection: Connection) -> bool:
    """End a connection with a reset; its owner reads ECONNABORTED. Say whether it was still there.

    Raises:
        OSError: EPERM without CAP_NET_ADMIN, EOPNOTSUPP where the kernel was built without CONFIG_INET_DIAG_DESTROY.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as sock:
        body = connection.key
        sock.send(_HEADER.pack(_HEADER.size + len(body), _DESTROY, _REQUEST | _ACK, 1, 0) + body)
        for _kind, answer in _messages(sock.recv(_PART_BYTES)):
            try:
                _raise(answer)
            except FileNotFoundError:
                return False
    return True


def only_ports(ports: Sequence[tuple[int, int]]) -> bytes:
    """Return a filter: a program for the kernel that accepts sockets whose local port lies in one of these (first, last).

    It accepts where its end is reached exactly, and refuses where a jump leads past it.
    """
    if len(ports) > _MOST_RANGES:  # too long for a program: the caller looks closer anyway
        ports = [(min(first for first, _ in ports), max(last for _, last in ports))]
    size = 2 * _OPERATION.size  # an operation and its port
    each = 2 * size + _OPERATION.size
    total = each * len(ports)
    code = b""
    for number, (first, last) in enumerate(ports):
        at = number * each
        # At the last one "no" leads past the end, else to the next.
        past = 4 if number == len(ports) - 1 else 0
        code += _OPERATION.pack(_AT_LEAST, size, each + past) + _OPERATION.pack(0, 0, first)
        code += _OPERATION.pack(_AT_MOST, size, each - size + past) + _OPERATION.pack(0, 0, last)
        code += _OPERATION.pack(_JUMP, _OPERATION.size, total - at - 2 * size)
    return code


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        yield kind, data[at + _HEADER.size : at + length]
        at += max(length, _HEADER.size) + 3 & ~3


def _raise(body: bytes) -> None:
    (number,) = struct.unpack_from("=i", body)
    if number:
        raise OSError(-number, f"sock_diag: {os.strerror(-number)}")


def _connection(body: bytes) -> Connection | None:
    if len(body) < _ANSWER.size:
        raise OSError(errno.EPROTO, "sock_diag: a part of an answer is missing")
    family, state, _timer, _retransmits, number, _expires, _queue_in, queue_out, _uid, inode = _ANSWER.unpack_from(body)
    local_port, remote_port, local, remote, _interface, low, high = _CONNECTION.unpack(number)
    info, at = None, _ANSWER.size
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if kind == _INFO and length >= _ATTRIBUTE.size + _INFO_BYTES and state not in (SYN_RECEIVED, _NEW_SYN_RECEIVED):
            info = _info(body, at + _ATTRIBUTE.size, queue_out)
        at += max(length, _ATTRIBUTE.size) + 3 & ~3
    return Connection(
        state, _address(family, local), int.from_bytes(local_port, "big"),
        _address(family, remote), int.from_bytes(remote_port, "big"),
        inode, low | high << 32, info,
        _QUESTION.pack(family, socket.IPPROTO_TCP, 0, 1 << state, number),
    )  # fmt: skip


def _info(body: bytes, at: int, queue_out: int) -> Info:
    def word(offset: int) -> int:
        return int(struct.unpack_from("=I", body, at + offset)[0])

    def long(offset: int) -> int:
        return int(struct.unpack_from("=Q", body, at + offset)[0])

    unsent = word(_NOT_SENT)
    return Info(
        word(_RTT), word(_RETRANSMITS), unsent, max(queue_out - unsent, 0), long(_BYTES_RECEIVED), long(_BYTES_ACKED),
        min(word(_LAST_DATA_SENT), word(_LAST_DATA_RECEIVED)) / 1000,
    )  # fmt: skip


def _address(family: int, raw: bytes) -> bytes:
    if family == socket.AF_INET:
        return raw[:4]
    return raw[12:] if raw.startswith(_MAPPED) else raw
