"""Which kernel attends, and what it works in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vramplan.planner.attention import KERNELS, efficient_workspace, kernel_numbers, takes_flash
from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import estimate, kinds, peak_allocated, tensor_table
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig

ADA, AMPERE, TURING, BLACKWELL = (8, 9), (8, 0), (7, 5), (12, 0)


@pytest.mark.parametrize(
    ("width", "dtype", "capability", "dropout", "kernel"),
    [
        (64, "bfloat16", ADA, 0.0, "flash"),
        (60, "bfloat16", ADA, 0.0, "padded flash"),
        (64, "float32", ADA, 0.0, "efficient"),
        (60, "float32", ADA, 0.0, "efficient"),
        (43, "tf32", ADA, 0.0, "math"),
        (43, "float32", TURING, 0.0, "efficient"),
        (64, "float16", TURING, 0.0, "efficient"),
        (60, "float16", TURING, 0.0, "math"),
        (64, "bfloat16", TURING, 0.0, "math"),
        (192, "bfloat16", ADA, 0.1, "flash"),
        (200, "bfloat16", ADA, 0.0, "efficient"),
        (200, "bfloat16", BLACKWELL, 0.0, "efficient"),
        (200, "bfloat16", AMPERE, 0.0, "flash"),
        (232, "bfloat16", ADA, 0.0, "flash"),
        (232, "bfloat16", ADA, 0.1, "efficient"),
        (256, "pure-bfloat16", AMPERE, 0.1, "flash"),
        (264, "bfloat16", AMPERE, 0.0, "efficient"),
        (260, "bfloat16", AMPERE, 0.0, "math"),
    ],
)
def test_the_kernel(width: int, dtype: Any, capability: tuple[int, int], dropout: float, kernel: str) -> None:
    shape = Shape(n_layer=1, n_head=2, n_embd=2 * width)
    numbers = kernel_numbers(shape, StepConfig(dtype=dtype, dropout=dropout), capability)
    assert KERNELS[int(numbers)] == kernel
    assert KERNELS[int(kernel_numbers(shape, StepConfig(dtype=dtype, device="cpu"), capability))] == "flash"


def test_no_half_no_flash() -> None:
    assert takes_flash(np.array([64, 128]), False, ADA).tolist() == [False, False]


def test_the_workspace_of_the_memory_efficient_backward() -> None:
    """A tile of 64 x 64 float32 with its lock is 16,400 bytes (the struct GradQTempStorage)."""
    assert efficient_workspace(1, 64, 64, False) == 16_400
    assert efficient_workspace(96, 64, 1024, False) == 96 * 16 * 16_400
    assert efficient_workspace(96, 80, 1000, False) == 96 * 16 * 2 * 16_400
    # in half precision wide heads also gather the gradients of k and v: two splits of the keys for 96 heads
    assert efficient_workspace(96, 192, 1024, True) == 96 * (16 * 3 * 16_400 + 4 * 2 * 2 * 64 * 192)
    assert efficient_workspace(500, 192, 1024, True) == 500 * (16 * 3 * 16_400 + 4 * 2 * 64 * 192)


def test_held_scores_are_priced() -> None:
    """Twelve layers hold 4 bytes for every head and pair of tokens."""
    card, step = find_gpu("4070"), StepConfig(batch_size=8, dtype="float32")
    odd, even = (Shape(n_layer=12, n_head=12, n_embd=width) for width in (516, 528))
    scores = 4 * 12 * 8 * 1024**2
    assert (
        estimate(odd, step, card).peak_allocated_bytes > estimate(even, step, card).peak_allocated_bytes + 12 * scores
    )
    assert "scores of every head are held" in estimate(odd, step, card).caveats[0]
    assert not estimate(even, step, card).caveats


def test_arrays_may_mix_what_has_other_tensors() -> None:
    """Kernels, groups and accumulation side by side: each as it is on its own."""
    heads = np.array([4, 4, 12, 12, 8, 8, 6, 1])
    width = np.array([832, 832, 516, 768, 512, 480, 384, 86])
    groups, batch, accum = (
        np.array([2, 0, 0, 4, 8, 2, 3, 0]),
        np.array([4, 1, 1, 8, 2, 3, 4, 3]),
        np.array([1, 4, 1, 4, 1, 1, 2, 1]),
    )
    for dtype in ("float32", "bfloat16"):
        shape = Shape(n_layer=3, n_head=heads, n_embd=width, n_kv_head=groups)
        step = StepConfig(batch_size=batch, grad_accum=accum, dtype=dtype)
        together = peak_allocated(shape, step)
        with pytest.raises(ValueError, match="different tensors"):
            tensor_table(shape, step)
        assert len(np.unique(kinds(shape, step))) > 3
        for i, (n_head, n_embd, n_kv_head, b, a) in enumerate(zip(heads, width, groups, batch, accum, strict=True)):
            one = Shape(n_layer=3, n_head=int(n_head), n_embd=int(n_embd), n_kv_head=int(n_kv_head))
            alone = peak_allocated(one, StepConfig(batch_size=int(b), grad_accum=int(a), dtype=dtype))
            assert (
                together[i]
                == alone
                == estimate(one, StepConfig(batch_size=int(b), grad_accum=int(a), dtype=dtype)).peak_table_bytes
            )


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16", "float16"])
def test_heads_over_256_are_outside_whatever_the_dtype(dtype: Any) -> None:
    shape = Shape(n_layer=2, n_head=4, n_embd=1280)
    caveats = estimate(shape, StepConfig(dtype=dtype), find_gpu("4070")).caveats
    assert "head_dim 320 is beyond the 256" in caveats[0]
    assert not estimate(replace(shape, n_head=5), StepConfig(dtype=dtype), find_gpu("A100 80GB")).caveats


def test_a_whole_million_is_evaluated_in_pieces() -> None:
    rng = np.random.default_rng(0)
    heads, batch = rng.integers(1, 9, 40_000), rng.integers(1, 5, 40_000)
    shape = Shape(n_layer=2, n_head=heads, n_embd=heads * rng.integers(30, 90, 40_000), vocab_size=500)
    step = StepConfig(batch_size=batch, loss="full", dtype="float32")
    together = peak_allocated(shape, step)
    for at in rng.integers(0, 40_000, 25).tolist():
        one = replace(shape, n_head=int(heads[at]), n_embd=int(shape.n_embd[at]))
        assert together[at] == peak_allocated(one, replace(step, batch_size=int(batch[at])))
    table = Shape(n_layer=np.array([[1], [2]]), n_head=heads[:30], n_embd=shape.n_embd[:30], vocab_size=500)
    short = replace(shape, n_head=heads.astype(np.int32), n_embd=shape.n_embd.astype(np.int32), block_size=4096)
    large = replace(step, batch_size=np.full(40_000, 64, dtype=np.int32))
    long = replace(shape, block_size=4096), replace(step, batch_size=np.full(40_000, 64))
    assert np.array_equal(peak_allocated(short, large), peak_allocated(*long))
    both = peak_allocated(table, replace(step, batch_size=batch[:30]))
    assert both.shape == (2, 30)
    assert both[1].tolist() == together[:30].tolist()


def test_as_many_keys_as_queries_are_no_groups() -> None:
    heads = np.array([4, 4])
    shape = Shape(n_layer=2, n_head=heads, n_embd=64 * heads, n_kv_head=4)
    plain = Shape(n_layer=2, n_head=4, n_embd=256)
    assert peak_allocated(shape, StepConfig()).tolist() == [peak_allocated(plain, StepConfig())] * 2


@pytest.mark.parametrize(
    ("card", "outside"), [("H100 SXM", True), ("B200", True), ("A100 80GB", False), ("5090", False)]
)
def test_where_torch_prefers_cudnn_only_our_trainer_is_known(card: str, outside: bool) -> None:
    shape, gpu = Shape(n_layer=2, n_head=4, n_embd=256), find_gpu(card)
    script = StepConfig(loss="full", workload="nanogpt")
    assert ("cuDNN" in " ".join(estimate(shape, script, gpu).caveats)) is outside
    assert not estimate(shape, StepConfig(loss="full"), gpu).caveats
    assert not estimate(shape, replace(script, dtype="float32"), gpu).caveats
