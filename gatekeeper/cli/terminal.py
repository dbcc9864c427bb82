"""What every command shares: its streams, exit codes, colour, JSON, and how its help is laid out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import click

FINE = 0  # done, and all is well
NO = 1  # done, and the answer is no: errors in the file, refused, checks failed
USAGE = 2  # the command line makes no sense
CANNOT = 3  # could not do it: unreadable file, port taken

EXIT_CODES = """\
Exit codes: 0 done and fine; 1 done, and the answer is no (errors in the file, refused, a check failed); \
2 bad usage; 3 could not do it (unreadable file, port taken)."""

# A type for completion only: commands open files themselves and say what failed (with exit code 3, not 2).
FILE = click.Path(readable=False, allow_dash=True)


class CannotDo(click.ClickException):
    """The command could not do its work; the message says what and why."""

    exit_code = CANNOT


@dataclass(frozen=True, slots=True)
class Terminal:
    """The three streams of one invocation. Results go to ``stdout``, everything else to ``stderr``."""

    stdin: TextIO
    stdout: TextIO
    stderr: TextIO

    @property
    def colour(self) -> bool:
        """Whether results may be coloured: only for a person's terminal, and never under NO_COLOR."""
        return self.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def print(self, text: str = "") -> None:
        """Write one result line."""
        self.stdout.write(text + "\n")

    def print_json(self, document: Any) -> None:
        """Write one JSON document, indented, as the only result."""
        self.stdout.write(json.dumps(document, indent=2) + "\n")

    def note(self, text: str) -> None:
        """Write one line that is not a result."""
        self.stderr.write(text + "\n")

    def paint(self, text: str, colour: str, *, bold: bool = False) -> str:
        """Return ``text`` in a colour, or as it is when colours are not wanted."""
        return click.style(text, fg=colour, bold=bold) if self.colour else text


class Command(click.Command):
    """A command whose help opens with examples and ends with the keys of its JSON and the exit codes."""

    def __init__(
        self, *args: Any, examples: tuple[str, ...] = (), json_keys: tuple[tuple[str, str], ...] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.json_keys = json_keys

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples, usage, text, options, JSON keys and exit codes, in this order."""
        write_examples(formatter, self.examples)
        super().format_help(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's shape
        """Write what stands below the options."""
        if self.json_keys:
            with formatter.section("Keys of --json"):
                formatter.write_dl(list(self.json_keys))
        formatter.write_paragraph()
        formatter.write_text(EXIT_CODES)


def write_examples(formatter: click.HelpFormatter, examples: tuple[str, ...]) -> None:
    """Write the examples section."""
    if examples:
        with formatter.section("Examples"):
            for example in examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")
        formatter.write_paragraph()


def format_table(rows: Sequence[tuple[str, ...]], gap: int = 2) -> list[str]:
    """Return rows as lines with aligned columns; the last column is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width + gap) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append(("".join(cells) + row[-1]).rstrip())
    return lines


def count(number: int, thing: str) -> str:
    """Return ``1 rule`` or ``2 rules``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
