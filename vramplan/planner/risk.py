"""From an estimate and a budget to the probability of running out of memory.

No measurements of the user's card enter yet: the error of the estimate is *assumed*, normal and proportional to the
process's memory, and every answer says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from .shape import Ints
from .step import StepConfig

ASSUMED_ERROR = {"eager": 0.010, "compiled": 0.025}
"""Standard deviation of measured over estimated process memory. Allocated bytes met recorded
real peaks far closer; the rest allows for the allocator and, when compiled, for inductor's temporaries, which are
modelled and not measured."""


LARGEST_RISK = 0.5
"""Beyond it a plan would be expected to run out."""

CERTAINTY = 1e-6
"""An assumed distribution says nothing about odds longer than this."""


@dataclass(frozen=True, slots=True)
class OomRisk:
    """Probability of running out, and where it comes from."""

    probability: float
    reason: str


def assumed_error(step: StepConfig) -> float:
    """Relative standard deviation that is assumed for this mode."""
    return ASSUMED_ERROR["compiled" if step.compile else "eager"]


def oom_risk(process_bytes: int, budget_bytes: int, step: StepConfig) -> OomRisk:
    """Probability that the process needs more than the budget, both in bytes."""
    sigma = assumed_error(step)
    z = (budget_bytes - process_bytes) / (sigma * process_bytes)
    probability = min(1 - CERTAINTY, max(CERTAINTY, 0.5 * math.erfc(z / math.sqrt(2))))
    reason = f"stated margin, no measurements of this card: error assumed normal with {sigma:.1%} standard deviation"
    return OomRisk(probability, reason)


def needed_bytes(process_bytes: Ints, step: StepConfig, max_risk: float) -> Ints:
    """Smallest budget in bytes that keeps the risk within ``max_risk`` (0 < max_risk <= 0.5); vectorised."""
    return process_bytes * (1 - NormalDist().inv_cdf(max_risk) * assumed_error(step))
