"""The counters of one worker: an array of unsigned 64-bit slots in a memfd that only this worker can write.

Slots 0-63 belong to the worker itself. Every listener name gets a block of ``LISTENER_SLOTS``, every verdict key
(listener, action, rule, reason) one slot; both are assigned by the supervisor and never reused, so that they survive
reloads. A successor of a dead worker starts from a copy of its predecessor's slots.
"""

from __future__ import annotations

import enum

CAPACITY = 1 << 20  # slots; the memory is sparse, only touched pages exist
CAPACITY_BYTES = CAPACITY * 8
WORKER_SLOTS = 64
LISTENER_SLOTS = 96


class WorkerSlot(enum.IntEnum):
    """Slots of the worker itself."""

    HEARTBEAT_MS = 0  # time.monotonic() of the latest turn of the loop
    GENERATION = 1  # the snapshot in force
    LOOP_STALL_MAX_US = 2  # the longest turn since the worker started
    EVENTS_LOST_REFUSAL = 3
    EVENTS_LOST_CONNECTION = 4
    ACCEPT_PAUSES = 5  # times a listener paused for want of descriptors or memory
    REFUSALS_SUPPRESSED = 6  # refusals left out of the audit log by the budget
    LOOP_TURNS = 7


class ListenerSlot(enum.IntEnum):
    """Offsets inside a listener's block. Gauges are marked; all else only grows."""

    SESSIONS_OPENED = 0
    SESSIONS_CLOSED = 1  # live = opened - closed
    BYTES_IN = 2  # from the client
    BYTES_OUT = 3
    ACCEPT_QUEUE = 4  # gauge: waiting in the kernel, this worker's sockets
    ACCEPT_OVERFLOWS = 5  # dropped by the kernel: queue full (TCP) or receive buffer full (UDP)
    ACCEPT_ERRORS = 6  # accepted, yet ended before it could be judged
    DATAGRAMS_LOST = 7  # UDP: accepted by policy, yet not forwarded
    ENDS = 16  # one slot per End (16)
    DURATION_SUM_US = 32
    DURATION_BUCKETS = 33  # len(DURATION_BOUNDS_S) + 1 slots, not cumulative
    DIAL_SUM_US = 64
    DIAL_BUCKETS = 65  # len(DIAL_BOUNDS_S) + 1 slots, not cumulative
    BACKEND_FAILURES = 82  # one slot per Cause (14)


DURATION_BOUNDS_S = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 21600.0, 86400.0)
DIAL_BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Cause(enum.IntEnum):
    """Why a backend could not be reached."""

    REFUSED = 0
    TIMEOUT = 1
    UNREACHABLE = 2
    RESET = 3
    RESOURCES = 4  # we ran out of descriptors, memory or ephemeral ports
    LOOP = 5  # the dial connected to itself
    MISSING = 6  # the unix socket does not exist
    DENIED = 7  # we may not: the mode of the unix socket, or a packet filter
    OTHER = 8

    @property
    def label(self) -> str:
        return self.name.lower()


class End(enum.IntEnum):
    """Why a session ended."""

    FINISHED = 0  # both sides said so
    CLIENT_RESET = 1
    BACKEND_RESET = 2
    IDLE_TIMEOUT = 3
    HALF_CLOSE_TIMEOUT = 4
    BACKEND_FAILED = 5  # the dial failed
    DRAINED = 6  # the service stopped and the deadline passed
    RESPONSES = 7  # UDP: all expected replies were forwarded
    REFUSED = 8  # never began: only in audit records of refusals
    ERROR = 9  # our own fault; the traceback is in the service log
    REMOVED = 10  # its listener was removed by a reload
    REVOKED = 11  # a new policy refuses it
    CUT = 12  # an operator ended it
    BANNED = 13  # its source was banned

    @property
    def label(self) -> str:
        return self.name.lower()
