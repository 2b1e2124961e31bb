"""Does a memory saver change what is learned? A small GPT on the demo corpus with each of them, beside the plain path.

    python benchmarks/savers_keep_the_loss.py            about six minutes on two cores; exit code 1: a loss is off
    python benchmarks/savers_keep_the_loss.py --quick    a minute: bytes instead of GPT-2's vocabulary, fewer steps

``float32``: 200 steps on the tokens of examples/demo_corpus.py with GPT-2's vocabulary, each run from the same weights
and on the same sequences. The plain path is the full loss, fused AdamW, no checkpointing, no accumulation. The final
loss, the mean of the last 20 steps, must be within 1 % of it. One thread, so that a run can be repeated. AdamW inside
the backward can neither clip nor accumulate and is compared with the plain path without clipping. Offloaded states are
refused on a CPU (there is no other memory to offload to), so those rows run the class itself, past the validator: its
arithmetic, not its transfers.

``half``: 30 steps on the corpus's bytes (vocabulary 256: products in half precision are slow on many CPUs) in bfloat16,
float16 with loss scaling, and pure bfloat16 with stochastic rounding or offloaded masters, beside float32. Reported,
and not judged.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vramplan.errors import ConfigError
from vramplan.files import write_text
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import DataSection, RunConfig
from vramplan.trainer.data import prepare
from vramplan.trainer.model import GPT
from vramplan.trainer.optimizer import build_optimizer
from vramplan.trainer.step import TrainStep
from vramplan.trainer.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
SHAPE = Shape(n_layer=2, n_head=2, n_embd=64, block_size=32)
BYTES_SHAPE = Shape(n_layer=2, n_head=2, n_embd=64, vocab_size=256, block_size=64)
PLAIN = StepConfig(batch_size=4, dtype="float32", device="cpu", loss="full")
STEPS, LAST, HALF_STEPS = 200, 20, 30
LEARNING_RATE, WARM_UP, SEED = 2e-3, 20, 20261122
LIMIT = 0.01
"""How far the final loss may be from the plain path's, relative to it."""


@dataclass(frozen=True)
class Saver:
    """A change to the plain path."""

    name: str
    change: dict[str, Any] = field(default_factory=dict)
    grad_clip: float = 1.0

    @property
    def step(self) -> StepConfig:
        """The plain path with this change."""
        return replace(PLAIN, **self.change)

    def refusal(self, shape: Shape) -> str | None:
        """What the configuration's validation says against it; None where it may be used."""
        try:
            RunConfig.build(shape, self.step, train={"grad_clip": self.grad_clip})
        except ConfigError as error:
            return "; ".join(str(problem) for problem in error.problems)
        return None


REFERENCE = Saver("plain")
WITHOUT_CLIPPING = Saver("plain, without clipping", grad_clip=0.0)
SLICES = {"loss": "chunked", "loss_chunk_tokens": 32}
SAVERS = (
    Saver("chunked loss", SLICES),
    Saver("selective checkpointing", {"checkpointing": "selective"}),
    Saver("block checkpointing", {"checkpointing": "block"}),
    Saver("accumulation, 1 x 4 instead of 4 x 1", {"batch_size": 1, "grad_accum": 4}),
    Saver("adamw-foreach", {"optimizer": "adamw-foreach"}),
    Saver("adamw8bit", {"optimizer": "adamw8bit"}),
    Saver("adamw-offload, the class itself", {"optimizer": "adamw-offload"}),
    Saver("adamw-in-backward", {"optimizer": "adamw-in-backward"}, grad_clip=0.0),
    Saver("compiled", {"compile": True}),
    Saver("compiled, chunked loss", {"compile": True, **SLICES}),
    Saver(
        "chunked, block, adamw8bit, accumulation",
        {**SLICES, "checkpointing": "block", "optimizer": "adamw8bit", "batch_size": 1, "grad_accum": 4},
    ),
)
HALVES = (
    Saver("bfloat16", {"dtype": "bfloat16"}),
    Saver("float16, loss scaling", {"dtype": "float16"}),
    Saver("pure-bfloat16, stochastic rounding", {"dtype": "pure-bfloat16", "optimizer": "adamw-stochastic"}),
    Saver(
        "pure-bfloat16, accumulation 1 x 4",
        {"dtype": "pure-bfloat16", "optimizer": "adamw-stochastic", "batch_size": 1, "grad_accum": 4},
    ),
    Saver("pure-bfloat16, float32 masters offloaded", {"dtype": "pure-bfloat16", "optimizer": "adamw-offload"}),
)

Batch = tuple[Tensor, Tensor]


def reference_of(saver: Saver) -> Saver:
    """The plain path that clips as the saver does."""
    return REFERENCE if saver.grad_clip else WITHOUT_CLIPPING


