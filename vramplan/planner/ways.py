"""Neighbouring ways to run the same optimizer step: memory and speed of each, and which none beats in both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from .gpu import Gpu
from .memory import Estimate, estimate
from .plan import differences
from .risk import needed_for
from .search import LOSS_CHUNKS, quality_price
from .shape import divisors
from .speed import tokens_per_second
from .step import Checkpointing, Optimizer, StepConfig, check_step

BATCHES_EACH_WAY = 2
"""Legal batch sizes below and above the present one that are looked at with each setting."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the step. ``changes`` are words against the chosen one, none for the chosen one itself.

    ``tokens_per_second`` is None without a card; ``needs_bytes`` is the smallest budget that keeps the risk within the
    limit. ``on_front``: no other way of the list needs less and is at least as fast, or is faster and needs no more;
    those that cost numerics against the chosen one (``changes_result``) neither are on the front nor beat others.
    """

    step: StepConfig
    changes: tuple[str, ...]
    process_bytes: int
    needs_bytes: int
    tokens_per_second: float | None
    fits: bool
    changes_result: bool
    on_front: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As reports print it."""
        return {
            "changes": list(self.changes), "batch_size": self.step.batch_size, "grad_accum": self.step.grad_accum,
            "compile": self.step.compile, "loss": self.step.loss, "loss_chunk_tokens": self.step.loss_chunk_tokens,
            "checkpointing": self.step.checkpointing, "optimizer": self.step.optimizer,
            "process_bytes": self.process_bytes, "needs_bytes": self.needs_bytes,
            "tokens_per_second": self.tokens_per_second, "fits": self.fits, "changes_result": self.changes_result,
            "on_front": self.on_front,
        }  # fmt: skip


def ways(chosen: Estimate, gpu: Gpu | None, budget_bytes: int, max_risk: float) -> tuple[Way, ...]:
    """The chosen way, which was estimated, first, then its neighbours, least memory first.

    A neighbour differs in one of compile, loss, checkpointing and 8-bit optimizer states, or in none, and has one of
    the nearest batch sizes. Shape, tokens per step and dtype stay, so all of them train the same (8-bit states apart).
    """
    shape, step = chosen.shape, chosen.step
    found = []
    for other in _neighbours(step):
        full = chosen if other == step else estimate(shape, other, gpu)
        rate = float(tokens_per_second(shape, other, gpu)) if gpu is not None else None
        needs = math.ceil(needed_for(full, max_risk))
        worse = quality_price(other, gpu) > quality_price(step, gpu)
        words = tuple(differences(other, step))
        found.append(Way(other, words, full.process_bytes, needs, rate, needs <= budget_bytes, worse))
    ordered = [found[0], *sorted(found[1:], key=lambda way: way.process_bytes)]
    return tuple(replace(way, on_front=_on_front(way, ordered)) for way in ordered)


def _on_front(way: Way, every: Sequence[Way]) -> bool:
    def beats(other: Way) -> bool:
        less = way.process_bytes - other.process_bytes
        faster = (other.tokens_per_second or 0) - (way.tokens_per_second or 0)
        return less >= 0 and faster >= 0 and (less > 0 or faster > 0)

    return not way.changes_result and not any(beats(other) for other in every if not other.changes_result)


def _neighbours(step: StepConfig) -> Iterator[StepConfig]:
    """The step itself, then the others, each once and all of them legal."""
    sequences = int(step.batch_size * step.grad_accum)
    legal = divisors(sequences)
    at = legal.index(int(step.batch_size))
    near = legal[max(0, at - BATCHES_EACH_WAY) : at + BATCHES_EACH_WAY + 1]
    seen = {step}
    yield step
    for mode in _modes(step):
        for batch in near:
            other = replace(mode, batch_size=batch, grad_accum=sequences // batch)
            if other not in seen and not check_step(other):
                seen.add(other)
                yield other


def _modes(step: StepConfig) -> Iterator[StepConfig]:
    yield step
    if step.device == "cuda":
        yield replace(step, compile=not step.compile)
    if step.workload != "vramplan":
        return
    if step.loss == "chunked":
        yield replace(step, loss="full")
    for tokens in (LOSS_CHUNKS[0], LOSS_CHUNKS[-1]):
        yield replace(step, loss="chunked", loss_chunk_tokens=tokens)
    for checkpointing in get_args(Checkpointing):
        yield replace(step, checkpointing=checkpointing)
    if step.optimizer.startswith("adamw") and step.dtype != "pure-bfloat16":
        narrow: Optimizer = "adamw8bit"
        yield replace(step, optimizer=narrow)
