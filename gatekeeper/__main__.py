"""``python -m gatekeeper``: the same as the command ``gatekeeper``."""

import sys

from gatekeeper.cli.main import entry

sys.exit(entry())
