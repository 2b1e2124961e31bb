"""The largest GPT that trains in 11.2 GiB with each combination of savers, by the planner: nothing here was measured.

    python benchmarks/largest_model.py             about three minutes; writes docs/largest-model.md and the JSON
    python benchmarks/largest_model.py --quick     seconds: few shapes and combinations, nothing written

Every row is an optimizer step of 524,288 tokens in sequences of 1024 whose gradients are clipped by their global norm.
Combinations that the configuration's own validation refuses are left out, so that a new saver appears here by itself.

11.2 GiB is what torch's allocator may *reserve* on an RTX 4070: 11.71 GiB usable, less 0.21 GiB of CUDA context, less
what a 1 % risk of running out asks for in eager mode. A shape fits when the peak reserved bytes of the replayed first
steps are at most that, and the risk of exceeding 11.71 GiB with the context is at most 1 % (which for compiled steps,
whose estimates are less sure, is the stricter rule). Reserved and not allocated, because that is what the card loses.
Near the limit torch gives cached blocks back before it fails, so the truth lies between this and the largest shape of
which the *allocated* bytes are at most 11.2 GiB, which a perfect allocator could train; it stands beside it.

Shapes: GPT-2's layout, widths in steps of 64, heads 128 wide where the width allows it and else 64, every depth with
which width/depth is that of published GPTs. For the largest shape that fits, the split of the step is the fastest one
that fits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vramplan.errors import ConfigError
from vramplan.files import write_text
from vramplan.planner.candidates import conventional
from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import Estimate, estimate, host_bytes, peak_allocated
from vramplan.planner.risk import needed_for, risk_of
from vramplan.planner.shape import Shape
from vramplan.planner.speed import seconds_to_tokens, tokens_per_second
from vramplan.planner.step import Checkpointing, DType, Loss, Optimizer, StepConfig, check
from vramplan.runconfig import RunConfig
from vramplan.units import GIB

ROOT = Path(__file__).parent.parent
GPU = find_gpu("4070")
BUDGET_BYTES, MAX_RISK = int(11.2 * GIB), 0.01
TOKENS_PER_STEP, BLOCK_SIZE, TOKENS_PER_PARAMETER = 524_288, 1024, 20
REQUIRED_PARAMETERS = 1.5e9
BATCHES, CHUNKS = (1, 2, 4, 8, 16, 32), (512, 1024, 2048, 4096)
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "pure-bfloat16")
SHIPPED_BATCH, SHIPPED_ACCUM = 12, 40
"""nanoGPT's train.py as it stands: 491,520 tokens a step."""

STATES = {
    "adamw8bit": "2 x 8-bit", "adamw-offload": "none: on the host", "adamw-stochastic": "2 x bfloat16",
    "muon": "1 x float32 (AdamW's 2 outside the blocks)",
}  # fmt: skip
"""What an optimizer keeps on the card, where it is not two float32 moments."""

DAY = 86_400


@dataclass(frozen=True)
class Row:
    """One combination of savers, and the largest shape that trains with it (None: not even the smallest)."""

    mode: StepConfig
    fit: Estimate | None
    largest_by_allocated: int
    name: str = "vramplan"

    @property
    def parameters(self) -> int:
        """Of the largest shape; 0 where nothing fits."""
        return int(self.fit.shape.parameters) if self.fit else 0

    def as_dict(self) -> dict[str, Any]:
        """As the JSON holds it."""
        words = precision(self.mode)
        row = {"name": self.name, "dtype": self.mode.dtype, **words, "optimizer": self.mode.optimizer} | {
            "compile": self.mode.compile, "loss": self.mode.loss, "checkpointing": self.mode.checkpointing,
            "parameters": self.parameters, "largest_by_allocated": self.largest_by_allocated,
        }  # fmt: skip
        if self.fit is None:
            return row
        shape, step = self.fit.shape, self.fit.step
        rate = float(tokens_per_second(shape, step, GPU))
        return row | {
            "n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "batch_size": step.batch_size,
            "grad_accum": step.grad_accum, "loss_chunk_tokens": step.loss_chunk_tokens,
            "peak_allocated_bytes": self.fit.peak_allocated_bytes,
            "peak_reserved_bytes": self.fit.peak_reserved_bytes, "process_bytes": self.fit.process_bytes,
            "host_bytes": int(host_bytes(self.fit.shape, self.mode)),
            "oom_risk": round(risk_of(self.fit, GPU.usable_bytes).probability, 6),
            "tokens_per_second": round(rate, 1),
            "days": round(float(seconds_to_tokens(TOKENS_PER_PARAMETER * self.parameters, rate)) / DAY, 1),
        }  # fmt: skip


def precision(mode: StepConfig) -> dict[str, str]:
    """Words for what weights, gradients and optimizer states are kept in on the card."""
    wide = "bfloat16" if mode.pure else "float32"
    return {"weights": wide, "gradients": wide, "states": STATES.get(mode.optimizer, f"2 x {wide}")}


