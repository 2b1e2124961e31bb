"""The console that every report prints to."""

from __future__ import annotations

import sys

from rich.console import Console

PIPE_WIDTH = 110
"""Columns when the output goes to a file or pipe, where rich would assume 80 and cut tables."""


def console() -> Console:
    """A console for standard output: long lines are left to the terminal, numbers are not coloured."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
