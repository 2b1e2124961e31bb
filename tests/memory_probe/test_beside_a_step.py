"""What is allocated where it is not a usual step that runs: the first one, resuming, sampling."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vramplan.memory_probe.cpu import measure_cpu_step
from vramplan.memory_probe.fake import cuda_operators
from vramplan.memory_probe.meter import TensorMeter
from vramplan.memory_probe.scripts import ScriptLoop
from vramplan.planner.memory import estimate, sampling_table
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.planner.tape import peak

SMALL = Shape(n_layer=2, n_head=4, n_embd=192, vocab_size=2003, block_size=64)


@pytest.mark.parametrize(
    "step",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "batch_size": 8},
        {"grad_accum": 2},
        {"optimizer": "muon"},
        {"optimizer": "adamw-in-backward"},
        {"dtype": "pure-bfloat16", "optimizer": "adamw-stochastic"},
        pytest.param({"optimizer": "adamw8bit"}, id="8 bit, whose states are the larger part of a resume"),
    ],
)
def test_resuming_on_a_cpu(step: dict[str, Any]) -> None:
    if step.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    config = StepConfig(**{"device": "cpu", **step})
    real, expected = measure_cpu_step((SMALL, config), resume=True), estimate(SMALL, config)
    most = max(expected.besides["resume"], expected.peak_allocated_bytes)  # a step follows
    assert most == pytest.approx(real.phase_peaks["resume"], rel=0.0005)
    assert (most > expected.peak_allocated_bytes) is (step.get("optimizer") == "adamw8bit")


@pytest.mark.parametrize("grad_accum", [1, 3])
@pytest.mark.parametrize("workload", ["plain", "autocast"])
def test_the_first_step_of_a_script(workload: Any, grad_accum: int) -> None:
    shape = Shape(n_layer=3, n_head=4, n_embd=256, vocab_size=5003, block_size=128)
    step = StepConfig(batch_size=2, grad_accum=grad_accum, loss="full", dtype="float32", workload=workload)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        size = (step.batch_size, shape.block_size)
        return torch.randint(0, shape.vocab_size, size), torch.randint(0, shape.vocab_size, size)

    with FakeTensorMode(), cuda_operators(shape, step), TensorMeter(granularity=512) as meter:
        loop = ScriptLoop(shape, step, torch.device("cpu"))
        peaks = []
        for _ in range(3):
            gc.collect()
            meter.restart()
            loop.run(draw)
            peaks.append(meter.timeline.peak.live_bytes)
    expected = estimate(shape, step)
    workspaces = 2 * 8_519_680
    assert expected.besides["first step"] - workspaces == pytest.approx(peaks[0], rel=0.002)
    assert expected.peak_table_bytes - workspaces == pytest.approx(peaks[2], rel=0.002)
    assert peaks[0] < peaks[2]


def test_the_first_step_of_ours_is_like_the_others_but_for_its_kernels() -> None:
    eager, compiled = (estimate(SMALL, StepConfig(batch_size=4, compile=c)) for c in (False, True))
    assert eager.besides["first step"] == eager.peak_table_bytes
    tuned = compiled.besides["first step"]
    assert compiled.peak_table_bytes < tuned <= compiled.peak_table_bytes + compiled.first_step_bytes


def test_a_script_that_loads_its_checkpoint_onto_the_card_has_the_weights_twice() -> None:
    shape = Shape(n_layer=12, n_head=12, n_embd=768)
    ours, nanogpt = (estimate(shape, StepConfig(loss="full", workload=w)) for w in ("vramplan", "nanogpt"))  # type: ignore[arg-type]
    assert ours.besides["resume"] == pytest.approx(12 * shape.parameters, rel=0.001)
    assert nanogpt.besides["resume"] == pytest.approx(16 * shape.parameters, rel=0.001)


def test_sampling_is_a_process_of_its_own() -> None:
    step = StepConfig(batch_size=16)
    alone = StepConfig(batch_size=1)
    assert estimate(SMALL, step).besides["sampling"] == peak(sampling_table(SMALL, alone, SMALL.block_size))


def test_they_are_in_the_json() -> None:
    found: Any = estimate(SMALL, StepConfig()).as_dict()["phase_peaks"]
    assert {"first step", "resume", "sampling", "evaluation", "checkpoint save", "forward"} <= set(found)
