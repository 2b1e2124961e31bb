"""Seconds in which the closed form evaluates a million configurations, for each kind of table.

    python benchmarks/closed_form.py

Must stay under 1 s. Widths are multiples of 64 heads wide, or any, so that attention kernels are mixed. Prints one line
for each kind, and the time of one full estimate with its replay: as installed, and with the replay in Python, as it is
where there was no C compiler.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vramplan.planner import first_steps
from vramplan.planner.memory import estimate, peak_allocated
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig

CONFIGURATIONS = 1_000_000

MODERN = {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "qk_norm": True, "logit_softcap": 30.0}
KINDS: dict[str, tuple[StepConfig, dict[str, Any]]] = {
    "eager, full loss": (StepConfig(loss="full"), {}),
    "eager, chunked loss, accumulation": (StepConfig(grad_accum=8), {}),
    "eager, float32, checkpointing": (StepConfig(dtype="float32", checkpointing="block"), {}),
    "compiled, full loss": (StepConfig(loss="full", compile=True), {}),
    "nanoGPT": (StepConfig(loss="full", workload="nanogpt"), {}),
    "modern, compiled, checkpointing": (StepConfig(compile=True, checkpointing="block"), MODERN),
    "modern, float16, 8-bit, selective": (
        StepConfig(dtype="float16", optimizer="adamw8bit", checkpointing="selective"), MODERN,
    ),
    "foreach, biases, untied, accumulation": (
        StepConfig(loss="full", optimizer="adamw-foreach", grad_accum=4), {"bias": True, "tied": False},
    ),
    "gated, compiled, block, 8-bit, untied": (
        StepConfig(compile=True, checkpointing="block", optimizer="adamw8bit"),
        {"mlp": "swiglu", "bias": True, "tied": False},
    ),
    "Muon, float32, selective": (StepConfig(dtype="float32", optimizer="muon", checkpointing="selective"), {}),
}  # fmt: skip

ESTIMATES = {
    "eager": StepConfig(batch_size=8, grad_accum=8),
    "compiled": StepConfig(batch_size=8, grad_accum=8, compile=True),
    "nanoGPT": StepConfig(batch_size=8, grad_accum=8, loss="full", workload="nanogpt"),
    "nanoGPT, compiled": StepConfig(batch_size=8, grad_accum=8, loss="full", workload="nanogpt", compile=True),
}


def million(step: StepConfig, layout: dict[str, Any], *, any_width: bool = False) -> float:
    """Seconds for a million random sizes and batches of one layout."""
    rng = np.random.default_rng(0)
    widths = rng.integers(30, 140, CONFIGURATIONS) if any_width else np.full(CONFIGURATIONS, 64)
    layers, heads = rng.integers(1, 49, CONFIGURATIONS), rng.integers(1, 26, CONFIGURATIONS)
    batch, block = rng.integers(1, 65, CONFIGURATIONS), 256 * rng.integers(1, 9, CONFIGURATIONS)
    names = StepConfig.__dataclass_fields__
    shape = Shape(n_layer=layers, n_head=heads, n_embd=widths * heads, block_size=block, **layout)
    batches = StepConfig(**{name: getattr(step, name) for name in names} | {"batch_size": batch})
    start = time.perf_counter()
    peak_allocated(shape, batches)
    return time.perf_counter() - start


def paired(run: Callable[[], object], times: int = 15) -> tuple[float, float]:
    """Median milliseconds of a call as installed, and without the compiled replay, by turns."""
    compiled = first_steps.COMPILED
    took: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(times):
        for usual, seconds in took.items():
            first_steps.COMPILED = usual and compiled
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    first_steps.COMPILED = compiled
    return 1e3 * statistics.median(took[True]), 1e3 * statistics.median(took[False])


def main() -> None:
    for name, (step, layout) in KINDS.items():
        mixed = million(step, layout, any_width=True)
        print(f"{name:38} {million(step, layout):.2f} s for a million, {mixed:.2f} s with heads of any width")
    for layers, width, heads in ((12, 768, 12), (24, 1024, 16), (48, 1600, 25)):
        shape = Shape(n_layer=layers, n_head=heads, n_embd=width)
        for name, step in ESTIMATES.items():
            usual, slowly = paired(lambda shape=shape, step=step: estimate(shape, step))  # type: ignore[misc]
            print(f"one estimate, {shape.label:14} {name:20} {usual:6.1f} ms, replayed in Python {slowly:6.1f} ms")


if __name__ == "__main__":
    main()
