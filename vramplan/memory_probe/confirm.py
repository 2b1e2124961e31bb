"""Confirm a plan by real passes: on the device it is for, down the list until one holds; else on a CPU, in small.

Without the card a CPU can confirm the tensors: the same layout, loss, checkpointing, optimizer and dtype at a small
width are counted byte for byte against the table. What is CUDA's own stays unconfirmed, and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..planner.plan import Plan
from ..planner.shape import Shape
from ..planner.step import StepConfig
from ..units import gib
from .measurement import Measurement

Probe = Callable[[Shape, StepConfig], Measurement]

AGREES = 0.01
"""Share of the peak by which a stand-in may miss the table and still confirm it."""

MICRO_BATCHES = 2
"""As many show what accumulation holds; further ones hold the same again."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One plan that was run, whether it held, and why not."""

    rank: int
    measurement: Measurement
    holds: bool
    why: str


@dataclass(frozen=True, slots=True)
class Confirmation:
    """``rank`` is that of the plan that held, None when none did. ``unconfirmed`` is what no pass has shown."""

    rank: int | None
    tried: tuple[Tried, ...]
    unconfirmed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What ``plan --confirm --json`` adds."""
        return {
            "rank": self.rank,
            "tried": [
                {"rank": t.rank, "holds": t.holds, "why": t.why, "measurement": t.measurement.model_dump(mode="json")}
                for t in self.tried
            ],
            "unconfirmed": list(self.unconfirmed),
        }


def confirm_here(
    plans: Sequence[Plan], budget_bytes: int, probe: Probe, unconfirmed: tuple[str, ...] = ()
) -> Confirmation:
    """Run the plans on their own device, best first, until one stays within the budget.

    ``unconfirmed`` is what this device cannot show of the one that was planned for.
    """
    tried: list[Tried] = []
    for plan in plans:
        found = probe(plan.shape, fewer_micro_batches(plan.step))
        why = _why_not(found, budget_bytes)
        tried.append(Tried(plan.rank, found, not why, why or "it ran, and stayed within the budget"))
        if not why:
            return Confirmation(plan.rank, tuple(tried), unconfirmed)
        if found.outcome == "killed":
            break
    return Confirmation(None, tuple(tried), unconfirmed)


def confirm_in_small(plan: Plan, probe: Probe) -> Confirmation:
    """Count the tensors of the plan's small stand-in on this machine's CPU."""
    found = probe(*stand_in(plan.shape, plan.step))
    error = found.allocated_error
    if error is None:
        why = f"the stand-in did not run: {found.reason}"
    elif abs(error) > AGREES:
        why = f"the stand-in needed {error:+.2%} of what the table says"
    else:
        why = f"the stand-in's tensors are the table's, {error:+.3%} of the peak"
    holds = error is not None and abs(error) <= AGREES
    missing = ["memory that CUDA's kernels take for themselves", "what the allocator reserves", "the CUDA context"]
    if plan.step.compile:
        missing.append("what the compiled graph keeps (the stand-in ran eager)")
    if plan.step.optimizer == "adamw-offload":
        missing.append("offloaded states (a CPU has them anyway)")
    tried = Tried(plan.rank, found, holds, why)
    return Confirmation(plan.rank if holds else None, (tried,), (*missing, "the speed"))


def fewer_micro_batches(step: StepConfig) -> StepConfig:
    """The same step with no more accumulation than shows what it holds."""
    return replace(step, grad_accum=min(int(step.grad_accum), MICRO_BATCHES))


def stand_in(shape: Shape, step: StepConfig) -> tuple[Shape, StepConfig]:
    """The same layout and settings, small enough for any CPU. Grouped heads stay grouped."""
    heads = min(4, shape.n_head)
    keys = 0 if shape.n_kv_head in (0, shape.n_head) else max(1, heads * shape.n_kv_head // shape.n_head)
    while keys and heads % keys:
        keys -= 1
    small = replace(
        shape, n_layer=min(2, shape.n_layer), n_head=heads, n_embd=16 * heads, n_kv_head=keys,
        vocab_size=min(512, shape.vocab_size), block_size=min(64, shape.block_size),
    )  # fmt: skip
    optimizer = step.optimizer
    if optimizer == "adamw-offload":
        optimizer = "adamw-stochastic" if step.pure else "adamw-fused"
    return small, replace(
        fewer_micro_batches(step), batch_size=min(4, int(step.batch_size)), compile=False, device="cpu",
        loss_chunk_tokens=min(64, int(step.loss_chunk_tokens)), optimizer=optimizer,
    )  # fmt: skip


def _why_not(found: Measurement, budget_bytes: int) -> str:
    """Why a measured plan does not hold, or an empty string."""
    if found.outcome != "fits":
        return found.reason
    needs = found.process_bytes
    if needs is not None and needs > budget_bytes:
        return f"it took {gib(needs)}, more than the {gib(budget_bytes)} of the budget"
    return ""
