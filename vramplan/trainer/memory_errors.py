"""Which exceptions mean that memory ran out."""

from __future__ import annotations

import torch

_HOST_TEXTS = ("can't allocate memory", "not enough memory", "cannot allocate memory")
"""What torch's CPU allocator says on Linux, on Windows, and what the C library says."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is the device's or the host's way of saying that an allocation failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or any(t in text for t in _HOST_TEXTS))
