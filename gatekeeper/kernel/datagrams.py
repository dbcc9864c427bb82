"""Many datagrams with one system call: recvmmsg(2) and sendmmsg(2), which Python does not have.

The structures that the kernel reads and writes are laid out once, in memory of ours; for each call only the numbers in
them change. A datagram has a room of its own there, so nothing is copied on the way from one box to the next socket.
Pages that no datagram has needed yet take no memory.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct

MOST = 64  # datagrams in a box
ROOM_BYTES = 1 << 16  # no datagram is larger
NAME_BYTES: dict[int, int] = {socket.AF_INET: 16, socket.AF_INET6: 28}  # struct sockaddr_in, sockaddr_in6

_NAME_ROOM = 32
_CONTROL_ROOM = 64
_MSG_DONTWAIT = 0x40
_CONTROL_HEADER = struct.Struct("@Nii")  # cmsg_len, cmsg_level, cmsg_type; what follows is aligned like it
_PKTINFO_V4 = struct.Struct("=i4s4s")  # interface, local address (the one to answer from), destination in the header
_PKTINFO_V6 = struct.Struct("=16si")
_IP_PKTINFO = 8
_IPV6_PKTINFO = getattr(socket, "IPV6_PKTINFO", 50)

# Without releasing the interpreter's lock: these calls never wait, and a worker has no second thread.
_libc = ctypes.PyDLL(None, use_errno=True)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """Struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p), ("name_bytes", ctypes.c_uint32),
        ("vector", ctypes.c_void_p), ("vectors", ctypes.c_size_t),
        ("control", ctypes.c_void_p), ("control_bytes", ctypes.c_size_t), ("flags", ctypes.c_int),
    )  # fmt: skip


class _Message(ctypes.Structure):
    """Struct mmsghdr."""

    _fields_ = (("header", _Header), ("received", ctypes.c_uint))


_recvmmsg, _sendmmsg = _libc.recvmmsg, _libc.sendmmsg
_recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
_MESSAGE_BYTES = ctypes.sizeof(_Message)


class _Box:
    """``rooms`` are views of `ROOM_BYTES` each; the other views have an item for each room."""

    def __init__(self) -> None:
        data = mmap.mmap(-1, MOST * ROOM_BYTES)
        names, controls = bytearray(MOST * _NAME_ROOM), bytearray(MOST * _CONTROL_ROOM)
        vectors, messages = bytearray(MOST * ctypes.sizeof(_Vector)), bytearray(MOST * _MESSAGE_BYTES)
        data_at, self._at = _address(data), _address(messages)
        names_at, controls_at, vectors_at = _address(names), _address(controls), _address(vectors)
        vector_of, message_of = (_Vector * MOST).from_buffer(vectors), (_Message * MOST).from_buffer(messages)
        for i in range(MOST):
            vector_of[i] = _Vector(data_at + i * ROOM_BYTES, ROOM_BYTES)
            message_of[i].header = _Header(
                name=names_at + i * _NAME_ROOM, vector=vectors_at + i * ctypes.sizeof(_Vector), vectors=1,
                control=controls_at + i * _CONTROL_ROOM,
            )  # fmt: skip
        view = memoryview(data)
        self.rooms = [view[at : at + ROOM_BYTES] for at in range(0, MOST * ROOM_BYTES, ROOM_BYTES)]
        self._names, self._controls = memoryview(names), memoryview(controls)
        self._sizes = _column(vectors, "N", _Vector.length.offset, ctypes.sizeof(_Vector))
        self._name_bytes = _column(messages, "I", _Header.name_bytes.offset, _MESSAGE_BYTES)
        self._control_bytes = _column(messages, "N", _Header.control_bytes.offset, _MESSAGE_BYTES)
        self._received = _column(messages, "I", _Message.received.offset, _MESSAGE_BYTES)


