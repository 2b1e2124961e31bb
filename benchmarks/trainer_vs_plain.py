"""Our trainer beside a plain loop: seconds of a step, what the loop around the step costs, and peak memory.

    python benchmarks/trainer_vs_plain.py [--pairs 40]     six to ten minutes on two cores; exit code 1: too slow
    python benchmarks/trainer_vs_plain.py --quick          seconds, a tiny model: does the program work?

* ``step``: one optimizer step of ours (default settings: chunked loss) over one of a loop in the manner of nanoGPT's
  train.py (all logits at once and kept by the script, ``F.cross_entropy``, fused AdamW, gradients clipped to norm 1 and
  set to None). GPT-2's layout, float32 on the CPU at hand, eager and compiled, no accumulation. Both start with the
  same weights and see the same tokens, so their losses must agree at every step. They run in turn, in pairs of
  alternating order: the median ratio ours/plain counts, with a 95 % bootstrap interval; the first pairs warm up.
* ``loop``: one step inside ``train()`` (data, learning rate, metrics line every step, event) over the mean of the bare
  steps before and after it, from the events of a real run.
* ``memory``: peak bytes of both by the planner's table for 124M, batch 8 x 1024 on an RTX 4070. Not measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vramplan.files import write_text
from vramplan.memory_probe.cpu import random_batches
from vramplan.memory_probe.scripts import ScriptGPT
from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import estimate
from vramplan.planner.shape import GPT2_VOCAB, Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer.events import Event, StepLogged
from vramplan.trainer.loop import train
from vramplan.trainer.model import GPT
from vramplan.trainer.optimizer import build_optimizer
from vramplan.trainer.shards import Manifest, ShardSet, ShardWriter, token_dtype
from vramplan.trainer.step import TrainStep

SHAPE = Shape(n_layer=4, n_head=4, n_embd=256, block_size=256)
QUICK_SHAPE = Shape(n_layer=2, n_head=2, n_embd=64, vocab_size=1024, block_size=64)
STEP = StepConfig(batch_size=4, dtype="float32", device="cpu")
LEARNING_RATE, WEIGHT_DECAY, BETAS, GRAD_CLIP = 1e-3, 0.1, (0.9, 0.95), 1.0
MODES = ("eager", "compiled")
PAIRS, WARM_UP, SEED = 40, 3, 20261122
SLOWEST, LOSS_TOLERANCE = 1.00, 1e-4
"""What the median ratio and the difference of any two losses may be at most."""
MOST_MEMORY = {"eager": 0.55, "compiled": 0.80}
"""Largest share of the plain loop's peak that ours may need, with and without accumulation."""

NAMES = {"attn.qkv": "qkv", "attn.proj": "attn_out", "mlp.fc": "fc", "mlp.proj": "mlp_out"}
"""Our names of a block's matrices, and the plain model's."""

Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], float]


