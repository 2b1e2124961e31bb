"""The closed form, vectorised over candidates, and the enumerated table are the same numbers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from vramplan.planner.memory import peak_allocated, tensor_table
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig, check_step
from vramplan.planner.tape import unroll

SAMPLES = 14
"""Random shapes and batches for each combination of settings: more than 2,000 configurations in all."""

OURS = itertools.product(
    ["vramplan"], ["float32", "bfloat16", "float16"], [False, True], ["full", "chunked"],
    ["none", "selective", "block"], ["adamw-fused", "adamw-foreach", "adamw8bit"], [1, 3],
)  # fmt: skip
OTHER_OPTIMIZERS = itertools.product(
    ["vramplan"], ["bfloat16", "tf32", "pure-bfloat16"], [False, True], ["full", "chunked"], ["none", "selective"],
    ["muon", "adamw-in-backward", "adamw-offload", "adamw-stochastic"], [1, 3],
)  # fmt: skip
SCRIPTS = itertools.product(
    ["nanogpt", "autocast", "plain"], ["float32", "bfloat16"], [False, True], ["full"], ["none"],
    ["adamw-fused", "adamw-foreach"], [1, 3],
)  # fmt: skip
COMBINATIONS = [*OURS, *OTHER_OPTIMIZERS, *SCRIPTS]


NAMES = ("workload", "dtype", "compile", "loss", "checkpointing", "optimizer", "grad_accum")


def enumerated_peak(shape: Shape, step: StepConfig) -> int:
    live = top = 0
    for alloc, row, _, _, _ in unroll(tensor_table(shape, step, evaluation=False)):
        live += int(row.size) if alloc else -int(row.size)
        top = max(top, live)
    return top


def random_arrays(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    heads = rng.integers(2, 6, SAMPLES)  # more than the keys that some of them share
    shape = {
        "n_layer": rng.integers(1, 4, SAMPLES),
        "n_head": heads,
        "n_embd": heads * rng.integers(8, 160, SAMPLES),  # also widths that are no multiple of 8
        "block_size": rng.integers(1, 300, SAMPLES),
        "vocab_size": rng.integers(2, 60_000, SAMPLES),
    }
    return shape, {"batch_size": rng.integers(1, 9, SAMPLES), "loss_chunk_tokens": rng.integers(1, 900, SAMPLES)}


def test_there_are_more_than_two_thousand_configurations() -> None:
    legal = [c for c in COMBINATIONS if not check_step(StepConfig(**dict(zip(NAMES, c, strict=True))))]
    assert SAMPLES * len(legal) > 2000


@pytest.mark.parametrize("number", range(0, len(COMBINATIONS), 12))
def test_the_closed_form_is_the_enumerated_table_to_the_byte(number: int) -> None:
    rng = np.random.default_rng(number)
    for workload, dtype, compiled, loss, checkpointing, optimizer, grad_accum in COMBINATIONS[number : number + 12]:
        fixed: dict[str, Any] = {
            "workload": workload, "dtype": dtype, "compile": compiled, "loss": loss, "checkpointing": checkpointing,
            "optimizer": optimizer, "dropout": 0.1 if workload != "vramplan" and rng.random() < 0.5 else 0.0,
        }  # fmt: skip
        shape, step = random_arrays(rng)
        options: dict[str, Any] = {"bias": bool(rng.integers(2)), "tied": bool(rng.integers(2))}
        if workload == "vramplan":
            options |= {
                "norm": rng.choice(["layernorm", "rmsnorm"]), "positions": rng.choice(["learned", "rotary"]),
                "mlp": rng.choice(["gelu", "swiglu", "relu2"]), "n_kv_head": int(rng.integers(2)),
                "qk_norm": bool(rng.integers(2)), "logit_softcap": float(15 * rng.integers(2)),
            }  # fmt: skip
        if check_step(StepConfig(**fixed, grad_accum=grad_accum)):
            continue
        accum = np.full(SAMPLES, grad_accum)
        together = peak_allocated(Shape(**shape, **options), StepConfig(**step, grad_accum=accum, **fixed))
        for i in range(SAMPLES):
            one = Shape(**{name: int(values[i]) for name, values in shape.items()}, **options)
            how = StepConfig(**{name: int(v[i]) for name, v in step.items()}, grad_accum=grad_accum, **fixed)
            assert enumerated_peak(one, how) == int(np.broadcast_to(together, SAMPLES)[i]), (one, how)
