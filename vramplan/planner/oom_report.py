"""A report that memory ran out or that something else failed, and whose memory it was."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from .failures import NOT_MEMORY
from .oom_fields import Figures

Kind = Literal["cuda_oom", "hip_oom", "host_oom"]
Weight = Literal["figures", "words", "killed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A report that memory ran out, at ``start`` in the text.

    ``figures`` are torch's sizes; ``weight`` says whether it has them, is mere words, or only that a process was
    killed. ``says`` is what it means in a sentence's words; ``limited`` that it names a limit; ``final`` that it says
    by itself that memory was exhausted; ``warning`` that it may have been survived.
    """

    start: int
    end: int
    kind: Kind
    weight: Weight
    line: str
    says: str
    figures: Figures = field(default_factory=Figures)
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    limited: bool = False
    final: bool = False
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Other:
    """A failure that is not one of memory, at ``start`` in the text, with what it means."""

    start: int
    reason: str
    line: str


OTHER_FRAMEWORKS = (
    (r"paddle|Out of memory error on GPU \d", "PaddlePaddle"),
    (r"tensorflow|\bTF_|ResourceExhaustedError|OOM when allocating tensor|bfc_allocator|stream_executor", "TensorFlow"),
    (r"\bjax|\bxla\b|xla[._/]|RESOURCE_EXHAUSTED", "JAX"),
    (r"ggml|llama\.cpp|llama_(?:model|kv|init|new|decode|context)|whisper_", "llama.cpp (ggml)"),
    (r"onnxruntime|\bORT\b|BFCArena|bfc_arena", "ONNX Runtime"),
    (r"cupy", "CuPy"),
    (r"tensorrt|\[TRT\]", "TensorRT"),
    (r"numba|Call to cuMemAlloc", "Numba"),
    (r"mxnet|cudaMalloc retry failed", "MXNet"),
    (r"\brmm::|/rmm/|rapids", "RAPIDS"),
    (r"opencv|Gpu API call", "OpenCV"),
    (r"javascript heap|v8::|node::", "a JavaScript program"),
    (r"java\.lang|java heap", "a Java program"),
    (r"vk_error|vulkan", "Vulkan"),
    (r"mps backend|mps allocated", "torch's backend for Apple's chips (MPS)"),
    (r"\bxpu out of|xpu error|level.zero|ze_result|UR_RESULT|platform can not allocate memory block",
     "torch's backend for Intel's GPUs (XPU)"),
    (r"\bnpu out of|\bnpu\b.{0,40}out of memory|torch_npu", "torch's backend for Ascend's NPUs"),
    (r"\bhpu\b|MODULE:PT_DEVMEM|\bmusa out of|\bgcu out of|\bmlu out of", "another vendor's backend of torch"),
)  # fmt: skip
"""Whose memory it was, where a failure is not one of torch on CUDA, ROCm or the host."""

OTHER_FAILURES = (
    *NOT_MEMORY,
    (r"no space left on device|disk quota exceeded|errno 28\b|file write failed", "the disk is full"),
    (r"insufficient shared memory|out of shared memory|unable to open shared memory|/dev/shm|bus error",
     "shared memory (/dev/shm) is too small, which is not the host's memory"),
    (r"too many open files|received 0 items of ancdata|errno 24\b", "too many files are open"),
    (r"watchdog caught collective|collective operation timeout|nccl.{0,40}time(?:d ?)?out|ncclremoteerror|"
     r"timed out waiting", "a process waited for others in vain (NCCL)"),
    (r"n_embd % (?:config\.)?n_head|assert config\.n_embd", "n_embd is not divisible by n_head"),
    (r"storage size calculation overflowed|integer multiplication overflow|numel: integer", "a size overflowed"),
    (r"shapes cannot be multiplied|size mismatch|must match the size|expected all tensors to be on", "shapes or devices"
     " do not match"),
    (r"cublas_status_(?!alloc)\w+|cudnn_status_(?!alloc|internal_error_device_alloc)\w+", "a CUDA library failed"),
    (r"cuda error: (?!out of memory)[a-z]", "a CUDA call failed, and not for memory"),
    (r"keyboardinterrupt", "it was interrupted"),
    (r"segmentation fault|core dumped|sigsegv", "it crashed"),
)  # fmt: skip
"""Beside those that the trainer meets (``failures``)."""

OTHERS = [(re.compile(pattern, re.IGNORECASE), reason) for pattern, reason in OTHER_FAILURES]
_FRAMEWORKS = [(re.compile(pattern, re.IGNORECASE), name) for pattern, name in OTHER_FRAMEWORKS]
_OWN = re.compile(r"(?i)\b(?:cuda|hip) (?:error: )?out of memory")
_DEVICE = re.compile(r"(?i)\b(?:xpu|npu|mps|musa|gcu|mlu|hpu)(?: backend| driver)?(?: error:)? out of memory")
_TORCH = re.compile(
    r"torch\.(?:cuda\.)?(?:OutOfMemory|Accelerator)Error|CUDA kernel errors might|CUDACachingAlloc|TORCH_USE_CUDA_DSA"
)


def framework_of(text: str) -> str | None:
    """The other framework whose failure a piece of text is; None for torch's."""
    if _TORCH.search(text) and (_OWN.search(text) or not _DEVICE.search(text)):
        return None
    return next((name for pattern, name in _FRAMEWORKS if pattern.search(text)), None)
