"""From an estimate and a budget to the probability of running out of memory.

No measurements of the user's card enter yet: the error of the estimate is *assumed*, normal and proportional to the
process's memory, and every answer says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from .memory import Estimate
from .shape import Ints
from .step import StepConfig

ASSUMED_ERROR = {"eager": 0.010, "compiled": 0.025, "outside the model": 0.10}
"""Standard deviation of measured over estimated process memory. Allocated bytes met recorded
real peaks far closer; the rest allows for the allocator and, when compiled, for inductor's temporaries, which are
modelled and not measured. Outside the model nothing is known; the figure only says so."""


LARGEST_RISK = 0.5
"""Beyond it a plan would be expected to run out."""

CERTAINTY = 1e-6
"""An assumed distribution says nothing about odds longer than this."""


@dataclass(frozen=True, slots=True)
class OomRisk:
    """Probability of running out, and where it comes from."""

    probability: float
    reason: str


def assumed_error(step: StepConfig, *, outside: bool = False) -> float:
    """Relative standard deviation that is assumed for this mode, or ``outside`` what the tensor table knows."""
    return ASSUMED_ERROR["outside the model" if outside else "compiled" if step.compile else "eager"]


def risk_of(full: Estimate, budget_bytes: int) -> OomRisk:
    """Probability that what was estimated needs more than the budget in bytes."""
    return oom_risk(full.process_bytes, budget_bytes, full.step, outside=bool(full.caveats))


def needed_for(full: Estimate, max_risk: float) -> float:
    """Smallest budget in bytes that keeps the risk of what was estimated within ``max_risk`` (0 < max_risk <= 0.5)."""
    return float(needed_bytes(full.process_bytes, full.step, max_risk, outside=bool(full.caveats)))


def oom_risk(process_bytes: int, budget_bytes: int, step: StepConfig, *, outside: bool = False) -> OomRisk:
    """Probability that the process needs more than the budget, both in bytes."""
    sigma = assumed_error(step, outside=outside)
    z = (budget_bytes - process_bytes) / (sigma * process_bytes)
    probability = min(1 - CERTAINTY, max(CERTAINTY, 0.5 * math.erfc(z / math.sqrt(2))))
    reason = f"stated margin, no measurements of this card: error assumed normal with {sigma:.1%} standard deviation"
    return OomRisk(probability, reason)


def needed_bytes(process_bytes: Ints, step: StepConfig, max_risk: float, *, outside: bool = False) -> Ints:
    """Smallest budget in bytes that keeps the risk within ``max_risk`` (0 < max_risk <= 0.5); vectorised."""
    return process_bytes * (1 - NormalDist().inv_cdf(max_risk) * assumed_error(step, outside=outside))
