"""Plan: the ranked answer to "what fits this budget and trains fastest", able to explain itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DoesNotFitError, Problem
from ..units import MIB, count, gib, gib_needed
from .candidates import PUBLISHED, conventional, published_name
from .gpu import Budget, Gpu, find_gpu
from .memory import Estimate, estimate, host_bytes
from .plan_file import SCHEMA, SHAPE_FIELDS, STEP_FIELDS
from .risk import OomRisk, needed_for, risk_of
from .search import Grid, Ranking, confirm, quality_price, rank
from .shape import PADDED_GPT2_VOCAB, TOKENS_PER_PARAMETER, Shape, awkward, legal_neighbours
from .speed import flops_per_token, matmul_dtype, mfu, seconds_to_tokens, tokens_per_second
from .step import CHECKPOINTING_WORDS, OPTIMIZER_WORDS, StepConfig, tokens_per_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One answer. Speed figures are None when no card is known (CPU plans)."""

    rank: int
    shape: Shape
    step: StepConfig
    estimate: Estimate
    tokens_per_second: float | None
    mfu: float | None
    oom_risk: OomRisk
    needs_bytes: int
    reason: str

    def seconds_for(self, n_tokens: int) -> float | None:
        """Seconds of training until ``n_tokens`` have been seen."""
        return float(seconds_to_tokens(n_tokens, self.tokens_per_second)) if self.tokens_per_second else None

    def as_dict(self) -> dict[str, Any]:
        """One entry of ``plans`` in the JSON."""
        return {
            "rank": self.rank,
            "config": {n: getattr(self.shape, n) for n in SHAPE_FIELDS}
            | {n: getattr(self.step, n) for n in STEP_FIELDS},
            "estimate": self.estimate.as_dict(),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            **self.oom_risk.as_dict(),
            "needs_bytes": self.needs_bytes,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSet:
    """Everything ``plan`` answers: the ranked plans, other shapes beside the chosen one, and what was assumed."""

    plans: tuple[Plan, ...]
    alternatives: tuple[Plan, ...]
    gpu: Gpu | None
    budget: Budget
    max_risk: float
    considered: int
    seconds: float
    target_parameters: int | None
    token_budget: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What ``plan --json`` prints and ``-o`` writes; published keys stay."""
        return {
            "schema": SCHEMA,
            "plans": [p.as_dict() for p in self.plans],
            "alternatives": [p.as_dict() for p in self.alternatives],
            "gpu": self.gpu.name if self.gpu else None,
            "total_bytes": self.budget.total_bytes,
            "reserve_bytes": self.budget.reserve_bytes,
            "budget_bytes": self.budget.budget_bytes,
            "assumptions": list(self.budget.assumptions),
            "notes": list(self.notes),
            "max_risk": self.max_risk,
            "target_parameters": self.target_parameters,
            "token_budget": self.token_budget,
            "considered": self.considered,
            "seconds": round(self.seconds, 4),
        }


def make_plan(
    grid: Grid,
    gpu: Gpu | None,
    budget: Budget,
    *,
    max_risk: float = 0.01,
    top: int = 5,
    fastest_shape: bool = False,
    target_parameters: int | None = None,
    token_budget: int | None = None,
) -> PlanSet:
    """Search the grid and explain the best ``top`` plans.

    ``grid.shapes[0]`` is the settled shape unless ``fastest_shape`` lets speed decide among all of them. Raises
    DoesNotFitError with the smallest thing that would fit.
    """
    started = time.perf_counter()
    ranked = rank(grid, gpu, budget.budget_bytes, max_risk)
    own = ranked if fastest_shape else ranked.of(grid.shapes[0])
    fits = confirm(own, gpu, budget.budget_bytes, max_risk, top)
    if not fits:
        raise DoesNotFitError(_nothing_fits(grid, ranked, gpu, budget.budget_bytes, max_risk))
    plans: list[Plan] = []
    for fit in fits:
        plan = price_plan(len(plans) + 1, fit.estimate, gpu, budget.budget_bytes, max_risk)
        reason = compare(plan, plans[0], gpu) if plans else _why_best(plan, gpu, len(ranked.of(plan.shape)), grid)
        plans.append(replace(plan, reason=reason))
    others: list[Plan] = []
    for shape in [s for s in grid.shapes if s != plans[0].shape][:6]:
        for fit in confirm(ranked.of(shape), gpu, budget.budget_bytes, max_risk, 1):
            plan = price_plan(len(others) + 1, fit.estimate, gpu, budget.budget_bytes, max_risk)
            others.append(replace(plan, reason=compare(plan, plans[0], gpu)))
    return PlanSet(
        plans=tuple(plans),
        alternatives=tuple(others),
        gpu=gpu,
        budget=budget,
        max_risk=max_risk,
        considered=grid.size(),
        seconds=time.perf_counter() - started,
        target_parameters=target_parameters,
        token_budget=token_budget or TOKENS_PER_PARAMETER * int(plans[0].shape.parameters),
        notes=tuple(_notes(plans[0], target_parameters)),
    )


def refit(shape: Shape, step: StepConfig, gpu: Gpu | None, free_bytes: int, max_risk: float) -> PlanSet | None:
    """None when ``step`` fits ``free_bytes`` within the risk limit; else how to run the same step so that it does.

    Shape, tokens per step, dtype, compile and optimizer stay: the training itself is the same. Raises DoesNotFitError.
    """
    if needed_for(estimate(shape, step, gpu), max_risk) <= free_bytes:
        return None
    grid = Grid(
        shapes=(shape,), tokens_per_step=int(tokens_per_step(shape, step)), dtypes=(step.dtype,),
        compiles=(step.compile,), optimizers=(step.optimizer,), residual=step.residual, device=step.device,
    )  # fmt: skip
    return make_plan(grid, gpu, Budget(total_bytes=free_bytes, reserve_bytes=0), max_risk=max_risk, top=1)


FAR_FROM_TARGET = 0.10
"""A model this far (fraction) from the size asked for is worth a warning."""


def _notes(plan: Plan, target: int | None) -> list[str]:
    """What a user should know about the plan before a day of training."""
    shape, notes = plan.shape, list(plan.estimate.caveats)
    if plan.step.optimizer == "adamw8bit":
        notes.append('adamw8bit rounds the optimizer states to 8 bits and needs: pip install "vramplan[8bit]".')
    if target is not None and abs(shape.parameters / target - 1) > FAR_FROM_TARGET:
        notes.append(f"{shape.label} has {count(shape.parameters)} parameters, far from the {count(target)} asked for.")
    if not conventional(shape):
        rest = awkward(shape.head_dim)
        aspect = f"width/depth {shape.n_embd / shape.n_layer:.0f}, head_dim {shape.head_dim}{rest}"
        notes.append(f"{shape.label} is unlike published GPTs: {aspect}.")
    return notes


def price_plan(
    number: int, full: Estimate, gpu: Gpu | None, budget_bytes: int, max_risk: float, reason: str = ""
) -> Plan:
    """Put speed and risk beside an estimate."""
    rate = float(tokens_per_second(full.shape, full.step, gpu)) if gpu is not None else None
    return Plan(
        rank=number,
        shape=full.shape,
        step=full.step,
        estimate=full,
        tokens_per_second=rate,
        mfu=float(mfu(full.shape, rate, gpu, matmul_dtype(full.step, gpu))) if gpu is not None and rate else None,
        oom_risk=risk_of(full, budget_bytes),
        needs_bytes=math.ceil(needed_for(full, max_risk)),
        reason=reason,
    )


def _why_best(plan: Plan, gpu: Gpu | None, fitting: int, grid: Grid) -> str:
    goal = "fastest" if plan.tokens_per_second else "fewest FLOPs"
    price = quality_price(plan.step, gpu)
    if price == 0:
        goal += " without a cost in numerics"
    elif any(quality_price(mode, gpu) < price for mode in grid.modes()):
        goal += " of those that fit: none does without this cost in numerics"
    ways = f"{fitting:,} ways to run this shape fit, before the allocator's slack"
    return f"{goal}; {ways}; {grid.size():,} configurations considered"


def differences(step: StepConfig, other: StepConfig) -> list[str]:
    """Words for each setting in which ``step`` differs from ``other``."""
    words = []
    if step.batch_size != other.batch_size:
        words.append(f"batch {step.batch_size} x {step.grad_accum} instead of {other.batch_size} x {other.grad_accum}")
    if step.compile != other.compile:
        words.append("compiled" if step.compile else "eager instead of compiled")
    if step.loss != other.loss:
        words.append("chunked loss" if step.loss == "chunked" else "full loss")
    elif step.loss == "chunked" and step.loss_chunk_tokens != other.loss_chunk_tokens:
        words.append(f"slices of {step.loss_chunk_tokens} tokens")
    if step.checkpointing != other.checkpointing:
        words.append(CHECKPOINTING_WORDS[step.checkpointing])
    if step.optimizer != other.optimizer:
        words.append(OPTIMIZER_WORDS.get(step.optimizer, step.optimizer))
    if step.dtype != other.dtype:
        words.append(step.dtype)
    return words


def speed_words(change: float) -> str:
    """``2.5% slower`` for -0.025."""
    return "as fast" if abs(change) < 0.0005 else f"{abs(change):.1%} {'faster' if change > 0 else 'slower'}"


def compare(plan: Plan, best: Plan, gpu: Gpu | None) -> str:
    """One line: how ``plan`` differs from ``best``, what it costs and what it saves."""
    words = differences(plan.step, best.step)
    if plan.shape != best.shape:
        name = published_name(plan.shape)
        words.insert(0, f"{plan.shape.label}{f' ({name})' if name else ''}, {count(plan.shape.parameters)}")
    verdict = []
    if plan.tokens_per_second and best.tokens_per_second:
        change = plan.tokens_per_second / best.tokens_per_second - 1
        verdict.append(speed_words(change))
    else:
        change = flops_per_token(plan.shape, plan.step) / flops_per_token(best.shape, best.step) - 1
        verdict.append(f"{abs(change):.1%} {'more' if change > 0 else 'fewer'} FLOPs" if change else "the same FLOPs")
    if quality_price(plan.step, gpu) > quality_price(best.step, gpu):
        verdict.append("a cost in numerics")
    saved = best.estimate.process_bytes - plan.estimate.process_bytes
    size = f"{gib(abs(saved))} {'less' if saved > 0 else 'more'}" if abs(saved) >= MIB else "the same"
    verdict.append(f"{size} memory")
    return f"{', '.join(verdict)}: {'; '.join(words) or 'the same settings'}"


def _nothing_fits(grid: Grid, ranked: Ranking, gpu: Gpu | None, budget_bytes: int, max_risk: float) -> str:
    shape = grid.shapes[0]
    smallest = _least_memory(rank(replace(grid, shapes=(shape,)), gpu, None, max_risk), gpu, max_risk)
    need, step = smallest
    lines = [
        f"No configuration of {shape.label} ({count(shape.parameters)} parameters) fits {gib(budget_bytes)}.",
        f"The smallest needs at least {gib_needed(need)} free: batch_size={step.batch_size} x "
        f"grad_accum={step.grad_accum}, {step.dtype}, {'compiled' if step.compile else 'eager'}, {step.loss} loss, "
        f"checkpointing={step.checkpointing}, {step.optimizer}.",
    ]
    if len(grid.optimizers) > 1 and grid.device == "cuda" and grid.workload == "vramplan":
        offloaded = replace(grid, shapes=(shape,), optimizers=("adamw-offload",))
        for fit in confirm(rank(offloaded, gpu, budget_bytes, max_risk), gpu, budget_bytes, max_risk, 1):
            host = gib(int(host_bytes(shape, fit.candidate.step)))
            lines.append(f"With --optimizer adamw-offload it fits: AdamW's states are then in host memory ({host}).")
    for other in grid.shapes[1:]:
        if confirm(ranked.of(other), gpu, budget_bytes, max_risk, 1):
            return "\n".join([*lines, f"Also near the target, {other.label} ({count(other.parameters)}) fits."])
    for published in sorted(PUBLISHED, key=lambda p: -p.n_layer * p.n_embd**2):
        other = replace(shape, n_layer=published.n_layer, n_head=published.n_head, n_embd=published.n_embd)
        if other.parameters < shape.parameters:
            candidates = rank(replace(grid, shapes=(other,)), gpu, budget_bytes, max_risk)
            if confirm(candidates, gpu, budget_bytes, max_risk, 1):
                size = f"{other.label} ({published.name}, {count(other.parameters)} parameters)"
                lines.append(f"The largest published shape that fits is {size}.")
                break
    if grid.optimizers == ("adamw-in-backward",):
        lines.append("adamw-in-backward cannot accumulate: fewer --tokens-per-step make its only micro-batch smaller.")
    return "\n".join(lines)


def _least_memory(ranked: Ranking, gpu: Gpu | None, max_risk: float) -> tuple[int, StepConfig]:
    priced = [(needed_for(estimate(c.shape, c.step, gpu), max_risk), c.step) for c in ranked.least_memory(20)]
    need, step = min(priced, key=lambda p: p[0])
    return math.ceil(need), step


# -------------------------------------------------------------------- reading a plan back


def plan_gpu(name: str | None) -> Gpu | None:
    """The catalogue entry a plan file or run configuration names, if any."""
    return find_gpu(name) if name else None


def nanogpt_plan(data: dict[str, Any], shape: Shape, step: StepConfig) -> Plan:
    """The best way to run this shape with nanoGPT's own memory, at the tokens per step and budget of a plan file.

    nanoGPT ties the head and, without a meta.pkl, has 50,304 tokens. Raises DoesNotFitError when it does not fit.
    """
    shape = replace(shape, tied=True, vocab_size=PADDED_GPT2_VOCAB)
    grid = Grid(
        shapes=(shape,), tokens_per_step=int(tokens_per_step(shape, step)), dtypes=(step.dtype,),
        compiles=(True, False) if step.compile else (False,), losses=("full",), checkpointings=("none",),
        optimizers=("adamw-fused",), device=step.device, workload="nanogpt",
    )  # fmt: skip
    budget = Budget(total_bytes=data["budget_bytes"], reserve_bytes=0)
    return make_plan(grid, plan_gpu(data["gpu"]), budget, max_risk=data["max_risk"], top=1).plans[0]


def price_illegal(
    asked: Shape, grid_for: Callable[[Shape], Grid], gpu: Gpu | None, budget: Budget, max_risk: float
) -> Problem:
    """The error for a width that its heads do not divide, each legal neighbour with size, memory and speed."""
    lines = []
    for shape in legal_neighbours(asked):
        fits = confirm(rank(grid_for(shape), gpu, budget.budget_bytes, max_risk), gpu, budget.budget_bytes, max_risk, 1)
        text = f"n_embd={shape.n_embd} n_head={shape.n_head}: head_dim {shape.head_dim}{awkward(shape.head_dim)}, "
        text += f"{shape.parameters / 1e6:.1f}M parameters, "
        if fits:
            plan = price_plan(1, fits[0].estimate, gpu, budget.budget_bytes, max_risk)
            text += f"{gib(plan.estimate.process_bytes)} at batch_size={plan.step.batch_size}"
            text += f", {count(plan.tokens_per_second)} tokens/s" if plan.tokens_per_second else ""
        else:
            text += "does not fit this budget"
        lines.append(f"\n      {text}")
    rule = f"is not divisible by n_head={asked.n_head}"
    return Problem("n_embd", asked.n_embd, rule, "use" + "".join(lines))
