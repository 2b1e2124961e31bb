"""Spikes of the loss and the gradient norm, seen step by step. A spike is reported; it never stops a run."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Literal

Watched = Literal["loss", "grad_norm"]

LEVEL = 32
"""Steps whose median is the usual value. Few enough to follow a falling loss, many enough to show a rising one."""
WINDOW, LEAST_COUNT = 128, 32
"""Steps that say how far from it values usually are, and how many there must be before any is called unusual."""
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

    A step's distance is the logarithm of its value less the median of the LEVEL logarithms before it, so that a curve
    may fall as steeply as it likes. The last WINDOW distances have a median and a median absolute deviation (MAD),
    which a few outliers cannot move. A value is a spike if its distance is above their median by more than DEVIATIONS
    x NORMAL x MAD, and it is at least LEAST_TIMES the usual value: on a very quiet curve a small unevenness is no
    news. A spike of several steps is reported once, at its first. Values that are not finite or not positive are left
    out (float16 skips such steps). The first LEVEL + LEAST_COUNT steps of a run are not judged, nor those after a
    resume: nothing of this is in a checkpoint.

    False alarms in a million steps of stationary noise with a standard deviation of 5 % (loss) or 30 % (norm): none if
    it is normal, also if each step resembles the one before (correlation 0.9); 160 to 190 if it is heavy-tailed
    (Laplace, or Student's t with 5 degrees of freedom), where such values are a part of the noise.
    """

    def __init__(self, what: Watched) -> None:
        self.what: Watched = what
        self._logs: deque[float] = deque(maxlen=LEVEL)
        self._distances: deque[float] = deque(maxlen=WINDOW)
        self._above = False

    def see(self, value: float) -> Spike | None:
        """Take in the value of the next step; the spike that begins with it, if one does."""
        if not (math.isfinite(value) and value > 0):
            return None
        now, spike = math.log(value), None
        if len(self._logs) == LEVEL:
            usual = median(self._logs)
            above = self._is_far(now - usual)
            if above and not self._above:
                spike = Spike(self.what, value, math.exp(usual))
            self._above = above
            self._distances.append(now - usual)
        self._logs.append(now)
        return spike

    def _is_far(self, distance: float) -> bool:
        if len(self._distances) < LEAST_COUNT or distance < math.log(LEAST_TIMES[self.what]):
            return False
        middle = median(self._distances)
        return distance - middle > DEVIATIONS * NORMAL * median(abs(d - middle) for d in self._distances)
