"""A plan is confirmed by what really ran, falling down the list, and without a card only as far as a CPU can."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from vramplan.memory_probe.confirm import MICRO_BATCHES, confirm_here, confirm_in_small, fewer_micro_batches, stand_in
from vramplan.memory_probe.measurement import Measurement
from vramplan.memory_probe.probe import probe
from vramplan.planner.gpu import Budget, find_gpu
from vramplan.planner.plan import Plan, make_plan
from vramplan.planner.search import Grid
from vramplan.planner.shape import Shape
from vramplan.planner.step import CHOICES, StepConfig, check
from vramplan.runconfig import ModelSection, StepSection
from vramplan.units import GIB

CARD = find_gpu("4070")
BUDGET = Budget(total_bytes=11 * GIB, reserve_bytes=0)


@pytest.fixture(scope="module")
def plans() -> tuple[Plan, ...]:
    grid = Grid(
        shapes=(Shape(n_layer=12, n_head=12, n_embd=768),), tokens_per_step=524288, dtypes=("bfloat16",),
        compiles=(True, False),
    )  # fmt: skip
    return make_plan(grid, CARD, BUDGET, top=4).plans


def measured(shape: Shape, step: StepConfig, **changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "id": "0123456789abcdef", "when": "2026-11-21T00:00:00+00:00", "version": "0", "outcome": "fits",
        "architecture": "8.9", "process_bytes": 10 * GIB, "reason": "ran to its end", **changes,
    }  # fmt: skip
    model = {n: getattr(shape, n) for n in ModelSection.model_fields}
    settings = {n: getattr(step, n) for n in StepSection.model_fields}
    return Measurement(model=ModelSection(**model), step=StepSection(**settings), **values)


def test_the_first_that_holds_is_taken_and_why_the_others_did_not_is_kept(plans: tuple[Plan, ...]) -> None:
    ends = iter([
        {"outcome": "out_of_memory", "reason": "CUDA out of memory"}, {"process_bytes": 12 * GIB}, {},
    ])  # fmt: skip
    seen: list[StepConfig] = []

    def run(shape: Shape, step: StepConfig) -> Measurement:
        seen.append(step)
        return measured(shape, step, **next(ends))

    found = confirm_here(plans, BUDGET.budget_bytes, run)
    assert (found.rank, [t.holds for t in found.tried]) == (3, [False, False, True])
    assert "CUDA out of memory" in found.tried[0].why
    assert "12.00 GiB" in found.tried[1].why
    assert [s.batch_size for s in seen] == [p.step.batch_size for p in plans[:3]]
    assert max(s.grad_accum for s in seen) <= MICRO_BATCHES
    assert found.as_dict()["rank"] == 3


def test_when_none_holds_none_is_recommended(plans: tuple[Plan, ...]) -> None:
    found = confirm_here(plans, BUDGET.budget_bytes, lambda a, b: measured(a, b, outcome="spilled", reason="slow"))
    assert (found.rank, len(found.tried)) == (None, len(plans))


def test_being_killed_is_no_reason_to_try_the_next(plans: tuple[Plan, ...]) -> None:
    found = confirm_here(plans, BUDGET.budget_bytes, lambda a, b: measured(a, b, outcome="killed"))
    assert (found.rank, len(found.tried)) == (None, 1)


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({"architecture": "cpu", "allocated_bytes": 1_004_000, "expected_allocated_bytes": 1_000_000}, 1),
        ({"architecture": "cpu", "allocated_bytes": 1_020_000, "expected_allocated_bytes": 1_000_000}, None),
        ({"architecture": "cpu", "outcome": "not_memory"}, None),
    ],
)
def test_in_small_the_table_has_to_be_met(plans: tuple[Plan, ...], changes: dict[str, Any], rank: int | None) -> None:
    found = confirm_in_small(plans[0], lambda a, b: measured(a, b, **changes))
    assert found.rank == rank
    assert any("context" in word for word in found.unconfirmed)
    assert any("compiled" in word for word in found.unconfirmed) is plans[0].step.compile


def test_the_real_stand_in_of_a_plan_meets_its_table(plans: tuple[Plan, ...]) -> None:
    found = confirm_in_small(plans[0], lambda a, b: probe(a, b, steps=3))
    assert found.rank == 1, found.tried[0].why


def test_a_stand_in_is_legal_small_and_like_the_original() -> None:
    draw = random.Random(3)
    tried = 0
    for optimizer, checkpointing, dtype in itertools.product(
        CHOICES["optimizer"], CHOICES["checkpointing"], CHOICES["dtype"]
    ):
        heads = draw.choice([6, 8, 12, 25])
        shape = Shape(
            n_layer=draw.randint(1, 48), n_head=heads, n_embd=64 * heads, norm="rmsnorm", positions="rotary",
            mlp="swiglu", n_kv_head=draw.choice([k for k in range(1, heads + 1) if heads % k == 0] + [0]), qk_norm=True,
        )  # fmt: skip
        step: Any = replace(
            StepConfig(batch_size=draw.randint(1, 64), grad_accum=draw.choice([1, 7])), optimizer=optimizer,
            checkpointing=checkpointing, dtype=dtype,
        )  # fmt: skip
        if check(shape, step):
            continue
        tried += 1
        small, settings = stand_in(shape, step)
        assert check(small, settings) == []
        assert small.parameters < 300_000
        assert (small.norm, small.mlp, small.qk_norm, small.grouped) == ("rmsnorm", "swiglu", True, shape.grouped)
        assert (settings.checkpointing, settings.dtype, settings.device) == (checkpointing, dtype, "cpu")
    assert tried > 40


def test_accumulation_is_kept_where_there_is_any() -> None:
    assert [fewer_micro_batches(StepConfig(grad_accum=n)).grad_accum for n in (1, 2, 64)] == [1, 2, 2]
