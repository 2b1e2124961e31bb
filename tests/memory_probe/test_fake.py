"""The tensor table against whole steps on fake tensors: sizes no machine here could hold, and CUDA's operators."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from dispatcher import seen_by_the_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from vramplan.errors import ConfigError
from vramplan.memory_probe.cpu import StepMeasurement, measure_cpu_step, probe_optimizer, random_batches
from vramplan.memory_probe.fake import measure_fake_step
from vramplan.planner.memory import Estimate, estimate
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.trainer.model import GPT
from vramplan.trainer.step import TrainStep

TOLERANCE = 0.0005
SCALARS = 2048
"""Tensors smaller than this are counted in the peaks but not compared one by one: loss scalars, counters."""

GPT2 = Shape(n_layer=12, n_head=12, n_embd=768)
SHAPES = {
    "124M": GPT2,
    "124M, biases, untied": replace(GPT2, bias=True, tied=False),
    "355M": Shape(n_layer=24, n_head=16, n_embd=1024),
    "774M": Shape(n_layer=36, n_head=20, n_embd=1280, tied=False),
    "1.5B": Shape(n_layer=48, n_head=25, n_embd=1600),
    "modern": replace(
        GPT2,
        norm="rmsnorm",
        positions="rotary",
        mlp="swiglu",
        n_kv_head=4,
        qk_norm=True,
        logit_softcap=30.0,
        tied=False,
    ),
    "squared ReLU": replace(GPT2, mlp="relu2", bias=True, positions="rotary"),
    "modern, heads of 52": Shape(
        n_layer=3,
        n_head=6,
        n_embd=312,
        vocab_size=5003,
        block_size=200,
        norm="rmsnorm",
        positions="rotary",
        mlp="swiglu",
        n_kv_head=3,
        qk_norm=True,
    ),
    "heads of 52": Shape(n_layer=3, n_head=5, n_embd=260, vocab_size=5003, block_size=200, bias=True),
}
STEP = StepConfig(batch_size=4, loss="full")
CHUNKED: dict[str, Any] = {"loss": "chunked", "loss_chunk_tokens": 1024}
BLOCK: dict[str, Any] = {"checkpointing": "block"}
SELECTIVE: dict[str, Any] = {"checkpointing": "selective"}


def case(shape: str, **step: Any) -> Any:
    return pytest.param(SHAPES[shape], replace(STEP, **step), id=f"{shape}, {step}")


CASES = [
    case("124M", dtype="float32"),
    case("124M", dtype="bfloat16"),
    case("124M", dtype="bfloat16", device="cpu"),
    case("124M", dtype="bfloat16", grad_accum=2, **CHUNKED),
    case("124M", dtype="float32", optimizer="adamw-foreach", **CHUNKED),
    case("124M", batch_size=16, dtype="bfloat16", **BLOCK),
    case("124M, biases, untied", dtype="bfloat16", grad_accum=2),
    case("124M, biases, untied", dtype="float32", **CHUNKED, **BLOCK),
    case("355M", dtype="bfloat16", batch_size=16, **CHUNKED),
    case("355M", dtype="float32", **BLOCK),
    case("774M", dtype="bfloat16"),
    case("774M", dtype="bfloat16", **CHUNKED, **BLOCK),
    case("1.5B", dtype="float32", device="cpu"),
    case("1.5B", dtype="bfloat16", **CHUNKED),
    case("heads of 52", dtype="float32", batch_size=7),
    case("heads of 52", dtype="bfloat16", batch_size=7, **CHUNKED),
    case("heads of 52", dtype="bfloat16", batch_size=7, **BLOCK),
    case("modern", dtype="bfloat16", grad_accum=2, **CHUNKED),
    case("modern", dtype="bfloat16", batch_size=16, **BLOCK),
    case("modern", dtype="float32"),
    case("modern", dtype="float32", device="cpu", **CHUNKED),
    case("squared ReLU", dtype="bfloat16"),
    case("124M", dtype="pure-bfloat16", optimizer="adamw-stochastic", **CHUNKED),
    case("355M", dtype="bfloat16", batch_size=1, optimizer="muon", **BLOCK),
    case("355M", dtype="bfloat16", batch_size=1, optimizer="adamw-in-backward", **CHUNKED),
    case("124M", batch_size=16, dtype="bfloat16", **SELECTIVE),
    case("355M", dtype="float32", grad_accum=2, **CHUNKED, **SELECTIVE),
    case("modern", dtype="bfloat16", **CHUNKED, **SELECTIVE),
    case("squared ReLU", dtype="float32", **CHUNKED, **BLOCK),
    case("modern, heads of 52", dtype="bfloat16", batch_size=7),
    case("modern, heads of 52", dtype="float32", batch_size=7, **BLOCK),
]


@cache
def measured(shape: Shape, step: StepConfig) -> StepMeasurement:
    return measure_fake_step(shape, step)


@cache
def estimated(shape: Shape, step: StepConfig) -> Estimate:
    return estimate(shape, step)


@pytest.mark.parametrize(("shape", "step"), CASES)
def test_the_peak_of_every_phase(shape: Shape, step: StepConfig) -> None:
    real = measured(shape, step)
    peak, phase, phases = seen_by_the_dispatcher(estimated(shape, step).table)
    assert (peak, phase) == (pytest.approx(real.peak_bytes, rel=TOLERANCE), real.peak_phase)
    net = peak - real.persistent_bytes
    assert net == pytest.approx(real.peak_bytes - real.persistent_bytes, rel=TOLERANCE)
    assert set(real.phase_peaks) == set(phases) - {"persistent", "checkpoint save"}  # which looks at values
    for name, bytes_ in real.phase_peaks.items():
        assert phases[name] == pytest.approx(bytes_, rel=TOLERANCE), name


@pytest.mark.parametrize(("shape", "step"), [c for c in CASES if c.values[1].grad_accum == 1])
def test_tensor_by_tensor(shape: Shape, step: StepConfig) -> None:
    """Each phase creates as many tensors of each size as the table says: none is missing, none is too many."""
    if step.loss == "chunked" and step.batch_size * shape.block_size % step.loss_chunk_tokens:
        step = replace(step, loss_chunk_tokens=step.batch_size * shape.block_size // 2)
    rows = [
        c
        for c in estimated(shape, step).changes
        if c.alloc and c.phase not in ("persistent", "checkpoint save", "optimizer step")
    ]
    table = Counter(
        (c.phase, int(c.row.size)) for c in rows if c.row.category != "inputs" and "(kernel)" not in c.row.name
    )
    inputs = {int(c.row.size) for c in rows if c.row.category == "inputs"}
    real = Counter(measured(shape, step).created)
    for (phase, size), n in list(real.items()):
        if phase == "optimizer step":
            del real[phase, size]
        elif phase == "evaluation" and size in inputs:  # drawn there, not in the step
            real[phase, size] = n - 2
    for seen in (real, table):  # the table lists three layers of an evaluation, which are like all others
        seen.update({key: 1 - n for key, n in seen.items() if key[0] == "evaluation" and n > 0})
    vectors = (
        -(-4 * step.loss_chunk_tokens // 512) * 512
    )  # of a slice's tokens: the table has as many as are alive at once
    for more in (real - table, table - real):
        assert {key for key in more if key[1] > (vectors if key[0] == "loss forward" else SCALARS)} == set()


def test_the_cases_reach_different_phases() -> None:
    winners = Counter(measured(*c.values).peak_phase for c in CASES)
    assert {"loss forward", "loss backward", "block backward"} <= set(winners)


@pytest.mark.parametrize("step", [StepConfig(batch_size=3, dtype="float32", loss="full", device="cpu"),
                                  StepConfig(batch_size=3, dtype="bfloat16", device="cpu", **BLOCK)])  # fmt: skip
def test_a_fake_step_is_a_real_step(step: StepConfig) -> None:
    shape = Shape(n_layer=2, n_head=2, n_embd=48, vocab_size=300, block_size=64)
    fake, real = measure_fake_step(shape, step), measure_cpu_step((shape, step), steps=2)
    assert fake.persistent_bytes == real.persistent_bytes
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, abs=64)  # a scalar less: the losses are not added up
    assert (fake.peak_phase, fake.peak_operation) == (real.peak_phase, real.peak_operation)


@pytest.mark.parametrize("name", ["124M", "355M", "774M", "1.5B"])
def test_torchs_own_tracker_agrees(name: str) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    shape, step = SHAPES[name], StepConfig(batch_size=4, dtype="float32", loss="full", device="cpu")
    with FakeTensorMode():
        model = GPT(shape, step)
        optimizer = probe_optimizer(model, step)
        train = TrainStep(model, optimizer, step, grad_clip=1.0, device=torch.device("cpu"))
        train.allocate()
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for tokens, targets in random_batches(shape, step):
                train.micro_step(tokens, targets)
            train.update()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert estimated(shape, step).peak_allocated_bytes == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"compile": True}, "compile"), ({"dtype": "float16"}, "dtype"), ({"optimizer": "adamw8bit"}, "optimizer"),
     ({"workload": "nanogpt"}, "workload")],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        measure_fake_step(GPT2, replace(STEP, **change))
    assert [p.field for p in caught.value.problems] == [field]
