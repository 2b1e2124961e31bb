"""A run small enough for any test."""

from __future__ import annotations

from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig


def config(**train_section) -> RunConfig:
    """Twelve steps of a GPT with one layer, on a CPU."""
    settings = {
        "max_steps": 12, "warmup_steps": 2, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "log_interval": 1,
        "eval_interval": 4, "checkpoint_interval": 4, "eval_batches": 2, "seed": 7,
    }  # fmt: skip
    shape = Shape(n_layer=1, n_head=2, n_embd=16, vocab_size=64, block_size=16)
    step = StepConfig(batch_size=2, grad_accum=2, dtype="float32", optimizer="adamw-foreach", device="cpu")
    return RunConfig.build(shape, step, train=settings | train_section)
