"""The smallest set of changes that makes a configuration fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import get_args

from ..units import gib
from .allocator_settings import AllocatorSettings
from .gpu import Gpu
from .memory import Estimate, estimate
from .plan import differences, speed_words
from .risk import needed_for
from .search import LOSS_CHUNKS, Candidate, Grid, rank
from .shape import Shape
from .speed import tokens_per_second
from .step import Checkpointing, Optimizer, StepConfig, tokens_per_step

MOST_REPLAYS = 48
"""Candidates of one number of changes that are looked at in full, the fastest first; the closed form has sorted out the
hopeless ones."""


@dataclass(frozen=True, slots=True)
class Repair:
    """A neighbouring configuration that fits. ``speed_ratio`` is its tokens/s over the original's (None without a
    card); ``changes`` are words such as ``chunked loss``, as many as there are changes, the cheapest in speed first."""

    step: StepConfig
    estimate: Estimate
    changes: tuple[str, ...]
    speed_ratio: float | None

    def sentence(self) -> str:
        """What to change, what it then needs, and what it costs."""
        speed = "" if self.speed_ratio is None else f", {speed_words(self.speed_ratio - 1)}"
        return f"{', '.join(self.changes)} ({gib(self.estimate.process_bytes)} for the process{speed})"

    def as_dict(self) -> dict[str, object]:
        """The repair as plain data."""
        return {
            "changes": list(self.changes),
            "config": asdict(self.step),
            "process_bytes": self.estimate.process_bytes,
            "speed_ratio": self.speed_ratio,
        }


def smallest_repair(
    shape: Shape, step: StepConfig, gpu: Gpu | None, budget_bytes: int, max_risk: float,
    settings: AllocatorSettings | None = None,
) -> Repair | None:  # fmt: skip
    """The fewest changes after which the same optimizer step fits, and of those the fastest; None when none does.

    Shape, tokens per step and dtype stay. States in host memory, which cost much time, are looked at when nothing else
    does, and 8-bit states, which change the numerics, last.
    """
    for optimizers in _optimizers(step):
        found = _search(shape, step, gpu, budget_bytes, max_risk, optimizers, settings)
        if found is not None:
            return found
    return None


def _optimizers(step: StepConfig) -> list[tuple[Optimizer, ...]]:
    """Which optimizers may be taken: at first, when that is not enough, and as the last resort."""
    own: tuple[Optimizer, ...] = (step.optimizer,)
    if step.optimizer == "adamw-foreach":
        own = (*own, "adamw-fused")
    if step.workload != "vramplan" or step.optimizer == "adamw8bit":
        return [own]
    offloaded: tuple[Optimizer, ...] = (*own, "adamw-offload") if len(own) > 1 or own[0] == "adamw-fused" else own
    return [own, *([offloaded] if offloaded != own else []), (*offloaded, "adamw8bit")]


def _search(
    shape: Shape, step: StepConfig, gpu: Gpu | None, budget_bytes: int, max_risk: float,
    optimizers: tuple[Optimizer, ...], settings: AllocatorSettings | None,
) -> Repair | None:  # fmt: skip
    ours = step.workload == "vramplan"
    grid = Grid(
        shapes=(shape,), tokens_per_step=int(tokens_per_step(shape, step)), dtypes=(step.dtype,),
        compiles=(step.compile, not step.compile) if step.device == "cuda" else (step.compile,),
        losses=("full", "chunked") if ours else ("full",),
        checkpointings=get_args(Checkpointing) if ours else ("none",),
        optimizers=optimizers, residual=step.residual, device=step.device, workload=step.workload,
        dropout=step.dropout, torch=step.torch,
        loss_chunks=tuple(sorted({*LOSS_CHUNKS, int(step.loss_chunk_tokens)})),
    )  # fmt: skip
    fastest_first = rank(grid, gpu, budget_bytes, max_risk)
    by_changes = sorted(fastest_first, key=lambda c: _changes(c, step))  # stable: the fastest of each number first
    for _, group in groupby(by_changes, key=lambda c: _changes(c, step)):
        for candidate in list(group)[:MOST_REPLAYS]:
            full = estimate(shape, candidate.step, gpu, settings)
            if needed_for(full, max_risk) <= budget_bytes:
                before = tokens_per_second(shape, step, gpu) if gpu is not None else None
                ratio = float(candidate.tokens_per_second / before) if before and candidate.tokens_per_second else None
                return Repair(candidate.step, full, _cheapest_first(shape, step, candidate.step, gpu), ratio)
    return None


SETTINGS = (
    ("batch_size", "grad_accum"), ("compile",), ("loss", "loss_chunk_tokens"), ("checkpointing",), ("optimizer",),
)  # fmt: skip
"""What a repair may change, each together with what follows from it."""


def _cheapest_first(shape: Shape, step: StepConfig, repaired: StepConfig, gpu: Gpu | None) -> tuple[str, ...]:
    """Words for each change, the one that costs the least speed on its own first."""
    alone = [replace(step, **{name: getattr(repaired, name) for name in names}) for names in SETTINGS]
    if gpu is not None:
        alone.sort(key=lambda changed: -float(tokens_per_second(shape, changed, gpu)))
    return tuple(word for changed in alone for word in differences(changed, step))


def _changes(candidate: Candidate, step: StepConfig) -> int:
    """How many settings differ; another split into micro-batches is one."""
    other = candidate.step
    names = ["batch_size", "compile", "loss", "checkpointing", "optimizer"]
    if other.loss == step.loss == "chunked":
        names.append("loss_chunk_tokens")
    return sum(getattr(other, name) != getattr(step, name) for name in names)
