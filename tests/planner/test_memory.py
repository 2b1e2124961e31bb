"""Estimated peaks agree with real ones, and each part of a peak moves with what causes it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import Estimate, context_bytes, estimate, peak_allocated, workspace_bytes
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.planner.tape import CATEGORIES
from vramplan.units import GIB, KIB, MIB

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent.parent / "data/measured/rtx3060.jsonl").read_text(encoding="utf-8").splitlines()
]
MEASURED = [row for row in ROWS if row["peak_mib"] is not None]
FAILED = [row for row in ROWS if row["failed_request_mib"] is not None]
SHAPE_FIELDS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "bias", "tied")
STEP_FIELDS = ("batch_size", "grad_accum", "dtype", "compile", "loss", "optimizer", "workload")

GPT2 = Shape(n_layer=12, n_head=12, n_embd=768)
FAILED_ON_4070 = Shape(n_layer=12, n_head=12, n_embd=576)
NANOGPT = StepConfig(batch_size=16, grad_accum=32, dtype="bfloat16", loss="full", workload="nanogpt")
OURS = StepConfig(batch_size=8)


def of_row(row: dict[str, Any]) -> Estimate:
    shape = Shape(**{field: row[field] for field in SHAPE_FIELDS})
    return estimate(shape, StepConfig(**{field: row[field] for field in STEP_FIELDS}), find_gpu("3060"))


def alive(e: Estimate) -> dict[str, int]:
    return {row.name: row.n_bytes for row in e.alive_at_peak}


# ------------------------------------------------------------------- against a card


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["name"])
def test_peak_measured_on_a_card(row: dict[str, Any]) -> None:
    assert of_row(row).peak_allocated_bytes / MIB == pytest.approx(row["peak_mib"], rel=5e-4)


def test_there_are_six_float32_rows_and_one_of_each_half_precision() -> None:
    assert sorted(row["dtype"] for row in MEASURED) == ["bfloat16", "float16", *["float32"] * 6]


@pytest.mark.parametrize("row", FAILED, ids=lambda row: row["name"])
def test_the_request_that_failed_on_a_card_is_the_one_that_no_longer_fits(row: dict[str, Any]) -> None:
    e = of_row(row)
    capacity = 12_036 * MIB - context_bytes(find_gpu("3060"))
    level = 0
    for change in e.changes:
        level += int(change.row.size) if change.alloc else -int(change.row.size)
        if level > capacity:
            break
    assert level > capacity
    assert int(change.row.size) == row["failed_request_mib"] * MIB


def test_the_4070_failure_was_the_gradient_of_the_logits_beside_the_logits() -> None:
    e = estimate(FAILED_ON_4070, replace(NANOGPT, compile=True), find_gpu("4070"))
    assert e.peak_phase == "loss backward"
    there = alive(e)
    assert there["logits"] == there["gradient of the logits"] == 16 * 1024 * 50304 * 2
    assert there["logits"] / 1e9 == pytest.approx(1.648, abs=5e-4)
    assert there["logits"] / GIB == pytest.approx(1.535, abs=5e-4)


def test_the_4070_remedy_of_turning_compile_off_needs_more() -> None:
    compiled = estimate(FAILED_ON_4070, replace(NANOGPT, compile=True))
    eager = estimate(FAILED_ON_4070, NANOGPT)
    logits = 16 * 1024 * 50304
    assert compiled.breakdown["logits_and_loss"] == pytest.approx(4 * logits, rel=1e-3)
    assert eager.breakdown["logits_and_loss"] == pytest.approx(12 * logits, rel=1e-3)
    assert eager.process_bytes > compiled.process_bytes + 4 * GIB


@pytest.mark.parametrize(
    ("step", "bytes_per_logit"),
    [
        (replace(NANOGPT, workload="autocast", dtype="float32"), 16),
        (replace(NANOGPT, workload="autocast"), 14),
        (NANOGPT, 12),
        (replace(NANOGPT, compile=True), 4),
        (replace(NANOGPT, workload="vramplan", dtype="float32"), 12),
    ],
)
def test_bytes_per_logit_at_the_loss_backward(step: StepConfig, bytes_per_logit: int) -> None:
    e = estimate(GPT2, step)
    assert e.peak_phase == "loss backward"
    assert e.breakdown["logits_and_loss"] / (16 * 1024 * 50304) == pytest.approx(bytes_per_logit, rel=1e-3)


# ------------------------------------------------------------------- precision


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("workload", ["vramplan", "nanogpt", "autocast"])
def test_float16_needs_what_bfloat16_needs(workload: Any, compile: bool) -> None:
    step = replace(NANOGPT, workload=workload, compile=compile)
    bf16, fp16 = (estimate(GPT2, replace(step, dtype=dtype)) for dtype in ("bfloat16", "float16"))
    assert 0 <= fp16.peak_table_bytes - bf16.peak_table_bytes <= 4 * KIB


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_half_precision_needs_less_than_float32(loss: Any) -> None:
    half, full = (estimate(GPT2, replace(OURS, loss=loss, dtype=d)) for d in ("bfloat16", "float32"))
    assert half.peak_table_bytes < 0.85 * full.peak_table_bytes
    assert half.breakdown["optimizer"] == full.breakdown["optimizer"], "master states stay float32"


def test_activations_per_token_and_layer() -> None:
    """64 h in float32 plus statistics and log-sum-exp; 36 h under autocast; 32 h with a half residual stream."""
    deeper = replace(GPT2, n_layer=13)
    tokens, h = 8 * 1024, 768
    for workload, dtype, width in (
        ("vramplan", "float32", 64 * h + 16 + 4 * 12),
        ("autocast", "float32", 64 * h + 16 + 4 * 12),
        ("autocast", "bfloat16", 36 * h + 16 + 4 * 12),
        ("vramplan", "bfloat16", 32 * h + 16 + 4 * 12),
    ):
        step = StepConfig(batch_size=8, loss="full", workload=workload, dtype=dtype)  # type: ignore[arg-type]
        one, two = (estimate(s, step) for s in (GPT2, deeper))
        assert one.peak_phase == two.peak_phase == "loss backward"
        more = two.breakdown["activations"] - one.breakdown["activations"]
        assert more / tokens == pytest.approx(width, abs=1), (workload, dtype)


# ------------------------------------------------------------------- what moves the peak


@pytest.mark.parametrize("compile", [False, True])
def test_accumulation_adds_a_set_of_gradients_at_the_loss_backward(compile: bool) -> None:
    shape, step = replace(GPT2, tied=False), replace(OURS, loss="full", compile=compile)
    one, more = (estimate(shape, replace(step, grad_accum=n)) for n in (1, 2))
    assert one.peak_phase == more.peak_phase == "loss backward"
    added = more.breakdown["gradients"] - one.breakdown["gradients"]
    assert added == 4 * int(shape.parameters)
    assert more.peak_table_bytes - one.peak_table_bytes == added
    assert more.persistent_bytes - one.persistent_bytes == added
    assert estimate(shape, replace(step, grad_accum=64)).peak_table_bytes == more.peak_table_bytes


@pytest.mark.parametrize("compile", [False, True])
def test_after_the_backward_only_one_set_of_gradients_is_left(compile: bool) -> None:
    step = replace(OURS, optimizer="adamw-foreach", compile=compile, checkpointing="block", batch_size=1)
    small = Shape(n_layer=12, n_head=12, n_embd=768, vocab_size=512, block_size=8)
    for accum in (1, 4):
        e = estimate(small, replace(step, grad_accum=accum))
        update = e.phase_peaks["optimizer step"]
        assert update == pytest.approx(20 * int(small.parameters) + 2 * 8_519_680, rel=2e-3), (
            "states, gradients, foreach"
        )


def test_the_chunked_loss_needs_less_the_more_chunks_there_are() -> None:
    peaks = [
        estimate(GPT2, replace(OURS, loss_chunk_tokens=chunk)).phase_peaks["loss forward"]
        for chunk in (8192, 4096, 2048, 1024, 512)
    ]
    assert all(more > less for more, less in pairwise(peaks))
    halves = [more - less for more, less in pairwise(peaks)]
    assert halves[0] == pytest.approx(2 * halves[1], rel=0.01)
    assert estimate(GPT2, OURS).process_bytes < 0.6 * estimate(GPT2, replace(OURS, loss="full")).process_bytes


def test_a_chunk_larger_than_the_micro_batch_is_the_micro_batch() -> None:
    one = replace(OURS, batch_size=1)
    assert (
        estimate(GPT2, replace(one, loss_chunk_tokens=1 << 20)).peak_table_bytes
        == estimate(GPT2, replace(one, loss_chunk_tokens=1024)).peak_table_bytes
    )


def test_checkpointing_keeps_one_block_and_the_inputs_of_all() -> None:
    full, kept = (estimate(GPT2, replace(OURS, checkpointing=c)) for c in ("none", "block"))
    assert kept.breakdown["activations"] < 0.25 * full.breakdown["activations"]
    assert kept.peak_table_bytes < full.peak_table_bytes
    deeper = estimate(replace(GPT2, n_layer=24), replace(OURS, checkpointing="block"))
    more = deeper.phase_peaks["loss forward"] - kept.phase_peaks["loss forward"]
    inputs = 12 * 2 * 768 * 8 * 1024
    assert more - (deeper.persistent_bytes - kept.persistent_bytes) == inputs


def test_optimizers_differ_by_their_states_and_their_scratch() -> None:
    fused, foreach, eight_bit = (
        estimate(GPT2, replace(OURS, optimizer=o))  # type: ignore[arg-type]
        for o in ("adamw-fused", "adamw-foreach", "adamw8bit")
    )
    parameters = int(GPT2.parameters)
    assert fused.breakdown["optimizer"] == pytest.approx(8 * parameters, rel=1e-3)
    assert eight_bit.breakdown["optimizer"] == pytest.approx(2.04 * parameters, rel=0.01)
    scratch = foreach.phase_peaks["optimizer step"] - fused.phase_peaks["optimizer step"]
    assert scratch == pytest.approx(4 * parameters, rel=0.05)


def test_an_untied_head_adds_a_head_of_weights_and_states() -> None:
    tied, untied = (estimate(replace(GPT2, tied=t), OURS) for t in (True, False))
    head = 50304 * 768
    assert untied.breakdown["weights"] - tied.breakdown["weights"] == 4 * head
    assert untied.breakdown["optimizer"] - tied.breakdown["optimizer"] == pytest.approx(8 * head, abs=KIB)


def test_an_awkward_head_width_pads_attention() -> None:
    plain, awkward = (estimate(Shape(n_layer=12, n_head=12, n_embd=h), OURS) for h in (768, 720))
    assert "padded q" not in alive(plain)
    assert alive(awkward)["padded q"] == alive(awkward)["padded v"] == 12 * 2 * 8 * 1024 * 12 * 64


def row_size(e: Estimate, name: str) -> int | None:
    return next((int(change.row.size) for change in e.changes if change.row.name == name), None)


def test_rows_for_what_attention_kernels_allocate_themselves() -> None:
    """FlashAttention-2 rounds rows to 128 and widths to 32; the float32 kernel aligns its log-sum-exp to 32 rows."""
    shape = Shape(n_layer=2, n_head=6, n_embd=240, block_size=200)
    half, full, cpu = (
        estimate(shape, replace(OURS, batch_size=4, dtype=dtype, device=device))  # type: ignore[arg-type]
        for dtype, device in (("bfloat16", "cuda"), ("float32", "cuda"), ("float32", "cpu"))
    )
    accumulator = "float32 accumulator of dq (kernel)"
    assert row_size(half, accumulator) == 4 * (4 * 6 * 256) * 64
    assert row_size(full, accumulator) is row_size(cpu, accumulator) is None
    assert row_size(full, "attention delta (kernel)") == -(-4 * 6 * 4 * 200 // 512) * 512
    assert row_size(full, "attention log-sum-exp") == 4 * 6 * 4 * 224
    assert row_size(cpu, "attention log-sum-exp") == 4 * 6 * 4 * 200


# ------------------------------------------------------------------- phases and sums


@pytest.mark.parametrize(
    ("phase", "shape", "step"),
    [
        ("loss backward", GPT2, replace(OURS, loss="full")),
        ("loss forward", GPT2, OURS),
        ("block backward", replace(GPT2, vocab_size=512), replace(OURS, checkpointing="block")),
        ("embedding backward", replace(GPT2, block_size=16), replace(OURS, batch_size=1, checkpointing="block")),
        ("optimizer step", replace(GPT2, block_size=16), replace(OURS, batch_size=1, optimizer="adamw-foreach")),
    ],
)
@pytest.mark.parametrize("compile", [False, True])
def test_the_phase_of_the_peak(phase: str, shape: Shape, step: StepConfig, compile: bool) -> None:
    if compile and phase == "embedding backward":
        step = replace(step, loss="full")
    e = estimate(shape, replace(step, compile=compile))
    assert e.peak_phase == phase
    assert e.phase_peaks[phase] == e.peak_table_bytes == max(e.phase_peaks.values())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("workload", ["vramplan", "nanogpt", "autocast"])
def test_the_breakdown_adds_up(workload: Any, compile: bool, device: Any) -> None:
    e = estimate(GPT2, replace(NANOGPT, batch_size=2, workload=workload, compile=compile, device=device))
    assert sum(e.breakdown.values()) == e.process_bytes
    assert set(e.breakdown) == {*CATEGORIES, "rounding", "first step", "fragmentation", "context"}
    assert all(size >= 0 for size in e.breakdown.values())
    assert sum(row.n_bytes for row in e.alive_at_peak) == e.peak_table_bytes
    sizes = [row.n_bytes for row in e.alive_at_peak]
    assert sizes == sorted(sizes, reverse=True)


def test_the_estimate_is_the_closed_form() -> None:
    batches = np.array([1, 2, 4, 8, 16, 32])
    together = peak_allocated(GPT2, replace(OURS, batch_size=batches, compile=True))
    alone = [estimate(GPT2, replace(OURS, batch_size=int(b), compile=True)).peak_table_bytes for b in batches]
    assert together.tolist() == alone
    assert (np.diff(together) > 0).all()


def test_persistent_bytes_are_weights_states_and_workspaces() -> None:
    e = estimate(GPT2, OURS)
    parameters = int(GPT2.parameters)
    steps = 512 * (2 + 1 + 6 * 12)  # one counter per parameter tensor
    assert e.persistent_bytes == 12 * parameters + steps + 2 * workspace_bytes(None)


def test_a_card_brings_its_own_workspace_and_context() -> None:
    h200, ada = (estimate(GPT2, OURS, find_gpu(name)) for name in ("H200", "4070"))
    assert h200.peak_table_bytes - ada.peak_table_bytes == 2 * (32 * MIB - 8_519_680)
    assert h200.context_bytes > ada.context_bytes == 200 * MIB


def test_a_cpu_has_no_workspace_and_no_fragmentation() -> None:
    e = estimate(GPT2, replace(OURS, dtype="float32", device="cpu"))
    assert e.breakdown["workspace"] == e.breakdown["fragmentation"] == 0
    assert e.peak_reserved_bytes == e.peak_table_bytes


def test_committed_passes_of_a_cpu_are_met() -> None:
    """What estimator_accuracy.py --cpu measured; test_cpu_confirms.py measures others anew."""
    path = Path(__file__).parent.parent / "data/measured/cpu.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 80
    for row in rows:
        shape = Shape(**{name: row[name] for name in Shape.__dataclass_fields__})
        step = StepConfig(**{name: row[name] for name in StepConfig.__dataclass_fields__ if name != "torch"})
        expected, persistent = estimate(shape, step).peak_allocated_bytes, row["persistent_mib"] * MIB
        assert expected == pytest.approx(row["peak_mib"] * MIB, rel=0.0005), row["name"]
        assert expected - persistent == pytest.approx(row["peak_mib"] * MIB - persistent, rel=0.001), row["name"]
