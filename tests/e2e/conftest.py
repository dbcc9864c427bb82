"""What the end-to-end tests share beside `tests/conftest.py`."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.support.clients import PATIENCE_S


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A listening socket of which the test itself accepts the connections."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        listening.settimeout(PATIENCE_S)
        yield listening
