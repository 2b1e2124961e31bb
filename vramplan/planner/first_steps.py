"""What the beginning of a run makes the allocator reserve.

One step alone does not decide it: a step that begins in another's cache may need a segment more. In most scripts
optimizer states come into being only in the first update, cut out of cached blocks that the second step then misses,
and accumulated gradients during the first micro-step's backward, between activations. Our trainer allocates both before
step 0, where they lie side by side. So the first steps are played in their order until the reserved bytes no longer
grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .allocator import SMALL_LIMIT, Block, CachingAllocator, Program, program_of
from .allocator_settings import AllocatorSettings
from .step import StepConfig
from .tape import Change

TUNING = -1
"""Stands for the tuner's buffer among the blocks of a program."""

MOST_STEPS = 5
"""By then the configurations that were tried had stopped growing."""


def replay_first_steps(
    changes: Sequence[Change], step: StepConfig, settings: AllocatorSettings | None = None, first_step_bytes: int = 0
) -> CachingAllocator:
    """Play weights, evaluation and the first optimizer steps; read the peaks off the result. Raises CapExceededError.

    ``changes`` is one unrolled step (:func:`~vramplan.planner.memory.tensor_table`). With accumulation that is a later
    micro-step; in the first one what would join a gradient becomes it. ``first_step_bytes`` are taken for a moment
    where a compiled graph of the first micro-step holds most: its kernels are tuned when they first run.
    """
    allocator = CachingAllocator(settings)
    living: dict[int, Block] = {}
    weights, states, gradients = _persistent(changes)
    evaluation = program_of(c for c in changes if c.phase == "evaluation")
    update = program_of(c for c in changes if c.phase == "optimizer step")
    own = [c for c in changes if c.phase not in ("persistent", "evaluation", "checkpoint save", "optimizer step")]
    lazily = step.workload != "vramplan"
    micro_steps = [program_of(own)]
    stay = {c.block for c in own if c.row.category == "gradients"}
    if lazily and step.grad_accum > 1:
        stay = {c.block for c in own if c.joins}
        micro_steps.insert(0, program_of(c for c in own if not c.joins))
    if first_step_bytes:
        first = _tuned(own if micro_steps[0] is micro_steps[-1] else [c for c in own if not c.joins], first_step_bytes)
        micro_steps = [first, *micro_steps[1:]]
    # small requests have segments of their own, in which a later step finds its places again
    small = {c.block for c in own if c.alloc and c.row.size <= SMALL_LIMIT} - stay
    small.add(TUNING)
    later = [[entry for entry in program if entry[1] not in small] for program in micro_steps]
    for program in (weights, *(() if lazily else (states, gradients)), evaluation):
        allocator.play(program, living)
    persistent = dict(living)
    for number in range(MOST_STEPS):
        before = allocator.peak_reserved_bytes
        kept: list[Block] = []
        living = {}
        for micro_step in micro_steps:
            for handle in living.values():  # what the loop's names still held goes when they are bound anew
                allocator.release(handle)
            living = {}
            allocator.play(micro_step, living)
            kept += [living.pop(block) for block in list(living) if block in stay]
        if lazily and number == 0:
            allocator.play(states, persistent)
        allocator.play(update, living)
        for handle in (*living.values(), *kept):
            allocator.release(handle)
        if allocator.peak_reserved_bytes == before and number > lazily:
            break
        if number == 0 and first_step_bytes:
            micro_steps = [[entry for entry in program if entry[1] != TUNING] for program in micro_steps]
        if number >= lazily:  # the states are there: everything has been alive at once
            micro_steps = later
    return allocator


def _tuned(own: Sequence[Change], n_bytes: int) -> Program:
    """A micro-step with the tuner's buffer beside the most that is alive while the graph runs.

    A loss outside the graph is no part of it; the logits, its output, are.
    """
    outside = any(c.row.name == "log-probabilities" for c in own)
    live, top, at = 0, -1, 0
    for i, c in enumerate(own):
        live += c.row.size if c.alloc else -c.row.size
        inside = not outside or c.phase not in ("loss forward", "loss backward") or c.row.name.startswith("logits")
        if inside and live > top:
            top, at = live, i
    return [*program_of(own[: at + 1]), (n_bytes, TUNING), (0, TUNING), *program_of(own[at + 1 :])]


def _persistent(changes: Iterable[Change]) -> tuple[Program, Program, Program]:
    """Weights and workspaces; the optimizer's states; and the gradients that accumulate."""
    rows = [c for c in changes if c.phase == "persistent"]
    return (
        program_of(c for c in rows if c.row.category not in ("optimizer", "gradients")),
        program_of(c for c in rows if c.row.category == "optimizer"),
        program_of(c for c in rows if c.row.category == "gradients"),
    )