def losses(saver: Saver, shape: Shape, batches: Sequence[Batch]) -> list[float]:
    """The loss of each step: one for each of ``batches``, which hold the sequences of a whole step."""
    step = saver.step
    model = GPT(shape, step, seed=SEED)
    optimizer = build_optimizer(model, step, learning_rate=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    train = TrainStep(model, optimizer, step, grad_clip=saver.grad_clip, device=torch.device("cpu"))
    train.allocate()
    rates = (LEARNING_RATE * min(1.0, (number + 1) / WARM_UP) for number in itertools.count())
    return [train(_micro_batches(batch, step), rate).loss for batch, rate in zip(batches, rates, strict=False)]


def _micro_batches(batch: Batch, step: StepConfig) -> Iterator[Batch]:
    return zip(*(part.split(step.batch_size) for part in batch), strict=True)


def final(curve: Sequence[float], last: int = LAST) -> float:
    """Mean of the last steps."""
    return statistics.fmean(curve[-last:])


def corpus() -> Any:
    """The module that writes the demo corpus."""
    sys.path.append(str(ROOT / "examples"))
    return importlib.import_module("demo_corpus")


def token_batches(steps: int) -> list[Batch]:
    """Sequences of the demo corpus in GPT-2's tokens, in the order that a run reads them."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "corpus.parquet"
        corpus().write_corpus(text)
        shards = prepare(
            str(text), Path(folder) / "shards", load_tokenizer(), DataSection(), SHAPE.vocab_size,
            block_size=SHAPE.block_size,
        )  # fmt: skip
        stream = shards.train_stream(SHAPE.block_size, SEED)
        return [stream.batch(PLAIN.batch_size) for _ in range(steps)]


def byte_batches(steps: int, shape: Shape = BYTES_SHAPE, documents: int = 60) -> list[Batch]:
    """Random pieces of the corpus's first documents, as bytes."""
    texts = (text for _, _, text in itertools.islice(corpus().documents(), documents))
    tokens = np.frombuffer("\n\n".join(texts).encode(), dtype=np.uint8).astype(np.int64)
    draw, found = np.random.default_rng(SEED), []
    for _ in range(steps):
        starts = draw.integers(0, len(tokens) - shape.block_size - 1, PLAIN.batch_size)
        rows = torch.from_numpy(np.stack([tokens[s : s + shape.block_size + 1] for s in starts]))
        found.append((rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
    return found


def compare(savers: Sequence[Saver], shape: Shape, batches: Sequence[Batch], last: int) -> list[dict[str, Any]]:
    """Final loss of every saver over that of its plain path."""
    plain: dict[str, float] = {}
    rows = []
    for saver in savers:
        reference = reference_of(saver)
        if reference.name not in plain:
            plain[reference.name] = final(losses(reference, shape, batches), last)
        start = time.perf_counter()
        found = final(losses(saver, shape, batches), last)
        row = {
            "saver": saver.name, "change": saver.change, "beside": reference.name, "loss": round(found, 5),
            "plain_loss": round(plain[reference.name], 5), "ratio": round(found / plain[reference.name], 6),
            "seconds": round(time.perf_counter() - start, 1), "refused_here": saver.refusal(shape),
        }  # fmt: skip
        rows.append(row)
        line = "{saver}: {loss:.4f} beside {plain_loss:.4f}, ratio {ratio:.5f}, {seconds:.0f} s"
        print(line.format(**row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 steps on bytes; writes nothing unless --out")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/savers_keep_the_loss.json, unless --quick"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape, steps = (BYTES_SHAPE, 40) if options.quick else (SHAPE, STEPS)
    batches = byte_batches(steps) if options.quick else token_batches(steps)
    full = compare(SAVERS, shape, batches, min(LAST, steps // 4))
    half = compare(HALVES, BYTES_SHAPE, byte_batches(HALF_STEPS), 5)
    result = {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "shape": shape.label, "vocab_size": shape.vocab_size, "tokens_per_step": PLAIN.batch_size * shape.block_size,
        "steps": steps, "limit": LIMIT, "float32": full, "half_steps": HALF_STEPS, "half": half,
    }  # fmt: skip
    out = options.out or (None if options.quick else ROOT / "benchmarks" / "results" / "savers_keep_the_loss.json")
    if out:
        write_text(out, json.dumps(result, indent=1) + "\n", "--out")
    off = [f"{row['saver']}: {row['ratio'] - 1:+.2%}" for row in full if abs(row["ratio"] - 1) > LIMIT]
    print("\n".join(off) or f"every final loss is within {LIMIT:.0%} of the plain path's")
    if off:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
