"""What was alive during real passes: every tensor the dispatcher sees, byte for byte.

A CPU has no memory statistics like CUDA's, so the meter watches each operation's results below autograd and adds up the
storages that are alive. Scratch space that a kernel takes and returns inside one operation is not seen: it depends on
the CPU's instruction set (oneDNN, FlashAttention for CPU) and says nothing about a GPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes alive right after ``operation`` returned, during ``phase``."""

    live_bytes: int
    operation: str
    phase: str


@dataclass(slots=True)
class Timeline:
    """All samples of a metered stretch, and the largest of them."""

    samples: list[Sample] = field(default_factory=list)
    created: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How many tensors of each phase and size (bytes) came into being, without those that only joined gradients."""

    @property
    def peak(self) -> Sample:
        """The sample with the most bytes alive (the first, if several)."""
        return max(self.samples, key=lambda s: s.live_bytes)

    @property
    def phase_peaks(self) -> dict[str, int]:
        """Most bytes alive within each phase, in order of first appearance."""
        peaks: dict[str, int] = {}
        for sample in self.samples:
            peaks[sample.phase] = max(peaks.get(sample.phase, 0), sample.live_bytes)
        return peaks


class TensorMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that counts the bytes of every living storage created inside it.

    ``phase_of`` is asked after each operation what the program is doing; its answer labels the sample. A tensor that
    existed before the meter began counts from when it is given to :meth:`watch`. Each storage counts as a multiple of
    ``granularity``.
    """

    def __init__(self, phase_of: Callable[[], str] = lambda: "", granularity: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.granularity = granularity
        self.phase_of = phase_of
        self._timeline = Timeline()
        self._sum: tuple[Sample, weakref.ref[Any], int] | None = None
        self._known: dict[int, weakref.ref[Any]] = {}

    @property
    def timeline(self) -> Timeline:
        """What has been seen since the start or the last :meth:`restart`."""
        self._settle()
        return self._timeline

    def watch(self, tensor: torch.Tensor) -> int:
        """Count ``tensor``'s storage from now until it is freed. Returns its bytes, or 0 when it is counted already."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known() is storage:
            return 0
        size = self._rounded(storage.nbytes())
        self.live_bytes += size

        def gone(_: Any, key: int = key, size: int = size) -> None:
            self.live_bytes -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        return size

    def restart(self) -> None:
        """Forget the timeline so far, keep counting what is alive."""
        self._settle()
        self._timeline = Timeline()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count what it returned."""
        self._settle()
        result = func(*args, **(kwargs or {}))
        fresh = [size for leaf in tree_iter(result) if isinstance(leaf, torch.Tensor) and (size := self.watch(leaf))]
        phase = self.phase_of()
        sample = Sample(self.live_bytes, str(func), phase)
        if _joins_gradients(func):
            self._sum = (
                sample,
                weakref.ref(args[0].untyped_storage()),
                self._rounded(result.untyped_storage().nbytes()),
            )
        else:
            self._timeline.samples.append(sample)
            self._timeline.created.update((phase, size) for size in fresh)
        return result

    def _rounded(self, n_bytes: int) -> int:
        return -(-n_bytes // self.granularity) * self.granularity

    def _settle(self) -> None:
        """Decide what the latest sum of two gradients cost: nothing if its first operand did not outlive it."""
        if self._sum is None:
            return
        (sample, operand, size), self._sum = self._sum, None
        if operand() is None:
            sample = replace(sample, live_bytes=sample.live_bytes - size)
        self._timeline.samples.append(sample)


def _joins_gradients(func: Any) -> bool:
    """Whether autograd adds two gradients of one tensor.

    It does so in place when it holds the last reference to the first, but never while a dispatch mode is active
    (torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace): there the meter would change what it measures.
    A Python backward that adds out of place looks the same here and would be counted as if in place.
    """
    in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
    return in_backward and func is torch.ops.aten.add.Tensor
