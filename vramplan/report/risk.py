"""The OOM-risk report: what a plan or run needs, what dominates, and what each lever would change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..planner.gpu import Gpu
from ..planner.levers import Lever, largest_batch, levers
from ..planner.memory import Estimate, estimate
from ..planner.repair import Repair, smallest_repair
from ..planner.risk import OomRisk, needed_for, risk_of
from ..planner.shape import Shape
from ..planner.step import StepConfig
from ..units import gib, gib_needed
from .console import console
from .plans import between, breakdown_table, percent


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskReport:
    """All data of the report in one place; text and JSON are read from it.

    ``measured`` holds what a run recorded: ``peak_allocated_bytes``, ``peak_reserved_bytes`` (None on a CPU).
    """

    title: str
    shape: Shape
    step: StepConfig
    gpu: Gpu | None
    budget_bytes: int
    max_risk: float
    estimate: Estimate
    risk: OomRisk
    needs_bytes: int
    largest_batch: int
    repair: Repair | None
    levers: tuple[Lever, ...]
    measured: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "title": self.title,
            "gpu": self.gpu.name if self.gpu else None,
            "budget_bytes": self.budget_bytes,
            "headroom_bytes": self.budget_bytes - self.estimate.process_bytes,
            "max_risk": self.max_risk,
            **self.risk.as_dict(),
            "needs_bytes": self.needs_bytes,
            "largest_batch": self.largest_batch,
            "estimate": self.estimate.as_dict(),
            "top_tensors": [
                {"name": t.name, "category": t.category, "bytes": t.n_bytes} for t in self.estimate.alive_at_peak[:10]
            ],
            "repair": None if self.repair is None else self.repair.as_dict(),
            "levers": [
                {
                    "name": lever.name,
                    "process_bytes": lever.process_bytes,
                    "saved_bytes": lever.saved_bytes,
                    "speed_ratio": lever.speed_ratio,
                    "largest_batch": lever.largest_batch,
                    "changes_result": lever.changes_result,
                }
                for lever in self.levers
            ],
            "measured": dict(self.measured),
        }


def build_report(
    title: str, shape: Shape, step: StepConfig, gpu: Gpu | None, budget_bytes: int, max_risk: float,
    measured: Mapping[str, Any] | None = None,
) -> RiskReport:  # fmt: skip
    """Compute everything the report shows."""
    full = estimate(shape, step, gpu)
    return RiskReport(
        title=title,
        shape=shape,
        step=step,
        gpu=gpu,
        budget_bytes=budget_bytes,
        max_risk=max_risk,
        estimate=full,
        risk=risk_of(full, budget_bytes),
        needs_bytes=math.ceil(needed_for(full, max_risk)),
        repair=smallest_repair(shape, step, gpu, budget_bytes, max_risk)
        if needed_for(full, max_risk) > budget_bytes
        else None,
        largest_batch=largest_batch(shape, step, gpu, budget_bytes, max_risk),
        levers=tuple(levers(shape, step, gpu, budget_bytes, max_risk)),
        measured=measured or {},
    )


def print_report(report: RiskReport, out: Console | None = None) -> None:
    """The report in the terminal."""
    out = out or console()
    full, fits = report.estimate, report.risk.probability <= report.max_risk
    out.print(f"[bold]OOM-risk report[/] {escape(report.title)}")
    verdict = "[green]fits[/]" if fits else "[red]does not fit[/]"
    risk = f"OOM risk {percent(report.risk.probability)}{between(report.risk)} (limit {percent(report.max_risk)})"
    out.print(f"  It {verdict}: {gib(full.process_bytes)} of {gib(report.budget_bytes)}, {risk}.")
    out.print(f"  [dim]{report.risk.reason}[/]")
    needs = f"needs at least {gib_needed(report.needs_bytes)} free"
    out.print(f"  headroom   {gib(report.budget_bytes - full.process_bytes)}; {needs}\n")
    out.print(breakdown_table(full, report.budget_bytes))
    top = full.alive_at_peak
    out.print(f"  The peak, {gib(full.peak_allocated_bytes)} allocated, comes during {full.peak_phase}. Largest then:")
    for row in top[:5]:
        share = row.n_bytes / full.peak_allocated_bytes
        out.print(f"    {gib(row.n_bytes):>10}  {share:>4.0%}  {row.name} ({row.category.replace('_', ' ')})")
    phases = ", ".join(f"{name} {gib(size)}" for name, size in full.phase_peaks.items() if name != "persistent")
    out.print(f"  By phase: {phases}.")
    if report.repair is not None:
        out.print(f"  Smallest change that fits: {report.repair.sentence()}.")
    elif not fits:
        out.print("  No other way to run the same optimizer step fits: a smaller model or block_size, or another card.")
    out.print(_lever_table(report))
    out.print("  * changes the optimisation itself (numerics or context length).")
    out.print(
        "  The largest batch divides the step's sequences; (all) is the whole step at once, without accumulation."
    )
    _print_measured(out, report)


def _lever_table(report: RiskReport) -> Table:
    table = Table(title="\nLevers, one at a time", title_justify="left", box=None, padding=(0, 2))
    for name in ("change", "needs", "saves", "speed", "largest batch"):
        table.add_column(name, justify="left" if name == "change" else "right", no_wrap=True)
    table.add_row("as it is", gib(report.estimate.process_bytes), "", "", _batch(report.largest_batch, report.step))
    for lever in report.levers:
        speed = "n/a" if lever.speed_ratio is None else f"{lever.speed_ratio:.2f}x"
        largest = _batch(lever.largest_batch, lever.step)
        name = f"{lever.name}{' *' if lever.changes_result else ''}"
        saved = f"{'-' if lever.saved_bytes < 0 else ''}{gib(abs(lever.saved_bytes))}"
        table.add_row(name, gib(lever.process_bytes), saved, speed, largest)
    return table


def _batch(largest: int, step: StepConfig) -> str:
    """The largest batch in words: it divides the step's sequences, so the whole step is the most there is."""
    if largest == step.batch_size * step.grad_accum:
        return f"{largest} (all)"
    return str(largest) if largest else "none fits"


def _print_measured(out: Console, report: RiskReport) -> None:
    if not report.measured:
        return
    allocated = report.measured.get("peak_allocated_bytes")
    if allocated is None:
        out.print(
            "\n  Measured: a CPU run records no peak; `estimate` counts tensors that a CPU pass confirms in the tests."
        )
        return
    error = report.estimate.peak_allocated_bytes / allocated - 1
    out.print(f"\n  Measured: {gib(allocated)} allocated; the estimate is {error:+.2%} off.")
