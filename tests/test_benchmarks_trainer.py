"""The benchmarks of the trainer and of the savers do what they say, at sizes that take seconds."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import largest_model
import trainer_vs_plain

from vramplan.memory_probe.cpu import random_batches
from vramplan.planner.candidates import conventional
from vramplan.planner.memory import estimate
from vramplan.planner.step import StepConfig

# ------------------------------------------------------------------- our trainer beside a plain loop


def test_ours_and_the_plain_loop_learn_the_same() -> None:
    torch.manual_seed(0)
    shape, step = trainer_vs_plain.QUICK_SHAPE, trainer_vs_plain.STEP
    ours = trainer_vs_plain.ours(shape, step)
    plain = trainer_vs_plain.PlainLoop(ours)
    losses = []
    for _ in range(6):
        batch = next(iter(random_batches(shape, step)))
        losses.append((ours([batch], trainer_vs_plain.LEARNING_RATE).loss, plain(batch)))
    assert all(mine == pytest.approx(theirs, abs=trainer_vs_plain.LOSS_TOLERANCE) for mine, theirs in losses)
    for name, weight in trainer_vs_plain.PlainLoop(ours).model.named_parameters():
        torch.testing.assert_close(weight, plain.model.get_parameter(name), rtol=1e-3, atol=1e-4, msg=name)


def test_a_step_of_the_run_is_compared_with_its_neighbours() -> None:
    found = trainer_vs_plain.loop_over_step(trainer_vs_plain.QUICK_SHAPE, trainer_vs_plain.STEP, 4)
    assert found["pairs"] == len(found["ratios"]) == 4
    assert found["interval_95"][0] <= found["median_ratio"] <= found["interval_95"][1]


def test_our_peak_is_within_its_share_of_the_plain_loops() -> None:
    rows = trainer_vs_plain.memory()
    assert len(rows) == 8
    assert not trainer_vs_plain.failures({"step": {}, "memory": rows})


def test_what_misses_a_requirement_is_named() -> None:
    step = {"eager": {"median_ratio": 1.01, "largest_loss_difference": 1e-3}}
    memory = [{**row, "ratio": 0.9} for row in trainer_vs_plain.memory()[:1]]
    assert len(trainer_vs_plain.failures({"step": step, "memory": memory})) == 3


# ------------------------------------------------------------------- the largest model


def test_only_what_accumulates_and_clips_is_combined() -> None:
    modes = list(largest_model.combinations(("adamw-fused", "adamw-in-backward", "adamw-stochastic")))
    pairs = {(mode.dtype, mode.optimizer) for mode in modes}
    assert pairs == {("float32", "adamw-fused"), ("bfloat16", "adamw-fused"), ("pure-bfloat16", "adamw-stochastic")}
    assert len(modes) == 3 * 2 * 3 * 2, "each with both losses, three checkpointings, eager and compiled"


def test_the_largest_shape_is_the_first_that_fits_in_order_of_size() -> None:
    shapes = largest_model.ladder(widest=1536, step=384)
    assert all(conventional(shape) for shape in shapes)
    assert [s.parameters for s in shapes] == sorted((s.parameters for s in shapes), reverse=True)
    mode = StepConfig(checkpointing="block")
    found = largest_model.largest(shapes, mode, [(1, 512)])
    fitting = [
        shape
        for shape in shapes
        if any(
            largest_model.fits(
                estimate(shape, replace(mode, grad_accum=512, loss_chunk_tokens=chunk), largest_model.GPU)
            )
            for chunk in (512, 1024)
        )
    ]
    assert found.fit is not None
    assert found.fit.shape == fitting[0] != shapes[0]
    assert found.fit.step.batch_size * found.fit.step.grad_accum * 1024 == largest_model.TOKENS_PER_STEP
    assert found.parameters <= found.largest_by_allocated


def test_the_fastest_split_that_fits_is_chosen() -> None:
    shapes = largest_model.ladder(widest=768, step=384)[:1]
    row = largest_model.largest(shapes, StepConfig(checkpointing="block"))
    assert row.as_dict()["batch_size"] > 1
    assert largest_model.fits(row.fit)


def test_the_page_names_the_best_and_what_is_only_on_paper() -> None:
    shapes = largest_model.ladder(step=1024)
    modes = itertools.islice(largest_model.combinations(("adamw-fused",)), 4)
    rows = [largest_model.largest(shapes, mode) for mode in modes]
    page = largest_model.page(rows, list(largest_model.nanogpt(shapes)), len(shapes))
    best = max(rows, key=lambda row: row.parameters)
    assert best.fit.shape.label in page.partition("##")[0]
    assert "no row was measured on a card" in page
    assert "batch 12 x 40" in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1
