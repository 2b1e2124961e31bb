"""Memory of one training step: the peak, when it happens, and what is alive then.

The tensors are listed in :mod:`eager` and :mod:`compiled`; here they are added up. Allocated bytes are what torch's
allocator has handed out; reserved is what it holds from the driver; the process also has a CUDA context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..units import MIB
from .allocator_settings import AllocatorSettings
from .attention import KERNELS, LEAST_NARROW, MAX_FLASH_HEAD_DIM, Kernel, kernel_numbers, prefers_cudnn
from .compiled import TRACED_TORCH, CompiledStep
from .eager import EagerStep
from .evidence import NO_EVIDENCE, Evidence
from .first_steps import first_step_peak, replay_first_steps
from .gpu import Gpu
from .overheads import autotune_buffer_bytes, cublas_workspace_bytes, cuda_context_bytes
from .partitions import partition_of
from .sampling import Sampling
from .shape import Ints, Shape
from .state_rows import plain
from .step import DeviceKind, StepConfig, release
from .tape import CATEGORIES, Category, Change, Tape, Unrolled, kept_by_a_repetition, peak, unroll

DEFAULT_CAPABILITY = (8, 9)
"""Assumed when no card is named: workspaces and context of an Ada card."""

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

    Sizes may be arrays. Raises ValueError where one table cannot have them all: :func:`kinds`.
    """
    numbers = kinds(shape, step, gpu)
    if np.any(numbers != numbers.flat[0]):
        raise ValueError("these configurations have different tensors, not only different sizes")
    return _table_of(int(numbers.flat[0]), shape, step, gpu, evaluation=evaluation)


