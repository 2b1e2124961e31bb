"""Plans and estimates in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import command
from ..planner.candidates import published_name
from ..planner.gpu import Budget
from ..planner.memory import Estimate
from ..planner.plan import Plan, PlanSet
from ..planner.repair import Repair
from ..planner.risk import OomRisk
from ..planner.step import CHECKPOINTING_WORDS, tokens_per_step
from ..planner.timeline import GROUPS
from ..units import count, duration, gib, gib_needed
from .console import console

BREAKDOWN = (
    *((name, categories) for name, categories in GROUPS if name != "workspace"),
    ("tuning kernels", ("first step",)),
    ("allocator slack", ("rounding", "fragmentation")),
)
"""What a person reads, and the parts of an estimate's breakdown behind it; workspaces go with the context."""


def percent(probability: float) -> str:
    """A risk as people read it: ``< 0.01 %``, ``0.4 %``, ``37 %``."""
    if probability < 1e-4:
        return "< 0.01 %"
    return f"{probability * 100:.2f} %" if probability < 0.1 else f"{probability * 100:.0f} %"


def risk_words(risk: OomRisk) -> str:
    """A risk with its interval, where that says more, and where it comes from."""
    return f"{percent(risk.probability)}{between(risk)} ({risk.reason})"


def between(risk: OomRisk) -> str:
    """``, between 0.01 % and 2 %``; empty where both ends read the same."""
    low, high = (percent(end) for end in risk.interval)
    return "" if low == high else f", between {low} and {high}"


def sentence(plan: Plan) -> str:
    """The plan as one sentence with its arithmetic."""
    shape, step = plan.shape, plan.step
    name = published_name(shape)
    total = int(tokens_per_step(shape, step))
    loss = f"chunked loss ({step.loss_chunk_tokens} tokens a slice)" if step.loss == "chunked" else "full loss"
    how = ", ".join(
        [
            step.dtype,
            "compiled" if step.compile else "eager",
            loss,
            CHECKPOINTING_WORDS[step.checkpointing],
            step.optimizer,
        ]
    )
    whose = "" if step.workload == "vramplan" else f", memory of the {step.workload} workload"
    variant = "".join(f", {word}" for word in shape.variant)
    return (
        f"{shape.label}{f' ({name})' if name else ''}{variant}, {count(shape.parameters)} parameters, head_dim "
        f"{shape.head_dim}: batch_size {step.batch_size} x grad_accum {step.grad_accum} x block_size "
        f"{shape.block_size} = {total:,} tokens per step; {how}{whose}."
    )


def print_plans(
    plans: PlanSet, notes: Iterable[str], saved_as: Path | None = None, out: Console | None = None, *,
    goes_on: bool = False,
) -> None:  # fmt: skip
    """The recommended plan, its memory, what to expect, what lost against it, and unless it ``goes_on`` what to do."""
    out = out or console()
    best = plans.plans[0]
    on_cpu = best.step.device == "cpu"
    where = plans.gpu.name if plans.gpu else "this machine's memory" if on_cpu else "a GPU of this size"
    kept = (
        f" ({gib(plans.budget.total_bytes)} less {gib(plans.budget.reserve_bytes)})"
        if plans.budget.reserve_bytes
        else ""
    )
    out.print(f"[bold]Plan for {where}[/]: {gib(plans.budget.budget_bytes)} to use{kept}")
    for note in notes:
        out.print(f"  [dim]{escape(note)}[/]")
    for note in plans.notes:
        out.print(f"  [yellow]warning[/]: {note}")
    out.print(f"\n[bold green]Recommended[/] {sentence(best)}")
    out.print(f"  {best.reason}; searched in {duration(plans.seconds)}.\n")
    out.print(breakdown_table(best.estimate, plans.budget.budget_bytes))
    _print_expectations(out, best, plans)
    if len(plans.plans) > 1:
        out.print("\n[bold]Runners-up[/] and why they lost")
        for plan in plans.plans[1:]:
            out.print(f"  {plan.rank}. {plan.reason}")
    if plans.alternatives:
        out.print("\n[bold]Other shapes[/] near the target, each with its best settings")
        for plan in plans.alternatives:
            out.print(f"  - {plan.reason}")
    if goes_on:
        return
    save = "" if saved_as else "add -o plan.json, then "
    apply = ("vramplan", "apply", saved_as or "plan.json")
    follow = f"{command(*apply, '-o', 'run.toml')} && vramplan train run.toml --data FILE.parquet --out RUN"
    if best.step.workload == "nanogpt":
        follow = command(*apply, "--format", "nanogpt", "-o", "planned.py")
    if best.step.workload == "autocast":
        follow = command("vramplan", "report", saved_as or "plan.json")
    out.print(f"\nNext: {save}{follow}", markup=False)


