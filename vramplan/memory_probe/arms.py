"""What the autotuner may try, in the planner's order, and what trying it means."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..planner.allocator_settings import AllocatorSettings
from ..planner.gpu import Gpu
from ..planner.memory import estimate
from ..planner.search import Candidate, Grid, rank
from ..planner.shape import Shape
from ..planner.step import Optimizer, StepConfig, tokens_per_step
from ..units import gib
from .measurement import Measurement
from .tuner import Arm, Result

SAME_NUMERICS: dict[Optimizer, tuple[Optimizer, ...]] = {
    "adamw-fused": ("adamw-fused", "adamw-foreach"),
    "adamw-foreach": ("adamw-fused", "adamw-foreach"),
}
"""Optimizers that compute the same update in another way; every other one is kept as it is."""

EXPANDABLE = "expandable_segments:True"
"""The allocator's setting that is tried beside its default; Windows has none."""

TIMED_SECONDS = 2.0
"""How long an arm's steps are timed at least."""

EVEN_RISK = 0.5
"""An arm is ruled out without a probe only where it is expected to run out: the probe decides the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What may vary around a configuration, and what it must fit."""

    shapes: tuple[Shape, ...]
    step: StepConfig
    gpu: Gpu | None
    budget_bytes: int
    compiles: tuple[bool, ...] = (False,)

    def arms(self) -> list[Arm]:
        """Every way to run the same steps, the planner's best first, then those that are expected not to fit."""
        step = self.step
        grid = Grid(
            shapes=self.shapes, tokens_per_step=int(tokens_per_step(self.shapes[0], step)), dtypes=(step.dtype,),
            compiles=self.compiles, optimizers=SAME_NUMERICS.get(step.optimizer, (step.optimizer,)),
            residual=step.residual, device=step.device, torch=step.torch,
        )  # fmt: skip
        fitting = list(rank(grid, self.gpu, self.budget_bytes, EVEN_RISK))
        known = set(fitting)
        rest = [c for c in rank(grid, self.gpu, None, EVEN_RISK) if c not in known]
        confs = ("", EXPANDABLE) if step.device == "cuda" and os.name != "nt" else ("",)
        return [
            Arm(c.shape, c.step, conf, number, c.tokens_per_second)
            for number, (c, conf) in enumerate((c, conf) for c in self._in_order(fitting, rest) for conf in confs)
        ]

    def _in_order(self, fitting: list[Candidate], rest: list[Candidate]) -> Iterable[Candidate]:
        """Without slices of the loss that are larger than a micro-batch: they are one slice, as the next smaller."""
        seen = set()
        for c in (*fitting, *rest):
            tokens = int(c.step.batch_size) * int(c.shape.block_size)
            chunk = min(int(c.step.loss_chunk_tokens), tokens) if c.step.loss == "chunked" else 0
            key = c.shape, replace(c.step, loss_chunk_tokens=1), chunk
            if key not in seen:
                seen.add(key)
                yield c

    def ruled_out(self, arm: Arm) -> Result | None:
        """The result of an arm that the estimate does not let in; None for one that has to be measured."""
        full = estimate(arm.shape, arm.step, self.gpu, AllocatorSettings.parse(arm.alloc_conf))
        if full.process_bytes <= self.budget_bytes:
            return None
        missing = full.process_bytes / self.budget_bytes - 1
        return Result("estimate", violation=missing, reason=f"expected to need {gib(full.process_bytes)}")

    def measured_by(
        self, probe: Callable[[Arm], Measurement], keep: Callable[[Measurement], None]
    ) -> Callable[[Arm], Result]:
        """What the tuner calls for an arm that the estimate lets in: a probe, whose measurement is kept."""

        def measure(arm: Arm) -> Result:
            found = probe(arm)
            if found.outcome == "killed":
                raise KeyboardInterrupt
            keep(found)
            return self._judged(found)

        return measure

    def _judged(self, found: Measurement) -> Result:
        if found.outcome in ("out_of_memory", "spilled"):
            return Result(found.outcome, violation=1.0, reason=found.reason, measurement=found.id)
        if found.outcome != "fits" or found.tokens_per_second is None:
            return Result(found.outcome, reason=found.reason, measurement=found.id)
        needs = found.process_bytes if found.architecture != "cpu" else None
        rate, score = undisturbed_rate(found), score_of(found)
        return Result("fits", rate, score=score, needs_bytes=needs, reason=found.reason, measurement=found.id)


def undisturbed_rate(found: Measurement) -> float:
    """Tokens/s of the faster half of the steps: other programs only ever slow a step down."""
    seconds = sorted(found.step_seconds)
    half = seconds[: (len(seconds) + 1) // 2]
    return int(tokens_per_step(found.shape, found.step_config)) / statistics.median(half)


def score_of(found: Measurement) -> float:
    """What arms are compared by: tokens/s, on a CPU tokens per reference step, which a busy machine changes less."""
    if found.reference_ratio is None:
        return undisturbed_rate(found)
    return int(tokens_per_step(found.shape, found.step_config)) / found.reference_ratio
