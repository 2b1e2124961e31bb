"""From an estimate, a budget and what was measured before, to the probability of running out of memory.

The error of an estimate is what a measured process needed over what was expected, less 1. With many measurements of the
same workload and mode on the same architecture the risk is their share, and no shape of the errors is assumed
(conformal prediction). With few, a normal error is assumed, whose stated spread each measurement corrects. With none it
is that assumption alone, and the answer says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .evidence import NEAR, NO_EVIDENCE, Evidence, Residual
from .memory import Estimate
from .shape import Ints
from .step import StepConfig

ASSUMED_ERROR = {"eager": 0.010, "compiled": 0.025, "outside the model": 0.10}
"""Standard deviation of measured over estimated process memory. Allocated bytes met recorded
real peaks far closer; the rest allows for the allocator and, when compiled, for inductor's temporaries, which are
modelled and not measured. Outside the model nothing is known; the figure only says so."""

PRIOR_WEIGHT = 10
"""The assumption counts as so many measurements."""

ENOUGH = 99
"""Measurements from which on the risk is their share: a bound of 1 % takes so many."""

UNBOUNDED = 9.0
"""Stands for the error of what ran out: ten times what was expected."""

LARGEST_RISK = 0.5
"""Beyond it a plan would be expected to run out."""

CERTAINTY = 1e-6
"""An assumed distribution says nothing about odds longer than this."""

INTERVAL = 0.90
"""Confidence of the interval around a risk."""
_Z = NormalDist().inv_cdf(0.5 + INTERVAL / 2)


@dataclass(frozen=True, slots=True)
class OomRisk:
    """Probability of running out, and where it comes from.

    ``measurements`` is the number of measured configurations behind it; ``interval`` (90 %) says how well they, or the
    assumption, pin it down.
    """

    probability: float
    reason: str
    measurements: int = 0
    interval: tuple[float, float] = (0.0, 1.0)

    def as_dict(self) -> dict[str, object]:
        """As plans, estimates and reports print it."""
        return {
            "oom_risk": self.probability,
            "oom_risk_reason": self.reason,
            "oom_risk_measurements": self.measurements,
            "oom_risk_interval": list(self.interval),
        }


def assumed_error(step: StepConfig, *, outside: bool = False) -> float:
    """Relative standard deviation that is assumed for this mode, or ``outside`` what the tensor table knows."""
    return ASSUMED_ERROR["outside the model" if outside else mode_of(step)]


def mode_of(step: StepConfig) -> str:
    """``eager`` or ``compiled``: their errors have other sources."""
    return "compiled" if step.compile else "eager"


def risk_of(full: Estimate, budget_bytes: int) -> OomRisk:
    """Probability that what was estimated needs more than the budget in bytes."""
    return oom_risk(full.process_bytes, budget_bytes, full.step, full.evidence, outside=bool(full.caveats))


def needed_for(full: Estimate, max_risk: float) -> float:
    """Smallest budget in bytes that keeps the risk of what was estimated within ``max_risk`` (0 < max_risk <= 0.5)."""
    return float(needed_bytes(full.process_bytes, full.step, max_risk, full.evidence, outside=bool(full.caveats)))


def oom_risk(
    process_bytes: int, budget_bytes: int, step: StepConfig, evidence: Evidence = NO_EVIDENCE, *, outside: bool = False
) -> OomRisk:
    """Probability that the process needs more than the budget, both in bytes."""
    known = () if outside else evidence.of(step.workload, mode_of(step))
    near = tuple(r for r in known if process_bytes <= NEAR * r.expected_bytes)
    margin, assumed = budget_bytes / process_bytes - 1, assumed_error(step, outside=outside)
    found = _risk(near, margin, assumed)
    if known and not near:  # what smaller ones showed can only make it worse
        return max(found, _risk(known, margin, assumed), key=lambda risk: risk.probability)
    return found


def _risk(known: Sequence[Residual], margin: float, assumed: float) -> OomRisk:
    """The chance that a further error exceeds ``margin``."""
    n, above = len(known), sum(error > margin for error in _errors(known))
    if n >= ENOUGH:
        # one more measurement is as likely to be any of the n + 1 in order of size
        reason = f"{above} of {n} measured configurations needed more than this; no distribution is assumed"
        return OomRisk((1 + above) / (n + 1), reason, n, _wilson(above, n))
    bias, sigma = posterior([r.error for r in known], assumed)
    probability = _bounded(max(1 - NormalDist(bias, sigma).cdf(margin), above / (n + 1)))
    doubt = _Z / math.sqrt(2 * (PRIOR_WEIGHT + n))  # of a standard deviation, relative
    ends = [_bounded(1 - NormalDist(bias, sigma * (1 + sign * doubt)).cdf(margin)) for sign in (-1, 1)]
    interval = (min(*ends, probability), max(*ends, probability))
    if not n:
        words = "stated margin, no measurements of this card: error assumed normal with"
        return OomRisk(probability, f"{words} {sigma:.1%} standard deviation", 0, interval)
    words = f"{n} measured configuration{'s correct' if n > 1 else ' corrects'} a stated margin: error assumed normal,"
    return OomRisk(probability, f"{words} {bias:+.1%} with {sigma:.1%} standard deviation", n, interval)


def needed_bytes(
    process_bytes: Ints,
    step: StepConfig,
    max_risk: float,
    evidence: Evidence = NO_EVIDENCE,
    *,
    outside: bool = False,
) -> Ints:
    """Smallest budget in bytes that keeps the risk within ``max_risk`` (0 < max_risk <= 0.5); vectorised."""
    assumed = assumed_error(step, outside=outside)
    known = () if outside else evidence.of(step.workload, mode_of(step))
    if not known:
        return process_bytes * (1 + _quantile((), assumed, max_risk))
    # how many of the residuals, which are in order of size, are too small to speak
    reaches = np.array([NEAR * r.expected_bytes for r in known])
    silent = np.searchsorted(reaches, np.asarray(process_bytes), side="left")
    margins = np.zeros(np.shape(silent))
    for n in np.unique(silent):
        margin = _quantile(known[n:], assumed, max_risk)
        if n == len(known):
            margin = max(margin, _quantile(known, assumed, max_risk))
        margins[silent == n] = margin
    return process_bytes * (1 + (float(margins) if margins.ndim == 0 else margins))


def posterior(errors: list[float], assumed: float) -> tuple[float, float]:
    """Mean and standard deviation of a normal error whose spread was ``assumed`` before ``errors`` were seen.

    The assumption (mean 0) counts as PRIOR_WEIGHT measurements, in the mean and in the variance.
    """
    weight = PRIOR_WEIGHT + len(errors)
    bias = sum(errors) / weight
    spread = PRIOR_WEIGHT * (assumed**2 + bias**2) + sum((error - bias) ** 2 for error in errors)
    return bias, math.sqrt(spread / weight)


def _quantile(known: Sequence[Residual], assumed: float, max_risk: float) -> float:
    """The error that is exceeded with probability ``max_risk`` at most.

    A limit below what ``known`` can state without an assumption takes the largest of them, and the assumption.
    """
    n = len(known)
    errors = _errors(known)
    allowed = math.floor(max_risk * (n + 1) + 1e-9)  # of n + 1 in order of size
    if n >= ENOUGH and allowed >= 1:
        return errors[n - allowed]
    bias, sigma = posterior([r.error for r in known], assumed)
    margin = NormalDist(bias, sigma).inv_cdf(1 - max_risk)
    more = [error for i, error in enumerate(errors) if (n - i) / (n + 1) > max_risk]
    return max([margin, *more[-1:]])


def _errors(known: Sequence[Residual]) -> list[float]:
    """Ascending. What ran out counts by what is known of it, and as unbounded where nothing is assumed."""
    enough = len(known) >= ENOUGH
    return sorted(UNBOUNDED if r.at_least and enough else r.error for r in known)


def _bounded(probability: float) -> float:
    return min(1 - CERTAINTY, max(CERTAINTY, probability))


def _wilson(above: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927)."""
    share, z2 = above / n, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)
