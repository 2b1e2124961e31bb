"""The most memory that each phase of a run has taken, from statistics that can be read and reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch


class PhasePeaks:
    """Most bytes allocated within each phase (``found``); nothing where there are no statistics.

    Entering a phase resets the statistics of CUDA's allocator, so whoever wants the peak since the process began asks
    here: :attr:`allocated` and :attr:`reserved` remember.
    """

    def __init__(
        self, peak: Callable[[], int] | None, reset: Callable[[], None] | None,
        reserved: Callable[[], int] | None = None, retries: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        self._peak, self._reset, self._most_reserved, self._retries = peak, reset, reserved, retries
        self._phase = ""
        self._before = self._reserved = 0
        self.found: dict[str, int] = {}

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """Those of a CUDA device; without statistics for another."""
        if device.type != "cuda":
            return cls(None, None)
        return cls(
            lambda: torch.cuda.max_memory_allocated(device),
            lambda: torch.cuda.reset_peak_memory_stats(device),
            lambda: torch.cuda.max_memory_reserved(device),
            lambda: int(torch.cuda.memory_stats(device)["num_alloc_retries"]),
        )

    @property
    def active(self) -> bool:
        """Whether there are statistics."""
        return self._peak is not None

    @property
    def allocated(self) -> int | None:
        """Most bytes allocated so far, in any phase or before the first; None without statistics."""
        return None if self._peak is None else max(self._before, self._peak(), *self.found.values())

    @property
    def reserved(self) -> int | None:
        """Most bytes reserved so far; None without statistics."""
        return None if self._most_reserved is None else max(self._reserved, self._most_reserved())

    @property
    def retries(self) -> int | None:
        """How often the allocator gave its cache back and tried again; None without statistics."""
        return None if self._retries is None else self._retries()

    def enter(self, phase: str) -> None:
        """The phase before is over."""
        if self._peak is None or self._reset is None or phase == self._phase:
            return
        if self._phase:
            self.found[self._phase] = max(self.found.get(self._phase, 0), self._peak())
        else:
            self._before = self._peak()
        self._reserved = self.reserved or 0
        self._reset()
        self._phase = phase
