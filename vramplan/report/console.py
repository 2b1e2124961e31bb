"""The console that every report prints to."""

from __future__ import annotations

import os
import sys

from rich.console import Console

PIPE_WIDTH = 110
"""Columns when the output goes to a file or pipe, where rich would assume 80 and cut tables."""


def console() -> Console:
    """A console for standard output: long lines are left to the terminal, numbers are not coloured."""
    return Console(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def printable(text: str) -> str:
    """Text from elsewhere without what would command the terminal; lines stay lines."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class PatientConsole(Console):
    """A console for work that goes on when nobody reads any more: the program is not ended, only silent."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() else PIPE_WIDTH
        super().__init__(highlight=False, emoji=False, soft_wrap=True, width=width, stderr=stderr)

    def on_broken_pipe(self) -> None:
        """Called by rich when the reader of a pipe has gone."""
        self.fall_silent()

    def fall_silent(self) -> None:
        """Print nothing more; what is still buffered goes nowhere instead of failing when the program ends."""
        self.quiet = True
        try:
            descriptor = self.file.fileno()
        except (OSError, ValueError):
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