class Inbox(_Box):
    """Takes in what has come to a socket. What is in it is overwritten by the next call."""

    def __init__(self) -> None:
        super().__init__()
        self._family = 0

    def receive(self, fd: int, family: int, *, control: bool) -> tuple[list[int], bytes]:
        """Return the sizes of the datagrams that waited at a socket, at most `MOST`, and the names of their sources.

        Datagram ``i`` lies in the first bytes of ``rooms[i]``, and its source is what `name_at` finds in the names. With
        ``control`` `local_address` tells where it was sent to. Never waits; an empty list: there was nothing.

        Raises:
            OSError: an error of the socket, which is cleared thereby.
        """
        # The kernel has written how long they were the last time: names of one family always the same, control messages
        # only where they were asked for.
        if family != self._family:
            self._family = family
            self._name_bytes[:] = _ALL_NAMES
        if control:
            self._control_bytes[:] = _ALL_CONTROLS
        count = _recvmmsg(fd, self._at, MOST, _MSG_DONTWAIT, None)
        if count < 0:
            number = ctypes.get_errno()
            if number in (errno.EAGAIN, errno.EINTR):
                return [], b""
            raise OSError(number, os.strerror(number))
        return self._received[:count].tolist(), bytes(self._names[: count * _NAME_ROOM])

    def local_address(self, i: int) -> bytes:
        """Return the packed address that datagram ``i`` was sent to.

        Raises:
            OSError: the kernel does not say so; the socket was not asked to.
        """
        at = i * _CONTROL_ROOM
        _length, level, kind = _CONTROL_HEADER.unpack_from(self._controls, at)
        if self._control_bytes[i] and (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            return bytes(_PKTINFO_V4.unpack_from(self._controls, at + _CONTROL_HEADER.size)[1])
        if self._control_bytes[i] and (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO):
            return bytes(_PKTINFO_V6.unpack_from(self._controls, at + _CONTROL_HEADER.size)[0])
        raise OSError("the kernel did not say which address a datagram came to")


class Outbox(_Box):
    """Collects datagrams that leave from one socket. ``rooms[count]`` is where the next one is to be put."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._fd = -1
        self._layout = (0, 0)  # family and length of control messages that the structures say now

    def begin(self, fd: int, family: int, control_bytes: int) -> None:
        """Send from this socket from now on, each with a control message of this length; the box must be empty."""
        self._fd = fd
        if self._layout != (family, control_bytes):
            self._layout = family, control_bytes
            self._name_bytes[:] = _array("I", NAME_BYTES[family])
            self._control_bytes[:] = _array("N", control_bytes)

    def put(self, size: int, name: bytes, control: bytes) -> None:
        """Add a datagram: the first ``size`` bytes of the next room, to ``name``. There must be a room."""
        i = self.count
        self._sizes[i] = size
        at = i * _NAME_ROOM
        self._names[at : at + len(name)] = name
        if control:
            at = i * _CONTROL_ROOM
            self._controls[at : at + len(control)] = control
        self.count = i + 1

    def size(self, i: int) -> int:
        """Return the size of datagram ``i``, also of one that is gone already."""
        return int(self._sizes[i])

    def send(self) -> list[int]:
        """Send all and empty the box; return which of them could not be sent."""
        count, self.count = self.count, 0
        failed: list[int] = []
        at = 0
        while at < count:
            sent = _sendmmsg(self._fd, self._at + at * _MESSAGE_BYTES, count - at, _MSG_DONTWAIT)
            if sent <= 0:  # the error is the first one's; those behind it may fare better
                failed.append(at)
                sent = 1
            at += sent
        return failed


def name_at(names: bytes, i: int, family: int) -> bytes:
    """Return the name of the ``i``-th source of what `Inbox.receive` has returned."""
    at = i * _NAME_ROOM
    return names[at : at + NAME_BYTES[family]]


def host_and_port(name: bytes) -> tuple[str, int]:
    """Return the address in a name, as the kernel writes it, without a scope."""
    port = int.from_bytes(name[2:4], "big")
    if len(name) == NAME_BYTES[socket.AF_INET]:
        return socket.inet_ntoa(name[4:8]), port
    return socket.inet_ntop(socket.AF_INET6, name[8:24]), port


def reply_from(local: bytes) -> bytes:
    """Return the control message that makes a datagram leave from ``local``."""
    if len(local) == 4:
        level, kind, data = socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO_V4.pack(0, local, local)
    else:
        level, kind, data = socket.IPPROTO_IPV6, _IPV6_PKTINFO, _PKTINFO_V6.pack(local, 0)
    length = _CONTROL_HEADER.size + len(data)
    return (_CONTROL_HEADER.pack(length, level, kind) + data).ljust(socket.CMSG_SPACE(len(data)), b"\0")


def _address(buffer: bytearray | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _column(table: bytearray, kind: str, offset: int, step: int) -> memoryview:
    size = struct.calcsize(kind)
    return memoryview(table).cast(kind)[offset // size :: step // size]  # type: ignore[call-overload,no-any-return]


def _array(kind: str, value: int) -> memoryview:
    return memoryview(bytearray(struct.pack(f"@{MOST}{kind}", *[value] * MOST))).cast(kind)  # type: ignore[call-overload,no-any-return]


_ALL_NAMES, _ALL_CONTROLS = _array("I", _NAME_ROOM), _array("N", _CONTROL_ROOM)
