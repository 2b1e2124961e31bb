"""What an error's text means, whoever raised it."""

from __future__ import annotations

import pytest

from vramplan.planner.failures import failure_of

OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity of 11.71 GiB of which 1.2 GiB is free.",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "aoti_torch_empty_strided(2, int_array_1, int_array_2, 5, 1, 0, &buf1_handle) API call failed at model.cpp, line 9",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 603979776 bytes.",
    "Unable to allocate 1.22 GiB for an array with shape (12, 34) and data type float32",
    "Triton Error [CUDA]: out of memory",
    "terminate called after throwing an instance of 'std::bad_alloc'",
    "cudaErrorMemoryAllocation",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "g++: fatal error: Killed signal terminated program cc1plus",
]
NOT_MEMORY = [
    "No valid triton configs. OutOfMemoryError: out of resource: triton_mm Required: 147456 Hardware limit:101376",
    "out of resource: shared memory, Required: 135168, Hardware limit: 101376. Reducing block sizes may help.",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: device-side assert triggered",
    "CUDA error: no kernel image is available for execution on the device",
    "No module named 'bitsandbytes'",
    "ImportError: libgomp.so.1: cannot allocate memory in static TLS block",
    "the loss is not finite (nan)",
    "The NVIDIA driver on your system is too old: CUDA driver version is insufficient",
    "Expected all tensors to be on the same device",
    "",
]


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_running_out_is_recognised(text: str) -> None:
    found = failure_of(f"rank0: {text}", ["RuntimeError", "Exception"])
    assert found.kind == "out_of_memory"
    assert text.splitlines()[0] in found.reason


@pytest.mark.parametrize("text", NOT_MEMORY)
def test_what_only_sounds_like_it_is_not(text: str) -> None:
    assert failure_of(text, ["RuntimeError", "Exception"]).kind == "not_memory"


@pytest.mark.parametrize("kinds", [["OutOfMemoryError", "RuntimeError"], ["MemoryError", "Exception"]])
def test_the_class_counts_where_the_text_says_nothing(kinds: list[str]) -> None:
    assert failure_of("", kinds) == failure_of("\n", kinds)
    assert failure_of("", kinds).kind == "out_of_memory"
    assert failure_of("", kinds).reason == kinds[0]
