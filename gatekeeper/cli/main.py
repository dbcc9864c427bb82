"""The command ``gatekeeper``: argv to an exit code.

A command's module is imported when the command is asked for, and imports what it needs when it runs, so that
``--version``, ``--help`` and shell completion answer at once. Held by tests/cli/test_main.py.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO

import click

from gatekeeper import __version__
from gatekeeper.cli.terminal import CANNOT, EXIT_CODES, Terminal, write_examples

COMMANDS = (  # each a module of this package
    "run", "check", "explain", "diff", "schema", "doctor", "demo", "completion",
    "plan", "reload", "confirm", "rollback", "upgrade",
    "status", "sessions", "top", "log", "cut", "ban", "unban", "bans",  # these ask the running daemon
)  # fmt: skip
COMPLETION = "_GATEKEEPER_COMPLETE"  # the variable in which the scripts of `gatekeeper completion` ask
INTERRUPTED = 130  # what shells report for SIGINT
NOBODY_READS = 141  # and for SIGPIPE

EXAMPLES = (
    "gatekeeper demo                                    see it work on this machine",
    "gatekeeper check rules.yaml                        what is wrong with the file, and where",
    "gatekeeper explain rules.yaml 198.51.100.7 22      may this source reach that port, and why",
    "gatekeeper run rules.yaml                          serve until SIGTERM; SIGHUP reloads",
)


class Program(click.Group):
    """The group of all commands, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's shape
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's shape
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"gatekeeper.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, EXAMPLES)
        super().format_help(ctx, formatter)


@click.group(cls=Program, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="gatekeeper", message="%(prog)s %(version)s")
def program() -> None:
    """Decide, for every new TCP connection and UDP flow, who may reach which port.

    People write the rules in YAML; gatekeeper stands in front of the service, enforces them, explains every
    verdict and counts everything for Prometheus.
    """


def main(argv: Sequence[str], stdin: TextIO, stdout: TextIO, stderr: TextIO) -> int:
    """Run one command line (without the program's name) on these streams and return its exit code."""
    terminal = Terminal(stdin, stdout, stderr)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            # Not click's own main(): it would turn a reader that went away into exit code 1, which means "no" here.
            with program.make_context("gatekeeper", list(argv), obj=terminal) as context:
                code = program.invoke(context)
        except click.exceptions.Exit as err:
            code = err.exit_code
        except click.ClickException as err:
            err.show(stderr)
            code = err.exit_code
        except (click.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except BrokenPipeError:
            code = NOBODY_READS
        except MemoryError:
            stderr.write("gatekeeper: there is not enough memory\n")
            code = CANNOT
        except OSError as err:  # whatever the machine refuses; each command translates what it expects
            stderr.write(f"gatekeeper: {err}\n")
            code = CANNOT
    return int(code or 0)


def fill_standard_streams() -> None:
    """Open /dev/null where the caller closed standard input, output or error (``>&-``).

    Whatever is opened next would get the free number, and an audit log on "standard output" would go into a socket.
    """
    for number, mode in enumerate("rww"):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
            setattr(sys, ("stdin", "stdout", "stderr")[number], stream)


def entry() -> int:
    """Run this process's command line. Ends quietly when nobody reads its output any more (``| head``)."""
    fill_standard_streams()
    # What a terminal of another encoding cannot show is written out ("\xfc"), as Python does on standard error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if COMPLETION in os.environ:  # a shell asks what could come next
        program.main(prog_name="gatekeeper", complete_var=COMPLETION)
    code = main(sys.argv[1:], sys.stdin, sys.stdout, sys.stderr)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = NOBODY_READS
    if code == NOBODY_READS:
        # Python flushes standard output once more at exit and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
