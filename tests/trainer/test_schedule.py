"""The learning rate over a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.trainer.schedule import learning_rate


def rates(warmup: int, total: int, peak: float = 1.0, minimum: float = 0.1) -> list[float]:
    return [learning_rate(s, peak=peak, minimum=minimum, warmup_steps=warmup, total_steps=total) for s in range(total)]


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert rates(4, 100)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_half_way_down_the_cosine_is_the_middle():
    assert rates(10, 110)[60] == pytest.approx(0.55)


def test_it_ends_near_the_minimum_and_stays_there():
    assert rates(10, 1000)[-1] == pytest.approx(0.1, abs=1e-5)
    for step in (1000, 5000):
        assert learning_rate(step, peak=1.0, minimum=0.1, warmup_steps=10, total_steps=1000) == 0.1


def test_without_warm_up_it_begins_at_the_peak():
    assert rates(0, 10)[0] == 1.0


def test_a_warm_up_longer_than_the_run_still_reaches_the_peak():
    assert rates(700, 4) == [0.25, 0.5, 0.75, 1.0]


@given(st.integers(0, 300), st.integers(1, 200))
def test_it_rises_to_one_maximum_and_then_falls(warmup, total):
    found = rates(warmup, total)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert max(found) == 1.0
    assert all(0 < r <= 1 for r in found)
