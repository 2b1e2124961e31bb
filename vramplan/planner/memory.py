"""Memory of one training step: the peak, when it happens, and what is alive then.

The tensors are listed in :mod:`eager` and :mod:`compiled`; here they are added up. Allocated bytes are what torch's
allocator has handed out; reserved is what it holds from the driver; the process also has a CUDA context.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..units import MIB
from .allocator_settings import AllocatorSettings
from .compiled import TRACED_TORCH, CompiledStep
from .eager import EagerStep
from .evidence import NO_EVIDENCE, Evidence
from .first_steps import replay_first_steps
from .gpu import Gpu
from .overheads import autotune_buffer_bytes, cublas_workspace_bytes, cuda_context_bytes, release
from .shape import MAX_FUSED_HEAD_DIM, Ints, Shape
from .step import DeviceKind, StepConfig
from .tape import CATEGORIES, Change, Tape, Unrolled, peak, unroll

DEFAULT_CAPABILITY = (8, 9)
"""Assumed when no card is named: workspaces and context of an Ada card."""

NARROW_FLASH = ((8, 6), (8, 9), (12, 0))
"""Where FlashAttention has no backward for heads of 193 to 224, nor with dropout for wider ones (ATen
transformers/cuda/sdp_utils.cpp)."""

CPU_PROCESS_BYTES = 300 * MIB
"""Resident memory of Python with torch, pyarrow and tiktoken: 258 MiB measured (torch 2.13, Linux), plus threads."""

STEP_PARTS: dict[str, tuple[str, ...]] = {
    "forward": ("forward", "loss forward"),
    "backward": ("loss backward", "block recompute", "block backward", "embedding backward"),
    "optimizer step": ("optimizer step",),
}
"""The parts of an optimizer step that a run or a traceback can tell apart, and the table's phases in each, in order."""

DEFAULT_SMS = 46
"""As many as an RTX 4070 has."""


def workspace_bytes(gpu: Gpu | None, torch_version: str | None = None) -> int:
    """Bytes of one cuBLAS workspace on this card: measured on it, or what this torch (the newest) takes."""
    if gpu is not None and gpu.workspace_bytes is not None:
        return gpu.workspace_bytes
    return cublas_workspace_bytes(gpu.capability if gpu else DEFAULT_CAPABILITY, torch_version)


def context_bytes(gpu: Gpu | None, device: DeviceKind = "cuda") -> int:
    """Bytes of the process outside torch's allocator: the CUDA context; on a CPU Python with torch loaded."""
    if device == "cpu":
        return CPU_PROCESS_BYTES
    if gpu is None:
        return cuda_context_bytes(DEFAULT_CAPABILITY)
    return cuda_context_bytes(gpu.capability, gpu.sms) if gpu.context_bytes is None else gpu.context_bytes


def host_bytes(shape: Shape, step: StepConfig) -> Ints:
    """Host memory that offloaded states take, in bytes; 0 for other optimizers.

    A float32 copy of the weights (the master of narrower ones), two moments, and a gradient during the update.
    """
    return 16 * shape.parameters if step.optimizer == "adamw-offload" else 0


def first_step_bytes(step: StepConfig, gpu: Gpu | None) -> int:
    """What a compiled run takes for a moment in its first step, while kernels are tuned."""
    if not step.compile or step.device == "cpu":
        return 0
    capability, sms = (gpu.capability, gpu.sms) if gpu else (DEFAULT_CAPABILITY, DEFAULT_SMS)
    return autotune_buffer_bytes(capability, sms, step.torch or None)


def tensor_table(shape: Shape, step: StepConfig, gpu: Gpu | None = None, *, evaluation: bool = True) -> Tape:
    """The table of one optimizer step, and of the evaluation before it.

    Sizes may be arrays; ``grad_accum`` must then be 1 everywhere or nowhere.
    """
    table = CompiledStep if step.compile else EagerStep
    workspace = workspace_bytes(gpu, step.torch or None) if step.device == "cuda" else 0
    return table(shape, step, workspace).write(evaluation=evaluation)


