"""The learning rate of each step: linear warm-up, then half a cosine, a plateau with a final decay, or a constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from ..runconfig import RunConfig, Schedule


def learning_rate(
    step: int,
    *,
    schedule: Schedule = "cosine",
    peak: float,
    minimum: float,
    warmup_steps: int,
    total_steps: int,
    decay_fraction: float = 0.2,
) -> float:
    """Learning rate of optimizer step ``step``, counted from 0.

    Rises linearly so that the last warm-up step has ``peak``. Then ``cosine`` follows a cosine that would reach
    ``minimum`` at ``total_steps``; ``wsd`` (warm-up, stable, decay) stays at ``peak`` until the last ``decay_fraction``
    of the steps, a rounded number of at least one, and falls on a straight line that would reach ``minimum`` at
    ``total_steps``; ``constant`` stays at ``peak``. After ``total_steps`` the first two stay at ``minimum``. A warm-up
    longer than the run is cut to the run, which then ends at ``peak``; one that reaches into the decay shortens it.
    """
    warmup = min(warmup_steps, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    if step >= total_steps:
        return minimum
    if schedule == "wsd":
        start = max(warmup, total_steps - max(1, round(decay_fraction * total_steps)))
        return peak if step <= start else minimum + (peak - minimum) * (total_steps - step) / (total_steps - start)
    progress = (step - warmup) / (total_steps - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def schedule_of(config: RunConfig) -> Callable[[int], float]:
    """The learning rate of each step of a run, by its number from 0."""
    t = config.train
    return partial(
        learning_rate,
        schedule=t.schedule,
        peak=t.learning_rate,
        minimum=t.min_learning_rate,
        warmup_steps=t.warmup_steps,
        total_steps=config.total_steps,
        decay_fraction=t.decay_fraction,
    )


def first_difference(one: RunConfig, other: RunConfig, steps: int) -> int | None:
    """The first of ``steps`` steps, from 0, that the two runs take at different learning rates; None: there is none.

    Then the one run may go on as the other after so many steps: it is what the other would have been so far.
    """
    before, after = schedule_of(one), schedule_of(other)
    return next((step for step in range(steps) if before(step) != after(step)), None)
