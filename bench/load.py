"""What it costs to check a list of a million networks, beside HAProxy and nginx.

    python bench/load.py [--entries N] [--turns N] [--keep DIR]

Makes the same IPv4 networks (/24 to /32, fixed seed) twice, sorted and in random order, as a list file of gatekeeper, an
ACL file of HAProxy and a geo block of nginx. Then `gatekeeper check`, `haproxy -c` and `nginx -t` take turns, because
the speed of a shared machine wanders; each is a process of its own from exec to exit. Printed are the best and the
median wall time, the least processor time, and the largest resident set. Programs that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SEED = 7
RULES = """\
version: 1
listeners:
  - {{name: web, listen: 127.0.0.1:8080, backend: 127.0.0.1:8081}}
sets:
  blocked: {{file: {list}}}
default: allow
rules:
  - {{name: blocked, action: deny, from: blocked}}
"""
HAPROXY = """\
global
defaults
  mode tcp
  timeout connect 5s
  timeout client 5s
  timeout server 5s
frontend web
  bind 127.0.0.1:8080
  acl blocked src -f {list}
  tcp-request connection reject if blocked
  default_backend app
backend app
  server one 127.0.0.1:8081
"""
NGINX = """\
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
stream {{
  geo $blocked {{ default 0; include {list}; }}
  map $blocked $target {{ 0 127.0.0.1:8081; 1 ""; }}
  server {{ listen 127.0.0.1:8080; proxy_pass $target; }}
}}
"""
NGINX_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"


def main() -> None:
    """Make the lists, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--keep", metavar="DIR", help="where to leave the files (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="gatekeeper-load-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        runs = prepare_apart(folder.resolve(), arguments.entries)
        print(f"{arguments.entries} networks, {arguments.turns} turns: wall best and median, processor best, peak memory")
        for (order, name), results in take_turns(runs, arguments.turns).items():
            walls, processors, peaks = zip(*results, strict=True)
            print(
                f"{order:>7} {name:<18} {min(walls):6.2f} s {statistics.median(walls):6.2f} s"
                f" {min(processors):6.2f} s {max(peaks):6.0f} MiB"
            )
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


def networks(entries: int) -> list[str]:
    """Return distinct networks in ascending order; nested ones occur, as in real lists."""
    dice = random.Random(SEED)
    found: set[tuple[int, int]] = set()
    while len(found) < entries:
        prefix = dice.randint(24, 32)
        found.add((dice.getrandbits(32) >> (32 - prefix) << (32 - prefix), prefix))
    return [
        f"{first >> 24}.{first >> 16 & 255}.{first >> 8 & 255}.{first & 255}/{prefix}"
        for first, prefix in sorted(found)
    ]


def prepare_apart(folder: Path, entries: int) -> dict[tuple[str, str], list[str]]:
    """Do `prepare` in a child: a process counts the memory of the one that started it as its own peak."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with open(writing, "w") as pipe:
            json.dump([[*key, command] for key, command in prepare(folder, entries).items()], pipe)
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        runs = {(order, name): command for order, name, command in json.load(pipe)}
    os.waitpid(child, 0)
    return runs


def prepare(folder: Path, entries: int) -> dict[tuple[str, str], list[str]]:
    """Write all files; return (order, program) -> command line."""
    runs: dict[tuple[str, str], list[str]] = {}
    listed = networks(entries)
    for order in ("sorted", "random"):
        if order == "random":
            random.Random(SEED).shuffle(listed)
        plain = folder / f"{order}.txt"
        plain.write_text("\n".join(listed) + "\n")
        rules = folder / f"{order}.yaml"
        rules.write_text(RULES.format(list=plain.name))
        rules.chmod(0o644)
        runs[order, "gatekeeper check"] = [sys.executable, "-m", "gatekeeper", "check", str(rules)]
        if haproxy := shutil.which("haproxy"):
            config = folder / f"{order}.cfg"
            config.write_text(HAPROXY.format(list=plain))
            runs[order, "haproxy -c"] = [haproxy, "-c", "-q", "-f", str(config)]
        if nginx := shutil.which("nginx"):
            geo = folder / f"{order}.geo"
            geo.write_text("".join(f"{network} 1;\n" for network in listed))
            config = folder / f"{order}.conf"
            module = f"load_module {NGINX_MODULE};\n" if Path(NGINX_MODULE).exists() else ""
            config.write_text(module + NGINX.format(list=geo, folder=folder))
            runs[order, "nginx -t"] = [nginx, "-t", "-q", "-c", str(config)]
    return runs


def take_turns(runs: dict[tuple[str, str], list[str]], turns: int) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """Run every command ``turns`` times, in rotating order; return what `measure` returns for each run."""
    results: dict[tuple[str, str], list[tuple[float, float, float]]] = {key: [] for key in runs}
    keys = list(runs)
    for turn in range(turns):
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            results[key].append(measure(runs[key]))
    return results


def measure(command: Sequence[str]) -> tuple[float, float, float]:
    """Run a command to its end; return wall seconds, processor seconds and its peak resident set in MiB.

    Raises:
        SystemExit: it failed.
    """
    root = str(Path(__file__).resolve().parent.parent)
    started = time.perf_counter()
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    environment = {**os.environ, "PYTHONPATH": root}
    pid = os.posix_spawn(command[0], list(command), environment, file_actions=silent)
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(command)}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
