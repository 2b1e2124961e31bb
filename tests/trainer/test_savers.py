"""No memory saver changes what is learned: with each of them the loss falls as it does without."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from savers_keep_the_loss import (
    HALVES,
    LIMIT,
    REFERENCE,
    SAVERS,
    WITHOUT_CLIPPING,
    byte_batches,
    final,
    losses,
    reference_of,
)

from vramplan.planner.shape import Shape
from vramplan.planner.step import CHOICES
from vramplan.trainer.loss import _compiled_slice

SHAPE = Shape(n_layer=2, n_head=2, n_embd=48, vocab_size=256, block_size=32)
STEPS, LAST = 40, 8
SAME = 1e-3
"""Largest relative difference of any step's loss where a saver does the same arithmetic, in another order."""
HALF_LIMIT = 0.02
EIGHT_BIT = "adamw8bit"


@pytest.fixture
def without_inductor(monkeypatch):
    """Graphs are captured and differentiated as ever, without the minute that inductor takes for their kernels."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    _compiled_slice.cache_clear()
    yield
    _compiled_slice.cache_clear()
    torch.compiler.reset()


@pytest.fixture(scope="module")
def batches():
    return byte_batches(STEPS, SHAPE, documents=20)


@pytest.fixture(scope="module")
def plain(batches):
    """The losses of the plain paths, with and without clipping, by name."""
    return {saver.name: losses(saver, SHAPE, batches) for saver in (REFERENCE, WITHOUT_CLIPPING)}


def named(savers):
    return pytest.mark.parametrize("saver", savers, ids=lambda saver: saver.name)


@named(SAVERS)
def test_the_final_loss_is_within_one_per_cent_of_the_plain_path(saver, batches, plain, without_inductor):
    expected, found = plain[reference_of(saver).name], losses(saver, SHAPE, batches)
    assert final(expected, LAST) < 0.75 * expected[0], "the plain path learns"
    assert abs(final(found, LAST) / final(expected, LAST) - 1) < LIMIT
    if saver.step.optimizer != EIGHT_BIT:
        assert found == pytest.approx(expected, rel=SAME)


@named(HALVES)
def test_half_precision_learns_nearly_the_same(saver, batches, plain):
    found = losses(saver, SHAPE, batches)
    assert abs(final(found, LAST) / final(plain[REFERENCE.name], LAST) - 1) < HALF_LIMIT


def test_clipping_makes_a_difference_here(plain):
    """Otherwise a saver that forgets to clip would pass."""
    assert plain[REFERENCE.name] != pytest.approx(plain[WITHOUT_CLIPPING.name], rel=1e-5)


def test_every_saver_the_configuration_knows_is_among_them():
    steps = [saver.step for saver in (*SAVERS, *HALVES)]
    for field in ("loss", "checkpointing", "optimizer"):
        known = set(CHOICES[field]) - {"muon"}  # which saves by being another optimizer than AdamW
        assert known == {getattr(step, field) for step in (REFERENCE.step, *steps)}, field


def test_only_offloading_is_refused_on_a_cpu():
    refused = {saver.name: saver.refusal(SHAPE) for saver in (*SAVERS, *HALVES) if saver.refusal(SHAPE)}
    assert list(refused) == ["adamw-offload, the class itself", "pure-bfloat16, float32 masters offloaded"]
    assert all("where a CPU has them anyway" in reason for reason in refused.values())
