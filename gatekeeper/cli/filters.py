"""The options with which `sessions` and `cut` say which sessions are meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from gatekeeper.cli.run import parse_duration

STATES = ("dialing", "open", "client_closed", "backend_closed", "resetting", "flow")

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def parse_optional_duration(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """Return seconds, ``None`` when the option is not given.

    Raises:
        click.BadParameter: it is no duration.
    """
    return None if text is None else parse_duration(ctx, param, text)


def _duration(name: str, help_text: str) -> Callable[[Decorated], Decorated]:
    return click.option(name, metavar="DURATION", callback=parse_optional_duration, help=help_text)


OPTIONS = (
    click.option("--listener", metavar="NAME", multiple=True, help="At this listener."),
    click.option("--rule", metavar="NAME", multiple=True, help='Allowed by this rule; "default" is the default.'),
    click.option("--source", metavar="SOURCE", multiple=True, help="From this address, network or range."),
    click.option("--state", type=click.Choice(STATES), multiple=True, help="In this state."),
    _duration("--older", "That began longer ago: 90s, 5m, 1h, 2d."),
    _duration("--younger", "That began more recently."),
    _duration("--idle", "That have been silent for so long, at least."),
    click.option("--stuck", is_flag=True, help="That one side has closed and the other has not released."),
)


def filter_options(command: Decorated) -> Decorated:
    """Give a command these options. Each may be given several times; a session must fit all kinds that are given."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def as_arguments(
    *, listener: tuple[str, ...], rule: tuple[str, ...], source: tuple[str, ...], state: tuple[str, ...],
    older: float | None, younger: float | None, idle: float | None, stuck: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return the options as arguments of a request; those that were not given are left out."""
    wanted: dict[str, Any] = {
        "listener": list(listener), "rule": list(rule), "source": list(source), "state": list(state),
        "older_s": older, "younger_s": younger, "idle_s": idle, "stuck": stuck or None,
    }  # fmt: skip
    return {name: value for name, value in wanted.items() if value is not None and value != []}
