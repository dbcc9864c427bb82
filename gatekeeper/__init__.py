"""gatekeeper: a socket-level firewall that decides, for every new connection, whether a client may reach a backend."""

__version__ = "0.1.0"
