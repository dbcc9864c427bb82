"""Reloads under load: nobody is refused or cut who may stay, everybody goes who may not, and the books agree to the byte."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import gatekeeper
from tests.endurance.reloads.riders import Riding
from tests.support.gate import Gate
from tests.support.metrics import Scrape
from tests.support.ports import free_port
from tests.support.wait import until

RATE = 1000  # new connections a second, if the machine gives that
STALL_S = 0.005
ALWAYS = [f"127.0.40.{number}" for number in range(1, 21)]
NEVER = [f"127.0.41.{number}" for number in range(1, 5)]
EVEN = [f"127.0.42.{number}" for number in range(1, 9)]  # allowed by the even policy only
ODD = [f"127.0.43.{number}" for number in range(1, 9)]  # allowed by the odd policy only


class Scene:
    """A gate, a backend behind it, and policies of the two kinds."""

    def __init__(self, run_gate: Callable[..., Gate], backend: Riding) -> None:
        self.backend = backend
        self.tcp_port, self.udp_port = map(int, backend.line().split())
        self.port, self.more = free_port(), free_port()
        self.million: Path | None = None
        self.gate = run_gate(self.policy(0), workers=2)

    def policy(self, number: int, default: str = "deny") -> str:
        """Return the even or the odd policy. The odd one has a listener more, too."""
        allowed, denied = ("42", "43") if number % 2 == 0 else ("43", "42")
        more = f"  - {{name: more, listen: '127.0.0.1:{self.more}', backend: '127.0.0.1:{self.tcp_port}'}}\n" if number % 2 else ""
        sets = f"sets: {{crowd: {{file: {self.million}}}}}\n" if self.million else ""
        rules = "  - {name: crowd, action: drop, from: crowd}\n" if self.million else ""
        return (
            f"listeners:\n"
            f"  - {{name: door, listen: '127.0.0.1:{self.port}', backend: '127.0.0.1:{self.tcp_port}'}}\n"
            f"  - {{name: flow, protocol: udp, listen: '127.0.0.1:{self.port}', backend: '127.0.0.1:{self.udp_port}'}}\n{more}{sets}"
            f"default: {default}\nrules:\n{rules}"
            f"  - {{name: always, action: allow, from: 127.0.40.0/24}}\n"
            f"  - {{name: never, action: deny, from: 127.0.41.0/24}}\n"
            f"  - {{name: yes-{number % 2}, action: allow, from: 127.0.{allowed}.0/24}}\n"
            f"  - {{name: no-{number % 2}, action: deny, from: 127.0.{denied}.0/24}}\n"
        )

    def reload(self, number: int) -> dict[str, Any]:
        """Put policy ``number`` in force and return what the command says."""
        self.gate.write(self.policy(number))
        return self.ask("reload")

    def ask(self, *words: str) -> dict[str, Any]:
        """Run a command of an operator, which succeeds, and return its result."""
        done = gatekeeper(*words, "--control", str(self.gate.control_path), "--json")
        assert done.code == 0, done
        result: dict[str, Any] = json.loads(done.out)
        return result


@pytest.fixture
def scene(run_gate: Callable[..., Gate]) -> Iterator[Scene]:
    """A gate that serves the even policy, and the backend."""
    with Riding("backend") as backend:
        yield Scene(run_gate, backend)


def write_million(path: Path, count: int) -> None:
    """Write a list of that many networks, none of which is next to another or anybody's here."""
    path.write_text("".join(f"{16 + (n >> 15)}.{(n >> 7) & 255}.{(n << 1) & 255}.0/24\n" for n in range(count)))
    path.chmod(0o644)


def all_went_on(riders: list[dict[str, Any]], ports: int = 1) -> None:
    """Every session lived to the end with right answers; a flow spoke to the backend from at most so many ports of ours."""
    for rider in riders:
        assert (rider["ended"], rider["wrong"]) == (None, False), rider
        assert rider["exchanges"] > 0, rider
        assert len(rider["ports"]) in (range(1, ports + 1) if rider["kind"] == "udp" else {0}), rider


def all_served(story: dict[str, Any]) -> None:
    """No short session was refused or broken."""
    assert story["wrong"] == []
    assert {outcome for counts in story["outcomes"].values() for outcome in counts} == {"allowed"}, story["outcomes"]


