"""bpf(2) as far as we need it: maps, programs, links, pins. No library: one system call and its argument as bytes.

Every function that returns a descriptor returns a new one, close-on-exec, that the caller closes. Errors are `OSError`;
a program that the verifier refuses is a `Refused`, which carries the verifier's words and the listing.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct

# Commands, types and flags of linux/bpf.h.
_MAP_CREATE = 0
_MAP_LOOKUP_ELEM = 1
_MAP_UPDATE_ELEM = 2
_MAP_DELETE_ELEM = 3
_PROG_LOAD = 5
_OBJ_PIN = 6
_OBJ_GET = 7
_PROG_TEST_RUN = 10
_PROG_GET_FD_BY_ID = 13
_MAP_GET_FD_BY_ID = 14
_OBJ_GET_INFO_BY_FD = 15
_PROG_QUERY = 16
_MAP_FREEZE = 22
_MAP_UPDATE_BATCH = 26
_LINK_CREATE = 28
_LINK_UPDATE = 29
_ENABLE_STATS = 32

HASH = 1
ARRAY = 2
SOCKMAP = 15
LPM_TRIE = 11
RINGBUF = 27
MMAPABLE = 1 << 10
NO_PREALLOC = 1

_SK_LOOKUP_TYPE = 30
_SK_LOOKUP_ATTACH = 36

NUMBERS = {"x86_64": 321, "aarch64": 280}  # of the system call
_NO_BATCHES = (errno.EOPNOTSUPP, 524)  # what kernels say that know none for this kind of map
_NAME = b"gatekeeper"
# None of the helpers we call asks for the GPL.
_LICENSE = b"Apache-2.0"
_LOG_BYTES = 1 << 20
_LOG_SHOWN_BYTES = 4000  # its end says what is wrong
_PROGRAM_INFO_BYTES = 208
_MAP_INFO_BYTES = 80
_LINK_INFO_BYTES = 32  # type, id, program id, then what depends on the type
_MAP_IDS_AT = 52  # in struct bpf_prog_info: their number, then where to write them
_RUN_TIME_AT = 192  # in struct bpf_prog_info: run_time_ns, then run_cnt
_CONTEXT_BYTES = 72  # struct bpf_sk_lookup

_ADVICE = {
    errno.EPERM: "it takes CAP_BPF and CAP_NET_ADMIN outside of user namespaces (systemd: AmbientCapabilities=CAP_BPF "
    "CAP_NET_ADMIN), and a seccomp profile that allows bpf",
    errno.EINVAL: "it takes Linux 5.9 or newer",
    errno.ENOSYS: "it takes a kernel with CONFIG_BPF_SYSCALL, on x86-64 or arm64",
    errno.ENOMEM: "the table does not fit into memory",
}

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(OSError):
    """The kernel did not take a program. ``listing`` is the program, ``log`` what the verifier said (both may be long)."""

    def __init__(self, number: int, log: str, listing: str) -> None:
        text = f"the kernel refuses the program: {os.strerror(number)}"
        super().__init__(number, f"{text}\n{log[-_LOG_SHOWN_BYTES:]}" if log else text)
        self.log = log
        self.listing = listing


def advice(err: OSError) -> str:
    """Return what is probably missing when a call fails like this; empty when we do not know."""
    return _ADVICE.get(err.errno or 0, "")


def create_map(kind: int, key_bytes: int, value_bytes: int, entries: int, flags: int = 0) -> int:
    """Return a new map."""
    attributes = struct.pack("=IIIIIII16s", kind, key_bytes, value_bytes, entries, flags, 0, 0, _NAME)
    return _bpf(_MAP_CREATE, attributes, "BPF_MAP_CREATE")


def table(value_bytes: int, entries: int, *contents: memoryview) -> int:
    """Return an array filled with ``contents``, one after the other, that nobody can change any more by whatever means.

    ``value_bytes`` is a multiple of 8: the kernel lays elements out at such distances. What is not filled is 0.
    """
    fd = create_map(ARRAY, 4, value_bytes, entries, MMAPABLE)
    try:
        # Unmapped before it is frozen: a writable mapping, and Python's copy of the descriptor, would forbid that.
        with mmap.mmap(fd, value_bytes * entries) as memory:
            at = 0
            for part in contents:
                memory[at : at + part.nbytes] = part.cast("B")
                at += part.nbytes
        freeze(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def freeze(fd: int) -> None:
    """Let no process change a map any more; programs may."""
    _bpf(_MAP_FREEZE, struct.pack("=I", fd), "BPF_MAP_FREEZE")


def update(fd: int, key: bytes, value: bytes) -> None:
    """Set one element of a map."""
    keys, values = _buffer(key), _buffer(value)
    attributes = struct.pack("=IxxxxQQQ", fd, ctypes.addressof(keys), ctypes.addressof(values), 0)
    _bpf(_MAP_UPDATE_ELEM, attributes, "BPF_MAP_UPDATE_ELEM")


def delete(fd: int, key: bytes) -> None:
    """Take one element out of a map.

    Raises:
        OSError: ENOENT when there is none.
    """
    keys = _buffer(key)
    _bpf(_MAP_DELETE_ELEM, struct.pack("=IxxxxQQQ", fd, ctypes.addressof(keys), 0, 0), "BPF_MAP_DELETE_ELEM")


def update_many(fd: int, keys: bytes, values: bytes, count: int) -> None:
    """Set ``count`` elements of a hash or a trie; keys and values follow one another.

    Raises:
        OSError: some of them are set, others are not.
    """
    if not count:
        return
    key_buffer, value_buffer = _buffer(keys), _buffer(values)
    attributes = struct.pack(
        "=QQQQIIQQ", 0, 0, ctypes.addressof(key_buffer), ctypes.addressof(value_buffer), count, fd, 0, 0
    )
    try:
        _bpf(_MAP_UPDATE_BATCH, attributes, "BPF_MAP_UPDATE_BATCH")
    except OSError as err:
        if err.errno not in _NO_BATCHES:
            raise
        key_bytes, value_bytes = len(keys) // count, len(values) // count
        for number in range(count):
            update(fd, keys[number * key_bytes :][:key_bytes], values[number * value_bytes :][:value_bytes])


def lookup(fd: int, key: bytes, value_bytes: int) -> bytes:
    """Return one element of a map.

    Raises:
        OSError: ENOENT when there is none.
    """
    keys, values = _buffer(key), ctypes.create_string_buffer(value_bytes)
    attributes = struct.pack("=IxxxxQQQ", fd, ctypes.addressof(keys), ctypes.addressof(values), 0)
    _bpf(_MAP_LOOKUP_ELEM, attributes, "BPF_MAP_LOOKUP_ELEM")
    return values.raw


def load(code: bytes, listing: str) -> int:
    """Return a new sk_lookup program.

    Raises:
        Refused: the verifier does not take it, or we may not load programs.
    """
    try:
        return _load(code, 0, None)
    except OSError as err:
        log = ctypes.create_string_buffer(_LOG_BYTES)
        try:  # once more, now with its reasons
            return _load(code, 1, log)
        except OSError:
            raise Refused(err.errno or 0, log.value.decode(errors="replace").strip(), listing) from err


def _load(code: bytes, log_level: int, log: ctypes.Array[ctypes.c_char] | None) -> int:
    instructions, license_text = _buffer(code), _buffer(_LICENSE + b"\0")
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        _SK_LOOKUP_TYPE, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(license_text),
        log_level, 0 if log is None else len(log), 0 if log is None else ctypes.addressof(log),
        0, 0, _NAME, 0, _SK_LOOKUP_ATTACH,
    )  # fmt: skip
    return _bpf(_PROG_LOAD, attributes, "BPF_PROG_LOAD")


def attach(program: int, namespace: int) -> int:
    """Return a link that lets ``program`` judge in a network namespace for as long as the link lives."""
    return _bpf(_LINK_CREATE, struct.pack("=IIII", program, namespace, _SK_LOOKUP_ATTACH, 0), "BPF_LINK_CREATE")


def swap(link: int, program: int) -> None:
    """Let another program take over, between two packets."""
    _bpf(_LINK_UPDATE, struct.pack("=IIII", link, program, 0, 0), "BPF_LINK_UPDATE")


def attached(namespace: int) -> list[int]:
    """Return the ids of all sk_lookup programs in a network namespace (at most 64 of them)."""
    ids = (ctypes.c_uint32 * 64)()
    attributes = _buffer(struct.pack("=IIIIQIxxxx", namespace, _SK_LOOKUP_ATTACH, 0, 0, ctypes.addressof(ids), len(ids)))
    _call(_PROG_QUERY, attributes, "BPF_PROG_QUERY")
    (count,) = struct.unpack_from("=I", attributes.raw, 24)
    return list(ids[: min(count, len(ids))])


def pin(fd: int, path: str) -> None:
    """Keep a link alive under a path of the bpf file system, whatever happens to us."""
    name = _buffer(os.fsencode(path) + b"\0")
    _bpf(_OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), fd, 0), f"pin {path}")


def pinned(path: str) -> int:
    """Return the link that is pinned at a path.

    Raises:
        OSError: ENOENT when there is none.
    """
    name = _buffer(os.fsencode(path) + b"\0")
    return _bpf(_OBJ_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0), f"open {path}")


def program_of(link: int) -> int:
    """Return the id of the program that a link holds."""
    return int(struct.unpack_from("=III", _info(link, _LINK_INFO_BYTES))[2])


def namespace_of(link: int) -> int:
    """Return the inode of the network namespace that a link is for, 0 when that is gone."""
    return int(struct.unpack_from("=IIIxxxxI", _info(link, _LINK_INFO_BYTES))[3])


def map_id(fd: int) -> int:
    """Return the id of a map."""
    return int(struct.unpack_from("=II", _info(fd, _MAP_INFO_BYTES))[1])


def program_id(program: int) -> int:
    """Return the id of a program."""
    return int(struct.unpack_from("=II", _info(program, _PROGRAM_INFO_BYTES))[1])


def maps_of(program_id: int) -> list[int]:
    """Return the ids of the maps that a program uses. It takes CAP_SYS_ADMIN, which only people who look have.

    Raises:
        OSError: ENOENT when there is no such program.
    """
    fd = _by_id(_PROG_GET_FD_BY_ID, program_id)
    try:
        ids = (ctypes.c_uint32 * 64)()
        info = ctypes.create_string_buffer(_PROGRAM_INFO_BYTES)
        struct.pack_into("=IQ", info, _MAP_IDS_AT, len(ids), ctypes.addressof(ids))
        _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(info), ctypes.addressof(info)), "BPF_OBJ_GET_INFO_BY_FD")
        return list(ids[: struct.unpack_from("=I", info, _MAP_IDS_AT)[0]])
    finally:
        os.close(fd)


def program_exists(number: int) -> bool:
    """Say whether the kernel has a program with this id. It takes CAP_SYS_ADMIN."""
    return _exists(_PROG_GET_FD_BY_ID, number)


def map_exists(number: int) -> bool:
    """Say whether the kernel has a map with this id. It takes CAP_SYS_ADMIN."""
    return _exists(_MAP_GET_FD_BY_ID, number)


def _exists(command: int, number: int) -> bool:
    try:
        os.close(_by_id(command, number))
    except FileNotFoundError:
        return False
    return True


def _by_id(command: int, number: int) -> int:
    return _bpf(command, struct.pack("=III", number, 0, 0), "look for an id")


def run_time(program: int) -> tuple[int, int]:
    """Return how long a program ran, in ns, and how often, while `measuring` was on."""
    total, count = struct.unpack_from("=QQ", _info(program, _PROGRAM_INFO_BYTES), _RUN_TIME_AT)
    return total, count


def measuring() -> int:
    """Return a descriptor; while it is open, the kernel notes the run time of every program."""
    return _bpf(_ENABLE_STATS, struct.pack("=I", 0), "BPF_ENABLE_STATS")


def try_out(program: int, context: bytes, repeat: int = 1) -> tuple[int, int, int]:
    """Run a program on a made-up connection and return its answer, the socket that it chose, and how long it took.

    The answer is 0 (drop) or 1 (pass), the socket its cookie (0: none), the time the mean of all runs in ns.
    ``context`` is a struct bpf_sk_lookup. Counters and reports are real.
    """
    assert len(context) == _CONTEXT_BYTES
    before = _buffer(context)
    after = ctypes.create_string_buffer(_CONTEXT_BYTES)
    attributes = _buffer(struct.pack(
        "=IIIIQQIIIIQQII", program, 0, 0, 0, 0, 0, repeat, 0, _CONTEXT_BYTES, _CONTEXT_BYTES,
        ctypes.addressof(before), ctypes.addressof(after), 0, 0,
    ))  # fmt: skip
    _call(_PROG_TEST_RUN, attributes, "BPF_PROG_TEST_RUN")
    (answer,) = struct.unpack_from("=I", attributes.raw, 4)
    (mean_ns,) = struct.unpack_from("=I", attributes.raw, 36)
    (cookie,) = struct.unpack_from("=Q", after.raw)
    return answer, cookie, mean_ns


def _info(fd: int, size: int) -> bytes:
    info = ctypes.create_string_buffer(size)
    _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, size, ctypes.addressof(info)), "BPF_OBJ_GET_INFO_BY_FD")
    return info.raw


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, len(data))


def _bpf(command: int, attributes: bytes, what: str) -> int:
    return _call(command, _buffer(attributes), what)


def _call(command: int, attributes: ctypes.Array[ctypes.c_char], what: str) -> int:
    number = NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"{what}: not on {platform.machine()}")
    result = int(_libc.syscall(
        ctypes.c_long(number), ctypes.c_long(command), ctypes.c_void_p(ctypes.addressof(attributes)),
        ctypes.c_ulong(len(attributes)),
    ))  # fmt: skip
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result
