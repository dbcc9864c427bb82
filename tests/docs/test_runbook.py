"""docs/runbook.md is a session: all its commands, in order, against a gate with an SSH server and a web server behind it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gatekeeper.cli.main import COMMANDS
from tests.cli.program import gatekeeper
from tests.docs.sessions import ROOT, Step, blocks, run, steps

PAGE = (ROOT / "docs/runbook.md").read_text()
(RULES,) = [block for block in blocks("yaml", PAGE) if "version:" in block]
SESSION_S = 170

# The host of the page: its networks, its places and its servers, in namespaces, with whatever else the host has.
HOST = r"""
set -e
unset GATEKEEPER_CONTROL
mount -t tmpfs none /mnt
mkdir /mnt/etc
cp -r --no-preserve=ownership /etc/. /mnt/etc 2>/dev/null || true
mount --bind /mnt/etc /etc
for place in /run /var/lib /var/log; do
    mount -t tmpfs none $place
    mkdir $place/gatekeeper
done
mkdir -p /etc/gatekeeper /run/sshd /run/www
ip link set lo up
for network in 192.0.2.1/24 198.51.100.1/24 203.0.113.1/24; do ip address add $network dev lo; done
cat >/etc/gatekeeper/rules.yaml <<'RULES'
@RULES@
RULES
echo hello >/run/www/index.html
ssh-keygen -q -t ed25519 -N '' -f /run/host-key
"$(command -v sshd || echo /usr/sbin/sshd)" -D -e -f /dev/null -h /run/host-key -o ListenAddress=127.0.0.1:2222 \
    -o LoginGraceTime=600 -o MaxStartups=100 2>/run/sshd.log &
python3 -m http.server --bind 127.0.0.1 --directory /run/www 8080 >/run/web.log 2>&1 &
for port in 2222 8080; do until nc -z 127.0.0.1 $port; do sleep 0.1; done; done
set +e

start() {
    STATE_DIRECTORY=/var/lib/gatekeeper RUNTIME_DIRECTORY=/run/gatekeeper \
        gatekeeper run /etc/gatekeeper/rules.yaml >>/run/journal 2>&1 &
    gate=$!
    while kill -0 $gate; do
        gatekeeper status >/dev/null 2>&1
        [ $? -ne 3 ] && return
        sleep 0.1
    done
}
systemctl() {  # what it does with our unit, without systemd
    [ "$*" = "restart gatekeeper" ] || { echo "systemctl $*?"; return 1; }
    kill $gate
    wait $gate
    start
}
journalctl() {  # -u gatekeeper -n 20
    tail -n "$4" /run/journal
}
visitors() {  # visitors NUMBER SOURCE PORT: each says half a request, and stays
    python3 - "$1" "$2" "$3" <<'VISITORS' &
import select, socket, sys
number, source, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
here = {}
for _ in range(number):
    visitor = socket.socket()
    visitor.bind((source, 0))
    visitor.connect(("192.0.2.1", port))
    if port == 80:
        visitor.sendall(b"GET / HTTP/1.0\r\n")
    here[visitor.fileno()] = visitor
poll = select.poll()
for fd in here:
    poll.register(fd, select.POLLIN)
while here:
    for fd, _ in poll.poll():
        try:
            stays = here[fd].recv(1000)
        except OSError:
            stays = b""
        if not stays:
            poll.unregister(fd)
            here.pop(fd).close()
VISITORS
}
knock() {  # knock SOURCE PORT: again and again
    python3 - "$1" "$2" <<'KNOCK' &
import socket, sys, time
while True:
    with socket.socket() as visitor:
        visitor.bind((sys.argv[1], 0))
        try:
            visitor.connect(("192.0.2.1", int(sys.argv[2])))
            visitor.recv(1)
        except OSError:
            pass
    time.sleep(0.03)
KNOCK
}
crowd() {  # crowd NUMBER: wait until there are so many live sessions
    until [ "$(gatekeeper sessions --json | jq .matched)" = "$1" ]; do sleep 0.2; done
}
start
"""

# What has happened on that host when somebody opens the page at a section.
MEANWHILE = {
    "How it is": "for host in 1 2 200; do visitors 1 198.51.100.$host 22; done; crowd 3\n",
    "Somebody is attacking now": r"""
visitors 30 203.0.113.9 80
crowd 32
knock 203.0.113.66 22
attacker=$!
until [ "$(jq -r 'select(.event_type == "refusal") | .src_ip' /var/log/gatekeeper/audit.log | wc -l)" -gt 9 ]; do sleep 0.2; done
""",
    "Locked out": "kill $attacker; gatekeeper ban 198.51.100.0/25 --reason 'a colleague was in a hurry' >/dev/null\n",
}


def sections() -> dict[str, str]:
    """Return the text under each heading of the second level."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def session() -> list[Step]:
    """Return all steps of the page, what happens meanwhile before the first of its section."""
    found: list[Step] = []
    for title, text in sections().items():
        own = [step for block in blocks("console", text) for step in steps(block)]
        if title in MEANWHILE:
            own[0] = (MEANWHILE[title] + own[0][0], own[0][1])
        found += own
    return found


@pytest.mark.timeout(SESSION_S + 20)
@pytest.mark.slow
@pytest.mark.needs("unshare", "ip", "curl", "bash", "nc", "jq", "ssh-keygen", "sshd")
def test_every_command_does_what_the_page_says(folder: Path) -> None:
    """Typed one after the other, the commands print what the runbook shows."""
    run(session(), folder, HOST.replace("@RULES@", RULES), SESSION_S, unshare=["--mount"])


def test_the_rules_of_the_page_are_good(folder: Path) -> None:
    """The rule file passes its own tests."""
    (folder / "rules.yaml").write_text(RULES)
    done = gatekeeper("check", str(folder / "rules.yaml"))
    assert done.code == 0, done.out


def test_every_section_has_commands_that_exist() -> None:
    """There is a session for each situation, and what prose names is a command of the program."""
    assert all("```console" in text for text in sections().values())
    assert set(MEANWHILE) <= set(sections())
    assert set(re.findall(r"gatekeeper ([a-z]+)\b", "\n".join(re.findall(r"`(gatekeeper [a-z][^`]*)`", PAGE)))) <= set(COMMANDS)
