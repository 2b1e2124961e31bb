"""Where a loss curve is heading: a power law above a floor, with an interval that was checked on real curves.

The family is L(s) = E + A s^-b. Its three numbers are never known from one run, so none of them is chosen: every b and
E of a grid is weighted by how well its curve meets the evaluations (A and the noise integrated out), and forecasts are
drawn from all of them. What remains is that real runs do not follow the family. How far they stray was measured, see
:data:`STRAYING` and docs/run-health.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..trainer.watch import NORMAL
from .run_record import Curve, finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

INTERVAL = 0.9
"""Share of later evaluations that the interval is meant to hold."""
WINDOW = 0.2
"""Only evaluations after this fraction of the run so far are fitted: before it, curves fall by another law."""
LEAST_POINTS, MOST_POINTS = 4, 500
FURTHEST = 4.0
"""No forecast is made beyond this many times the steps done: nothing so far ahead was checked."""
STRAYING = 0.40
"""Standard deviation of ln(what a real curve still fell / what its fit said): between half and twice, 9 times of 10.

Chosen so that the interval held: of 58 forecasts from parts of 18 published validation curves, 1.4 to 4 times ahead,
96 % of the later evaluations were inside, and 88 % of the last ones. Chosen on half of the curves and judged on the
other half (200 divisions): 94 % and 88 %, with 0.40 as the mean choice. The ratio itself had a root mean square of 0.44
and a median of 0.90, no bias worth correcting. Most of these runs had a constant learning rate.
"""
EXPONENTS, LEAST_EXPONENT, LARGEST_EXPONENT = 60, 0.05, 3.0
FLOORS = 200
DRAWS = 4000
_SEED = 20
BENT, BENT_SHARE = 2.5, 0.06
"""A fit that misses the values by so many times their own unevenness, and by such a share of the whole fall, is the
wrong curve. A straight line is missed by 4.8 times and 13 %, 12 - ln s by 3 % (its forecasts hold), power laws by 1 %.
"""
RISEN = 3.0
"""Standard deviations of the noise above its lowest point at which a curve counts as rising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the loss will be if the run goes on as it does.

    ``what`` is the curve that was fitted, ``points`` how many of its values, from ``first_step`` to ``last_step``.
    ``noise`` is the standard deviation of one evaluation around the fit; ``floor`` and ``exponent`` the middle of E and
    b over all curves that fit.
    """

    what: str
    points: int
    first_step: int
    last_step: int
    noise: float
    floor: float
    exponent: float
    words: str
    _draws: tuple[Floats, Floats, Floats, Floats, Floats] = field(repr=False, compare=False)

    @property
    def furthest_step(self) -> int:
        """The last step that a forecast is made for."""
        return int(FURTHEST * self.last_step)

    def curve(self, steps: Sequence[int]) -> list[tuple[int, float, float, float]]:
        """(step, middle, low, high) of what an evaluation would show; none before the fitted or beyond the furthest."""
        import numpy as np

        floor, height, exponent, noise, straying = self._draws
        now = floor + height
        low, high = (1 - INTERVAL) / 2, (1 + INTERVAL) / 2
        found = []
        for step in steps:
            if not self.first_step <= step <= self.furthest_step:
                continue
            fall = now - (floor + height * (step / self.last_step) ** -exponent)
            values = now - (fall * straying if step > self.last_step else fall)
            middle = float(np.quantile(values, 0.5))
            bottom, top = np.quantile(values + noise, (low, high))
            found.append((int(step), middle, float(bottom), float(top)))
        return found

    def as_dict(self, steps: Sequence[int] = ()) -> dict[str, Any]:
        """As plain data, with the forecasts for ``steps``."""
        return {
            "what": self.what, "points": self.points, "first_step": self.first_step, "last_step": self.last_step,
            "noise": self.noise, "floor": self.floor, "exponent": self.exponent, "interval": INTERVAL,
            "words": self.words, "furthest_step": self.furthest_step,
            "at": [
                {"step": step, "middle": middle, "low": low, "high": high}
                for step, middle, low, high in self.curve(steps)
            ],
        }  # fmt: skip


def forecast(curve: Curve, what: str, warmup_steps: int = 0) -> Forecast | str:
    """The forecast of a curve, or why there is none."""
    import numpy as np

    values = finite(curve)
    if not values:
        return f"there is no {what}"
    end = values[-1][0]
    start = max(warmup_steps, WINDOW * end, 1)
    fitted = [(step, loss) for step, loss in values if step >= start]
    if len(fitted) < LEAST_POINTS:
        return (
            f"at least {LEAST_POINTS} values of the {what} are needed after step {math.ceil(start):,} (warm-up and the "
            f"first {WINDOW:.0%} left out), and there {'is' if len(fitted) == 1 else 'are'} {len(fitted) or 'none'}"
        )
    if min(loss for _, loss in fitted) <= 0:
        return f"the {what} is not one of a language model"
    every = -(-len(fitted) // MOST_POINTS)
    fitted = fitted[::-1][::every][::-1]
    steps, losses = np.asarray(fitted, dtype=np.float64).T
    noise = curve_noise(fitted)
    lowest = int(np.argmin(losses))
    if lowest < len(losses) - 2 and losses[-2:].min() - losses[lowest] > RISEN * noise:
        return f"the {what} has risen since step {int(steps[lowest]):,}: a falling curve does not describe it"
    drawn = _draw(steps / end, losses, rounding(losses.tolist()))
    if drawn is None:
        return f"the {what} does not fall"
    floor, height, exponent, error, _ = drawn
    fallen = float(np.median(height * ((steps[0] / end) ** -exponent - 1)))
    spread = float(np.sqrt(np.mean(error**2)))
    if fallen < 2 * spread:
        return (
            f"the {what} has hardly fallen since step {int(steps[0]):,}: by {fallen:.3f}, and it varies by {spread:.3f}"
        )
    if len(fitted) > LEAST_POINTS + 1 and spread > max(BENT * noise, BENT_SHARE * fallen):
        return (
            f"the {what} falls by another law than E + A s^-b: the best such curve misses it by {spread:.3f}, {BENT:g} "
            f"times its own unevenness or more ({noise:.3f})"
        )
    middle_floor, middle_exponent = float(np.median(floor)), float(np.median(exponent))
    words = (
        f"E + A s^-b through {len(fitted)} values of the {what} from step {int(steps[0]):,} on, every b and E weighted "
        f"by its fit (middle: E {middle_floor:.2f}, b {middle_exponent:.2f}); {INTERVAL:.0%} interval, in which what "
        "is still to fall may be half or twice what the fit says, as it was in published runs"
    )
    return Forecast(
        what=what, points=len(fitted), first_step=int(steps[0]), last_step=end, noise=spread, floor=middle_floor,
        exponent=middle_exponent, words=words, _draws=drawn,
    )  # fmt: skip


def _draw(x: Floats, losses: Floats, resolution: float) -> tuple[Floats, Floats, Floats, Floats, Floats] | None:
    """(E, A, b, noise of an evaluation, straying) of DRAWS curves that fit; None when no falling curve does.

    Flat priors on E from 0 to the lowest loss and on ln b; A > 0; 1/sigma for the noise. Given b and E the fit is
    linear in A, so a pair's weight is RSS^(-(n-1)/2) / sqrt(sum x^-2b). Losses are rounded: that variance is in the
    RSS.
    """
    import numpy as np

    exponents = np.exp(np.linspace(math.log(LEAST_EXPONENT), math.log(LARGEST_EXPONENT), EXPONENTS))
    floors = np.linspace(0.0, losses.min(), FLOORS)
    above = losses[None, :] - floors[:, None]
    squares = ((x[None, :] ** -exponents[:, None]) ** 2).sum(axis=1)
    heights, sums = np.empty((EXPONENTS, FLOORS)), np.empty((EXPONENTS, FLOORS))
    for i, exponent in enumerate(exponents):
        falling = x**-exponent
        heights[i] = above @ falling / squares[i]
        sums[i] = ((above - heights[i][:, None] * falling) ** 2).sum(axis=1)
    sums += len(x) * resolution**2 / 12
    freedom = len(x) - 1
    weights = -freedom / 2 * np.log(sums) - np.log(squares)[:, None] / 2
    weights[heights <= 0] = -np.inf
    if not np.isfinite(weights.max()):
        return None
    share = np.exp(weights - weights.max()).ravel()
    generator = np.random.default_rng(_SEED)
    chosen = generator.choice(share.size, DRAWS, p=share / share.sum())
    at, floor_at = np.divmod(chosen, FLOORS)
    deviation = np.sqrt(sums.ravel()[chosen] / generator.chisquare(freedom, DRAWS))
    height = heights.ravel()[chosen] + deviation / np.sqrt(squares[at]) * generator.standard_normal(DRAWS)
    noise = deviation * generator.standard_normal(DRAWS)
    straying = np.exp(STRAYING * generator.standard_normal(DRAWS))
    return floors[floor_at], np.maximum(height, 0.0), exponents[at], noise, straying


def rounding(losses: Sequence[float]) -> float:
    """The step in which losses were printed: 0.01 where all have two decimals or fewer, down to 0.0001."""
    for digits in (2, 3):
        if all(math.isclose(loss, round(loss, digits), abs_tol=1e-9) for loss in losses):
            return float(10**-digits)
    return 1e-4


def curve_noise(points: Sequence[tuple[int, float]]) -> float:
    """Standard deviation of single values around a smooth curve: each against the line through its neighbours.

    Over the logarithm of the steps, where loss curves are nearly straight; a step 0 is left out.
    The median of the absolute distances stands for all, so that a bend or a spike does not count as noise. At least
    what rounding does; infinite for fewer than three points, from which nothing follows.
    """
    distances = []
    points = [(step, loss) for step, loss in points if step > 0]
    for (before, low), (at, loss), (after, high) in zip(points, points[1:], points[2:], strict=False):
        share = math.log(at / before) / math.log(after / before)
        expected = low + share * (high - low)
        distances.append(abs(loss - expected) / math.sqrt(1 + share**2 + (1 - share) ** 2))
    if not distances:
        return math.inf
    return max(NORMAL * sorted(distances)[len(distances) // 2], rounding([loss for _, loss in points]) / math.sqrt(12))
