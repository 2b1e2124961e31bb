"""How the blocks of a step are divided into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Split:
    """``grad_accum`` micro-batches of ``batch_size`` blocks."""

    batch_size: int
    grad_accum: int

    def __str__(self) -> str:
        return f"batch_size {self.batch_size} x grad_accum {self.grad_accum}"

    def below(self, batch_size: int) -> list[Split]:
        """The same blocks in micro-batches of every divisor below ``batch_size``, the largest first."""
        b = self.batch_size
        return [Split(d, b // d * self.grad_accum) for d in range(min(b, batch_size) - 1, 0, -1) if b % d == 0]
