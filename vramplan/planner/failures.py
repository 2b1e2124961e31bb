"""What the text of a failed step says: that memory ran out, or something else.

Pure text, so that it serves a trainer's exception, a child process's last words and a pasted traceback alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FailureKind = Literal["out_of_memory", "not_memory"]

NOT_MEMORY = (
    (r"no valid triton configs|out of resources?\b|outofresources", "a Triton kernel asks for more than the chip has"),
    (r"memory in static tls block", "the loader has no room for another library's thread data"),
    (r"illegal memory access|misaligned address", "a kernel touched memory that is not its own"),
    (r"device-side assert", "a kernel's own check failed (often a token beyond the vocabulary)"),
    (
        r"no kernel image is available|unsupported gpu|invalid device function",
        "this torch has no kernels for this card",
    ),
    (r"driver version is insufficient|found no nvidia driver", "the driver is missing or too old for this torch"),
    (r"cannot find a working triton|triton is not available", "Triton is missing"),
    (r"no module named|cannot import name|importerror", "something that is needed is not installed"),
    (r"\bnan\b|not finite|no longer numbers", "the numbers left the range of the dtype"),
)
"""Looked for first: inductor calls a kernel that exceeds the chip an ``OutOfMemoryError: out of resource``."""

OUT_OF_MEMORY = (
    r"out of memory",
    r"outofmemory",
    r"(cublas|cudnn|cusolver|cusparse|cufft|nccl)\w*alloc(ation)?_?failed",
    r"cudaerrormemoryallocation",
    r"failed to allocate",
    r"(can ?no|can')t allocate memory",
    r"not enough memory",
    r"unable to allocate [\d.]+ [kmgt]?i?b",
    r"aoti_torch_empty_strided.*failed",
    r"std::bad_alloc",
    r"could not create a (primitive|memory object)$",
    r"killed signal terminated program",
    r"memoryerror",
)
"""torch and its C++ wrapper, CUDA's libraries, the host's allocators on Linux and Windows, numpy, the C++ runtime, and
a compiler that the kernel killed; oneDNN, which says no more than that it could not, when there is too little."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a failure was, and one sentence about it."""

    kind: FailureKind
    reason: str


def failure_of(text: str, kinds: Sequence[str] = ()) -> Failure:
    """Read an error's text, and the names of its class and that class's bases where they are known."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), kinds[0] if kinds else "no message")
    for pattern, reason in NOT_MEMORY:
        if found := re.search(pattern, text, re.IGNORECASE):
            return Failure("not_memory", f"{reason}: {_line(text, found)}")
    for pattern in OUT_OF_MEMORY:
        if found := re.search(pattern, text, re.IGNORECASE):
            return Failure("out_of_memory", _line(text, found))
    if {"OutOfMemoryError", "MemoryError"} & set(kinds):
        return Failure("out_of_memory", first)
    return Failure("not_memory", f"{kinds[0]}: {first}" if kinds else first)


def last_failure(output: str) -> Failure | None:
    """What the last telling line of a program's output says; None when none does."""
    for line in reversed(output.splitlines()):
        found = failure_of(line)
        if found.kind == "out_of_memory" or ": " in found.reason.removesuffix(line.strip()):
            return found
    return None


def _line(text: str, found: re.Match[str]) -> str:
    """The whole line in which something was found."""
    start, end = text.rfind("\n", 0, found.start()) + 1, text.find("\n", found.end())
    return text[start : end if end >= 0 else None].strip()
