"""``report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rich_click as click

from ..errors import ConfigError, Problem
from ..planner.plan import plan_gpu
from .options import DEFAULT_MAX_RISK, FilePath, card_options, refused, resolve_target, with_evidence
from .subject import read_subject


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
    shape, step, planned, measured = read_subject(subject, rank)
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
        gpu, budget = with_evidence(plan_gpu(planned.get("gpu"))), int(planned["budget_bytes"])
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
