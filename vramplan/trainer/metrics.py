"""``metrics.jsonl``: one JSON object per line, in the order things happened.

Every line has ``kind`` (``step``, ``checkpoint``, ``evaluation``, ``guard``, ``memory``, ``spike`` or ``stopped``),
``step``, ``run_seconds`` (the recorder's) and ``time`` (Unix seconds). A ``memory`` line holds the most bytes allocated
in each phase since the process began. Numbers that are not finite are written as null, because
JSON has no other word for them.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import DataError, Problem

CONFIG, METRICS, FACTS = "config.toml", "metrics.jsonl", "run.json"
"""Names inside a run directory that reports read (:class:`~vramplan.trainer.rundir.RunDirectory` needs torch)."""

Line = dict[str, Any]

_REQUIRED = {
    "step": ("loss",),
    "evaluation": ("val_loss", "best_val_loss", "train_loss"),
    "checkpoint": ("file",),
    "guard": ("reason", "batch_size", "grad_accum"),
    "spike": ("what", "value", "usual", "times"),
    "stopped": ("reason",),
}
_WORDS = ("kind", "reason", "file", "what")
"""Fields that hold text. All others hold numbers, or null."""


class MetricsLog:
    """Appends lines to ``path``; each is flushed at once, so a killed run loses at most the line being written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def append(self, kind: str, values: Line) -> None:
        """Write one line: kind, the values, and the time."""
        line = {"kind": kind, **values, "time": time.time()}
        self._file.write(json.dumps({k: _finite(v) for k, v in line.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[Line]:
    """All complete lines; none when the file does not exist. A last line cut off by a crash is left out.

    Raises DataError for damage anywhere else.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(Problem("metrics", str(path), f"cannot be read ({error.strerror})")) from None
    found: list[Line] = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            line = None
        if not _sound(line):
            raise DataError(Problem("metrics", str(path), f"is damaged in line {number}", "remove that line"))
        found.append(line)
    return found


def anything_done(path: Path) -> bool:
    """Whether there is more than words about memory that was tried to no avail. An unreadable line counts."""
    with path.open("rb") as lines:
        return any(not line.startswith(b'{"kind": "guard"') for line in lines)


def _sound(line: Any) -> bool:
    """Whether a line has what its kind needs, and numbers where numbers belong."""
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str) or type(line.get("step")) is not int:
        return False
    complete = all(name in line for name in _REQUIRED.get(line["kind"], ()))
    return complete and all(v is None or _is_number(v) for k, v in line.items() if k not in _WORDS)


LARGEST = 2**63
"""Whole numbers beyond it are none that a run writes."""


def _is_number(value: Any) -> bool:
    """Whether it is a number that JSON has and a float can hold."""
    return math.isfinite(value) if type(value) is float else type(value) is int and abs(value) < LARGEST


def drop_after(path: Path, step: int) -> int:
    """Remove the lines beyond ``step`` (and a last one that was cut off), atomically. Returns how many were removed."""
    if not path.exists():
        return 0
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in kept)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
    return len(lines) - len(kept)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
