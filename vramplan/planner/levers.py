"""What each single change would save and cost, and how far the batch could grow with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .allocator_settings import AllocatorSettings
from .evidence import NO_EVIDENCE
from .gpu import Gpu
from .memory import Estimate, context_bytes, estimate, peak_allocated
from .risk import needed_bytes, needed_for
from .shape import Shape, divisors
from .speed import tokens_per_second
from .step import CHECKPOINTING_WORDS, OPTIMIZER_WORDS, DType, StepConfig, check_step

LEVER_CHUNK = 4096
"""Tokens per slice when the chunked loss is offered as a lever: the fastest that the search tries."""

EXPANDABLE = "PYTORCH_ALLOC_CONF=expandable_segments:True"
"""An environment variable (older torch: PYTORCH_CUDA_ALLOC_CONF; not on Windows). It usually shrinks the allocator's
slack; it is offered where the replay says so."""

LEAST_CHUNK = 256
"""Shorter slices save next to nothing: the head and its gradient are larger by then."""


@dataclass(frozen=True, slots=True)
class Lever:
    """One change to a configuration.

    ``saved_bytes`` may be negative; ``speed_ratio`` is tokens/s after over before (None without a card);
    ``largest_batch`` is the largest batch_size dividing the step's sequences that fits the budget (0: none; None: not
    looked for). ``changes_result`` says whether the optimisation itself changes (tokens per step, context length,
    numerics).
    """

    name: str
    shape: Shape
    step: StepConfig
    process_bytes: int
    saved_bytes: int
    speed_ratio: float | None
    largest_batch: int | None
    changes_result: bool


def levers(full: Estimate, gpu: Gpu | None, budget_bytes: int, max_risk: float) -> list[Lever]:
    """Every single change that is legal for the configuration that was estimated.

    Those that save memory first, and of them those that cost the least speed; without a card those that save most.
    """
    shape, step, base = full.shape, full.step, full.process_bytes
    speed = _speed(shape, step, gpu)
    found = []
    for name, other_shape, other, changes in _legal(shape, step, gpu):
        process = estimate(other_shape, other, gpu).process_bytes
        batch = largest_batch(other_shape, other, gpu, budget_bytes, max_risk)
        ratio = _speed(other_shape, other, gpu) / speed if speed else None
        found.append(Lever(name, other_shape, other, process, base - process, ratio, batch, changes))
    if step.device == "cuda":
        settings = AllocatorSettings(expandable_segments=True)
        process = estimate(shape, step, gpu, settings).process_bytes
        if process < base:
            batch = largest_batch(shape, step, gpu, budget_bytes, max_risk, settings)
            found.append(Lever(EXPANDABLE, shape, step, process, base - process, None, batch, False))
    return _cheapest_first(found)


def _cheapest_first(found: list[Lever]) -> list[Lever]:
    return sorted(found, key=lambda lever: (lever.saved_bytes <= 0, -(lever.speed_ratio or 1.0), -lever.saved_bytes))


def rough_levers(full: Estimate, gpu: Gpu | None) -> list[Lever]:
    """The same changes to what was estimated, priced by the closed form alone, as if the allocator's slack stayed.

    Takes a hundredth of the time, and is off by as much as the slack really changes. Without largest batches, and
    without the allocator's settings, which change nothing else.
    """
    shape, step = full.shape, full.step
    table, speed = int(peak_allocated(shape, step, gpu)), _speed(shape, step, gpu)
    found = []
    for name, other_shape, other, changes in _legal(shape, step, gpu):
        saved = table - int(peak_allocated(other_shape, other, gpu))
        ratio = _speed(other_shape, other, gpu) / speed if speed else None
        found.append(Lever(name, other_shape, other, full.process_bytes - saved, saved, ratio, None, changes))
    return _cheapest_first(found)


def _speed(shape: Shape, step: StepConfig, gpu: Gpu | None) -> float:
    """Tokens/s; 0 without a card."""
    return float(tokens_per_second(shape, step, gpu)) if gpu is not None else 0.0


def _legal(shape: Shape, step: StepConfig, gpu: Gpu | None) -> list[tuple[str, Shape, StepConfig, bool]]:
    return [found for found in _neighbours(shape, step, gpu) if not check_step(found[2])]


def _neighbours(shape: Shape, step: StepConfig, gpu: Gpu | None) -> Iterator[tuple[str, Shape, StepConfig, bool]]:
    sequences = step.batch_size * step.grad_accum
    smaller = max((b for b in divisors(sequences) if b < step.batch_size), default=None)
    if smaller is not None:
        halved = replace(step, batch_size=smaller, grad_accum=sequences // smaller)
        yield f"batch_size {smaller} x grad_accum {sequences // smaller}", shape, halved, False
    if step.workload != "vramplan":
        ours = replace(step, workload="vramplan", loss="chunked", loss_chunk_tokens=LEVER_CHUNK, dropout=0.0)
        yield "vramplan's trainer, chunked loss", shape, ours, False
    elif step.loss == "full":
        yield "chunked loss", shape, replace(step, loss="chunked", loss_chunk_tokens=LEVER_CHUNK), False
    elif (half := int(min(step.loss_chunk_tokens, step.batch_size * shape.block_size)) // 2) >= LEAST_CHUNK:
        yield f"loss in slices of {half} tokens", shape, replace(step, loss_chunk_tokens=half), False
    if step.checkpointing == "none":
        yield CHECKPOINTING_WORDS["selective"], shape, replace(step, checkpointing="selective"), False
    if step.checkpointing != "block":
        yield CHECKPOINTING_WORDS["block"], shape, replace(step, checkpointing="block"), False
    if step.dtype == "float32":
        half_dtype: DType = "bfloat16" if gpu is None or gpu.supports_bf16 else "float16"
        yield half_dtype, shape, replace(step, dtype=half_dtype), True
    elif step.dtype == "bfloat16":
        yield "float16 (the same two bytes)", shape, replace(step, dtype="float16"), True
    else:
        yield "float32", shape, replace(step, dtype="float32"), True
    if step.optimizer == "adamw-foreach":
        yield OPTIMIZER_WORDS["adamw-fused"], shape, replace(step, optimizer="adamw-fused"), False
    if step.optimizer in ("adamw-fused", "adamw-foreach"):
        yield OPTIMIZER_WORDS["adamw-offload"], shape, replace(step, optimizer="adamw-offload"), False
    if step.optimizer != "adamw8bit" and step.workload == "vramplan":
        yield OPTIMIZER_WORDS["adamw8bit"], shape, replace(step, optimizer="adamw8bit"), True
    if step.device == "cuda":
        yield ("eager" if step.compile else "compiled"), shape, replace(step, compile=not step.compile), False
    if shape.block_size % 2 == 0:
        shorter = replace(shape, block_size=shape.block_size // 2)
        longer_step = replace(step, grad_accum=step.grad_accum * 2)
        yield f"block_size {shorter.block_size}", shorter, longer_step, True


def largest_batch(
    shape: Shape, step: StepConfig, gpu: Gpu | None, budget_bytes: int, max_risk: float,
    settings: AllocatorSettings | None = None,
) -> int:  # fmt: skip
    """Largest batch_size that divides the step's sequences and fits the budget; 0 when not even 1 does."""
    sequences = step.batch_size * step.grad_accum
    for b in reversed(_hopeful(shape, step, gpu, budget_bytes, max_risk)):
        full = estimate(shape, replace(step, batch_size=b, grad_accum=sequences // b), gpu, settings)
        if needed_for(full, max_risk) <= budget_bytes:
            return b
    return 0


def _hopeful(shape: Shape, step: StepConfig, gpu: Gpu | None, budget_bytes: int, max_risk: float) -> list[int]:
    """Batch sizes whose tensors alone fit, by the closed form: what the allocator adds is not counted yet."""
    sequences = int(step.batch_size * step.grad_accum)
    legal = np.array(divisors(sequences), dtype=np.int64)
    several = replace(step, batch_size=legal, grad_accum=sequences // legal)
    process = peak_allocated(shape, several, gpu) + context_bytes(gpu, step.device)
    needed = needed_bytes(process, step, max_risk, gpu.evidence if gpu else NO_EVIDENCE)
    return legal[np.broadcast_to(needed <= budget_bytes, legal.shape)].tolist()  # type: ignore[no-any-return]
