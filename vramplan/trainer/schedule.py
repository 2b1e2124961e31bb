"""The learning rate of each step: linear warm-up, then half a cosine."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, minimum: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 0.

    Rises linearly so that the last warm-up step has ``peak``, then follows a cosine that would reach ``minimum`` at
    ``total_steps``, and stays there. A warm-up longer than the run is cut to the run, which then ends at ``peak``.
    """
    warmup = min(warmup_steps, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if step >= total_steps:
        return minimum
    progress = (step - warmup) / (total_steps - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
