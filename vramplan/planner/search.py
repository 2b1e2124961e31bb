"""Enumerate every combination of the documented grid, price all of them at once, and rank those that fit.

The grid: each given shape x every split of the tokens per step into batch_size and grad_accum x dtype x compile x
loss (full, or chunked with several slice sizes) x activation checkpointing x optimizer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from ..errors import ConfigError, Problem
from .evidence import NO_EVIDENCE
from .gpu import Gpu
from .memory import Estimate, context_bytes, estimate, peak_allocated, state_bytes
from .risk import needed_bytes, needed_for
from .shape import Shape, divisors
from .speed import flops_per_token, tokens_per_second
from .step import CONFLICTS, Checkpointing, DeviceKind, DType, Loss, Optimizer, Residual, StepConfig, Workload

Numbers = Any  # numpy arrays

LARGEST_STEP = 2**30
"""Tokens per step beyond which a value is taken for a slip."""

BUSY_TOKENS = 8192
"""Where no speed is known: tokens of a micro-batch from which on a larger one is taken to gain nothing."""

LOSS_CHUNKS = (512, 1024, 2048, 4096)
"""Tokens per slice that the search tries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What may vary. Every field is a list of choices; one choice pins it."""

    shapes: tuple[Shape, ...]
    tokens_per_step: int
    dtypes: tuple[DType, ...]
    compiles: tuple[bool, ...]
    losses: tuple[Loss, ...] = ("full", "chunked")
    loss_chunks: tuple[int, ...] = LOSS_CHUNKS
    checkpointings: tuple[Checkpointing, ...] = get_args(Checkpointing)
    optimizers: tuple[Optimizer, ...] = ("adamw-fused", "adamw8bit")
    residual: Residual = "compute"
    batch_sizes: tuple[int, ...] | None = None
    device: DeviceKind = "cuda"
    workload: Workload = "vramplan"
    dropout: float = 0.0
    torch: str = ""

    @property
    def batches(self) -> tuple[int, ...]:
        """Every batch_size that divides the sequences of one step. Raises ConfigError when none can be exact."""
        block = self.shapes[0].block_size
        check_tokens_per_step(self.tokens_per_step, block)
        sequences = self.tokens_per_step // block
        every = divisors(sequences)
        if self.optimizers == ("adamw-in-backward",):  # which cannot accumulate
            every = (sequences,)
        if self.batch_sizes is None:
            return every
        if min(self.batch_sizes) < 1:
            raise ConfigError(Problem("batch_size", min(self.batch_sizes), "must be at least 1"))
        wrong = [b for b in self.batch_sizes if b not in every]
        if wrong:
            rule = f"does not divide the {sequences} sequences of a step"
            near = sorted(every, key=lambda b: abs(math.log(b / max(1, wrong[0]))))[:4]
            raise ConfigError(Problem("batch_size", wrong[0], rule, f"use {', '.join(map(str, sorted(near)))}"))
        return self.batch_sizes

    def modes(self) -> Iterator[StepConfig]:
        """Every combination of the discrete settings that is possible."""
        for dtype, compiled, loss, checkpointing, optimizer in itertools.product(
            self.dtypes, self.compiles, self.losses, self.checkpointings, self.optimizers
        ):
            mode = StepConfig(
                dtype=dtype, compile=compiled, loss=loss, checkpointing=checkpointing, optimizer=optimizer,
                residual=self.residual, device=self.device, workload=self.workload, dropout=self.dropout,
                torch=self.torch,
            )  # fmt: skip
            if not any(conflict.applies(mode) for conflict in CONFLICTS):
                yield mode

    def first_mode(self) -> StepConfig:
        """The first combination, possible or not: what to complain about when none is."""
        return StepConfig(
            dtype=self.dtypes[0], compile=self.compiles[0], loss=self.losses[0], checkpointing=self.checkpointings[0],
            optimizer=self.optimizers[0], residual=self.residual, device=self.device, workload=self.workload,
            dropout=self.dropout, torch=self.torch,
        )  # fmt: skip

    def size(self) -> int:
        """Number of configurations considered."""
        chunks = sum(len(self.loss_chunks) if mode.loss == "chunked" else 1 for mode in self.modes())
        return len(self.shapes) * len(self.batches) * chunks


def check_tokens_per_step(tokens: int, block_size: int) -> None:
    """Raise ConfigError, listing the nearest totals, unless whole sequences add up to exactly ``tokens``."""
    if tokens > LARGEST_STEP:
        raise ConfigError(
            Problem("tokens_per_step", tokens, f"is beyond the largest that is planned for, {LARGEST_STEP}")
        )
    if tokens < 1 or tokens % block_size:
        below, above = tokens // block_size * block_size, (tokens // block_size + 1) * block_size
        near = [str(n) for n in (below, above) if n > 0]
        rule = f"is not a multiple of block_size={block_size}"
        raise ConfigError(Problem("tokens_per_step", tokens, rule, f"nearest totals: {' or '.join(near)}"))


@dataclass(frozen=True, slots=True)
class Candidate:
    """One priced configuration. ``tokens_per_second`` is None on a CPU."""

    shape: Shape
    step: StepConfig
    allocated_bytes: int
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class Ranking:
    """Candidates in order, best first, kept as arrays: only those that are looked at become objects."""

    shapes: tuple[Shape, ...]
    modes: tuple[StepConfig, ...]
    columns: Numbers
    has_speed: bool

    def __len__(self) -> int:
        return int(self.columns.shape[1])

    def __iter__(self) -> Iterator[Candidate]:
        for shape, mode, batch, accum, chunk, allocated, rate in self.columns.T:
            step = replace(
                self.modes[int(mode)], batch_size=int(batch), grad_accum=int(accum), loss_chunk_tokens=int(chunk)
            )
            yield Candidate(self.shapes[int(shape)], step, int(allocated), float(rate) if self.has_speed else None)

    def of(self, shape: Shape) -> Ranking:
        """Only the candidates of one shape, in the same order."""
        return replace(self, columns=self.columns[:, self.columns[0] == self.shapes.index(shape)])

    def least_memory(self, n: int) -> Ranking:
        """The ``n`` candidates with the fewest allocated bytes."""
        return replace(self, columns=self.columns[:, np.argsort(self.columns[5], kind="stable")[:n]])


def quality_price(step: StepConfig, gpu: Gpu | None) -> int:
    """How much the settings cost in numerics: 1 for float16 where bfloat16 exists, 2 for states of 8 or 16 bits."""
    price = 2 if step.optimizer == "adamw8bit" or step.dtype == "pure-bfloat16" else 0
    return price + (1 if step.dtype == "float16" and (gpu is None or gpu.supports_bf16) else 0)


def _priced(grid: Grid, gpu: Gpu | None) -> Iterator[tuple[StepConfig, Numbers, Numbers]]:
    """For each discrete mode, over (shape, batch, slice) flattened: the step with arrays, shape indices, allocated."""
    batches = np.array(grid.batches, dtype=np.int64)
    sequences = grid.tokens_per_step // grid.shapes[0].block_size
    every = _stack(grid.shapes, np.arange(len(grid.shapes)))
    states: dict[StepConfig, Numbers] = {}
    peaks: dict[tuple[StepConfig, bool], Numbers] = {}
    for mode in grid.modes():
        base = _same_but_for_states(mode, gpu)
        for m in (mode, base):
            key = replace(StepConfig(), optimizer=m.optimizer, dtype=m.dtype, device=m.device, workload=m.workload)
            if key not in states:
                states[key] = state_bytes(every, key)
            states[m] = states[key]
        chunks = np.array(grid.loss_chunks if mode.loss == "chunked" else (mode.loss_chunk_tokens,), dtype=np.int64)
        for part in (batches[batches < sequences], batches[batches == sequences]):
            if len(part):
                index, batch, chunk = (
                    a.ravel() for a in np.meshgrid(np.arange(len(grid.shapes)), part, chunks, indexing="ij")
                )
                arrays = {"batch_size": batch, "grad_accum": sequences // batch, "loss_chunk_tokens": chunk}
                which = base, bool(part[0] == sequences)
                if which not in peaks:
                    peaks[which] = peak_allocated(_stack(grid.shapes, index), replace(base, **arrays), gpu)
                allocated = peaks[which] + (states[mode] - states[base])[index]
                step = replace(mode, **arrays)
                yield step, index, np.broadcast_to(allocated, batch.shape)


def _same_but_for_states(mode: StepConfig, gpu: Gpu | None) -> StepConfig:
    """The mode that differs only in what is alive all the time: 8-bit states, float16's loss scale.

    Where bfloat16 is not known to the card it has another attention kernel than float16.
    """
    optimizer: Optimizer = "adamw-fused" if mode.optimizer == "adamw8bit" else mode.optimizer
    alike = mode.dtype == "float16" and (gpu is None or gpu.supports_bf16)
    return replace(mode, optimizer=optimizer, dtype="bfloat16" if alike else mode.dtype)


def _stack(shapes: tuple[Shape, ...], index: Any) -> Shape:
    def column(name: str) -> Any:
        return np.array([getattr(s, name) for s in shapes], dtype=np.int64)[index]

    return replace(
        shapes[0], n_layer=column("n_layer"), n_head=column("n_head"), n_embd=column("n_embd"),
    )  # fmt: skip


def rank(grid: Grid, gpu: Gpu | None, budget_bytes: int | None, max_risk: float) -> Ranking:
    """All candidates whose allocated bytes leave the risk within ``max_risk``, best first (all when no budget).

    Order: quality price, then tokens/s, then less memory. Where no card says how fast it is, on a CPU or with only a
    size given: quality price, fewest FLOPs, half precision, compiled, nothing recomputed, micro-batches up to
    BUSY_TOKENS, less memory.
    """
    context, evidence = context_bytes(gpu, grid.device), gpu.evidence if gpu else NO_EVIDENCE
    modes: list[StepConfig] = []
    columns, qualities = [], []
    for step, index, allocated in _priced(grid, gpu):
        keep = np.full(allocated.shape, True)
        if budget_bytes is not None:
            keep = needed_bytes(allocated + context, step, max_risk, evidence) <= budget_bytes
        index = index[keep]
        kept = replace(
            step,
            batch_size=step.batch_size[keep],
            grad_accum=step.grad_accum[keep],
            loss_chunk_tokens=step.loss_chunk_tokens[keep],
        )
        shape = _stack(grid.shapes, index)
        rate = tokens_per_second(shape, kept, gpu) if gpu is not None else -flops_per_token(shape, kept).astype(float)
        sizes = (kept.batch_size, kept.grad_accum, kept.loss_chunk_tokens, allocated[keep], rate)
        columns.append(np.array([index, np.full(index.shape, len(modes)), *sizes], dtype=float))
        qualities.append(np.full(index.shape, quality_price(step, gpu)))
        modes.append(step)
    table = np.concatenate(columns, axis=1)
    keys = [np.concatenate(qualities), -table[6]]
    if gpu is None:
        slower = np.array([(not mode.half, not mode.compile, mode.checkpointing != "none") for mode in modes])
        tokens = np.minimum(table[2] * grid.shapes[0].block_size, BUSY_TOKENS)
        keys += [*slower[table[1].astype(int)].T, -tokens]
    order = np.lexsort((table[5], *reversed(keys)))
    return Ranking(grid.shapes, tuple(modes), table[:, order], gpu is not None)


@dataclass(frozen=True, slots=True)
class Fit:
    """A candidate with its full estimate, replayed through the allocator."""

    candidate: Candidate
    estimate: Estimate


def confirm(ranked: Iterable[Candidate], gpu: Gpu | None, budget_bytes: int, max_risk: float, top: int) -> list[Fit]:
    """Walk down the ranking and keep the first ``top`` that still fit with what the allocator reserves on top.

    Candidates that differ from a kept one only in the slice size of the loss are passed over.
    """
    kept: list[Fit] = []
    seen: set[tuple[Any, ...]] = set()
    for candidate in ranked:
        key = (candidate.shape.label, replace(candidate.step, loss_chunk_tokens=1))
        if key in seen:
            continue
        full = estimate(candidate.shape, candidate.step, gpu)
        if needed_for(full, max_risk) <= budget_bytes:
            seen.add(key)
            kept.append(Fit(candidate, full))
            if len(kept) == top:
                break
    return kept
