"""What the beginning of a run makes the allocator reserve.

One step alone does not decide it: a step that begins in another's cache may need a segment more. In most scripts
optimizer states come into being only in the first update, cut out of cached blocks that the second step then misses,
and accumulated gradients during the first micro-step's backward, between activations. Our trainer allocates both before
step 0, where they lie side by side. So the first steps are played in their order until the reserved bytes no longer
grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .allocator import Block, CachingAllocator
from .allocator_settings import AllocatorSettings
from .step import StepConfig
from .tape import Change

try:
    from . import _replay
except ImportError:  # it was installed without a compiler
    _replay = None  # type: ignore[assignment]

MOST_STEPS = 5
"""By then the configurations that were tried had stopped growing."""

Entries = NDArray[np.int64]
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

    programs: list[Entries]
    settled: int
    n_blocks: int


def replay_first_steps(
    changes: Sequence[Change], step: StepConfig, settings: AllocatorSettings | None = None, first_step_bytes: int = 0
) -> Peaks:
    """Play weights, evaluation and the first optimizer steps. Raises CapExceededError.

    ``changes`` is one unrolled step (:func:`~vramplan.planner.memory.tensor_table`). With accumulation that is a later
    micro-step; in the first one what would join a gradient becomes it. ``first_step_bytes`` are taken for a moment
    where a compiled graph of the first micro-step holds most: its kernels are tuned when they first run.
    """
    return play(first_steps(changes, step, first_step_bytes), settings or AllocatorSettings())


def play(run: Run, settings: AllocatorSettings) -> Peaks:
    """Play a run, compiled where that is possible. Raises CapExceededError."""
    if _replay is not None and settings.plain:
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


def first_steps(changes: Sequence[Change], step: StepConfig, first_step_bytes: int) -> Run:
    """The programs that :func:`replay_first_steps` plays."""
    lazily = step.workload != "vramplan"
    entries, n_blocks = _entries(changes), len(changes)
    phases = _phases(changes)
    own = np.flatnonzero(~np.isin(phases, ("persistent", "evaluation", "checkpoint save", "optimizer step")))
    passes = entries[own]
    left = _alive(passes)
    if lazily and step.grad_accum > 1:
        joining = np.array([c.block for c in changes if c.joins], dtype=np.int64)
        first = own[_but_releases(joining, passes)]
        gradients = joining + n_blocks
        # the first micro-step, and what the loop's names still hold, which goes when they are bound anew
        passes = np.concatenate([entries[first] + np.array((0, n_blocks)), _releases(left + n_blocks), passes])
    else:
        first = own
        of_gradients = np.array([c.block for c in changes if c.row.category == "gradients"], dtype=np.int64)
        gradients = np.intersect1d(left, of_gradients)
        left = np.setdiff1d(left, gradients)
    update = entries[phases == "optimizer step"]
    update = update[_but_releases(gradients, update)]
    end = np.concatenate([update, _releases(_alive(update, left)), _releases(gradients)])
    tuned = passes
    if first_step_bytes:
        at, buffer = _fullest(entries[first], [changes[i] for i in first.tolist()]), 2 * n_blocks
        tuned = np.insert(passes, [at, at], [(first_step_bytes, buffer), (0, buffer)], axis=0)
    persistent: dict[str, list[int]] = {"optimizer": [], "gradients": [], "weights": []}
    for i in np.flatnonzero(phases == "persistent").tolist():
        persistent.get(changes[i].row.category, persistent["weights"]).append(i)
    weights, states, accumulated = (entries[persistent[name]] for name in ("weights", "optimizer", "gradients"))
    evaluation, usual = entries[phases == "evaluation"], np.concatenate([passes, end])
    if lazily:  # the states are there from the first update on: only a later step can have everything alive at once
        programs = [np.concatenate([weights, evaluation]), np.concatenate([tuned, states, end]), usual]
    else:
        programs = [np.concatenate([weights, states, accumulated, evaluation]), np.concatenate([tuned, end])]
    settled = len(programs)
    return Run([*programs, *[usual] * (MOST_STEPS + 1 - settled)], settled, 2 * n_blocks + 1)


def _entries(changes: Sequence[Change]) -> Entries:
    """One entry for each change; that of an empty tensor releases what was never allocated, which does nothing."""
    sizes = np.array([row.size if alloc else 0 for alloc, row, _, _, _ in changes], dtype=np.int64)
    return np.column_stack([sizes, np.array([change.block for change in changes], dtype=np.int64)])


def _phases(changes: Sequence[Change]) -> NDArray[np.str_]:
    """The phase of each change. They come in long runs."""
    runs = [(phase, len(list(run))) for phase, run in groupby([change.phase for change in changes])]
    return np.repeat([phase for phase, _ in runs], [length for _, length in runs])


def _releases(blocks: NDArray[np.int64]) -> Entries:
    return np.column_stack([np.zeros_like(blocks), blocks])


def _but_releases(blocks: NDArray[np.int64], program: Entries) -> NDArray[np.bool_]:
    """Which entries of a program are not the releases of these blocks."""
    return (program[:, BYTES] > 0) | ~np.isin(program[:, BLOCK], blocks)


def _alive(program: Entries, before: Sequence[int] | NDArray[np.int64] = ()) -> NDArray[np.int64]:
    """Blocks that are alive after a program, the oldest first, of its own and those that were ``before``."""
    allocates = program[:, BYTES] > 0
    made = np.concatenate([np.array(before, dtype=np.int64), program[allocates, BLOCK]])
    return made[~np.isin(made, program[~allocates, BLOCK])]


def _fullest(program: Entries, changes: Sequence[Change]) -> int:
    """After how many entries of the first micro-step's program most is alive while the graph runs.

    A loss outside the graph is no part of it; the logits, its output, are.
    """
    signed = np.where(program[:, BYTES] > 0, program[:, BYTES], [-change.row.size for change in changes])
    live = np.cumsum(signed)
    if any(change.row.name == "log-probabilities" for change in changes):
        loss = ("loss forward", "loss backward")
        live[[c.phase in loss and not c.row.name.startswith("logits") for c in changes]] = -1
    return int(np.argmax(live)) + 1
