"""The command line: parse, call, print. No arithmetic, and no heavy import before a command needs it."""

from __future__ import annotations

import contextlib
import importlib
import io
import keyword
import os
import signal
import sys
from typing import Any

import rich_click as click

from .. import __version__
from ..errors import VramplanError

COMMANDS = {  # and the module each lives in
    "plan": "planning",
    "apply": "planning",
    "estimate": "estimating",
    "gpus": "planning",
    "doctor": "doctor",
    "probe": "probing",
    "tune": "tuning",
    "train": "training",
    "sample": "training",
    "export": "exchange",
    "import": "exchange",
    "report": "reporting",
    "ui": "page",
    "health": "health",
    "explain": "explaining",
    "ledger": "probing",
    "trace": "tracing",
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
        name = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command: click.Command = getattr(module, name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; Ctrl-C where no command handles it itself ends it with the exit code of that signal."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Stopped by SIGINT.", err=True)
            sys.exit(128 + signal.SIGINT)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; a VramplanError becomes its message and exit code, never a traceback."""
        _forgiving_streams()
        try:
            return super().main(*args, **kwargs)
        except VramplanError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:  # what no command foresaw: a full disk behind standard output, a path it cannot use
            _drop_output()
            click.echo(f"Error: {error.filename or 'the output'} cannot be used ({error.strerror})", err=True)
            sys.exit(VramplanError.exit_code)


def _forgiving_streams() -> None:
    """A stream that was closed swallows what is printed; a character it cannot show is replaced."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the rest of the process
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _drop_output() -> None:
    """When standard output cannot be written, what is still buffered goes nowhere instead of failing at the exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vramplan")
def main() -> None:
    """Plan a GPT training run that fits your GPU's memory, then train it.

    Start with: vramplan plan --gpu 4070 --params 125M
    """
