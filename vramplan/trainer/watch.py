"""Spikes of the loss and the gradient norm, seen step by step. A spike is reported; it never stops a run."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Literal

Watched = Literal["loss", "grad_norm"]

WINDOW, LEAST_COUNT = 128, 32
"""Steps that say what is usual, and how many there must be before anything is called unusual."""
DEVIATIONS = 8.0
NORMAL = 1.4826
"""Standard deviations in a median absolute deviation, if what deviates is normal."""
LEAST_TIMES: dict[Watched, float] = {"loss": 1.05, "grad_norm": 1.5}


@dataclass(frozen=True, slots=True)
class Spike:
    """``value`` of a step where ``usual`` was the median of the steps before it."""

    what: Watched
    value: float
    usual: float

    @property
    def times(self) -> float:
        """How many times the usual value it is."""
        return self.value / self.usual


class SpikeWatch:
    """Compares each step's value with the steps before it. It sees plain numbers, so it never waits for a GPU.

    The logarithms of the last WINDOW values have a median and a median absolute deviation (MAD), which a few outliers
    cannot move. A value is a spike if its logarithm is above the median by more than DEVIATIONS x NORMAL x MAD, and it
    is at least LEAST_TIMES the usual value: where a curve is very quiet, a small unevenness is no news. A spike of
    several steps is reported once, at its first step. Values that are not finite or not positive are left out (float16
    skips such steps), and nothing is said before LEAST_COUNT values. The window begins anew when a run is resumed, so
    the first LEAST_COUNT steps after that are not judged.

    False alarms in a million steps of stationary noise with a standard deviation of 5 % (loss) or 30 % (norm): none if
    it is normal, also if each step resembles the one before (correlation 0.9); about 200 if it is heavy-tailed
    (Laplace, or Student's t with 5 degrees of freedom), where such values are a part of the noise.
    """

    def __init__(self, what: Watched) -> None:
        self.what: Watched = what
        self._logs: deque[float] = deque(maxlen=WINDOW)
        self._above = False

    def see(self, value: float) -> Spike | None:
        """Take in the value of the next step; the spike that begins with it, if one does."""
        if not (math.isfinite(value) and value > 0):
            return None
        now, spike = math.log(value), None
        if len(self._logs) >= LEAST_COUNT:
            usual = median(self._logs)
            spread = NORMAL * median([abs(x - usual) for x in self._logs])
            above = now - usual > max(DEVIATIONS * spread, math.log(LEAST_TIMES[self.what]))
            if above and not self._above:
                spike = Spike(self.what, value, math.exp(usual))
            self._above = above
        self._logs.append(now)
        return spike