def peak_allocated(shape: Shape, step: StepConfig, gpu: Gpu | None = None) -> Ints:
    """Closed form of the peak in bytes, vectorised over arrays in ``shape`` and ``step``.

    Without the evaluation, which never is the peak and would take a tenth of the search's time.
    """
    return peak(tensor_table(shape, step, gpu, evaluation=False))


def state_bytes(shape: Shape, step: StepConfig) -> Ints:
    """Bytes of weights, optimizer states and workspaces, vectorised; what a change of optimizer alone changes."""
    table = EagerStep(shape, step)
    table.write_state()
    return peak(table.tape)


def is_traced(torch_version: str) -> bool:
    """Whether the compiled table was read from this release; empty is the newest of them."""
    return not torch_version or release(torch_version) in TRACED_TORCH


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """One line of a breakdown: all living tensors of one name together."""

    name: str
    category: str
    n_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Everything known about one configuration's memory. Sizes in bytes.

    ``peak_table_bytes`` are the table's tensors at their peak, each rounded to 512 B on CUDA. ``peak_allocated_bytes``
    is what torch.cuda.max_memory_allocated would say: there a block that was not worth splitting counts as a whole, and
    ``first_step_bytes`` of it are what tuning compiled kernels took beside the first step's peak.
    """

    shape: Shape
    step: StepConfig
    table: Unrolled
    peak_index: int
    peak_table_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    context_bytes: int
    first_step_bytes: int = 0
    capability: tuple[int, int] = DEFAULT_CAPABILITY
    evidence: Evidence = NO_EVIDENCE

    @property
    def changes(self) -> tuple[Change, ...]:
        """Every allocation and release of the step, in order."""
        return self.table.changes

    @property
    def process_bytes(self) -> int:
        """What the card loses to this process: reserved plus CUDA context."""
        return self.peak_reserved_bytes + self.context_bytes

    @property
    def peak_phase(self) -> str:
        """Phase in which the peak occurs."""
        return self.table.phases[int(self.table.phase[self.peak_index])]

    @property
    def caveats(self) -> tuple[str, ...]:
        """Why this configuration lies outside what the tensor table knows; empty when it does not."""
        why = self._attention_outside() or self._compiled_outside() or self._release_outside()
        return (f"Outside the model: {why}.",) if why else ()

    def _attention_outside(self) -> str:
        """Kernels that do not take such heads (ATen transformers/cuda/sdp_utils.cpp): scores would be held instead."""
        width, half = self.shape.head_dim, self.step.half
        if width > MAX_FUSED_HEAD_DIM:
            rule = f"head_dim {width} is beyond the {MAX_FUSED_HEAD_DIM} that fused attention handles"
            return f"{rule}; the scores it would then hold are not counted"
        if self.step.device == "cpu":
            return ""
        if not half and width % 4:
            return (
                f"fused attention takes no float32 heads of {width}, no multiple of 4; the scores that are then held "
                "are not counted"
            )
        if half and self.capability < (8, 0):
            return "attention's rows are FlashAttention's, which cards before Ampere do not have"
        wide = 192 < width <= 224 or (width > 224 and self.step.dropout > 0)
        if half and wide and self.capability in NARROW_FLASH:
            scores = "the scores of grouped heads, which are then held, are" if self.shape.grouped else "its rows are"
            return f"FlashAttention does not train heads of {width} on this architecture; {scores} not counted"
        return ""

    def _compiled_outside(self) -> str:
        step, shape = self.step, self.shape
        if not step.compile:
            return ""
        if step.half and shape.head_dim % 8:
            return f"how a compiled graph pads heads of {shape.head_dim} was not traced; eager rows are used"
        if step.wide_residual:
            return "what a compiled graph keeps beside a float32 residual stream; the rows are autocast's"
        if shape.mlp == "swiglu" and step.checkpointing == "block":
            return "a compiled gated MLP that is recomputed needed up to 5 % more on a CPU than it says here"
        if not is_traced(step.torch):
            *others, last = (".".join(map(str, version)) for version in TRACED_TORCH)
            return f"what torch {step.torch} keeps when it compiles was not traced, only {', '.join(others)} and {last}"
        return ""

    def _release_outside(self) -> str:
        first, last = TRACED_TORCH[0], TRACED_TORCH[-1]
        if not self.step.torch or first <= release(self.step.torch) <= last:
            return ""
        known = " to ".join(".".join(map(str, version)) for version in (first, last))
        return f"what torch {self.step.torch} allocates; the rows are those of {known}"

    @cached_property
    def alive_at_peak(self) -> tuple[TensorBytes, ...]:
        """Tensors alive at the peak, equals of one name added up, largest first."""
        return alive_after(self.changes[: self.peak_index + 1])

    @cached_property
    def breakdown(self) -> dict[str, int]:
        """Bytes per category at the peak; with what the allocator adds and ``context`` it is ``process_bytes``."""
        parts: dict[str, int] = dict.fromkeys((str(c) for c in CATEGORIES), 0)
        for row in self.alive_at_peak:
            parts[row.category] += row.n_bytes
        parts["rounding"] = self.peak_allocated_bytes - self.peak_table_bytes - self.first_step_bytes
        parts["first step"] = self.first_step_bytes
        parts["fragmentation"] = self.peak_reserved_bytes - self.peak_allocated_bytes
        parts["context"] = self.context_bytes
        return parts

    @cached_property
    def persistent_bytes(self) -> int:
        """Weights, optimizer states, workspaces, and with accumulation the gradients: alive all the time."""
        return int(self.table.sizes[self.table.within("persistent")].sum())

    @cached_property
    def phase_peaks(self) -> dict[str, int]:
        """Highest allocated bytes within each phase, its first moment included, in order of first appearance."""
        after = self.table.live_bytes
        highest = np.maximum(after, np.concatenate([[0], after[:-1]]))
        return {phase: int(highest[self.table.within(phase)].max(initial=0)) for phase in self.table.phases}

    def as_dict(self) -> dict[str, object]:
        """What ``estimate --json`` prints about memory."""
        return {
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "process_bytes": self.process_bytes,
            "peak_phase": self.peak_phase,
            "breakdown": self.breakdown,
            "phase_peaks": self.phase_peaks,
            "host_bytes": int(host_bytes(self.shape, self.step)),
            "parameters": int(self.shape.parameters),
            "caveats": list(self.caveats),
        }


def alive_after(changes: Iterable[Change]) -> tuple[TensorBytes, ...]:
    """Tensors alive after these changes, equals of one name added up, largest first."""
    living: dict[int, Change] = {}
    for change in changes:
        if change.alloc:
            living[change.block] = change
        else:
            del living[change.block]
    total: dict[tuple[str, str], int] = {}
    for change in living.values():
        key = (change.row.name, change.row.category)
        total[key] = total.get(key, 0) + int(change.row.size)
    rows = [TensorBytes(name, category, size) for (name, category), size in total.items()]
    return tuple(sorted(rows, key=lambda row: -row.n_bytes))


def estimate(
    shape: Shape, step: StepConfig, gpu: Gpu | None = None, settings: AllocatorSettings | None = None
) -> Estimate:
    """Enumerate the table of one configuration and replay its first steps through the allocator."""
    table = unroll(tensor_table(shape, step, gpu))
    index = int(np.argmax(table.live_bytes))
    top = int(table.live_bytes[index])
    allocated = reserved = top
    if step.device == "cuda":
        replayed = replay_first_steps(table, step, settings, first_step_bytes(step, gpu))
        allocated, reserved = replayed.peak_allocated_bytes, replayed.peak_reserved_bytes
    context = context_bytes(gpu, step.device)
    tuning = min(first_step_bytes(step, gpu), allocated - top)
    return Estimate(
        shape,
        step,
        table,
        index,
        top,
        allocated,
        reserved,
        context,
        tuning,
        gpu.capability if gpu else DEFAULT_CAPABILITY,
        gpu.evidence if gpu else NO_EVIDENCE,
    )
