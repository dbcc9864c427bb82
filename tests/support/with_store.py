"""Execute a program with the descriptors of a `Manager` from number 3 on: `with_store.py SOCKET PROGRAM ARGUMENT...`."""

from __future__ import annotations

import fcntl
import os
import socket
import sys

FIRST, OUT_OF_THE_WAY = 3, 200

if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as manager:
        manager.connect(sys.argv[1])
        names, fds, _flags, _address = socket.recv_fds(manager, 65536, 253)
    away = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, OUT_OF_THE_WAY) for fd in fds]
    for fd in fds:
        os.close(fd)
    for index, fd in enumerate(away):
        os.dup2(fd, FIRST + index)
    if fds:
        os.environ |= {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names.decode().strip(), "LISTEN_PID": str(os.getpid())}
    os.execvp(sys.argv[2], sys.argv[2:])
