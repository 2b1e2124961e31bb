"""Which exceptions mean that memory ran out."""

from __future__ import annotations

import torch

from ..planner.failures import failure_of


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is the device's or the host's way of saying that an allocation failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and failure_of(str(error)).kind == "out_of_memory"
