"""What workers tell the observer: fixed records, many to a message of a SOCK_SEQPACKET socket.

Slots and endpoint numbers are assigned by the supervisor for the life of the service, so a record can be read without
knowing which policy was in force. The reader treats every field as hostile: a worker talks to strangers.
"""

from __future__ import annotations

import struct

# kind, end (counters.End; its upper half is counters.Cause + 1 when a backend could not be reached), source family (4, 6, 0 unix), zero; slot; endpoint; source port, destination port; flow id;
# start (Unix time, s); duration (s); bytes in; bytes out; source and destination address, IPv4 in the first four bytes
RECORD = struct.Struct("<BBBxIIHHQddQQ16s16s")
MAX_RECORDS = 256  # a message
END_MASK = 15
CAUSE_SHIFT = 4

CONNECTION = 1  # an allowed session ended
REFUSAL = 2  # a connection or datagram was refused
SUPPRESSED = 3  # bytes in = refusals of this slot and endpoint that the budget left out
