"""What the beginning of a run makes the allocator reserve.

One step alone does not decide it. Where optimizer states come into being only in the first update, as torch's own do,
they are cut out of cached blocks that the second step then misses; accumulated gradients appear during the first
micro-step's backward; and a step that begins in another step's cache may need a segment more. So the first steps are
played in their order until the reserved bytes no longer grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .allocator import AllocatorSettings, Block, CachingAllocator, Program
from .step import StepConfig
from .tape import Change

MOST_STEPS = 5
"""No configuration that was tried grew after its third step."""


def replay_first_steps(
    changes: Sequence[Change], step: StepConfig, settings: AllocatorSettings | None = None
) -> CachingAllocator:
    """Play weights, evaluation and the first optimizer steps; read the peaks off the result. Raises CapExceededError.

    ``changes`` is one unrolled step (:func:`~vramplan.planner.memory.tensor_table`). With accumulation that is a later
    micro-step; in the first one what would join a gradient becomes it.
    """
    allocator = CachingAllocator(settings)
    living: dict[int, Block] = {}
    weights, states = _persistent(changes)
    evaluation = _program(c for c in changes if c.phase == "evaluation")
    update = _program(c for c in changes if c.phase == "optimizer step")
    own = [c for c in changes if c.phase not in ("persistent", "evaluation", "optimizer step")]
    gradients = {c.block for c in own if c.joins} or {c.block for c in own if c.row.category == "gradients"}
    micro_steps = [_program(c for c in own if not c.joins)]
    if step.grad_accum > 1:
        micro_steps.append(_program(own))
    lazily = step.workload != "vramplan"  # our trainer makes the states before step 0
    for program in (weights, [] if lazily else states, evaluation):
        allocator.play(program, living)
    persistent = dict(living)
    for number in range(MOST_STEPS):
        before = allocator.peak_reserved_bytes
        kept: list[Block] = []
        for micro_step in micro_steps:
            living = {}
            allocator.play(micro_step, living)
            for block, handle in living.items():
                if block in gradients:
                    kept.append(handle)
                else:
                    allocator.release(handle)
        if lazily and number == 0:
            allocator.play(states, persistent)
        living = {}
        allocator.play(update, living)
        for handle in (*living.values(), *kept):
            allocator.release(handle)
        if allocator.peak_reserved_bytes == before and number > lazily:
            break
    return allocator


def _persistent(changes: Iterable[Change]) -> tuple[Program, Program]:
    """Weights and workspaces; and the optimizer's states."""
    rows = [c for c in changes if c.phase == "persistent" and c.row.category != "gradients"]
    return (
        _program(c for c in rows if c.row.category != "optimizer"),
        _program(c for c in rows if c.row.category == "optimizer"),
    )


def _program(changes: Iterable[Change]) -> Program:
    return [(int(row.size) if alloc else 0, block) for alloc, row, block, _, _ in changes if row.size > 0]
