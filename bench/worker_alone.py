"""One worker without supervisor and observer, under the orders of the tests' rig: what the data path alone costs.

Started by `python -m bench --worker-alone` with the ports of a rule file, which it does not read: the policy here says the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import select
import signal
import sys

from bench.peers import RULES
from gatekeeper.kernel import steering
from gatekeeper.policy.model import Action, Backend, Endpoint, Listener, Protocol, Rule, Target
from gatekeeper.supervisor.listening import Opener
from tests.proxy.rig import Rig, listener, rule, sources


def policy(ports: argparse.Namespace) -> tuple[list[Listener], list[Rule]]:
    """The listeners and the 1,000 rules, of which the last two decide."""

    def before(name: str, port: int, backend: int, protocol: Protocol = Protocol.TCP) -> Listener:
        endpoint = Endpoint(protocol, 4, "127.0.0.1", port)
        return listener(name, Backend(4, "127.0.0.1", backend), endpoint, protocol=protocol, idle_s=86400.0)

    listeners = [
        before("tcp", ports.tcp, ports.backend_tcp),
        before("refused", ports.refused, ports.backend_tcp),
        before("udp", ports.udp, ports.backend_udp, Protocol.UDP),
    ]
    rules = []
    for i in range(RULES - 2):
        network = f"10.{i // 200}.{i % 200}"
        action = (Action.ALLOW, Action.DENY, Action.DROP)[i % 3]
        rules.append(rule(f"net-{i:04}", action, sources(f"{network}.0", f"{network}.255")))
    ourselves = sources("127.0.0.0", "127.255.255.255")
    turned_away = rule("turned-away", Action.DENY, ourselves)
    rules.append(dataclasses.replace(turned_away, targets=(Target("refused"),)))
    rules.append(rule("served", Action.ALLOW, ourselves))
    return listeners, rules


def main() -> None:
    """Serve until SIGTERM; event records are read and dropped."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("tcp", "udp", "refused", "backend-tcp", "backend-udp"):
        parser.add_argument(f"--{name}", type=int, required=True)
    listeners, rules = policy(parser.parse_args())
    endpoints = [endpoint for each in listeners for endpoint in each.endpoints]
    opened = Opener(1, steering.new_key(), []).open_all(endpoints, {})
    with Rig(listeners, rules, {key: one.sockets[0] for key, one in opened.items()}) as rig:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        while rig.process.poll() is None:
            if select.select([rig.events], [], [], 1.0)[0]:
                rig.events.recv(1 << 20)


if __name__ == "__main__":
    main()
