"""`python -m gatekeeper.proxy --channel FD`: one worker, started by the supervisor."""

from __future__ import annotations

import signal
import socket
import sys

from gatekeeper.kernel.channel import Channel
from gatekeeper.proxy.worker import main

if __name__ == "__main__":
    # The supervisor decides when to leave; a terminal's Ctrl-C reaches every process of the group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.exit(main(Channel(socket.socket(fileno=int(sys.argv[sys.argv.index("--channel") + 1])))))
