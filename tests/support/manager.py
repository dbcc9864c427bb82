"""A small stand-in for what systemd does for a service: it is told how the service is, and keeps its descriptors."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.wait import until

HERE = Path(__file__).parent
MOST = 64


class Manager:
    """Descriptors given with FDSTORE=1 are in ``store``, and passed on to whatever is started with ``prefix`` and ``env``.

    Like systemd it keeps one descriptor of each open file, and passes the latest first.
    """

    def __init__(self, folder: Path) -> None:
        self.store: list[tuple[str, int]] = []
        self.told: list[str] = []
        self._lock = threading.Lock()
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / "manager"))
        self._handing_out = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._handing_out.bind(str(folder / "store"))
        self._handing_out.listen()
        self.env = {"NOTIFY_SOCKET": str(folder / "manager"), "FDSTORE": str(MOST)}
        self.prefix = (sys.executable, str(HERE / "with_store.py"), str(folder / "store"))
        self._over = False
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._hand_out)]
        for thread in self._threads:
            thread.start()

    def names(self) -> list[str]:
        """Return the names in the store, each as often as it is there."""
        with self._lock:
            return sorted(name for name, _fd in self.store)

    def wait(self, line: str, times: int = 1) -> None:
        """Return when it was told ``line`` so many times."""

        def told() -> bool:
            assert self.told.count(line) >= times, self.told
            return True

        until(told, f"the service manager is told {line}", within_s=40)

    def _listen(self) -> None:
        while not self._over:
            text, fds, _flags, _address = socket.recv_fds(self._notify, 4096, 253)
            lines = text.decode().splitlines()
            fields = dict(line.split("=", 1) for line in lines)
            with self._lock:
                if "FDSTORE" in fields:
                    for fd in fds:
                        self._keep(fields["FDNAME"], fd)
                elif "FDSTOREREMOVE" in fields:
                    for item in [item for item in self.store if item[0] == fields["FDNAME"]]:
                        self.store.remove(item)
                        os.close(item[1])
                else:
                    for fd in fds:  # BARRIER=1
                        os.close(fd)
                self.told += lines

    def _keep(self, name: str, fd: int) -> None:
        if any(os.path.sameopenfile(fd, other) for _name, other in self.store):
            os.close(fd)
        else:
            self.store.insert(0, (name, fd))
        assert len(self.store) <= MOST

    def _hand_out(self) -> None:
        while not self._over:
            client, _address = self._handing_out.accept()
            with client, self._lock:
                if self._over:
                    return
                names = ":".join(name for name, _fd in self.store)
                socket.send_fds(client, [f"{names}\n".encode()], [fd for _name, fd in self.store])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over = True
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"OVER=1", self.env["NOTIFY_SOCKET"])
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
            visitor.connect(self.prefix[-1])
        for thread in self._threads:
            thread.join()
        self._notify.close()
        self._handing_out.close()
        for _name, fd in self.store:
            os.close(fd)