class PlainLoop:
    """A model of torch's own modules and one training step of it, as a script has them at module level."""

    def __init__(self, like: TrainStep) -> None:
        self.model = ScriptGPT(like.model.shape)
        self.model.load_state_dict(self._weights(like))
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
        self.call = torch.compile(self.model, dynamic=False) if like.step.compile else self.model
        self.logits: Tensor | None = None

    @staticmethod
    def _weights(like: TrainStep) -> dict[str, Tensor]:
        found = {}
        for name, value in like.model.state_dict().items():
            for ours, theirs in NAMES.items():
                name = name.replace(ours, theirs)
            found[name if name.endswith(".weight") else f"{name}.weight"] = value.clone()
        found["head.weight"] = found["wte.weight"]
        return found

    def __call__(self, batch: Batch) -> float:
        """One optimizer step; its loss. The logits stay referenced until the next ones replace them."""
        self.logits, loss = self.call(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def ours(shape: Shape, step: StepConfig) -> TrainStep:
    """Our training step, ready for its first update."""
    model = GPT(shape, step)
    optimizer = build_optimizer(model, step, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)
    made = TrainStep(model, optimizer, step, grad_clip=GRAD_CLIP, device=torch.device("cpu"))
    made.allocate()
    return made


def timed(step: Step, batch: Batch) -> tuple[float, float]:
    """Seconds of a step, and its loss."""
    start = time.perf_counter()
    loss = step(batch)
    return time.perf_counter() - start, loss


def paired_steps(shape: Shape, step: StepConfig, pairs: int) -> dict[str, Any]:
    """Steps of both in turn: seconds, ratios ours/plain, and the largest difference of their losses."""
    made = ours(shape, step)
    plain = PlainLoop(made)
    arms: dict[str, Step] = {"ours": lambda batch: made([batch], LEARNING_RATE).loss, "plain": plain}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    differences = []
    for number in range(WARM_UP + pairs):
        batch = next(iter(random_batches(shape, step)))
        losses = []
        for name in ("ours", "plain") if number % 2 else ("plain", "ours"):
            elapsed, loss = timed(arms[name], batch)
            losses.append(loss)
            if number >= WARM_UP:
                seconds[name].append(elapsed)
        differences.append(abs(losses[0] - losses[1]))
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    tokens = step.batch_size * shape.block_size
    return {
        **summary(ratios), "largest_loss_difference": max(differences), "steps_compared": len(differences),
        **{f"{name}_tokens_per_second": round(tokens / statistics.median(s), 1) for name, s in seconds.items()},
        "ratios": [round(ratio, 4) for ratio in ratios],
    }  # fmt: skip


def summary(ratios: list[float]) -> dict[str, Any]:
    """Median ratio with its 95 % bootstrap interval (percentiles of 10,000 resampled medians)."""
    draws = np.random.default_rng(SEED).choice(ratios, size=(10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return {
        "median_ratio": round(statistics.median(ratios), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
        "pairs": len(ratios),
    }


class BareSteps:
    """Listens to a run and takes a bare step between each two of its steps."""

    def __init__(self, shape: Shape, step: StepConfig) -> None:
        self.batch = next(iter(random_batches(shape, step)))
        self.made = ours(shape, step)
        self.loop: list[float] = []
        self.bare: list[float] = []
        self._since: float | None = None

    def __call__(self, event: Event) -> None:
        """After each step of the run: its seconds since the last bare one, then a bare one."""
        if not isinstance(event, StepLogged):
            return
        now = time.perf_counter()
        if self._since is not None:
            self.loop.append(now - self._since)
        self.bare.append(timed(lambda batch: self.made([batch], LEARNING_RATE).loss, self.batch)[0])
        self._since = time.perf_counter()

    def ratios(self) -> list[float]:
        """Seconds of each step in the loop over the mean of its two neighbours, without the first ones."""
        neighbours = [(a + b) / 2 for a, b in zip(self.bare, self.bare[1:], strict=False)]
        return [a / b for a, b in zip(self.loop, neighbours, strict=True)][WARM_UP:]


def loop_over_step(shape: Shape, step: StepConfig, pairs: int) -> dict[str, Any]:
    """A step of ``train()`` over a bare one. Its last step is left out: saving and evaluating come after it."""
    steps = pairs + WARM_UP + 1
    never = {"eval_interval": 10 * steps, "checkpoint_interval": 10 * steps, "eval_batches": 1}
    section = {"max_steps": steps, "log_interval": 1, "learning_rate": LEARNING_RATE, "warmup_steps": 1, **never}
    config = RunConfig.build(shape, step, train=section)
    with tempfile.TemporaryDirectory() as folder:
        shards = random_shards(Path(folder) / "shards", shape, 2 * steps * step.batch_size * shape.block_size)
        bare = BareSteps(shape, step)
        train(config, shards, Path(folder) / "run", device=torch.device("cpu"), on_event=bare)
    tokens = config.tokens_per_step
    return {
        **summary(bare.ratios()),
        "loop_tokens_per_second": round(tokens / statistics.median(bare.loop[WARM_UP:]), 1),
        "bare_tokens_per_second": round(tokens / statistics.median(bare.bare[WARM_UP:]), 1),
        "ratios": [round(ratio, 4) for ratio in bare.ratios()],
    }


def random_shards(folder: Path, shape: Shape, n_tokens: int) -> ShardSet:
    """Shards of random tokens, with a validation split of a tenth."""
    folder.mkdir()
    n_vocab = min(GPT2_VOCAB, shape.vocab_size)
    draw, written = np.random.default_rng(SEED), []
    for split, size in (("train", n_tokens), ("val", max(n_tokens // 10, 2 * shape.block_size))):
        with ShardWriter(folder, split, token_dtype(n_vocab), 10**8) as writer:
            writer.add(draw.integers(0, n_vocab, size))
        written += writer.shards
    documents = {"train": 1, "val": 1, "null": 0, "empty": 0}
    Manifest(settings={}, n_vocab=n_vocab, documents=documents, shards=tuple(written)).save(folder)
    return ShardSet.open(folder)


def memory() -> list[dict[str, Any]]:
    """Peaks of ours (defaults) and of nanoGPT's loop by the table, for 124M and batch 8 x 1024 on an RTX 4070."""
    shape, gpu, rows = Shape(n_layer=12, n_head=12, n_embd=768), find_gpu("4070"), []
    for dtype in ("bfloat16", "float32"):
        for accum in (1, 64):
            eager = StepConfig(batch_size=8, grad_accum=accum, dtype=dtype)
            for mode in MODES:
                default = replace(eager, compile=mode == "compiled")
                script = replace(default, loss="full", workload="nanogpt")
                mine, theirs, mine_eager = (estimate(shape, s, gpu) for s in (default, script, eager))
                rows.append({
                    "dtype": dtype, "grad_accum": accum, "mode": mode,
                    "ours_allocated_bytes": mine.peak_allocated_bytes,
                    "plain_allocated_bytes": theirs.peak_allocated_bytes,
                    "ratio": round(mine.peak_allocated_bytes / theirs.peak_allocated_bytes, 4),
                    "reserved_ratio": round(mine.peak_reserved_bytes / theirs.peak_reserved_bytes, 4),
                    "ours_eager_ratio": round(mine_eager.peak_allocated_bytes / theirs.peak_allocated_bytes, 4),
                })  # fmt: skip
    return rows


def failures(result: dict[str, Any]) -> list[str]:
    """Every requirement that the result does not meet, in words."""
    found = []
    for mode, step in result["step"].items():
        if step["median_ratio"] > SLOWEST:
            found.append(f"{mode}: {step['median_ratio']} of the plain loop's time, not at most {SLOWEST}")
        if step["largest_loss_difference"] > LOSS_TOLERANCE:
            found.append(f"{mode}: losses differ by {step['largest_loss_difference']:.2g}")
    for row in result["memory"]:
        limit = MOST_MEMORY[row["mode"]]
        if row["ratio"] > limit:
            name = f"{row['mode']} {row['dtype']} x {row['grad_accum']}"
            found.append(f"{name}: {row['ratio']} of the plain loop's memory, not at most {limit}")
    return found


def measure(shape: Shape, step: StepConfig, modes: Sequence[str], pairs: int) -> dict[str, Any]:
    """Everything this program reports."""
    torch.manual_seed(SEED)
    steps = {}
    for mode in modes:
        steps[mode] = paired_steps(shape, replace(step, compile=mode == "compiled"), pairs)
        show(f"{mode} step, ours over plain", steps[mode])
    loop = loop_over_step(shape, step, pairs)
    show("step in train() over bare step", loop)
    return {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "shape": shape.label, "vocab_size": shape.vocab_size, "block_size": shape.block_size,
        "batch_size": step.batch_size, "dtype": step.dtype, "step": steps, "loop": loop, "memory": memory(),
    }  # fmt: skip


def show(name: str, found: dict[str, Any]) -> None:
    """One line to look at while the rest runs."""
    low, high = found["interval_95"]
    rates = ", ".join(f"{key.partition('_')[0]} {value:.0f}" for key, value in found.items() if "per_second" in key)
    print(f"{name}: {found['median_ratio']:.3f} ({low:.3f} to {high:.3f}), {found['pairs']} pairs; tokens/s: {rates}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 5 pairs, eager; speed is not judged")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/trainer_vs_plain.json, unless --quick")
    options = parser.parse_args()
    if options.quick:
        result = measure(QUICK_SHAPE, STEP, ["eager"], 5)
    else:
        result = measure(SHAPE, STEP, options.modes, options.pairs)
    out = options.out or (None if options.quick else Path(__file__).parent / "results" / "trainer_vs_plain.json")
    if out:
        write_text(out, json.dumps(result, indent=1) + "\n", "--out")
    for row in result["memory"]:
        print("{mode} {dtype} x {grad_accum}: {ratio:.3f} of the plain loop's peak".format(**row))
    broken = failures(result)
    print("\n".join(broken) or "every requirement is met")
    if broken and not options.quick:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
