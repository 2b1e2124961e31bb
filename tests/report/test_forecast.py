"""Forecasts of a loss: honest on curves whose future is known, and refused where there is nothing to go on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vramplan.report import forecast as module
from vramplan.report.forecast import FURTHEST, Forecast, curve_noise, forecast, rounding

NOTE_003 = ((0, 10.88), (500, 5.86), (1000, 4.95), (2000, 4.48), (3000, 4.32), (4000, 4.24), (5000, 4.19), (6000, 4.17))
"""Validation losses of a 41.0M model, 524,288 tokens a step."""


def made(law, steps, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return tuple((int(s), float(law(s) + rng.normal(0, noise))) for s in steps)


def fitted(curve, **kwargs) -> Forecast:
    found = forecast(curve, "loss", **kwargs)
    assert isinstance(found, Forecast), found
    return found


@pytest.mark.parametrize("rows", [6, 7])
def test_the_first_rows_of_a_real_run_hold_its_last_ones(rows: int) -> None:
    found = fitted(NOTE_003[:rows])
    for (step, middle, low, high), (_, loss) in zip(found.curve((5000, 6000)), NOTE_003[6:], strict=True):
        assert low < loss < high, step
        assert abs(middle - loss) < 0.06
    assert found.last_step == NOTE_003[rows - 1][0]


def test_the_whole_table_says_what_more_steps_may_bring() -> None:
    at = {step: (middle, low, high) for step, middle, low, high in fitted(NOTE_003).curve((6000, 12_000, 20_000))}
    for middle, low, high in at.values():
        assert low < middle < high
    assert at[20_000][0] < at[12_000][0] < 4.17
    assert at[12_000][1] < 4.05 < at[12_000][2]
    assert at[20_000][2] - at[20_000][1] > at[12_000][2] - at[12_000][1] > at[6000][2] - at[6000][1]


@pytest.mark.parametrize("law", ["power", "two powers", "logarithm"])
def test_later_evaluations_lie_inside_as_often_as_promised(law: str) -> None:
    rng = np.random.default_rng(7)
    inside = []
    for curve in range(40):
        floor, a, b = rng.uniform(1.5, 3.5), rng.uniform(0.3, 0.9), rng.uniform(0.25, 0.8)
        laws = {
            "power": lambda s, f=floor, a=a, b=b: f + a * (s / 4000) ** -b,
            "two powers": lambda s, f=floor, a=a, b=b: f + a / 2 * (s / 4000) ** -0.2 + a / 2 * (s / 4000) ** -1.0,
            "logarithm": lambda s, f=floor, a=a, b=b: f + 2 - a / 4 * math.log(s / 4000),
        }
        points = made(laws[law], range(250, 4001, 250), noise=0.01, seed=curve)
        later = made(laws[law], (6000, 8000, 12_000), noise=0.01, seed=1000 + curve)
        told = fitted(points).curve([step for step, _ in later])
        inside += [low <= loss <= high for (_, _, low, high), (_, loss) in zip(told, later, strict=True)]
    assert np.mean(inside) > 0.9


def test_an_exact_curve_is_found() -> None:
    found = fitted(made(lambda s: 3.0 + 20 * s**-0.5, range(100, 10_001, 100)))
    assert found.floor == pytest.approx(3.0, abs=0.05)
    assert found.exponent == pytest.approx(0.5, abs=0.05)
    assert found.curve([20_000])[0][1] == pytest.approx(3.0 + 20 * 20_000**-0.5, abs=0.01)


def test_more_noise_is_a_wider_interval() -> None:
    widths = []
    for noise in (0.002, 0.02, 0.1):
        _, _, low, high = fitted(made(lambda s: 3 + 30 * s**-0.5, range(250, 8001, 250), noise)).curve([16_000])[0]
        widths.append(high - low)
    assert widths == sorted(widths)


def test_the_same_curve_gives_the_same_forecast() -> None:
    assert fitted(NOTE_003).curve([9000]) == fitted(NOTE_003).curve([9000])


def test_steps_too_far_ahead_and_before_the_first_are_left_out() -> None:
    found = fitted(NOTE_003)
    assert found.furthest_step == FURTHEST * 6000
    assert [step for step, *_ in found.curve([0, -5, 3000, 24_000, 24_001])] == [3000, 24_000]


@pytest.mark.parametrize(
    ("curve", "why"),
    [
        ((), "there is no loss"),
        (((0, 10.9), (100, 9.0)), "at least 4 values"),
        (tuple((s, None) for s in range(10)), "there is no loss"),
        (made(lambda s: 3.0, range(100, 2001, 100), noise=0.01), "fall"),
        (made(lambda s: 3.0 + s / 1000, range(100, 2001, 100)), "has risen since step 400"),
        (made(lambda s: 3 + (s - 1000) ** 2 / 1e6, range(100, 2001, 100)), "has risen since step 1,000"),
        (made(lambda s: -s, range(100, 2001, 100)), "not one of a language model"),
    ],
)
def test_a_forecast_is_refused_with_the_reason(curve, why: str) -> None:
    found = forecast(curve, "loss")
    assert isinstance(found, str)
    assert why in found


def test_the_warm_up_is_left_out() -> None:
    found = fitted(made(lambda s: 3 + 30 * s**-0.5, range(250, 8001, 250), 0.01), warmup_steps=4000)
    assert found.first_step == 4000
    refused = forecast(NOTE_003, "loss", 5000)
    assert isinstance(refused, str)
    assert "after step 5,000" in refused


def test_losses_that_are_no_numbers_are_passed_over() -> None:
    holes = tuple((step, None if step == 3000 else loss) for step, loss in NOTE_003)
    assert fitted(holes).points == 4


def test_long_curves_are_thinned_and_fast() -> None:
    found = fitted(made(lambda s: 3 + 30 * s**-0.5, range(10, 200_001, 10), 0.02))
    assert found.points <= module.MOST_POINTS
    assert found.last_step == 200_000


def test_the_words_say_how_it_was_fitted() -> None:
    found = fitted(NOTE_003)
    for words in ("E + A s^-b", "5 values", "step 2,000", "90%"):
        assert words in found.words
    data = found.as_dict([12_000])
    assert data["at"][0]["step"] == 12_000
    assert data["interval"] == 0.9


def test_noise_is_that_of_single_values_not_the_bend_of_the_curve() -> None:
    smooth = [(s, 3 + 30 * s**-0.5) for s in range(500, 8001, 500)]
    rng = np.random.default_rng(3)
    rough = [(s, loss + rng.normal(0, 0.03)) for s, loss in smooth]
    assert curve_noise(smooth) < 0.005
    assert curve_noise(rough) == pytest.approx(0.03, rel=0.5)
    assert curve_noise(smooth[:2]) == math.inf


def test_printed_digits_are_what_is_known() -> None:
    assert rounding([4.48, 4.3]) == 0.01
    assert rounding([4.48, 4.321]) == 0.001
    assert rounding([4.4823]) == 0.0001


def test_a_curve_of_another_law_is_refused_and_a_logarithm_is_near_enough() -> None:
    steps = range(1000, 9000, 1000)
    straight = forecast([(step, 5 - 2e-4 * step) for step in steps], "loss")
    assert isinstance(straight, str)
    assert "another law" in straight
    found = fitted([(step, 12 - math.log(step)) for step in steps])
    ((_, _, low, high),) = found.curve([16000])
    assert low <= 12 - math.log(16000) <= high
    assert found.curve([1, 999]) == []