def _table_of(kind: int, shape: Shape, step: StepConfig, gpu: Gpu | None, *, evaluation: bool) -> Tape:
    """The table of configurations that are all of one :func:`kinds`."""
    if not kind & GROUPED:
        shape = replace(shape, n_kv_head=0)
    workspace = workspace_bytes(gpu, step.torch or None) if step.device == "cuda" else 0
    given = shape, step, workspace, KERNELS[kind // KINDS_PER_KERNEL]
    if not step.compile:
        return EagerStep(*given).write(evaluation=evaluation)
    table, traced = CompiledStep(*given), partition_of(gpu.evidence.traced, shape, step) if gpu else None
    if traced is not None and not is_traced(step.torch):
        listed = CompiledStep(*given).write(evaluation=False)
        table.beyond = plain(np.maximum(traced.layer_bytes(shape, step) - kept_by_a_repetition(listed, "forward"), 0))
    return table.write(evaluation=evaluation)


AT_ONCE = 16_000
"""Candidates that are evaluated together: their arrays stay in the cache."""

ALONE, ACCUMULATES, GROUPED, ONE_HEAD, KINDS_PER_KERNEL = 1, 2, 4, 8, 16
"""What :func:`kinds` adds up."""


def kinds(shape: Shape, step: StepConfig, gpu: Gpu | None = None) -> Ints:
    """A number for each candidate; those with the same number have the same tensors, in other sizes.

    What tells them apart: the attention kernel, whether heads are grouped, whether gradients accumulate, and, where
    heads are padded or scores are held, whether heads need no joining or folding, because there is one of them, or one
    sequence.
    """
    kernel = kernel_numbers(shape, step, capability_of(gpu))
    grouped = (np.asarray(shape.n_kv_head) != 0) & (np.asarray(shape.n_kv_head) != shape.n_head)
    accumulates = np.asarray(step.grad_accum) > 1
    composed = kernel == KERNELS.index("math")
    one_head = (composed | (kernel == KERNELS.index("padded flash"))) & (np.asarray(shape.n_head) == 1)
    alone = composed & (np.asarray(step.batch_size) == 1) & ~one_head
    ours = GROUPED * grouped + ACCUMULATES * accumulates + ALONE * alone + ONE_HEAD * one_head
    return np.asarray(KINDS_PER_KERNEL * kernel + ours)


def capability_of(gpu: Gpu | None) -> tuple[int, int]:
    """Compute capability of the card, or the one that is assumed."""
    return gpu.capability if gpu else DEFAULT_CAPABILITY


def attention_kernel(shape: Shape, step: StepConfig, gpu: Gpu | None = None) -> Kernel:
    """The kernel that one configuration's attention runs."""
    return KERNELS[int(kernel_numbers(shape, step, capability_of(gpu)))]


def sampling_table(shape: Shape, step: StepConfig, prompt: Ints, gpu: Gpu | None = None) -> Tape:
    """The table of sampling with the dtype, batch_size and device of ``step``; ``prompt`` tokens of a sequence."""
    workspace = workspace_bytes(gpu, step.torch or None) if step.device == "cuda" else 0
    return Sampling(shape, step, prompt, workspace, attention_kernel(shape, step, gpu)).write()


def kept_in_a_layer(shape: Shape, step: StepConfig) -> Ints:
    """Bytes that the table has each layer keep from forward to backward."""
    return kept_by_a_repetition(tensor_table(shape, step, evaluation=False), "forward")


def peak_allocated(shape: Shape, step: StepConfig, gpu: Gpu | None = None) -> Ints:
    """Closed form of the peak in bytes, vectorised over arrays in ``shape`` and ``step``.

    Without the evaluation, which never is the peak and would take a tenth of the search's time.
    """
    shape, step = replace(shape, **_widened(shape)), replace(step, **_widened(step))
    arrays, numbers = _arrays(shape) | _arrays(step), kinds(shape, step, gpu)
    whole = np.broadcast_shapes(numbers.shape, *(array.shape for array in arrays.values()))
    size = math.prod(whole)
    if size == 1 or (0 < size <= AT_ONCE and np.all(numbers == numbers.flat[0])):
        return peak(_table_of(int(numbers.flat[0]), shape, step, gpu, evaluation=False))
    columns: dict[str, Ints] = {name: np.broadcast_to(array, whole).ravel() for name, array in arrays.items()}
    result, flat = np.empty(size, dtype=np.int64), np.broadcast_to(numbers, whole).ravel()
    for number in np.flatnonzero(np.bincount(flat)).tolist():
        of = np.flatnonzero(flat == number)
        for part in np.array_split(of, -(-len(of) // AT_ONCE)):
            some_shapes = replace(shape, **{name: columns[name][part] for name in _arrays(shape)})
            some_steps = replace(step, **{name: columns[name][part] for name in _arrays(step)})
            result[part] = peak(_table_of(number, some_shapes, some_steps, gpu, evaluation=False))
    return result.reshape(whole)


def _widened(config: Any) -> dict[str, Ints]:
    """Arrays of narrower integers, in 64 bits: products of sizes need them."""
    return {name: array.astype(np.int64) for name, array in _arrays(config).items() if array.dtype != np.int64}


def _arrays(config: Any) -> dict[str, Ints]:
    """The fields of a shape or a step that hold arrays."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def state_bytes(shape: Shape, step: StepConfig) -> Ints:
    """Bytes of weights, optimizer states and workspaces, vectorised; what a change of optimizer alone changes."""
    table = EagerStep(shape, step)
    table.write_state()
    return peak(table.tape)


def is_traced(torch_version: str) -> bool:
    """Whether the compiled table was read from this release; empty is the newest of them."""
    return not torch_version or release(torch_version) in TRACED_TORCH


STATE: tuple[Category, ...] = ("weights", "optimizer", "gradients")
"""What is kept from step to step, as far as it is there."""


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
    kernel: Kernel = "flash"
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
        """Kernels whose rows no measurement has met."""
        width, dtype, half = self.shape.head_dim, self.step.dtype, self.step.half
        usual = "flash" in self.kernel if half else self.kernel == "efficient" and width <= MAX_FLASH_HEAD_DIM
        if self.step.device == "cpu":
            return ""
        if usual and self.step.workload != "vramplan" and prefers_cudnn(half, self.capability):
            return "torch may run cuDNN's attention on this architecture, and the rows are FlashAttention's"
        if usual:
            return ""
        why = f"FlashAttention does not train {dtype} heads of {width} on this architecture"
        if width > MAX_FLASH_HEAD_DIM:
            why = f"head_dim {width} is beyond the {MAX_FLASH_HEAD_DIM} that FlashAttention takes"
        elif width <= LEAST_NARROW:
            why = "cards before Ampere do not have FlashAttention"
        if self.kernel == "efficient":
            return f"{why}; the rows are those of the memory-efficient kernel, read from its source and not measured"
        if not half:
            why = f"fused attention takes no float32 heads of {width}, no multiple of 4"
        return (
            f"{why}; so the scores of every head are held, which is counted as torch composes it, and was measured on "
            "no card"
        )

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
        if not is_traced(step.torch) and partition_of(self.evidence.traced, shape, step) is None:
            *others, last = (".".join(map(str, version)) for version in TRACED_TORCH)
            known = f"{', '.join(others)} and {last}"
            return (
                f"what torch {step.torch} keeps when it compiles was not traced, only {known}; vramplan trace does it"
            )
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
        return alive_after(self.table, self.peak_index + 1)

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

    def _persistent(self, category: Category) -> int:
        return int(self.table.sizes[self.table.within("persistent") & self.table.of(category)].sum())

    @cached_property
    def phase_peaks(self) -> dict[str, int]:
        """Highest allocated bytes within each phase, its first moment included, in order of first appearance."""
        after = self.table.live_bytes
        highest = np.maximum(after, np.concatenate([[0], after[:-1]]))
        return {phase: int(highest[self.table.within(phase)].max(initial=0)) for phase in self.table.phases}

    @cached_property
    def besides(self) -> dict[str, int]:
        """Highest allocated bytes where it is not a usual step that runs.

        ``first step``: scripts have no optimizer states yet when it begins, and compiled kernels are tuned in it.
        ``resume``: until the first step. On a CPU, and on a card in nanoGPT, which loads it there, the checkpoint's
        weights stand beside the model's; its states become the optimizer's (bitsandbytes copies them). ``sampling``: in
        a process of its own, one sequence after a prompt as long as the context.
        """
        weights, optimizer, gradients = (self._persistent(c) for c in STATE)
        on_cpu = self.step.device == "cpu"
        accumulating = gradients if self.step.workload == "vramplan" else 0
        loaded = weights if on_cpu or self.step.workload == "nanogpt" else 0
        if on_cpu and self.step.optimizer == "adamw8bit":
            loaded += optimizer
        resumed = weights + optimizer + max(loaded, accumulating)
        workspace = next((int(row.size) for row in self.table.rows if row.category == "workspace"), 0)
        # on a CPU the sampler computes in float32
        one = replace(self.step, batch_size=1, dtype="float32" if on_cpu else self.step.dtype)
        sampling = peak(Sampling(self.shape, one, self.shape.block_size, workspace, self.kernel).write())
        first = first_step_peak(self.table, self.step, self.first_step_bytes)
        return {"first step": first, "resume": resumed, "sampling": int(sampling)}

    @property
    def every_peak(self) -> dict[str, int]:
        """Highest allocated bytes of a step's phases, and beside a step."""
        return self.phase_peaks | self.besides

    def as_dict(self) -> dict[str, object]:
        """What ``estimate --json`` prints about memory."""
        return {
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "process_bytes": self.process_bytes,
            "peak_phase": self.peak_phase,
            "breakdown": self.breakdown,
            "phase_peaks": self.every_peak,
            "host_bytes": int(host_bytes(self.shape, self.step)),
            "parameters": int(self.shape.parameters),
            "caveats": list(self.caveats),
        }


def alive_after(table: Unrolled, end: int) -> tuple[TensorBytes, ...]:
    """Tensors alive after the first ``end`` changes, equals of one name added up, largest first."""
    made, gone = table.alloc[:end], table.block[:end][~table.alloc[:end]]
    living = table.row[:end][made][~np.isin(table.block[:end][made], gone)]
    counts = np.bincount(living, minlength=len(table.rows))
    total: dict[tuple[str, str], int] = {}
    for number in np.flatnonzero(counts).tolist():
        row = table.rows[number]
        key = (row.name, row.category)
        total[key] = total.get(key, 0) + int(counts[number]) * int(row.size)
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
        attention_kernel(shape, step, gpu),
        capability_of(gpu),
        gpu.evidence if gpu else NO_EVIDENCE,
    )
