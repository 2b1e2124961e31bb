"""Probe random configurations of our trainer on the CPU at hand, one child process each, into a ledger.

    python benchmarks/random_probes.py 130 --ledger FILE.sqlite
    vramplan ledger export --ledger FILE.sqlite -o tests/data/ledger/cpu.jsonl

The seed names the configuration, so that a run can be repeated or continued.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from vramplan.memory_probe.ledger import Ledger
from vramplan.memory_probe.probe import probe
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig, check


def random_configuration(seed: int) -> tuple[Shape, StepConfig]:
    """Any legal small configuration of our trainer."""
    draw = random.Random(seed)
    while True:
        heads = draw.choice([1, 2, 4])
        shape = Shape(
            n_layer=draw.randint(1, 4), n_head=heads, n_embd=heads * draw.choice([8, 16, 24, 32]),
            vocab_size=draw.randint(50, 3000), block_size=draw.randint(8, 96), bias=draw.random() < 0.3,
            tied=draw.random() < 0.7, norm=draw.choice(["layernorm", "rmsnorm"]),
            positions=draw.choice(["learned", "rotary"]), mlp=draw.choice(["gelu", "swiglu", "relu2"]),
            n_kv_head=draw.choice([0, 1]), qk_norm=draw.random() < 0.3, logit_softcap=draw.choice([0.0, 0.0, 15.0]),
        )  # fmt: skip
        step = StepConfig(
            batch_size=draw.randint(1, 8), grad_accum=draw.choice([1, 1, 2, 3]), device="cpu",
            dtype=draw.choice(["float32", "float32", "bfloat16", "float16", "pure-bfloat16"]),
            loss=draw.choice(["full", "chunked"]), loss_chunk_tokens=draw.choice([16, 64, 256]),
            checkpointing=draw.choice(["none", "selective", "block"]),
            optimizer=draw.choice(["adamw-fused", "adamw-foreach", "muon", "adamw8bit", "adamw-stochastic"]),
        )  # fmt: skip
        if not check(shape, step):
            return shape, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="how many, from seed --start on")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--ledger", type=Path, required=True)
    options = parser.parse_args()
    with Ledger(options.ledger) as ledger:
        for seed in range(options.start, options.start + options.count):
            found = probe(*random_configuration(seed), steps=3)
            ledger.add([found])
            print(seed, found.outcome, found.allocated_error, flush=True)


if __name__ == "__main__":
    main()
