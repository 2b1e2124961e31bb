"""The vectorised search against brute force, and its rules."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.errors import ConfigError
from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import context_bytes, peak_allocated
from vramplan.planner.risk import needed_bytes
from vramplan.planner.search import Grid, check_tokens_per_step, confirm, quality_price, rank
from vramplan.planner.shape import Shape
from vramplan.planner.speed import tokens_per_second
from vramplan.planner.step import StepConfig
from vramplan.units import GIB

CARD = find_gpu("4070")
SMALL = Shape(n_layer=12, n_head=12, n_embd=768)
LARGE = Shape(n_layer=24, n_head=16, n_embd=1024)


def subset(values, minimum=1):
    return st.lists(st.sampled_from(values), min_size=minimum, max_size=2, unique=True).map(tuple)


grids = st.builds(
    Grid,
    shapes=subset([SMALL, LARGE, Shape(n_layer=6, n_head=4, n_embd=256)]),
    tokens_per_step=st.sampled_from([524288, 24 * 1024, 1024]),
    dtypes=subset(["bfloat16", "float16", "float32"]),
    compiles=subset([True, False]),
    losses=subset(["full", "chunked"]),
    loss_chunks=subset([512, 2048]),
    checkpointings=subset(["none", "selective", "block"]),
    optimizers=subset(["adamw-fused", "adamw8bit", "adamw-foreach"]),
)


def brute_force(grid, gpu, budget, max_risk):
    """Every configuration priced on its own with plain integers."""
    sequences = grid.tokens_per_step // 1024
    found = []
    for shape in grid.shapes:
        for mode in grid.modes():
            for batch in [b for b in range(1, sequences + 1) if sequences % b == 0]:
                for chunk in grid.loss_chunks if mode.loss == "chunked" else (mode.loss_chunk_tokens,):
                    step = replace(mode, batch_size=batch, grad_accum=sequences // batch, loss_chunk_tokens=chunk)
                    allocated = int(peak_allocated(shape, step, gpu))
                    if needed_bytes(allocated + context_bytes(gpu), step, max_risk) <= budget:
                        speed = float(tokens_per_second(shape, step, gpu))
                        found.append((quality_price(step, gpu), -speed, allocated, shape, step))
    return found


@settings(max_examples=25, deadline=None)
@given(grid=grids, budget_gib=st.floats(2, 24))
def test_the_vectorised_search_equals_brute_force(grid, budget_gib):
    budget = int(budget_gib * GIB)
    expected = brute_force(grid, CARD, budget, 0.01)
    ranked = rank(grid, CARD, budget, 0.01)
    assert len(ranked) == len(expected)
    found = {(c.shape, c.step): c for c in ranked}
    for _, speed, allocated, shape, step in expected:
        assert found[shape, step].allocated_bytes == allocated
        assert found[shape, step].tokens_per_second == pytest.approx(-speed, rel=1e-12)
    if expected:
        best = next(iter(ranked))
        price, speed, *_ = min(expected, key=lambda row: row[:3])
        assert quality_price(best.step, CARD) == price
        assert best.tokens_per_second == pytest.approx(-speed, rel=1e-12)


def test_size_counts_the_whole_grid():
    grid = Grid(shapes=(SMALL, LARGE), tokens_per_step=524288, dtypes=("bfloat16",), compiles=(True, False))
    assert grid.size() == len(rank(grid, CARD, None, 0.01)) == 2 * 10 * (1 + 4) * 2 * 3 * 2


def test_speed_ranks_within_one_quality_price():
    grid = Grid(
        shapes=(SMALL,), tokens_per_step=524288, dtypes=("bfloat16", "float16", "float32"), compiles=(True, False)
    )
    keys = [(quality_price(c.step, CARD), -c.tokens_per_second) for c in rank(grid, CARD, 11 * GIB, 0.01)]
    assert keys == sorted(keys)


def test_float16_costs_nothing_where_bfloat16_does_not_exist():
    assert quality_price(StepConfig(dtype="float16"), find_gpu("2080")) == 0
    assert quality_price(StepConfig(dtype="float16"), CARD) == 1
    assert quality_price(StepConfig(dtype="bfloat16", optimizer="adamw8bit"), CARD) == 2


def test_every_split_keeps_the_tokens_per_step_exactly():
    grid = Grid(shapes=(SMALL,), tokens_per_step=480 * 1024, dtypes=("bfloat16",), compiles=(False,))
    for candidate in rank(grid, CARD, 11 * GIB, 0.01):
        assert candidate.step.batch_size * candidate.step.grad_accum * 1024 == 480 * 1024


def test_an_impossible_total_names_the_nearest_ones():
    with pytest.raises(ConfigError, match="524288 or 525312"):
        check_tokens_per_step(524_300, 1024)
    with pytest.raises(ConfigError, match=r"nearest totals: 1024$"):
        check_tokens_per_step(1000, 1024)


def test_a_batch_that_does_not_divide_names_its_neighbours():
    grid = Grid(shapes=(SMALL,), tokens_per_step=524288, dtypes=("bfloat16",), compiles=(False,), batch_sizes=(12,))
    with pytest.raises(
        ConfigError, match="batch_size=12 does not divide the 512 sequences of a step: use 4, 8, 16, 32"
    ):
        _ = grid.batches


def test_confirmed_plans_fit_with_what_the_allocator_reserves():
    grid = Grid(shapes=(SMALL,), tokens_per_step=524288, dtypes=("bfloat16",), compiles=(False,), losses=("full",))
    budget = 9 * GIB
    kept = confirm(rank(grid, CARD, budget, 0.01), CARD, budget, 0.01, 5)
    assert kept
    for fit in kept:
        assert needed_bytes(fit.estimate.process_bytes, fit.candidate.step, 0.01) <= budget
        assert fit.estimate.peak_table_bytes == fit.candidate.allocated_bytes
