"""Where a card's memory goes, from the number on the box to what this run leaves free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..units import gib
from .gpu import Gpu
from .memory import Estimate

PartKind = Literal["outside", "run", "free", "missing"]
Held = tuple[str, int | None]
"""Another process on the card: its name, and the bytes it holds (None where the driver does not tell)."""


@dataclass(frozen=True, slots=True)
class Part:
    """A share of the card in bytes. All add up to the card; ``missing`` is what they take beyond it."""

    name: str
    n_bytes: int
    kind: PartKind
    note: str = ""

    def as_dict(self) -> dict[str, object]:
        """As reports print it."""
        return {"name": self.name, "bytes": self.n_bytes, "kind": self.kind, "note": self.note}


def card_memory(
    gpu: Gpu | None, total_bytes: int, budget_bytes: int, full: Estimate, held: Sequence[Held] = ()
) -> tuple[Part, ...]:
    """The parts of a card (or of ``total_bytes``, where none is named), outermost first; empty ones are left out.

    ``total_bytes`` is what was taken as available before anything is kept back, ``budget_bytes`` what is left of it
    for the run. ``held`` names the other processes of the live card; with none of them known, what the card has beyond
    ``total_bytes`` is theirs and the desktop's together.
    """
    parts: list[Part] = []
    if gpu is not None and full.step.device == "cuda":
        usable = max(min(gpu.usable_bytes, gpu.total_bytes), min(total_bytes, gpu.total_bytes))
        how = "measured" if gpu.usable_measured else "derived from its architecture"
        parts.append(Part("driver", gpu.total_bytes - usable, "outside", f"{gib(usable)} are usable ({how})"))
        elsewhere = usable - total_bytes
        known = [(name, size) for name, size in held if size]
        for name, size in known:
            size = min(size, max(0, elsewhere))
            parts.append(Part(name, size, "outside", "on the card now"))
            elsewhere -= size
        unknown = ", ".join(name for name, size in held if not size)
        note = (
            f"held by {unknown}; the driver does not say how much"
            if unknown
            else "held by others, or not given to this run"
        )
        parts.append(Part("other programs" if held else "not available", max(0, elsewhere), "outside", note))
    parts.append(Part("kept back", total_bytes - budget_bytes, "outside", "for the desktop, or what --reserve says"))
    outside = "CUDA context" if full.step.device == "cuda" else "Python and torch"
    free = budget_bytes - full.process_bytes
    parts += [
        Part(outside, full.context_bytes, "run", "of this process, outside torch's allocator"),
        Part("tensors at the peak", full.peak_table_bytes, "run", f"alive during {full.peak_phase}"),
        Part("tuning kernels", full.first_step_bytes, "run", "for a moment of the first step"),
        Part(
            "allocator slack",
            full.peak_reserved_bytes - full.peak_table_bytes - full.first_step_bytes,
            "run",
            "reserved beyond the tensors",
        ),
        Part("free" if free >= 0 else "missing", abs(free), "free" if free >= 0 else "missing"),
    ]
    return tuple(part for part in parts if part.n_bytes > 0)
