"""Rule files that went wrong: cut, swapped, nested, swollen, in the wrong encoding. One number gives one file, always the same."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "rules"

# Everything that the format has, close together: mutations of it hit more than those of the examples, which explain much.
EVERYTHING = """\
version: 1
workers: 2
metrics: {listen: "127.0.0.1:9180"}
audit: ./audit.jsonl
state: state
listeners:
  - name: web
    listen: ["0.0.0.0:8000-8003", "[::]:8000", "*:9000", "unix:web.sock"]
    backend: 127.0.0.1:80
    connect_timeout: 500ms
    idle_timeout: 1.5h
    half_close_timeout: 10s
    max_sessions: 100
  - {name: dns, protocol: udp, listen: "*:53", backend: "[2001:db8::1]:5353", idle_timeout: 20s, max_responses: 1}
  - {name: app, listen: 192.0.2.1:22, backend: "unix:/run/app.sock"}
sets:
  office: [198.51.100.0/24, "2001:db8:42::/48", 203.0.113.10-203.0.113.20]
  mapped: ["::ffff:198.51.100.7", "::ffff:10.0.0.0/104"]
  blocked: {file: lists/blocked.txt}
  all_of_us: [office, mapped, 192.0.2.7]
  nobody: []
default: deny
rules:
  - {name: blocked, action: drop, from: blocked}
  - include: rules.d/*.yaml
  - {name: us, action: allow, from: all_of_us, except: [198.51.100.66, nobody], to: [web, 22, "53/udp"]}
  - {name: dns, action: allow, to: "53-60"}
  - name: rest
    action: deny
    from: any
    except: office
tests:
  - {from: 198.51.100.9, to: web, expect: allow}
  - {from: any, except: all_of_us, to: app, expect: deny}
"""
INCLUDED = """\
- {name: one, action: deny, from: 198.51.100.8, to: web}
- name: two
  action: allow
  from: ["2001:db8:7::/64"]
"""

VALUES = [
    "any", "none", "default", "tcp", "udp", "allow", "deny", "drop", "off", "auto", "true", "no", "~", "null", "''", '""', "[]", "{}", "0", "1", "2",
    "-1", "1.0", "1e3", "010", "0x10", "22:22", "1_000", ".inf", ".nan", "2001-01-01", "10.0.0.0/8", "10.0.0.5/8", "10.0.0.1-10.0.0.9",
    "10.0.0.9-10.0.0.1", '"::/0"', '"::1"', '"::ffff:1.2.3.4"', '"fe80::1%eth0"', "0.0.0.0/0", "0.0.0.0:22", '"*:22"', '"[::]:80"', "0.0.0.0:1-65535",
    "127.0.0.1:0", "127.0.0.1:65536", '"unix:/tmp/x"', '"unix:@x"', "localhost:80", "53/udp", "8000-8010", "80-70", "0s", "20s", "1.5h", "400d", "5",
    "office", "web", "dns", "{file: lists/blocked.txt}", "{file: /dev/zero}", "{file: .}", "[office, any]", "[[any]]", "!!str any", "&a any", "*a",
    '"\\n"', '"\\e[31m"', '"a\\nb"', '"\\u2028"', "|\n   any\n", ">-\n   any\n", "'it''s'", '"\\x41ny"', "99999999999999999999",
]  # fmt: skip
BYTES = [
    b"\xff", b"\xfe", b"\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\x00", b"\x1b[31m", b"\x7f", b"\x85", b"\xc2\x85",
    b"\xe2\x80\xa8", b"\xe2\x80\xae", b"\xc2\xa0", b"\r", b"\r\n", b"\n", b"\t", b" ", b"\x0b", b"\x0c", b"\xf0\x9f\x94\xa5", b"\xcc\x81",
]  # fmt: skip
MARKS = [
    b"- ", b": ", b"? ", b"[", b"]", b"{", b"}", b",", b"'", b'"', b"&a ", b"*a", b"!!str ", b"!x ", b"!<tag:x> ", b"<<: ", b"---\n", b"...\n", b"%YAML 1.1\n",
    b"%TAG ! x\n", b"# ", b"|", b">", b"@", b"`", b"\\",
]  # fmt: skip


def lay_out(folder: Path) -> dict[str, bytes]:
    """Write what the seeds name (lists, included rules) into ``folder`` and return the seeds by name."""
    for part, text in (("lists/blocked.txt", (EXAMPLES / "lists/blocked.txt").read_text()), ("rules.d/10.yaml", INCLUDED)):
        path = folder / part
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(text)
        path.chmod(0o600)
    return {path.name: path.read_bytes() for path in sorted(EXAMPLES.glob("*.yaml"))} | {"everything.yaml": EVERYTHING.encode()}


def truncations(seeds: dict[str, bytes]) -> Iterator[tuple[str, int]]:
    """Yield (seed, length) for every place where a file may have been cut."""
    for name, text in seeds.items():
        for length in range(len(text) + 1):
            yield name, length


def mutant(seeds: dict[str, bytes], number: int) -> bytes:
    """Return mutant ``number``: one to four mutations of one seed."""
    chooser = random.Random(number)
    text = seeds[chooser.choice(sorted(seeds))]
    for _ in range(chooser.choice([1, 1, 1, 2, 2, 3, 4])):
        text = chooser.choice(KINDS)(text, chooser, seeds)
    return text


def _bytes(text: bytes, chooser: random.Random, _seeds: dict[str, bytes]) -> bytes:
    at = chooser.randrange(len(text) + 1)
    return text[:at] + chooser.choice(BYTES + MARKS) + text[at + chooser.choice([0, 0, 1, 2, 8]) :]


def _byte(text: bytes, chooser: random.Random, _seeds: dict[str, bytes]) -> bytes:
    at = chooser.randrange(len(text) + 1)
    return text[:at] + bytes([chooser.randrange(256)]) + text[at + 1 :]


def _cut(text: bytes, chooser: random.Random, _seeds: dict[str, bytes]) -> bytes:
    first, last = sorted(chooser.randrange(len(text) + 1) for _ in range(2))
    return text[:first] + text[min(last, first + chooser.choice([1, 3, 20, 200])) :]


def _doubled(text: bytes, chooser: random.Random, _seeds: dict[str, bytes]) -> bytes:
    first = chooser.randrange(len(text) + 1)
    last = first + chooser.choice([1, 3, 20, 200])
    return text[:last] + text[first:]


def _swapped(text: bytes, chooser: random.Random, _seeds: dict[str, bytes]) -> bytes:
    words = re.split(rb"([\s,\[\]{}]+)", text)
    if len(words) < 3:
        return text
    one, other = (2 * chooser.randrange((len(words) + 1) // 2) for _ in range(2))
    words[one], words[other] = words[other], words[one]
    return b"".join(words)


def _valued(text: bytes, chooser: random.Random, _seeds: dict[str, bytes]) -> bytes:
    """Put another value in place of one behind a colon, or of an item of a list."""
    places = list(re.finditer(rb"(?<=: )[^\s,\[\]{}#][^,\[\]{}#\n]*|(?<=\[)[^,\[\]{}]+", text))
    if not places:
        return text
    place = chooser.choice(places)
    return text[: place.start()] + chooser.choice(VALUES).encode() + text[place.end() :]


def _lines(text: bytes, chooser: random.Random, seeds: dict[str, bytes]) -> bytes:
    """Move, double, indent or remove a line, or take one from another file."""
    lines = text.splitlines(keepends=True) or [b""]
    at, to = (chooser.randrange(len(lines)) for _ in range(2))
    kind = chooser.randrange(5)
    if kind == 0:
        lines.insert(to, lines.pop(at))
    elif kind == 1:
        lines.insert(to, lines[at])
    elif kind == 2:
        lines[at] = b" " * chooser.randint(1, 4) + lines[at]
    elif kind == 3:
        lines[at] = lines[at].removeprefix(b" " * chooser.randint(1, 4))
    else:
        lines.insert(to, chooser.choice(seeds[chooser.choice(sorted(seeds))].splitlines(keepends=True)))
    return b"".join(lines)


def _crossed(text: bytes, chooser: random.Random, seeds: dict[str, bytes]) -> bytes:
    other = seeds[chooser.choice(sorted(seeds))]
    return text[: chooser.randrange(len(text) + 1)] + other[chooser.randrange(len(other)) :]


def _nested(text: bytes, chooser: random.Random, _seeds: dict[str, bytes]) -> bytes:
    at = chooser.randrange(len(text) + 1)
    opening, closing = chooser.choice([(b"[", b"]"), (b"{a: ", b"}"), (b"- ", b""), (b"? ", b""), (b"!!seq [", b"]"), (b"[[", b"")])
    depth = chooser.choice([1, 5, 31, 32, 33, 200, 20_000])
    return text[:at] + opening * depth + text[at:] + closing * depth


def _swollen(text: bytes, chooser: random.Random, _seeds: dict[str, bytes]) -> bytes:
    at = chooser.randrange(len(text) + 1)
    piece = chooser.choice([b"x", b"9", b"1.", b"1:", b"a-", b"' ", b'\\"', b"\n", b" ", b"#", b"- a\n", b"a: 1\n", b"\xc3\xa9", b"[a,", b"10.0.0.1,"])
    return text[:at] + piece * chooser.choice([100, 5_000, 60_000]) + text[at:]


def _recoded(text: bytes, chooser: random.Random, _seeds: dict[str, bytes]) -> bytes:
    decoded = text.decode("utf-8", "replace")
    kind = chooser.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp037"])
    return decoded.encode(kind, "replace")


KINDS = [
    _bytes, _bytes, _byte, _byte, _cut, _doubled, _swapped, _swapped, _swapped, _valued, _valued, _valued, _valued, _lines, _lines, _crossed,
    _nested, _swollen, _recoded,
]  # fmt: skip