def books(scrape: Scrape, listener: str = "door") -> tuple[float, float, float]:
    """Return (allowed, refused, errors) of a listener."""
    allowed = scrape.value("gatekeeper_connections_total", listener=listener, action="allow")
    refused = scrape.value("gatekeeper_connections_total", listener=listener, action="deny")
    return allowed, refused, scrape.value("gatekeeper_accept_errors_total", listener=listener)


def moved(scrape: Scrape, listener: str) -> tuple[float, float]:
    """Return the bytes that a listener's sessions moved, from the clients and to them."""
    name = "gatekeeper_session_bytes_total"
    return scrape.value(name, listener=listener, direction="in"), scrape.value(name, listener=listener, direction="out")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("large", [False, True], ids=["small policy", "large policy"])
def test_reloads_are_noticed_by_nobody(scene: Scene, folder: Path, long: bool, *, large: bool) -> None:
    """Under load, with long sessions and flows: nobody refused, nobody broken, no flow changes its port, and exact books."""
    reloads, riders = (100, 100) if long else (6, 20)
    if large:
        reloads = 20 if long else 2
        scene.million = folder / "million.txt"
        write_million(scene.million, 1_000_000 if long else 50_000)
    sources = [f"127.0.40.{number}" for number in range(1, riders + 1)]
    gate = scene.gate
    scene.reload(0)
    with Riding("long", scene.port, *sources, *sources[: riders * long]) as riding, Riding("short", scene.port, RATE, *ALWAYS) as knocking:
        assert riding.line() == "open"
        before_s = gate.scrape().value("gatekeeper_loop_stall_seconds")
        for number in range(1, reloads + 1):
            result = scene.reload(number)
            assert (result["changed"], result["ended"]) == (True, 0), result
        after_s = gate.scrape().value("gatekeeper_loop_stall_seconds")
        riding.pause()
        story, rode = knocking.stop(), riding.stop()
    served = sum(counts["allowed"] for counts in story["outcomes"].values())
    print(f"{reloads} reloads, {served} short sessions in {story['seconds']:.0f} s, {len(rode)} riders with "
          f"{sum(rider['exchanges'] for rider in rode)} exchanges, {sum(rider['repeated'] for rider in rode)} repeated; "
          f"longest turn of the loop {before_s * 1e3:.1f} ms before, {after_s * 1e3:.1f} ms after")  # fmt: skip
    all_served(story)
    all_went_on(rode)
    gate.wait_for_value(0, "gatekeeper_sessions", listener="door")
    conserved(scene, [story], rode)


def conserved(scene: Scene, stories: list[dict[str, Any]], rode: list[dict[str, Any]]) -> None:
    """Accepted is allowed + refused + errors, and the gate's bytes are those that its clients and its backend counted."""
    gate = scene.gate
    behind = scene.backend.stop()
    tcp = [rider for rider in rode if rider["kind"] == "tcp"]
    connected = sum(story["total"].get("connected", 0) for story in stories) + len(tcp)
    said = sum(story["total"].get("bytes", 0) for story in stories)
    until(lambda: sum(books(gate.scrape())) == connected, f"all {connected} connections are counted once")
    scrape = gate.scrape()
    allowed, refused, errors = books(scrape)
    print(f"{connected} connected = {allowed:.0f} allowed + {refused:.0f} refused + {errors:.0f} errors")
    assert scrape.value("gatekeeper_session_ends_total", listener="door") == allowed == behind["connections"]
    assert moved(scrape, "door") == (said + sum(each["sent"] for each in tcp), said + sum(each["received"] for each in tcp))
    assert moved(scrape, "door") == (behind["tcp_in"], behind["tcp_out"])
    flows = (behind.get("udp_in", 0), behind.get("udp_out", 0))
    until(lambda: moved(gate.scrape(), "flow") == flows, "what flows moved that are still live is counted, too")
    assert flows[1] == sum(rider["received"] for rider in rode if rider["kind"] == "udp")


