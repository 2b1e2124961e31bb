"""How often later evaluations lie inside the forecast's interval, on curves made by laws that are known.

    python benchmarks/forecast_coverage.py [CURVES]

Five families, of which only the first is the one that is fitted. Each curve is fitted to its first part and judged at
1.5, 2 and 3 times the steps.
"""

from __future__ import annotations

import sys

import numpy as np

from vramplan.report.forecast import INTERVAL, Forecast, forecast

HORIZONS = (1.5, 2.0, 3.0)


def power(x, rng):
    """A power law above a floor."""
    return rng.uniform(1.5, 3.5) + rng.uniform(0.2, 0.9) * x ** -rng.uniform(0.2, 0.9)


def two_powers(x, rng):
    """A fast and a slow power law at once."""
    slow = rng.uniform(0.1, 0.4) * x ** -rng.uniform(0.1, 0.3)
    return rng.uniform(1.5, 3.0) + slow + rng.uniform(0.1, 0.5) * x ** -rng.uniform(0.7, 1.2)


def logarithm(x, rng):
    """Falling by the same amount with each doubling, without a floor in sight."""
    return rng.uniform(3.0, 4.5) - rng.uniform(0.05, 0.25) * np.log(x)


def exponential(x, rng):
    """Falling towards a floor much faster than any power law in the end."""
    return rng.uniform(1.5, 3.5) + rng.uniform(0.3, 1.0) * np.exp(-rng.uniform(0.5, 2.0) * np.sqrt(x))


def cosine(x, rng):
    """A power law whose learning rate comes down by a cosine at three times the steps seen, worth up to 0.15 nats."""
    falling = power(x, rng)
    return falling - rng.uniform(0.05, 0.15) * 0.5 * (1 - np.cos(np.pi * np.minimum(x / 3, 1)))


FAMILIES = (power, two_powers, logarithm, exponential, cosine)


def coverage(family, curves, seed=0):
    """Share of evaluations inside, for each horizon; then how many were refused, and the median width at the last."""
    rng = np.random.default_rng(seed)
    inside, widths, refused = [], [], 0
    for _ in range(curves):
        points, end = int(rng.integers(6, 41)), 10_000
        steps = np.linspace(0, end, points + 1)[1:].astype(int)
        later = [int(h * end) for h in HORIZONS]
        losses = family(np.concatenate([steps, later]) / end, rng)
        losses = losses + rng.normal(0, rng.choice([0.002, 0.01, 0.03]), len(losses))
        found = forecast(tuple(zip(steps.tolist(), losses.round(4).tolist(), strict=False)), "loss")
        if not isinstance(found, Forecast):
            refused += 1
            continue
        told = found.curve(later)
        inside.append([low <= loss <= high for (_, _, low, high), loss in zip(told, losses[points:], strict=True)])
        widths.append(told[-1][3] - told[-1][2])
    return np.mean(inside, axis=0), refused, float(np.median(widths))


def main() -> None:
    curves = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    print(f"{'family':14}" + "".join(f"{f'at {h} x':>10}" for h in HORIZONS) + f"{'refused':>10}{'width':>8}")
    for family in FAMILIES:
        shares, refused, width = coverage(family, curves)
        print(f"{family.__name__:14}" + "".join(f"{s:>10.0%}" for s in shares) + f"{refused:>10}{width:>8.2f}")
    print(f"The interval is meant to hold {INTERVAL:.0%}; {curves} curves of each family.")


if __name__ == "__main__":
    main()
