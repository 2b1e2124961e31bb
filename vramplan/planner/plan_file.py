"""Reading back the file that ``plan -o`` wrote, with every problem said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Problem
from .risk import LARGEST_RISK
from .shape import SHAPE_CHOICES, Shape
from .step import CHOICES, StepConfig, check

SCHEMA = 1
SHAPE_FIELDS = tuple(Shape.__dataclass_fields__)
LATER_FIELDS = frozenset({"norm", "positions", "mlp", "n_kv_head", "qk_norm", "logit_softcap", "residual", "torch"})
"""Absent from plan files that were written before there was a choice."""
STEP_FIELDS = (
    "batch_size", "grad_accum", "dtype", "compile", "loss", "loss_chunk_tokens", "checkpointing", "optimizer",
    "residual", "workload", "device", "torch",
)  # fmt: skip


_TOP: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    # what every plan file must state: type and what is legal
    "schema": (int, lambda v: v == SCHEMA, f"must be {SCHEMA}"),
    "plans": (list, lambda v: bool(v), "must not be empty"),
    "gpu": ((str, type(None)), lambda v: True, ""),
    "budget_bytes": (int, lambda v: v > 0, "must be positive"),
    "max_risk": (float, lambda v: 0 < v <= LARGEST_RISK, f"must lie between 0 and {LARGEST_RISK}"),
    "token_budget": (int, lambda v: v > 0, "must be positive"),
    "total_bytes": (int, lambda v: v > 0, "must be positive"),
    "target_parameters": ((int, type(None)), lambda v: v is None or v > 0, "must be positive"),
}
_FIELD_TYPES = (
    {"bias": bool, "tied": bool, "compile": bool, "qk_norm": bool, "logit_softcap": float, "torch": str}
    | dict.fromkeys(CHOICES, str)
    | dict.fromkeys(SHAPE_CHOICES, str)
)


def read_plans(path: Path) -> tuple[dict[str, Any], list[tuple[Shape, StepConfig]]]:
    """Read a file that ``plan -o`` wrote: its contents, and (shape, step) of each plan.

    Raises ConfigError, with all problems, when it is missing or not such a file.
    """
    remedy = "write one with `vramplan plan ... -o FILE`"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(Problem("plan", str(path), "does not exist", remedy)) from None
    except (OSError, ValueError, RecursionError):
        raise ConfigError(Problem("plan", str(path), "is not a JSON file that can be read", remedy)) from None
    if not isinstance(data, dict) or "plans" not in data:
        raise ConfigError(Problem("plan", str(path), "is not a plan file", remedy))
    data = {"gpu": None, "target_parameters": None, **data}
    problems = [p for name in _TOP for p in _top_problems(data, name)]
    entries = data["plans"] if isinstance(data["plans"], list) else []
    for number, entry in enumerate(entries, 1):
        problems += _entry_problems(entry, f"plans[{number}]")
    if problems:
        raise ConfigError(problems, source=str(path))
    return data, [restore(entry) for entry in entries]


def _top_problems(data: dict[str, Any], name: str) -> list[Problem]:
    kind, legal, rule = _TOP[name]
    value = data.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        return [Problem(name, value, "has the wrong type or is missing")]
    return [] if legal(value) else [Problem(name, value, rule)]


def _entry_problems(entry: Any, where: str) -> list[Problem]:
    """Wrong types first; only a well-typed entry is checked for legality."""
    config, figures = (entry.get(k) if isinstance(entry, dict) else None for k in ("config", "estimate"))
    if not isinstance(config, dict) or not isinstance(figures, dict):
        return [Problem(where, "missing", "config or estimate is missing")]
    problems = []
    for name in (*SHAPE_FIELDS, *STEP_FIELDS):
        if name not in config and name in LATER_FIELDS:
            continue
        value, kind = config.get(name), _FIELD_TYPES.get(name, int)
        if type(value) is not kind:
            problems.append(Problem(f"{where}.config.{name}", value, f"must be of type {kind.__name__}"))
    for name in ("process_bytes", "peak_allocated_bytes"):
        value = figures.get(name)
        if type(value) is not int or value < 1:
            problems.append(Problem(f"{where}.estimate.{name}", figures.get(name), "must be a number of bytes"))
    for name in ("tokens_per_second", "oom_risk"):
        if name not in entry or not isinstance(entry[name], (int, float, type(None))):
            problems.append(Problem(f"{where}.{name}", entry.get(name, "missing"), "must be a number or null"))
    if not problems:
        shape, step = restore(entry)
        problems = [replace(p, field=f"{where}.config.{p.field}") for p in check(shape, step)]
    return problems


def restore(entry: dict[str, Any]) -> tuple[Shape, StepConfig]:
    """Shape and step of one entry of ``plans``."""
    config = entry["config"]
    return Shape(**{n: config[n] for n in SHAPE_FIELDS if n in config}), StepConfig(
        **{n: config[n] for n in STEP_FIELDS if n in config}
    )