@pytest.mark.timeout(900)
def test_no_verdict_is_one_that_neither_policy_gives(scene: Scene, long: bool) -> None:
    """While two policies are swapped as fast as can be: those whom both allow get in, those whom both deny do not, ever."""
    swaps = 200 if long else 15
    everybody = [*ALWAYS, *NEVER, *EVEN, *ODD]
    with Riding("short", scene.port, 10 * RATE, *everybody) as knocking:
        for number in range(1, swaps + 1):
            assert scene.reload(number)["changed"]
        story = knocking.stop()
    assert story["wrong"] == []
    outcomes = story["outcomes"]
    seen: dict[str, Counter[str]] = {}
    for name, sources in {"always": ALWAYS, "never": NEVER, "even": EVEN, "odd": ODD}.items():
        seen[name] = sum((Counter(outcomes[source]) for source in sources), Counter())
    print(f"{swaps} swaps, {story['total']['connected']} sessions in {story['seconds']:.0f} s: {seen}")
    assert set(seen["always"]) == {"allowed"}
    assert set(seen["never"]) == {"refused"}
    for name in ("even", "odd"):
        assert set(seen[name]) == {"allowed", "refused"}, "each policy was in force for a while"
    verdicts = {key[1:] for key in scene.gate.scrape().verdicts()}
    assert verdicts == {
        ("allow", "always", "rule"), ("deny", "never", "rule"), ("allow", "yes-0", "rule"), ("allow", "yes-1", "rule"),
        ("deny", "no-0", "rule"), ("deny", "no-1", "rule"),
    }  # fmt: skip


@pytest.mark.timeout(600)
def test_exactly_those_who_may_not_stay_go(scene: Scene, long: bool) -> None:
    """Reloads, cuts and bans end just the sessions they are about, and afterwards the books agree to the byte."""
    each = 24 if long else 6
    groups = {name: [f"127.0.{net}.{number}" for number in range(1, each + 1)] for name, net in
              (("always", 40), ("even", 42), ("banned", 44), ("cut", 45))}  # fmt: skip
    gate = scene.gate
    gate.write(scene.policy(0, default="allow"))
    assert scene.ask("reload")["ended"] == 0
    sources = [source for group in groups.values() for source in group]
    with Riding("long", scene.port, *sources) as riding, Riding("short", scene.port, RATE, *ALWAYS) as knocking:
        assert riding.line() == "open"
        riding.pause()
        gate.wait_for_value(len(sources), "gatekeeper_sessions", listener="flow")
        gate.write(scene.policy(1, default="allow"))
        assert scene.ask("reload")["ended"] == 2 * each
        assert scene.ask("ban", "127.0.44.0/24", "--for", "1h")["ended"] == 2 * each
        assert scene.ask("cut", "--source", "127.0.45.0/24")["ended"] == 2 * each
        riding.go()
        riding.pause()
        story, rode = knocking.stop(), riding.stop()
    all_served(story)
    staying = [rider for rider in rode if rider["source"] in groups["always"]]
    all_went_on(staying)
    for rider in rode:
        if rider["kind"] == "tcp":
            assert rider["ended"] == (None if rider in staying else "reset"), rider
    gate.wait_for_value(0, "gatekeeper_sessions", listener="door")
    scrape = gate.scrape()
    for end in ("revoked", "cut", "banned"):
        for listener in ("door", "flow"):
            assert scrape.value("gatekeeper_session_ends_total", listener=listener, end=end) == each, (end, listener)
    conserved(scene, [story], rode)


@pytest.mark.timeout(900)
def test_an_upgrade_is_noticed_by_nobody(scene: Scene, long: bool) -> None:
    """The program is replaced under load, reloads before and after: nobody refused, no TCP session broken, exact books."""
    upgrades, riders = (5, 100) if long else (1, 20)
    gate, pid = scene.gate, scene.gate.pid
    sources = [f"127.0.40.{number}" for number in range(1, riders + 1)]
    with Riding("long", scene.port, *sources) as riding, Riding("short", scene.port, RATE, *ALWAYS) as knocking:
        assert riding.line() == "open"
        for number in range(1, upgrades + 1):
            assert scene.reload(number)["changed"]
            assert scene.ask("upgrade", "--no-wait")["pid"] == pid
            riding.go()
        assert scene.reload(upgrades + 1)["changed"]
        riding.go()
        riding.pause()
        story, rode = knocking.stop(), riding.stop()
    print(f"{upgrades} upgrades, {story['total']['connected']} short sessions in {story['seconds']:.0f} s")
    all_served(story)
    all_went_on(rode, ports=upgrades + 1)  # flows go on with the new workers, from other ports
    until(lambda: not scene.ask("status")["leaving"], "the old workers have left", within_s=60)
    gate.wait_for_value(0, "gatekeeper_sessions", listener="door")
    conserved(scene, [story], rode)
