"""Compiled policies and counters as bytes in shared memory."""
