"""Measuring a card: the same program on a CPU, where there are no statistics but everything else happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vramplan.memory_probe import card as module
from vramplan.memory_probe.card import measure_card
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig

SHAPE = Shape(n_layer=1, n_head=2, n_embd=32, vocab_size=64, block_size=16)
CPU = torch.device("cpu")


@pytest.mark.parametrize("workload", ["vramplan", "nanogpt", "autocast", "plain"])
def test_each_workload_runs_and_is_timed(workload: Any) -> None:
    step = StepConfig(batch_size=2, grad_accum=2, dtype="float32", loss="full", workload=workload, device="cpu")
    found = measure_card(SHAPE, step, CPU, steps=4)
    assert (found.outcome, found.error, len(found.seconds)) == ("fits", "", 2)
    assert found.tokens_per_second is not None
    assert found.tokens_per_second > 0
    assert found.allocated_bytes is found.reserved_bytes is found.context_bytes is found.retries is None


def test_running_out_of_memory_is_an_outcome_and_other_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Any:
        def run(*_: Any) -> None:
            raise error

        return run

    step = StepConfig(batch_size=2, dtype="float32", device="cpu")
    monkeypatch.setattr(module, "_run", fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nx")))
    found = measure_card(SHAPE, step, CPU)
    assert (found.outcome, found.seconds, found.tokens_per_second) == ("out_of_memory", (), None)
    assert found.error.startswith("CUDA out of memory")
    monkeypatch.setattr(module, "_run", fail(RuntimeError("an illegal memory access was encountered")))
    with pytest.raises(RuntimeError, match="illegal"):
        measure_card(SHAPE, step, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_the_estimate_is_near() -> None:
    from vramplan.planner.memory import estimate

    shape, step = Shape(n_layer=4, n_head=8, n_embd=512), StepConfig(batch_size=4)
    found = measure_card(shape, step, torch.device("cuda"))
    assert estimate(shape, step).peak_allocated_bytes == pytest.approx(found.allocated_bytes, rel=0.02)
