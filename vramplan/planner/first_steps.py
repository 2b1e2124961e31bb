"""What the beginning of a run makes the allocator reserve.

One step alone does not decide it: a step that begins in another's cache may need a segment more. In most scripts
optimizer states come into being only in the first update, cut out of cached blocks that the second step then misses,
and accumulated gradients during the first micro-step's backward, between activations. Our trainer allocates both before
step 0, where they lie side by side. So the first steps are played in their order until the reserved bytes no longer
grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .allocator import EDITION, Block, CachingAllocator
from .allocator_settings import UNLIMITED, AllocatorSettings
from .step import StepConfig
from .tape import Mask, Numbers, Unrolled

try:
    from . import _replay

    COMPILED = _replay.EDITION == EDITION
except ImportError:  # it was installed without a compiler
    COMPILED = False
"""Whether plain settings are replayed by the compiled loop."""

MOST_STEPS = 5
"""By then the configurations that were tried had stopped growing."""

Entries = Numbers
"""A program as an array, [entries, 2]: bytes and block of an allocation, 0 and block of a release."""

BYTES, BLOCK = 0, 1


class Peaks(NamedTuple):
    """What the first steps allocated and reserved at most, and what was still allocated after them, in bytes."""

    allocated_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int


class Run(NamedTuple):
    """The programs of a run's beginning, in order; from number ``settled`` on, one that reserves nothing new ends it.

    Blocks are numbered from 0 to ``n_blocks`` - 1.
    """

    programs: tuple[Entries, ...]
    settled: int
    n_blocks: int


def replay_first_steps(
    table: Unrolled, step: StepConfig, settings: AllocatorSettings | None = None, first_step_bytes: int = 0
) -> Peaks:
    """Play weights, evaluation and the first optimizer steps. Raises CapExceededError.

    ``table`` is one step (:func:`~vramplan.planner.memory.tensor_table`). With accumulation that is a later micro-step;
    in the first one what would join a gradient becomes it. ``first_step_bytes`` are taken for a moment where a compiled
    graph of the first micro-step holds most: its kernels are tuned when they first run.
    """
    return play(first_steps(table, step, first_step_bytes), settings or AllocatorSettings())


def play(run: Run, settings: AllocatorSettings) -> Peaks:
    """Play a run, compiled where that is possible. Raises CapExceededError."""
    countable = all(program.dtype == np.int64 for program in run.programs)
    if COMPILED and countable and settings.plain and settings.cap_bytes <= UNLIMITED:
        peaks = _replay.play(*run, settings.large_segment_bytes, settings.cap_bytes)
        if peaks is not None:
            return Peaks(*peaks)
    return play_slowly(run, settings)


def play_slowly(run: Run, settings: AllocatorSettings) -> Peaks:
    """Play a run in Python, whatever the settings. Raises CapExceededError."""
    allocator = CachingAllocator(settings)
    living: dict[int, Block] = {}
    for number, program in enumerate(run.programs):
        before = allocator.peak_reserved_bytes
        allocator.play(program.tolist(), living)
        if number >= run.settled and allocator.peak_reserved_bytes == before:
            break
    return Peaks(allocator.allocated_bytes, allocator.peak_allocated_bytes, allocator.peak_reserved_bytes)


def first_steps(table: Unrolled, step: StepConfig, first_step_bytes: int) -> Run:
    """The programs that :func:`replay_first_steps` plays."""
    lazily, n_blocks = step.workload != "vramplan", len(table)
    # the entry of an empty tensor releases what was never allocated, which does nothing
    entries = np.column_stack([np.where(table.alloc, table.sizes, 0), table.block])
    own = np.flatnonzero(~table.within("persistent", "evaluation", "checkpoint save", "optimizer step"))
    passes = entries[own]
    left = _alive(passes)
    if lazily and step.grad_accum > 1:
        joining = table.block[table.joins]
        first = own[_but_releases(joining, passes)]
        gradients = joining + n_blocks
        # the first micro-step, and what the loop's names still hold, which goes when they are bound anew
        passes = np.concatenate([entries[first] + np.array((0, n_blocks)), _releases(left + n_blocks), passes])
    else:
        first = own
        gradients = np.intersect1d(left, table.block[table.of("gradients")])
        left = np.setdiff1d(left, gradients)
    update = entries[table.within("optimizer step")]
    update = update[_but_releases(gradients, update)]
    end = np.concatenate([update, _releases(_alive(update, left)), _releases(gradients)])
    tuned = passes
    if first_step_bytes:
        at, buffer = _fullest(table, first), 2 * n_blocks
        tuned = np.insert(passes, [at, at], [(first_step_bytes, buffer), (0, buffer)], axis=0)
    persistent, states, accumulated = table.within("persistent"), table.of("optimizer"), table.of("gradients")
    weights = entries[persistent & ~states & ~accumulated]
    evaluation, usual = entries[table.within("evaluation")], np.concatenate([passes, end])
    if lazily:  # the states are there from the first update on: only a later step can have everything alive at once
        programs = [
            np.concatenate([weights, evaluation]),
            np.concatenate([tuned, entries[persistent & states], end]),
            usual,
        ]
    else:
        programs = [
            np.concatenate([weights, entries[persistent & states], entries[persistent & accumulated], evaluation]),
            np.concatenate([tuned, end]),
        ]
    settled = len(programs)
    return Run((*programs, *[usual] * (MOST_STEPS + 1 - settled)), settled, 2 * n_blocks + 1)


def first_step_peak(table: Unrolled, step: StepConfig, first_step_bytes: int = 0) -> int:
    """Most bytes that are allocated in the first optimizer step, each request rounded as in ``table``."""
    run = first_steps(table, step, first_step_bytes)
    before, first, *_ = run.programs
    program = np.concatenate([before, first])
    allocates = program[:, BYTES] > 0
    sizes = np.zeros(run.n_blocks, dtype=program.dtype)
    sizes[program[allocates, BLOCK].astype(np.int64)] = program[allocates, BYTES]
    change = np.where(allocates, program[:, BYTES], -sizes[program[:, BLOCK].astype(np.int64)])
    return int(np.cumsum(change)[len(before) :].max(initial=0))


def _releases(blocks: Numbers) -> Entries:
    return np.column_stack([np.zeros_like(blocks), blocks])


def _but_releases(blocks: Numbers, program: Entries) -> Mask:
    """Which entries of a program are not the releases of these blocks."""
    return (program[:, BYTES] > 0) | ~np.isin(program[:, BLOCK], blocks)


def _alive(program: Entries, before: Sequence[int] | Numbers = ()) -> Numbers:
    """Blocks that are alive after a program, the oldest first, of its own and those that were ``before``."""
    allocates = program[:, BYTES] > 0
    made = np.concatenate([np.array(before, dtype=np.int64), program[allocates, BLOCK]])
    return made[~np.isin(made, program[~allocates, BLOCK])]


def _fullest(table: Unrolled, first: Numbers) -> int:
    """After how many entries of the first micro-step, at ``first`` in the table, most is alive while the graph runs.

    A loss outside the graph is no part of it; the logits, its output, are.
    """
    live = np.cumsum(np.where(table.alloc, table.sizes, -table.sizes)[first])
    names = np.array([row.name for row in table.rows])
    used = names[table.row[first]]
    if "log-probabilities" in used:
        of_loss = table.within("loss forward", "loss backward")[first]
        live[of_loss & ~np.char.startswith(used, "logits")] = -1
    return int(np.argmax(live)) + 1 if len(live) else 0