def _print_expectations(out: Console, plan: Plan, plans: PlanSet) -> None:
    head = plans.budget.budget_bytes - plan.estimate.process_bytes
    out.print(f"  peak       {gib(plan.estimate.peak_allocated_bytes)} allocated, {gib(plan.estimate.process_bytes)} "
              f"for the process, during {plan.estimate.peak_phase}")  # fmt: skip
    needs = f"needs at least {gib_needed(plan.needs_bytes)} free for {percent(plans.max_risk)} risk"
    out.print(f"  headroom   {gib(head)}; {needs}")
    out.print(f"  OOM risk   {risk_words(plan.oom_risk)}")
    if plan.tokens_per_second and plan.mfu is not None:
        out.print(f"  speed      {plan.tokens_per_second:,.0f} tokens/s expected, MFU {plan.mfu:.0%}")
        seconds = plan.seconds_for(plans.token_budget) or 0.0
        per = plans.token_budget / plan.shape.parameters
        out.print(f"  time       {duration(seconds)} for {count(plans.token_budget)} tokens ({per:.0f} per parameter)")
    else:
        why = "for a CPU" if plan.step.device == "cpu" else "without a card's name (--gpu)"
        out.print(f"  speed      unknown {why}: ranked by FLOPs")


def breakdown_table(estimate: Estimate, budget_bytes: int | None) -> Table:
    """Where the memory goes at the peak, as bars against the budget."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 2))
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("share")
    whole = budget_bytes or estimate.process_bytes
    outside = "context and workspaces" if estimate.step.device == "cuda" else "Python and torch"
    for name, categories in (*BREAKDOWN, (outside, ("context", "workspace"))):
        size = sum(estimate.breakdown[c] for c in categories)
        table.add_row(name, gib(size), _bar(size / whole))
    if budget_bytes is not None:
        free = budget_bytes - estimate.process_bytes
        table.add_row("free" if free >= 0 else "[red]missing[/]", gib(abs(free)), _bar(abs(free) / whole, "░"))
    return table


def _bar(share: float, ink: str = "█", width: int = 40) -> str:
    return ink * min(width, round(share * width)) + f" {share:.0%}"


def print_estimate(
    estimate: Estimate, plan: Plan | None, budget: Budget | None, notes: Iterable[str], max_risk: float,
    repair: Repair | None = None, out: Console | None = None,
) -> None:  # fmt: skip
    """One configuration: peak, phase, breakdown, largest tensors, and the verdict when there is a budget."""
    out = out or console()
    shape = estimate.shape
    out.print(f"[bold]{shape.label}[/], {shape.parameters:,} parameters, workload {estimate.step.workload}")
    for note in notes:
        out.print(f"  [dim]{escape(note)}[/]")
    for note in estimate.caveats:
        out.print(f"  [yellow]warning[/]: {note}")
    allocated, reserved = gib(estimate.peak_allocated_bytes), gib(estimate.peak_reserved_bytes)
    out.print(f"  peak       {allocated} allocated, {reserved} reserved, {gib(estimate.process_bytes)} for the process")
    out.print(f"  phase      {estimate.peak_phase}\n")
    out.print(breakdown_table(estimate, budget.budget_bytes if budget else None))
    out.print("  largest at the peak:")
    for row in estimate.alive_at_peak[:5]:
        out.print(f"    {gib(row.n_bytes):>10}  {row.name}")
    if plan is not None and budget is not None:
        fits = plan.needs_bytes <= budget.budget_bytes
        verdict = "[green]fits[/]" if fits else "[red]does not fit[/]"
        out.print(f"  verdict    {verdict} {gib(budget.budget_bytes)}: "
                  f"OOM risk {risk_words(plan.oom_risk)}")  # fmt: skip
        out.print(f"  needs      at least {gib_needed(plan.needs_bytes)} free for {percent(max_risk)} risk")
        if plan.tokens_per_second and plan.mfu is not None:
            out.print(f"  speed      {plan.tokens_per_second:,.0f} tokens/s expected, MFU {plan.mfu:.0%}")
    if repair is not None:
        out.print(f"  repair     {repair.sentence()}")
