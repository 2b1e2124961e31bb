"""The command line: parse, call, print. No arithmetic, and no heavy import before a command needs it."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import rich_click as click

from .. import __version__
from ..errors import VramplanError

COMMANDS = {  # and the module each lives in
    "plan": "planning",
    "apply": "planning",
    "estimate": "planning",
    "gpus": "planning",
    "train": "training",
    "sample": "training",
    "report": "reporting",
}


class LazyGroup(click.RichGroup):
    """Imports a command's module only when that command is used, and shows our errors as one message."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order in which a new user needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[cmd_name]}", __name__)
        command: click.Command = getattr(module, cmd_name)
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; a VramplanError becomes its message and exit code, never a traceback."""
        try:
            return super().main(*args, **kwargs)
        except VramplanError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vramplan")
def main() -> None:
    """Plan a GPT training run that fits your GPU's memory, then train it.

    Start with: vramplan plan --gpu 4070 --params 125M
    """
