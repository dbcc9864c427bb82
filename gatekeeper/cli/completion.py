"""``gatekeeper completion``: the script that teaches a shell to complete our commands."""

from __future__ import annotations

import click

from gatekeeper.cli.terminal import FINE, Command, Terminal


@click.command(
    "completion",
    cls=Command,
    examples=(
        "gatekeeper completion bash > /etc/bash_completion.d/gatekeeper",
        "gatekeeper completion zsh > ~/.zfunc/_gatekeeper",
        "gatekeeper completion fish > ~/.config/fish/completions/gatekeeper.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> int:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - only this command needs it

    terminal: Terminal = ctx.obj
    scripts = get_completion_class(shell)
    assert scripts is not None
    source = scripts(ctx.find_root().command, {}, "gatekeeper", "_GATEKEEPER_COMPLETE")
    # The script itself, without click's check of the installed shell: it may be written for another machine.
    terminal.print(source.source_template % source.source_vars())
    return FINE
