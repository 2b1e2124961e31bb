"""What is allocated in the course of one training step, by category: the data of a picture and of its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .memory import Estimate

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # what a person reads, and the categories of the table behind it; a stack is drawn in this order, bottom first
    ("workspace", ("workspace",)),
    ("weights", ("weights",)),
    ("optimizer state", ("optimizer",)),
    ("gradients", ("gradients",)),
    ("activations", ("activations", "inputs")),
    ("logits and loss", ("logits_and_loss",)),
    ("temporaries", ("temporaries",)),
)
_GROUP_OF = {category: place for place, (_, categories) in enumerate(GROUPS) for category in categories}

WIDTHS = {
    "forward": 6, "loss forward": 4, "loss backward": 4, "block backward": 6, "embedding backward": 3,
    "optimizer step": 3,
}  # fmt: skip
"""What is drawn of a step, in its order, and the width of each in a picture. Widths are neither times nor numbers of
allocations: all must be seen."""

WITHIN = {"block recompute": "block backward"}
"""Phases that alternate with another, layer by layer, and are drawn with it."""

MOMENTS = 4
"""Shown for each unit of width."""

Moment = tuple[int, ...]
"""Bytes alive of each group, in the order of GROUPS."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """One phase: what was alive at several moments in it, the highest of its share of the phase each."""

    phase: str
    width: int
    moments: tuple[Moment, ...]

    @property
    def top(self) -> Moment:
        """The moment at which most is alive."""
        return max(self.moments, key=sum)


def step_timeline(full: Estimate, moments: int = MOMENTS) -> tuple[Stretch, ...]:
    """The phases of one optimizer step (of its last micro-step), each with so many moments per unit of width.

    The evaluation and the saving, which are no part of every step, are left out. Bytes are those of the table's
    tensors: without the allocator's slack and the CUDA context, which are there all the time.
    """
    live = [0] * len(GROUPS)
    seen: dict[str, list[Moment]] = {phase: [] for phase in WIDTHS}
    for alloc, row, _, phase, _ in full.changes:
        size = int(row.size)
        live[_GROUP_OF[row.category]] += size if alloc else -size
        drawn = WITHIN.get(phase, phase)
        if drawn in seen:
            seen[drawn].append(tuple(live))
    return tuple(
        Stretch(phase, WIDTHS[phase], _thinned(found, moments * WIDTHS[phase]))
        for phase, found in seen.items()
        if found
    )


def _thinned(found: Sequence[Moment], most: int) -> tuple[Moment, ...]:
    """At most so many: of each share the highest."""
    n = min(most, len(found))
    edges = [len(found) * i // n for i in range(n + 1)]
    return tuple(max(found[i:j], key=sum) for i, j in pairwise(edges))