def ladder(widest: int = 3584, step: int = 64) -> tuple[Shape, ...]:
    """Every shape of usual proportions, most parameters first."""
    found = []
    for width in range(384, widest + 1, step):
        heads = width // (128 if width % 128 == 0 else 64)
        shapes = (Shape(n_layer=n, n_head=heads, n_embd=width, block_size=BLOCK_SIZE) for n in range(6, 109))
        found += [shape for shape in shapes if conventional(shape)]
    return tuple(sorted(found, key=lambda shape: -shape.parameters))


def combinations(optimizers: Iterable[Optimizer]) -> Iterator[StepConfig]:
    """Every legal combination of savers that accumulates and clips."""
    probe = Shape(n_layer=12, n_head=6, n_embd=768, block_size=BLOCK_SIZE)
    for dtype, optimizer, loss, checkpointing, compiled in itertools.product(
        DTYPES, optimizers, get_args(Loss), get_args(Checkpointing), (False, True)
    ):
        mode = StepConfig(
            grad_accum=TOKENS_PER_STEP // BLOCK_SIZE, dtype=dtype, optimizer=optimizer, loss=loss,
            checkpointing=checkpointing, compile=compiled,
        )  # fmt: skip
        if not check(probe, mode) and _clips(probe, mode):
            yield mode


def _clips(shape: Shape, mode: StepConfig) -> bool:
    try:
        RunConfig.build(shape, mode, train={"grad_clip": 1.0})
    except ConfigError:
        return False
    return True


def fits(full: Estimate) -> bool:
    """Whether a run stays within the budget."""
    return full.peak_reserved_bytes <= BUDGET_BYTES and needed_for(full, MAX_RISK) <= GPU.usable_bytes


