"""A control channel between two of our processes: JSON messages with descriptors over a SOCK_SEQPACKET pair."""

from __future__ import annotations

import array
import json
import os
import socket
from typing import Any

from gatekeeper.errors import ChannelClosed

MAX_FDS = 200  # a message; the kernel's limit is 253
MAX_MESSAGE_BYTES = 1 << 17


class Channel:
    """One end. Owns its socket. Not thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: dict[str, Any], fds: tuple[int, ...] | list[int] = ()) -> None:
        """Send one message; the descriptors stay open here and arrive as copies.

        Raises:
            ChannelClosed: the other process is gone.
            BlockingIOError: the socket does not block and the other process does not read.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        try:
            if fds:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                self.sock.sendmsg([data], ancillary)
            else:
                self.sock.send(data)
        except (BrokenPipeError, ConnectionError) as err:
            raise ChannelClosed(str(err)) from err

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Return one message and the descriptors that came with it (close-on-exec; the caller owns them).

        Raises:
            ChannelClosed: the other process is gone.
            BlockingIOError: the socket does not block and nothing has arrived.
            ValueError: the message is not a JSON object; what came with it is closed.
        """
        fds = array.array("i")
        try:
            # socket.recv_fds ignores its flags in Python 3.11, and descriptors must not leak into what we execute.
            data, ancillary, _flags, _address = self.sock.recvmsg(
                MAX_MESSAGE_BYTES, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError as err:
            raise ChannelClosed(str(err)) from err
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        try:
            return _decode(data), list(fds)
        except BaseException:
            for fd in fds:  # a process that sends garbage must not fill our table of descriptors with it
                os.close(fd)
            raise

    def close(self) -> None:
        self.sock.close()


def _decode(data: bytes) -> dict[str, Any]:
    if not data:
        raise ChannelClosed("the other process closed its end")
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - the caller handles one error
    return message
