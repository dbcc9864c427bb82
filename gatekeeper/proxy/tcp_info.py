"""What the kernel knows of one TCP connection: fields of ``struct tcp_info`` in linux/tcp.h, and the queue to the peer."""

from __future__ import annotations

import _socket
import struct
import sys
import termios
from fcntl import ioctl

_BYTES = 148  # up to tcpi_notsent_bytes, which every kernel since 4.6 tells
_STATE = 0
_RTT_US = 68
_TOTAL_RETRANSMITS = 100
_NOT_SENT = 144
_CLOSED_BY_PEER = {7, 8, 9, 11}  # TCP_CLOSE, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING


def details(fd: int) -> dict[str, int] | None:
    """Return round-trip time, retransmitted segments, and bytes on their way to the peer; ``None`` if it is no TCP socket."""
    try:
        info = _read(fd)
        queued = int.from_bytes(ioctl(fd, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return None
    rtt_us, retransmits, unsent = (
        struct.unpack_from("=I", info, at)[0] for at in (_RTT_US, _TOTAL_RETRANSMITS, _NOT_SENT)
    )
    return {"rtt_us": rtt_us, "retransmits": retransmits, "unsent": unsent, "unacked": max(queued - unsent, 0)}


def has_closed(fd: int) -> bool:
    """Say whether the peer of a connection has sent its end, read or not."""
    try:
        return _read(fd)[_STATE] in _CLOSED_BY_PEER
    except OSError:
        return False


def _read(fd: int) -> bytes:
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0, fd)
    try:
        info = sock.getsockopt(_socket.IPPROTO_TCP, _socket.TCP_INFO, _BYTES)
    finally:
        sock.detach()
    if len(info) < _BYTES:
        raise OSError("this kernel tells too little")
    return info
