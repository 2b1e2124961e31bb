"""``report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rich_click as click

from ..errors import ConfigError, Problem
from ..planner.plan import plan_gpu
from ..planner.plan_file import read_plans
from ..runconfig import RunConfig
from .options import DEFAULT_MAX_RISK, FilePath, card_options, refused, resolve_target


@click.command()
@click.argument("subject", metavar="PLAN|CONFIG|RUN", type=FilePath())
@card_options(default=None, max_risk=None)
@click.option("--rank", type=click.IntRange(1), default=1, show_default=True, help="Which plan of a plan file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def report(subject: Path, rank: int, as_json: bool, max_risk: float | None, **card: Any) -> None:
    """The OOM-risk report: risk, what dominates the peak and when, and what each lever would save and cost.

    SUBJECT is a plan file (JSON), a run configuration (TOML) or a run directory. Card, budget and risk limit are those
    it was planned for, unless options say otherwise.
    """
    from ..report.risk import build_report, print_report

    refused().finish()
    shape, step, planned, measured = _read(subject, rank)
    asked = card["headless"] or any(card[name] is not None for name in ("gpu", "vram", "reserve"))
    if asked or (step.device == "cpu" and not planned.get("budget_bytes")):
        name = card["gpu"] or planned.get("gpu") or ("cpu" if step.device == "cpu" else None)
        size = card["vram"]
        if card["gpu"] is None and size is None:
            size = planned.get("total_bytes")  # the plan's own card or size; only what is kept back changes
        target = resolve_target(name, size, card["reserve"], card["headless"])
        if target.device != step.device:
            remedy = "plan again for that device"
            raise ConfigError(Problem("--gpu", name, f"does not run a configuration made for {step.device}", remedy))
        gpu, budget = target.gpu, target.budget.budget_bytes
    elif planned.get("budget_bytes"):
        gpu, budget = plan_gpu(planned.get("gpu")), int(planned["budget_bytes"])
    else:
        raise ConfigError(
            Problem("--gpu", "missing", "is required", f"{subject} names no budget; give --gpu or --vram")
        )
    title = f"{subject}{f', plan {rank}' if 'plans' in planned else ''}: {shape.label}"
    limit = max_risk or planned.get("max_risk") or DEFAULT_MAX_RISK
    result = build_report(title, shape, step, gpu, budget, limit, measured)
    if as_json:
        click.echo(json.dumps(result.as_dict()))
    else:
        print_report(result)


def _read(subject: Path, rank: int) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Shape, step, what was planned, and what a run measured."""
    if _is_json(subject):
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
        lines = [line for line in read_metrics(run.metrics) if line["kind"] == "step"]
        measured: dict[str, Any] = {"steps": max((line["step"] for line in lines), default=0)}
        for name in ("peak_allocated_bytes", "peak_reserved_bytes", "alloc_retries"):
            seen = [line[name] for line in lines if line.get(name) is not None]
            measured[name] = max(seen) if seen else None
        return config.shape, config.step_config, config.plan.model_dump(), measured
    config = RunConfig.load(subject)
    return config.shape, config.step_config, config.plan.model_dump(), {}


def _is_json(path: Path) -> bool:
    """Whether a file holds an object in JSON rather than TOML, whatever it is called."""
    if not path.is_file():
        return path.suffix.lower() == ".json"
    with path.open(encoding="utf-8", errors="replace") as f:
        return f.read(64).lstrip().startswith(("{", "[{"))
