"""The smallest change that fits: fewest changes first, then speed; numerics last."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from vramplan.planner.allocator_settings import AllocatorSettings
from vramplan.planner.gpu import find_gpu
from vramplan.planner.levers import levers
from vramplan.planner.memory import estimate
from vramplan.planner.plan import differences
from vramplan.planner.repair import smallest_repair
from vramplan.planner.risk import needed_for, oom_risk, risk_of
from vramplan.planner.shape import Shape
from vramplan.planner.speed import tokens_per_second
from vramplan.planner.step import StepConfig
from vramplan.units import GIB

GPT2 = Shape(n_layer=12, n_head=12, n_embd=768)
CARD = find_gpu("4070")
WIDE = StepConfig(batch_size=16, grad_accum=2, loss="full")
RISK = 0.01


def fits(step: StepConfig, budget: int) -> bool:
    return needed_for(estimate(GPT2, step, CARD), RISK) <= budget


@pytest.mark.parametrize("budget_gib", [9.0, 6.0, 4.0, 3.0])
def test_no_smaller_set_of_changes_fits_and_none_as_small_is_faster(budget_gib: float) -> None:
    budget = int(budget_gib * GIB)
    assert not fits(WIDE, budget)
    found = smallest_repair(GPT2, WIDE, CARD, budget, RISK)
    assert found is not None
    assert fits(found.step, budget)
    assert found.step.batch_size * found.step.grad_accum == 32
    assert found.step.dtype == WIDE.dtype
    own = tokens_per_second(GPT2, found.step, CARD)
    batches = [{"batch_size": b, "grad_accum": 32 // b} for b in (1, 2, 4, 8, 32)]
    single = [*batches, {"compile": True}, {"loss": "chunked", "loss_chunk_tokens": 512}, {"checkpointing": "block"}]
    for count in range(1, len(found.changes) + 1):
        for chosen in itertools.combinations(single, count):
            other = replace(WIDE, **{name: value for change in chosen for name, value in change.items()})
            if fits(other, budget):
                assert count == len(found.changes), other
                assert tokens_per_second(GPT2, other, CARD) <= own * 1.0001, other


def barely_too_little(step: StepConfig) -> int:
    """A budget that the step misses, compiled as well as eager, when nothing else is left to save."""
    return int(min(needed_for(estimate(GPT2, replace(step, compile=c), CARD), RISK) for c in (False, True)) - 0.1 * GIB)


@pytest.mark.parametrize(
    ("optimizer", "instead"),
    [("adamw-foreach", "adamw-fused"), ("adamw-fused", "adamw-offload"), ("muon", "adamw8bit")],
)
def test_another_optimizer_is_taken_when_it_must_be(optimizer: Any, instead: str) -> None:
    """The fused update where it is enough, then states in host memory, and states of 8 bits as the last resort."""
    step = StepConfig(batch_size=1, grad_accum=1, checkpointing="block", loss_chunk_tokens=512, optimizer=optimizer)
    found = smallest_repair(GPT2, step, CARD, barely_too_little(step), RISK)
    assert found is not None
    assert found.step.optimizer == instead


def test_nothing_fits_a_budget_below_the_weights() -> None:
    assert smallest_repair(GPT2, WIDE, CARD, int(0.5 * GIB), RISK) is None


def test_a_script_can_only_be_run_differently_not_rewritten() -> None:
    step = replace(WIDE, workload="nanogpt")
    found = smallest_repair(GPT2, step, CARD, 7 * GIB, RISK)
    assert found is not None
    assert (found.step.workload, found.step.loss, found.step.checkpointing) == ("nanogpt", "full", "none")


def test_dropout_and_allocator_settings_stay() -> None:
    step = replace(WIDE, workload="nanogpt", dropout=0.1)
    found = smallest_repair(GPT2, step, CARD, 7 * GIB, RISK)
    assert found is not None
    assert found.step.dropout == 0.1
    assert estimate(GPT2, found.step, CARD).process_bytes == found.estimate.process_bytes
    settings = AllocatorSettings(expandable_segments=True)
    expandable = smallest_repair(GPT2, step, CARD, 7 * GIB, RISK, settings)
    assert expandable is not None
    assert estimate(GPT2, expandable.step, CARD, settings).process_bytes == expandable.estimate.process_bytes


def test_every_word_is_a_change() -> None:
    for budget in (4.0, 3.0, 2.6):
        found = smallest_repair(GPT2, replace(WIDE, loss="chunked"), CARD, int(budget * GIB), RISK)
        assert found is not None
        names = ("batch_size", "compile", "loss", "loss_chunk_tokens", "checkpointing", "optimizer")
        base = replace(WIDE, loss="chunked")
        assert len(found.changes) == sum(getattr(found.step, n) != getattr(base, n) for n in names)


def test_outside_the_model_the_risk_is_wider() -> None:
    inside, outside = Shape(n_layer=2, n_head=4, n_embd=1024), Shape(n_layer=2, n_head=2, n_embd=1024)
    for shape, sigma in ((inside, "1.0%"), (outside, "10.0%")):
        full = estimate(shape, StepConfig(), CARD)
        assert bool(full.caveats) is (shape is outside)
        risk = risk_of(full, int(1.05 * full.process_bytes))
        assert sigma in risk.reason
        assert (risk.probability > 0.3) is (shape is outside)
    assert oom_risk(100, 110, StepConfig(), outside=True).probability > oom_risk(100, 110, StepConfig()).probability


def test_the_cheapest_change_is_named_first() -> None:
    found = smallest_repair(GPT2, WIDE, CARD, 3 * GIB, RISK)
    assert found is not None
    assert len(found.changes) > 1
    settings = (("batch_size", "grad_accum"), ("compile",), ("loss", "loss_chunk_tokens"), ("checkpointing",))
    alone = [replace(WIDE, **{name: getattr(found.step, name) for name in names}) for names in settings]
    speeds = {word: tokens_per_second(GPT2, one, CARD) for one in alone for word in differences(one, WIDE)}
    assert list(found.changes) == sorted(found.changes, key=lambda word: -speeds[word])


def test_levers_that_cost_the_least_speed_come_first() -> None:
    full = estimate(GPT2, WIDE, CARD)
    found = levers(full, CARD, 5 * GIB, RISK)
    saving = [lever for lever in found if lever.saved_bytes > 0]
    assert found[: len(saving)] == saving
    assert 3 < len(saving) < len(found)
    ratios = [lever.speed_ratio or 1.0 for lever in saving]
    assert ratios == sorted(ratios, reverse=True)
    without_a_card = [lever.saved_bytes for lever in levers(estimate(GPT2, WIDE), None, 5 * GIB, RISK)]
    assert without_a_card == sorted(without_a_card, reverse=True)
