"""A report that memory ran out or that something else failed, and how to tell it from talk about such failures."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from .failures import NOT_MEMORY
from .oom_fields import Figures, without_prefix

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
    (r"\bxpu out of|xpu error|level.zero|ze_result|UR_RESULT", "torch's backend for Intel's GPUs (XPU)"),
    (r"\bnpu out of|\bnpu\b.{0,40}out of memory|torch_npu", "torch's backend for Ascend's NPUs"),
    (r"\bhpu\b|MODULE:PT_DEVMEM|\bmusa out of|\bgcu out of|\bmlu out of", "another vendor's backend of torch"),
)
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
_TORCH = re.compile(
    r"torch\.(?:cuda\.)?(?:OutOfMemory|Accelerator)Error|CUDA kernel errors might|CUDACachingAlloc|TORCH_USE_CUDA_DSA"
)

TALK = re.compile(
    r"\b(?:if|when|whenever|avoid\w*|prevent\w*|unless|fix\w*|solv\w+|handl\w+|how|may|might|could|can|would|should|"
    r"in case|such as|e\.g|like|except|catch\w*|instead|causes?|leads?|without|risk\w*|likely|about|get|see|"
    r"common|typical\w*|raises?|throws?|means?|for|no|not|never|whether|as)\b",
    re.IGNORECASE,
)
"""Words before a phrase that make it talk about failures."""
TALK_AFTER = re.compile(
    r"\s+(?:errors?|issues?|problems?|exceptions?|is|are|was|can|may|might|will|when(?! calling)|if|because|for|with|by"
    r"|and|or|crash\w*|situations?|conditions?|handling|killer|means|indicates|usually|typically)\b",
    re.IGNORECASE,
)
_REPORTS = re.compile(
    r"\b(?:\w*(?:Error|Exception)|error|warning|fatal|critical|exception|fail|failed|failure|crashed|caught|terminated|aborted)\b"
    r"|what\(\)",
    re.IGNORECASE,
)
CODE = re.compile(
    r"\s*(?:raise|except|if|elif|while|assert|return|def|class|import|from|print|with|case|log(?:ger|ging)?\.\w+)\b"
    r"|\s*[\w.]+ [+|]?= |.*\bin str\(|.*isinstance\(|.*\.lower\(\)|\s*(?:#|//|@\w)"
    r"|\s*[(\[]{0,2}[rf]?[\"'].*[\"'][)\],]+\s*$|\s*(?![\w.]*(?:Error|Exception)\()[\w.]+\(.*\)\s*$"
)
"""Lines of source code, as tracebacks quote them and as people paste them."""


_LISTED = re.compile(r"\s*(?:[*+-]|\d+\.)\s")
_SPAN_ENDS = re.compile(r"[^`\n]{0,200}`\W*\w")
"""An item of a list that quotes an error and goes on to speak of it."""


def framework_of(text: str) -> str | None:
    """The other framework whose failure a piece of text is; None for torch's."""
    if _TORCH.search(text):
        return None
    return next((name for pattern, name in _FRAMEWORKS if pattern.search(text)), None)


def mentioned(line: str, start: int) -> bool:
    """Whether words before ``start``, or the line as source code, make it talk about a failure."""
    return bool(CODE.match(line) or TALK.search(without_prefix(line[:start])))


def talks(line: str, start: int, end: int, *, after: bool = True) -> bool:
    """Whether the phrase at ``start`` of a line is spoken of rather than reported."""
    before = line[:start]
    if CODE.match(line) or line.lstrip().startswith("|") or (after and TALK_AFTER.match(line[end : end + 40])):
        return True
    if after and _LISTED.match(line) and _SPAN_ENDS.match(line, end):
        return True
    bare = without_prefix(before.replace("**", "")).strip("\"'`( \t")
    if not bare:
        return before.lstrip().startswith(("#", "//", "*"))
    return bool(TALK.search(bare)) or _REPORTS.search(before) is None
