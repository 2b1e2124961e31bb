"""``report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from ..device import live_gpu
from ..errors import ConfigError, Problem
from ..files import check_not_over, write_text
from ..planner.card_memory import Held
from ..planner.gpu import Gpu
from ..planner.plan import plan_gpu
from ..planner.step import StepConfig
from .options import DEFAULT_MAX_RISK, FilePath, card_options, refused, resolve_target, with_evidence
from .subject import read_subject

if TYPE_CHECKING:
    from ..report.health import RunHealth


@click.command()
@click.argument("subject", metavar="PLAN|CONFIG|RUN", type=FilePath())
@card_options(default=None, max_risk=None)
@click.option("--rank", type=click.IntRange(1), default=1, show_default=True, help="Which plan of a plan file.")
@click.option("--html", type=FilePath(), help="Write it as one HTML file that needs no network.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def report(subject: Path, rank: int, html: Path | None, as_json: bool, max_risk: float | None, **card: Any) -> None:
    """The OOM-risk report: will it fit, how sure is that, what takes the memory when, and what each change would do.

    SUBJECT is a plan file (JSON), a run configuration (TOML) or a run directory; of a run also what was measured. Card,
    budget and risk limit are those it was planned for, unless options say otherwise.

    \b
    vramplan report plan.json
    vramplan report runs/first --html report.html
    """
    from ..report.risk import build_report
    from ..report.risk_text import print_report

    collect = refused()
    if html is not None:
        with collect:
            check_not_over(html, "--html", [subject])
    collect.finish()
    shape, step, planned, measured = read_subject(subject, rank)
    gpu, total, budget, notes = _room(subject, step, planned, card)
    title = f"{subject}{f', plan {rank}' if 'plans' in planned else ''}: {shape.label}"
    limit = max_risk or planned.get("max_risk") or DEFAULT_MAX_RISK
    result = build_report(
        title, shape, step, gpu, budget, limit, measured, total_bytes=total, held=_held(gpu), notes=notes
    )
    health = _health(subject, gpu)
    if html is not None:
        from ..report.html import render_report

        write_text(html, render_report(result, health), "--html")
    if as_json:
        click.echo(json.dumps(result.as_dict() | ({"health": health.as_dict()} if health else {})))
    elif html is not None:
        click.echo(f"{result.verdict}\nWrote {html}.")
    else:
        print_report(result)
        if health is not None:
            from ..report.health_text import print_health

            click.echo()
            print_health(health)


def _health(subject: Path, gpu: Gpu | None) -> RunHealth | None:
    """The health of a run; None of a plan or configuration."""
    if not subject.is_dir():
        return None
    from ..report.health import health_of_run

    return health_of_run(subject, gpu)


def _room(
    subject: Path, step: StepConfig, planned: dict[str, Any], card: dict[str, Any]
) -> tuple[Gpu | None, int, int, tuple[str, ...]]:
    """The card, what there is on it, of that what the run may take, and what was assumed."""
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
        return target.gpu, target.budget.total_bytes, target.budget.budget_bytes, target.notes
    if planned.get("budget_bytes"):
        budget = int(planned["budget_bytes"])
        return with_evidence(plan_gpu(planned.get("gpu"))), int(planned.get("total_bytes") or budget), budget, ()
    raise ConfigError(Problem("--gpu", "missing", "is required", f"{subject} names no budget; give --gpu or --vram"))


def _held(gpu: Gpu | None) -> list[Held]:
    """Who else is on the card, where it is the one in this machine."""
    live = live_gpu() if gpu is not None else None
    if live is None or gpu is None or live.capability != gpu.capability or live.total_bytes != gpu.total_bytes:
        return []
    return [(f"{process.name} (pid {process.pid})", process.used_bytes) for process in live.processes]
