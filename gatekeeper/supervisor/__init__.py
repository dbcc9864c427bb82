"""Processes, listening sockets, reload: the parent of all others."""
