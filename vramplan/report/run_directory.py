"""A run directory of our trainer as a :class:`Record`, read without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Problem
from ..runconfig import RunConfig
from ..trainer.metrics import CONFIG, FACTS, METRICS, Line, read_metrics
from .run_record import Curve, Happening, Planned, Rates, Record, SpikeLine, loss_of

SHORTEST_SECONDS, LONGEST_SECONDS, MOST_TOKENS = 1e-6, 1e6, 1e15
"""Of a step, and of an epoch: what is beyond is not a measurement."""


def read_run(path: Path, config: RunConfig | None = None) -> Record:
    """The run in directory ``path``; ``config`` serves where it has lost its own.

    Raises ConfigError when there is no run, or what is there cannot be read.
    """
    if not (path / CONFIG).exists() and not (path / METRICS).exists():
        remedy = "name a run directory, or the log of nanoGPT's train.py"
        raise ConfigError(Problem("run", str(path), f"holds neither {CONFIG} nor {METRICS}", remedy))
    if (path / CONFIG).exists():
        config = RunConfig.load(path / CONFIG)
    lines = [line for line in read_metrics(path / METRICS) if 0 <= line["step"] < 10**12]
    known: dict[str, Any] = {} if config is None else from_config(config)
    if config is None:
        known["missing"] = (f"{CONFIG} is gone: give the run's configuration with --config",)
    logged = [line for line in lines if line["kind"] == "step"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    losses = _curve(logged, "loss")
    validation = _curve(evaluations, "val_loss")
    return Record(
        title=str(path),
        program="vramplan",
        steps_done=max((line["step"] for line in lines if line["kind"] != "guard"), default=0),
        first_loss=_first_loss(losses, validation),
        losses=losses,
        validation=validation,
        step_seconds=_step_seconds(logged),
        unique_tokens=_unique_tokens(logged, config),
        device=_device(path / FACTS),
        spikes=tuple(
            SpikeLine(line["step"], str(line["what"]), line["value"], line["usual"])
            for line in lines
            if line["kind"] == "spike" and _number(line, "value") and _number(line, "usual") and line["usual"] > 0
        ),
        happenings=tuple(
            Happening(line["step"], "guard" if line["kind"] == "guard" else "stopped", str(line["reason"]))
            for line in lines
            if line["kind"] in ("guard", "stopped")
        ),
        peak_allocated_bytes=_largest(logged, "peak_allocated_bytes"),
        peak_reserved_bytes=_largest(logged, "peak_reserved_bytes"),
        alloc_retries=_largest(logged, "alloc_retries"),
        from_scratch=True if losses and losses[0][0] == 1 else None,
        **known,
    )


def from_config(config: RunConfig) -> dict[str, Any]:
    """The fields of a :class:`Record` that our configuration decides."""
    train, plan = config.train, config.plan
    return {
        "shape": config.shape,
        "step": config.step_config,
        "vocab_size": config.model.vocab_size,
        "tokens_per_step": config.tokens_per_step,
        "total_steps": config.total_steps,
        "rates": Rates(
            schedule=train.schedule, peak=train.learning_rate, minimum=train.min_learning_rate,
            warmup_steps=train.warmup_steps, total_steps=config.total_steps, decay_fraction=train.decay_fraction,
        ),
        "planned": Planned(
            parameters=plan.target_parameters, gpu=plan.gpu, budget_bytes=plan.budget_bytes,
            process_bytes=plan.process_bytes, peak_allocated_bytes=plan.peak_allocated_bytes,
            tokens_per_second=plan.tokens_per_second,
        ),
    }  # fmt: skip


def _curve(lines: list[Line], name: str) -> Curve:
    """One value for each step; of several the last."""
    return tuple(sorted({line["step"]: loss_of(line.get(name)) for line in lines}.items()))


def _number(line: Line, name: str) -> bool:
    value = line.get(name)
    return isinstance(value, int | float) and math.isfinite(value)


def _first_loss(losses: Curve, validation: Curve) -> float | None:
    """The first step's line has the loss before its update."""
    if validation and validation[0][0] == 0:
        return validation[0][1]
    return losses[0][1] if losses and losses[0][0] == 1 else None


def _step_seconds(logged: list[Line]) -> tuple[tuple[int, float], ...]:
    """Those of the lines that have a throughput: the first of a process has none."""
    return tuple(
        (line["step"], float(line["step_seconds"]))
        for line in logged
        if _number(line, "tokens_per_second")
        and _number(line, "step_seconds")
        and SHORTEST_SECONDS < line["step_seconds"] < LONGEST_SECONDS
    )


def _unique_tokens(logged: list[Line], config: RunConfig | None) -> int | None:
    """Tokens of an epoch, a whole number of blocks, from how much of how many epochs the last line has."""
    for line in reversed(logged):
        if _number(line, "epoch") and _number(line, "tokens") and line["epoch"] > 0:
            block = config.model.block_size if config else 1
            tokens = float(line["tokens"]) / float(line["epoch"])
            return round(tokens / block) * block if block <= tokens < MOST_TOKENS else None
    return None


def _device(facts: Path) -> str:
    """Where the last session ran; empty when ``run.json`` is gone or damaged, which ends nothing here."""
    try:
        return str(json.loads(facts.read_text(encoding="utf-8"))["sessions"][-1]["device"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""


def _largest(logged: list[Line], name: str) -> int | None:
    return max((int(line[name]) for line in logged if _number(line, name)), default=None)


def metrics_beside(path: Path) -> Path | None:
    """The run directory that a file of it was given for: ``metrics.jsonl`` or ``config.toml`` inside one."""
    inside = path.name in (METRICS, CONFIG) and (path.parent / METRICS).is_file()
    return path.parent if inside else None
