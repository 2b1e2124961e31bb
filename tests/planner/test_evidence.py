"""From residuals to a probability: bounds that hold for any distribution, and an assumption that evidence corrects."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.planner.evidence import NEAR, NO_EVIDENCE, Evidence, Residual
from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import estimate
from vramplan.planner.risk import ASSUMED_ERROR, ENOUGH, needed_bytes, oom_risk, risk_of
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.units import GIB

STEP = StepConfig()
SIZE = 8 * GIB


def evidence(errors: Any, **changes: Any) -> Evidence:
    base = Residual("vramplan", "eager", 0.0, SIZE)
    return Evidence(tuple(replace(base, error=float(error), **changes) for error in errors))


def test_without_evidence_it_is_the_stated_margin() -> None:
    found = oom_risk(SIZE, int(1.02 * SIZE), STEP)
    assert found.probability == pytest.approx(1 - NormalDist(0, ASSUMED_ERROR["eager"]).cdf(0.02), rel=1e-3)
    assert (found.measurements, "no measurements" in found.reason) == (0, True)
    assert found.interval[0] < found.probability < found.interval[1]


def test_many_measurements_need_no_assumption() -> None:
    errors = [0.001 * i for i in range(100)]  # up to 9.9 %
    found = oom_risk(SIZE, int(1.0951 * SIZE), STEP, evidence(errors))
    assert found.probability == pytest.approx(5 / 101)  # 4 lie above 9.51 %
    assert (found.measurements, "no distribution" in found.reason) == (100, True)
    assert found.interval[0] < 4 / 100 < found.interval[1]
    assert needed_bytes(SIZE, STEP, 0.05, evidence(errors)) == pytest.approx(1.095 * SIZE)


@pytest.mark.parametrize("n", [0, 1, 5, 30, 98, 99, 150, 400])
@pytest.mark.parametrize("limit", [0.2, 0.05, 0.01, 0.001])
def test_the_needed_budget_keeps_the_limit_and_hardly_less_would(n: int, limit: float) -> None:
    known = evidence(np.random.default_rng(n).laplace(0.003, 0.004, n))
    need = float(needed_bytes(SIZE, STEP, limit, known))
    least = 1 / (n + 1) if n >= ENOUGH else 0.0  # without an assumption so many measurements can state no less
    assert oom_risk(SIZE, int(need) + 2, STEP, known).probability <= max(limit, least) * (1 + 1e-6)
    if limit > least:
        assert oom_risk(SIZE, int(need * 0.99), STEP, known).probability > limit * (1 - 1e-6)
    else:
        assert need >= SIZE * (1 + max(r.error for r in known.residuals)) * (1 - 1e-9)


def test_good_evidence_shrinks_the_margin_and_bad_evidence_widens_it() -> None:
    def margin(*errors: float) -> float:
        return float(needed_bytes(SIZE, STEP, 0.01, evidence(errors))) / SIZE - 1

    assert margin() > margin(*[0.001] * 3) > margin(*[0.001] * 30) > 0
    assert margin(0.05) > 0.05 > margin()
    assert margin(*[-0.02] * 50) < 0.02


def test_other_workloads_modes_and_larger_models_are_no_evidence() -> None:
    near = evidence([0.0] * 50)
    assert oom_risk(SIZE, SIZE, STEP, near).measurements == 50
    assert oom_risk(SIZE, SIZE, replace(STEP, compile=True), near).measurements == 0
    assert oom_risk(SIZE, SIZE, replace(STEP, workload="nanogpt", loss="full"), near).measurements == 0
    assert oom_risk(SIZE, SIZE, STEP, near, outside=True).measurements == 0
    small = evidence([0.0] * 50, expected_bytes=int(SIZE / NEAR / 2))
    assert oom_risk(SIZE, SIZE, STEP, small).measurements == 0
    sizes = np.array([SIZE, SIZE // 4])
    assert needed_bytes(sizes, STEP, 0.01, small)[0] == needed_bytes(SIZE, STEP, 0.01)
    assert needed_bytes(sizes, STEP, 0.01, small)[1] < needed_bytes(SIZE // 4, STEP, 0.01)


def test_small_measurements_do_not_vouch_for_large_models_but_can_warn() -> None:
    """Each speaks for what is near its own size; what they warn of holds beyond."""
    tiny = [Residual("vramplan", "eager", 0.0, 2**20)] * 120
    one = Residual("vramplan", "eager", 0.0, SIZE)
    assert oom_risk(SIZE, int(1.01 * SIZE), STEP, Evidence((*tiny, one))).measurements == 1
    bad = evidence([0.08] * 30, expected_bytes=SIZE // 5)
    assert needed_bytes(SIZE, STEP, 0.01, bad) > 1.08 * SIZE > needed_bytes(SIZE, STEP, 0.01)
    assert oom_risk(SIZE, int(1.05 * SIZE), STEP, bad).probability > 0.5
    near = [int(needed_bytes(s, STEP, 0.01, bad)) for s in (SIZE // 5 * 4 - 1, SIZE // 5 * 4 + 1)]
    assert near[0] == pytest.approx(near[1], rel=1e-6)  # no step down at the edge of what they reach


def test_running_out_unexpectedly_is_evidence_of_the_worst_kind() -> None:
    fits = [Residual("vramplan", "eager", 0.0, SIZE)] * 120
    ran_out = [Residual("vramplan", "eager", 0.1, SIZE, at_least=True)]
    few = Evidence((*fits[:20], *ran_out * 2))
    assert oom_risk(SIZE, int(1.05 * SIZE), STEP, few).probability >= 2 / 23
    assert needed_bytes(SIZE, STEP, 0.01, few) >= 1.1 * SIZE
    many = Evidence((*fits, *ran_out * 10))
    assert oom_risk(SIZE, 2 * SIZE, STEP, many).probability == pytest.approx(11 / 131)
    assert needed_bytes(SIZE, STEP, 0.01, many) > 2 * SIZE
    assert np.isfinite(needed_bytes(SIZE, STEP, 0.001, many))


@given(st.lists(st.floats(-0.2, 0.2), max_size=150), st.floats(-0.3, 0.3), st.floats(0.0, 0.2))
def test_more_budget_is_never_a_greater_risk(errors: list[float], margin: float, more: float) -> None:
    known = evidence(errors)
    risks = [oom_risk(SIZE, int(SIZE * (1 + m)), STEP, known) for m in (margin, margin + more)]
    assert risks[0].probability >= risks[1].probability
    for risk in risks:
        assert 0 < risk.probability < 1
        assert 0 <= risk.interval[0] <= risk.interval[1] <= 1


DISTRIBUTIONS = {
    "normal, as assumed": lambda rng, n: rng.normal(0, 0.01, n),
    "Laplace": lambda rng, n: rng.laplace(0, 0.007, n),
    "Student t, 3 degrees": lambda rng, n: 0.008 * rng.standard_t(3, n),
    "mostly exact, sometimes 6 % more": lambda rng, n: np.where(rng.random(n) < 0.03, 0.06, 0.0005),
    "skewed": lambda rng, n: 0.02 * (rng.exponential(1, n) - 0.2),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_with_enough_measurements_the_stated_risk_holds_for_any_distribution(name: str) -> None:
    """A budget that the evidence calls 2 % risky is exceeded by a further measurement in at most 2 % of worlds."""
    rng, worlds, exceeded = np.random.default_rng(7), 4000, 0
    for _ in range(worlds):
        *errors, new = DISTRIBUTIONS[name](rng, 150)
        exceeded += new > needed_bytes(1.0, STEP, 0.02, evidence(errors, expected_bytes=1)) - 1 + 1e-9
    assert len(errors) >= ENOUGH
    assert exceeded / worlds <= 0.02 + 3 * (0.02 * 0.98 / worlds) ** 0.5


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("margin", [0.01, 0.03, 0.05])
def test_a_risk_that_many_measurements_state_is_no_less_than_the_true_one(name: str, margin: float) -> None:
    """On average over ledgers: one ledger may have been lucky, and the interval says by how much."""
    rng, worlds = np.random.default_rng(11), 400
    stated = []
    for _ in range(worlds):
        errors = DISTRIBUTIONS[name](rng, 120)
        stated.append(oom_risk(SIZE, int(SIZE * (1 + margin)), STEP, evidence(errors)).probability)
    true = float(np.mean(DISTRIBUTIONS[name](rng, 400_000) > margin))
    assert np.mean(stated) >= true - 0.003  # which is itself an average
    assert min(stated) >= 1 / 121


@pytest.mark.parametrize("name", ["normal, as assumed", "Laplace"])
@pytest.mark.parametrize("n", [3, 20, 60])
def test_with_few_the_stated_risk_is_near(name: str, n: int) -> None:
    """Where errors are as large as assumed, of another shape or not."""
    rng, worlds, exceeded = np.random.default_rng(n), 2000, 0
    for _ in range(worlds):
        *errors, new = DISTRIBUTIONS[name](rng, n + 1)
        exceeded += new > needed_bytes(1.0, STEP, 0.05, evidence(errors, expected_bytes=1)) - 1
    assert exceeded / worlds <= 0.05 * 1.6


def test_a_cards_evidence_reaches_the_estimate() -> None:
    shape, step = Shape(n_layer=12, n_head=12, n_embd=768), StepConfig(batch_size=8)
    card = find_gpu("4070")
    full = estimate(shape, step, card)
    assert full.evidence is NO_EVIDENCE
    known = evidence([0.0] * 60, expected_bytes=full.process_bytes)
    better = estimate(shape, step, replace(card, evidence=known))
    budget = int(1.015 * full.process_bytes)
    assert risk_of(better, budget).probability < risk_of(full, budget).probability / 2
    assert risk_of(better, budget).measurements == 60
