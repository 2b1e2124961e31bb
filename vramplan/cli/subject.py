"""What a command is about: a plan file, a run configuration or a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError, Problem
from ..planner.plan_file import read_plans
from ..planner.shape import Shape
from ..planner.step import StepConfig
from ..runconfig import RunConfig

ABOUT_A_LINE = ("kind", "step", "run_seconds", "time")
"""What every line of the metrics has."""


def read_subject(subject: Path, rank: int) -> tuple[Shape, StepConfig, dict[str, Any], dict[str, Any]]:
    """Shape, step, what was planned, and what a run measured. Raises ConfigError."""
    try:
        plans = _is_json(subject)
    except OSError as error:
        raise ConfigError(Problem("config", str(subject), f"cannot be read ({error.strerror})")) from None
    if rank > 1 and not plans:
        raise ConfigError(Problem("--rank", rank, f"means nothing: {subject} is no plan file", "leave it out"))
    if plans:
        data, configs = read_plans(subject)
        if rank > len(configs):
            raise ConfigError(Problem("--rank", rank, f"is beyond the {len(configs)} plans of {subject}"))
        return *configs[rank - 1], data, {}
    if subject.is_dir():
        from ..trainer.metrics import read_metrics
        from ..trainer.rundir import RunDirectory

        run = RunDirectory(subject)
        if not run.exists:
            raise ConfigError(
                Problem("run", str(subject), "holds no run", "name a run directory, plan or configuration")
            )
        config = run.stored_config()
        return config.shape, config.step_config, config.plan.model_dump(), _measured(read_metrics(run.metrics))
    config = RunConfig.load(subject)
    return config.shape, config.step_config, config.plan.model_dump(), {}


def _measured(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run's metrics say about its memory: the most of all sessions, by phase, and what the guard did."""
    from ..trainer.metrics import LARGEST

    steps = [line for line in lines if line["kind"] == "step"]
    measured: dict[str, Any] = {"steps": max((line["step"] for line in steps), default=0)}
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "alloc_retries"):
        seen = [line[name] for line in steps if line.get(name) is not None]
        least = 0 if name == "alloc_retries" else 1
        measured[name] = max((value for value in seen if least <= value < LARGEST), default=None)
    peaks: dict[str, int] = {}
    for line in lines:
        if line["kind"] == "memory":
            for phase, size in line.items():
                if phase not in ABOUT_A_LINE and size is not None and 0 < size < LARGEST:
                    peaks[phase] = max(peaks.get(phase, 0), int(size))
    measured["phase_peaks"] = peaks
    measured["guard"] = [
        {name: line[name] for name in ("step", "reason", "batch_size", "grad_accum")}
        for line in lines if line["kind"] == "guard"
    ]  # fmt: skip
    return measured


def read_config(subject: Path, rank: int) -> RunConfig:
    """The complete run configuration of the same. Raises ConfigError."""
    if _is_json(subject):
        from ..report.exports import run_config

        data, configs = read_plans(subject)
        if rank > len(configs):
            raise ConfigError(Problem("--rank", rank, f"is beyond the {len(configs)} plans of {subject}"))
        return run_config(data, rank)
    if subject.is_dir():
        from ..trainer.rundir import RunDirectory

        return RunDirectory(subject).stored_config()
    return RunConfig.load(subject)


def _is_json(path: Path) -> bool:
    """Whether a file holds an object in JSON rather than TOML, whatever it is called."""
    if not path.is_file():
        return path.suffix.lower() == ".json"
    with path.open(encoding="utf-8", errors="replace") as f:
        return f.read(64).lstrip().startswith(("{", "[{"))
