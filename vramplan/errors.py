"""Every error a user can meet.

VramplanError                 exit code 1
├── ConfigError               exit code 2   bad input: field, value, rule, nearest legal values
│   └── DataError             exit code 2   the same for Parquet files, shards and run directories
├── DoesNotFitError           exit code 3   nothing in the search fits the budget
├── CapExceededError          exit code 3   a replayed step does not fit under the cap
├── TokenizerUnavailableError exit code 1   no source for the merge table could be reached
└── Stopped                   exit code 128 + the number of the signal that asked for it
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class VramplanError(Exception):
    """Base of every error that is shown to the user as one message, without a traceback."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the input: which field, its value, the rule it breaks, and what to do instead.

    The value ``"missing"`` says that there was none; it is not shown.
    """

    field: str
    value: object
    rule: str
    remedy: str = ""

    def __str__(self) -> str:
        shown = f'="{self.value}"' if isinstance(self.value, str) else f"={self.value}"
        text = f"{self.field}{'' if self.value == 'missing' else shown} {self.rule}"
        return f"{text}: {self.remedy}" if self.remedy else text


class ConfigError(VramplanError):
    """Bad input. Carries *all* problems found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Problem | Iterable[Problem], source: str = "") -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.source = source
        head = f"{source}: " if source else ""
        if len(self.problems) == 1:
            text = head + str(self.problems[0])
        else:
            text = f"{head}{len(self.problems)} problems\n" + "\n".join(f"  * {p}" for p in self.problems)
        super().__init__(text)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...], str]]:
        """Pickle by problems and source, so that the error survives the way out of a worker process."""
        return type(self), (self.problems, self.source)


class Collector:
    """Gathers the problems of several checks: ``with collect: check()`` for each, then :meth:`finish`."""

    def __init__(self, problems: Iterable[Problem] = ()) -> None:
        self.problems = list(problems)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, ConfigError):
            self.problems.extend(error.problems)
        return isinstance(error, ConfigError)

    def error(self) -> ConfigError:
        """All problems as one error; each once, though several checks may have met it."""
        return ConfigError([p for i, p in enumerate(self.problems) if p not in self.problems[:i]])

    def finish(self) -> None:
        """Raise that error if there was any problem."""
        if self.problems:
            raise self.error()


class DataError(ConfigError):
    """A data file, shard directory or run directory that cannot be used as it is."""


class DoesNotFitError(VramplanError):
    """Nothing that was searched fits the budget; the message names the smallest thing that would."""

    exit_code = 3


class CapExceededError(VramplanError):
    """In a replay: a request did not fit under the cap, even after everything cached was given back. In bytes."""

    exit_code = 3

    def __init__(self, requested_bytes: int, allocated_bytes: int, reserved_bytes: int) -> None:
        self.requested_bytes, self.allocated_bytes, self.reserved_bytes = (
            requested_bytes,
            allocated_bytes,
            reserved_bytes,
        )
        super().__init__(f"{requested_bytes} bytes asked for, {allocated_bytes} allocated, {reserved_bytes} reserved")

    def __reduce__(self) -> tuple[type[CapExceededError], tuple[int, int, int]]:
        """Pickle by its three numbers, so that the error survives the way out of a worker process."""
        return type(self), (self.requested_bytes, self.allocated_bytes, self.reserved_bytes)


class TokenizerUnavailableError(VramplanError):
    """GPT-2's merge table is neither cached, nor downloadable, nor installed as a package."""


class Stopped(VramplanError):  # noqa: N818 - what happened, not something wrong
    """A signal ended the work; the message says what is left of it and how to go on."""

    exit_code = 128

    def __init__(self, message: str, signal_number: int) -> None:
        self.signal_number = signal_number
        self.exit_code = type(self).exit_code + signal_number
        super().__init__(message)

    def __reduce__(self) -> tuple[type[Stopped], tuple[str, int]]:
        """Pickle with the signal, so that the error survives the way out of a worker process."""
        return type(self), (str(self), self.signal_number)


def command(*words: object) -> str:
    """A command as it must be typed, with paths quoted where this system's shell needs it."""
    strings = [str(word) for word in words]
    if os.name != "nt":
        return shlex.join(strings)
    from subprocess import list2cmdline

    return list2cmdline(strings)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return ``did you mean ...?`` for the nearest known words, or the whole list when none is near."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