def largest(shapes: tuple[Shape, ...], mode: StepConfig, splits: Iterable[tuple[int, int]] | None = None) -> Row:
    """The largest of ``shapes``, which come in order of size, that trains with ``mode``, in its fastest split."""
    choices = [
        replace(mode, batch_size=batch, grad_accum=accum, loss_chunk_tokens=chunk)
        for batch, accum in splits or ((b, TOKENS_PER_STEP // BLOCK_SIZE // b) for b in BATCHES)
        for chunk in (CHUNKS if mode.loss == "chunked" else CHUNKS[:1])
        if chunk <= batch * BLOCK_SIZE
    ]
    allocated = np.array([_allocated(shapes, step) for step in choices])
    could = np.flatnonzero(allocated.min(axis=0) <= BUDGET_BYTES)
    by_allocated = int(shapes[could[0]].parameters) if len(could) else 0
    for index in could:
        smallest = int(allocated[:, index].argmin())
        if fits(estimate(shapes[index], choices[smallest], GPU)):
            return Row(mode, _fastest(shapes[index], choices), by_allocated)
    return Row(mode, None, by_allocated)


def _allocated(shapes: tuple[Shape, ...], step: StepConfig) -> Any:
    columns = {name: np.array([getattr(s, name) for s in shapes]) for name in ("n_layer", "n_head", "n_embd")}
    return peak_allocated(replace(shapes[0], **columns), step, GPU)


def _fastest(shape: Shape, choices: list[StepConfig]) -> Estimate | None:
    ordered = sorted(choices, key=lambda step: -float(tokens_per_second(shape, step, GPU)))
    return next((full for step in ordered if fits(full := estimate(shape, step, GPU))), None)


def nanogpt(shapes: tuple[Shape, ...]) -> Iterator[Row]:
    """nanoGPT's own loop, as it stands and with the micro-batch that lets the model be largest."""
    for compiled in (True, False):
        mode = StepConfig(workload="nanogpt", loss="full", compile=compiled, grad_accum=SHIPPED_ACCUM)
        shipped = largest(shapes, mode, [(SHIPPED_BATCH, SHIPPED_ACCUM)])
        yield replace(shipped, name="nanoGPT, batch 12 x 40 as it stands")
        yield replace(largest(shapes, mode), name="nanoGPT, smaller micro-batches")


# ------------------------------------------------------------------- the table

INTRODUCTION = """# The largest model in 11.2 GiB

How large a GPT can one train on an RTX 4070 at block size 1024 and 524,288 tokens per step, with gradients clipped by
their global norm? The planner's answer for {combinations} combinations of savers and {shapes:,} shapes of GPT-2's
layout. **On paper only: no row was measured on a card**, and what the host link costs offloaded states is a usual
figure. Written by `python benchmarks/largest_model.py`, which says what counts as fitting.

{answer}
"""

HEAD = (
    "| dtype or script | weights | gradients | states on the card | optimizer | loss | checkpointing | mode "
    "| largest model | parameters | by allocated | batch x accumulation | reserved | host | tokens/s "
    "| days for 20 tokens/parameter |"
)


def billions(parameters: int) -> str:
    """1.36B."""
    return f"{parameters / 1e9:.2f}B"


def line(row: Row) -> str:
    """One line of the table."""
    mode, words, full = row.mode, precision(row.mode), row.fit
    kind = row.name if mode.workload == "nanogpt" else mode.dtype
    start = [kind, *words.values(), mode.optimizer, mode.loss, mode.checkpointing]
    start.append("compiled" if mode.compile else "eager")
    if full is None:
        return f"| {' | '.join(start)} | nothing fits | | {billions(row.largest_by_allocated)} | | | | | |"
    found = row.as_dict()
    end = [
        full.shape.label, billions(row.parameters), billions(row.largest_by_allocated),
        f"{full.step.batch_size} x {full.step.grad_accum}",
        f"{full.peak_reserved_bytes / GIB:.2f} GiB",
        f"{found['host_bytes'] / GIB:.0f} GiB" if found["host_bytes"] else "",
        f"{found['tokens_per_second']:,.0f}", f"{found['days']:,.0f}",
    ]  # fmt: skip
    return f"| {' | '.join([*start, *end])} |"


def table(rows: Iterable[Row]) -> str:
    """Rows as a markdown table."""
    rule = "|" + "---|" * (HEAD.count("|") - 1)
    return "\n".join([HEAD, rule, *map(line, rows)])


def answer(best: Row, scripts: list[Row]) -> str:
    """How large the largest is, whether that was asked for, and what stands in the way."""
    wanted, theirs = REQUIRED_PARAMETERS / 1e9, billions(max(row.parameters for row in scripts))
    if best.fit is None:
        return "Nothing fits."
    text = (
        f"The largest that clips and accumulates has **{billions(best.parameters)} parameters**: "
        f"{best.fit.shape.label} in {best.mode.dtype} with {best.mode.optimizer}; nanoGPT's own loop reaches {theirs}."
    )
    if best.parameters >= REQUIRED_PARAMETERS:
        return f"{text} At least {wanted}B were asked for."
    each = best.fit.persistent_bytes / best.parameters
    return (
        f"{text} The {wanted}B that were asked for are **not** reached: there weights, gradients and states take "
        f"{each:.1f} bytes a parameter, which for {wanted}B is {each * REQUIRED_PARAMETERS / GIB:.1f} GiB."
    )


def page(rows: list[Row], scripts: list[Row], n_shapes: int) -> str:
    """The whole document."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row.mode.dtype, row.mode.optimizer
        best[key] = max(best.get(key, row), row, key=lambda r: r.parameters)
    short = [*sorted(best.values(), key=lambda row: -row.parameters), *scripts]
    introduction = INTRODUCTION.format(
        combinations=len(rows), shapes=n_shapes, answer=textwrap.fill(answer(short[0], scripts), 120)
    )
    halves = [row for row in rows if row.mode.half]
    return "\n".join([
        introduction, "## The best with each optimizer, and nanoGPT", "", table(short), "",
        "*By allocated* is the largest model whose allocated bytes are at most 11.2 GiB: no allocator could do better.",
        "float16 needs as much as bfloat16, TF32 as much as float32. `adamw-in-backward` is missing: where each",
        "gradient is used up in the backward, nothing can be accumulated or clipped by a global norm. *Host* is what",
        "offloaded states take there: a float32 copy of the weights (of bfloat16 ones on the card the master), two",
        "moments and a gradient. With pure-bfloat16 gradients are summed over the micro-batches in bfloat16, which",
        "over hundreds of them loses small parts: a smaller model with larger micro-batches trains better.", "",
        "## Every combination in half precision", "", table(sorted(halves, key=lambda row: -row.parameters)), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every eighth width, two optimizers; writes nothing")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "largest-model.md")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "largest_model.json")
    options = parser.parse_args()
    shapes = ladder(step=512) if options.quick else ladder()
    optimizers: tuple[Optimizer, ...] = ("adamw-fused", "adamw-stochastic") if options.quick else get_args(Optimizer)
    rows = [largest(shapes, mode) for mode in combinations(optimizers)]
    scripts = list(nanogpt(shapes))
    text = page(rows, scripts, len(shapes))
    best = max(rows, key=lambda row: row.parameters)
    if options.quick:
        print(text)
        return
    result = {
        "date": time.strftime("%Y-%m-%d"), "gpu": GPU.name, "usable_bytes": GPU.usable_bytes,
        "budget_reserved_bytes": BUDGET_BYTES, "max_risk": MAX_RISK, "tokens_per_step": TOKENS_PER_STEP,
        "block_size": BLOCK_SIZE, "shapes": len(shapes), "required_parameters": int(REQUIRED_PARAMETERS),
        "met": best.parameters >= REQUIRED_PARAMETERS, "best": best.as_dict(),
        "rows": [row.as_dict() for row in [*rows, *scripts]],
    }  # fmt: skip
    write_text(options.out, json.dumps(result, indent=1) + "\n", "--out")
    write_text(options.table, text, "--table")
    print(text.partition("## Every combination")[0])
    if not result["met"]:
        raise SystemExit(f"the largest model has {best.parameters / 1e9:.2f}B parameters, not 1.5B")


if __name__ == "__main__":
    main()
