"""Out-of-memory texts of every generation, the host's, and what only looks like one. All of them are made up."""

from __future__ import annotations

import time
from typing import Any

import pytest

from vramplan.planner.oom_text import OomText, read_oom

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

FIELDS = (
    "requested_bytes", "total_bytes", "free_bytes", "process_bytes", "allocated_bytes", "reserved_bytes",
    "reserved_unallocated_bytes", "private_pool_bytes", "limit_bytes", "gpu_index", "shape", "dtype",
)  # fmt: skip

ADVICE = (
    " If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid "
    "fragmentation.  See documentation for Memory Management  (https://example.org/notes)"
)


def b(number: float, unit: int) -> int:
    return round(number * unit)


def fields(text: str) -> dict[str, Any]:
    """The fields that the text fills, with kind and cause."""
    found = read_oom(text).as_dict()
    return {
        "kind": found["kind"],
        "cause": found["cause"],
        **{n: found[n] for n in FIELDS if found[n] is not None},
    }


OLD = (
    "RuntimeError: CUDA out of memory. Tried to allocate 2.25 GiB (GPU 1; 15.90 GiB total capacity; 13.70 GiB already "
    "allocated; 1.20 GiB free; 14.10 GiB reserved in total by PyTorch) If reserved memory is >> allocated memory try "
    "setting max_split_size_mb to avoid fragmentation.  See documentation"
)
OLD_FIELDS = {
    "kind": "cuda_oom", "cause": "exhausted", "gpu_index": 1, "requested_bytes": b(2.25, GIB),
    "total_bytes": b(15.9, GIB), "free_bytes": b(1.2, GIB), "allocated_bytes": b(13.7, GIB),
    "reserved_bytes": b(14.1, GIB),
}  # fmt: skip
NEW = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 640.00 MiB. GPU 0 has a total capacity of 23.52 GiB "
    "of which 312.81 MiB is free. Including non-PyTorch memory, this process has 23.20 GiB memory in use. Of the "
    "allocated memory 22.35 GiB is allocated by PyTorch, and 371.40 MiB is reserved by PyTorch but unallocated."
    + ADVICE
)
NEW_FIELDS = {
    "kind": "cuda_oom", "cause": "exhausted", "gpu_index": 0, "requested_bytes": 640 * MIB,
    "total_bytes": b(23.52, GIB), "free_bytes": b(312.81, MIB), "process_bytes": b(23.2, GIB),
    "allocated_bytes": b(22.35, GIB), "reserved_unallocated_bytes": b(371.4, MIB),
}  # fmt: skip


# -------------------------------------------------------------------- torch's own messages


def test_the_form_of_torch_1_is_read() -> None:
    assert fields(OLD) == OLD_FIELDS


def test_the_form_of_torch_2_is_read() -> None:
    assert fields(NEW) == NEW_FIELDS


def test_the_misspelt_capacity_of_torch_2_1_is_read() -> None:
    assert fields(NEW.replace("capacity", "capacty")) == NEW_FIELDS


def test_what_the_oldest_torch_called_cached_is_the_idle_part() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 1.10 GiB (GPU 0; 7.93 GiB total capacity; 3.00 GiB already allocated; "
        "0.40 GiB free; 4.10 GiB cached)"
    )
    found = fields(text)
    assert found["reserved_bytes"] == b(4.1, GIB)
    assert found["cause"] == "fragmentation"


def test_an_old_text_whose_reserved_memory_is_idle_is_fragmentation() -> None:
    text = OLD.replace("13.70 GiB already", "8.20 GiB already")
    assert fields(text)["cause"] == "fragmentation"
    assert "reserved_unallocated_bytes" not in fields(text)


def test_rocm_is_told_from_cuda() -> None:
    own = "Including non-PyTorch memory, this process has 23.20 GiB memory in use. "
    text = NEW.replace("CUDA out", "HIP out").replace(own, "")
    expected = {**NEW_FIELDS, "kind": "hip_oom"}
    del expected["process_bytes"]
    assert fields(text) == expected


def test_an_empty_gpu_index_is_none() -> None:
    expected = {name: value for name, value in NEW_FIELDS.items() if name != "gpu_index"}
    assert fields(NEW.replace("GPU 0 has", "GPU  has")) == expected


def test_all_units_and_zero_are_read() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 1.25 TiB. GPU 3 has a total capacity of 80.00 GiB of which 0 bytes is "
        "free. Of the allocated memory 982.50 KiB is allocated by PyTorch, and 512 bytes is reserved by PyTorch but "
        "unallocated."
    )
    found = fields(text)
    assert found["requested_bytes"] == b(1.25, TIB)
    assert found["free_bytes"] == 0
    assert found["allocated_bytes"] == b(982.5, KIB)
    assert found["reserved_unallocated_bytes"] == 512
    assert found["cause"] == "exhausted"


def test_private_pools_are_read_with_either_vendors_words() -> None:
    for maker in ("CUDA", "HIP"):
        pools = f"by PyTorch, with 1.50 GiB allocated in private pools (e.g., {maker} Graphs), and"
        text = NEW.replace("by PyTorch, and", pools)
        assert fields(text) == {**NEW_FIELDS, "private_pool_bytes": b(1.5, GIB)}


def test_without_idle_memory_the_clause_is_missing_and_the_field_none() -> None:
    text = NEW.replace(", and 371.40 MiB is reserved by PyTorch but unallocated", "")
    assert "reserved_unallocated_bytes" not in fields(text)


# -------------------------------------------------------------------- who holds the card


def test_other_processes_are_listed_and_this_one_is_marked() -> None:
    text = NEW.replace(
        "Including non-PyTorch memory, this process has 23.20 GiB",
        "Process 4711 has 9.80 GiB memory in use. Process 815 (python3) has 404.00 MiB memory in use. Including "
        "non-PyTorch memory, this process has 13.00 GiB",
    ).replace("22.35 GiB is allocated", "12.20 GiB is allocated")
    found = read_oom(text)
    assert found.figures.process_bytes == 13 * GIB
    assert [p.as_dict() for p in found.processes] == [
        {"pid": 4711, "name": None, "bytes": b(9.8, GIB)},
        {"pid": 815, "name": "python3", "bytes": 404 * MIB},
    ]
    assert found.cause == "other_process"


def test_one_unmarked_process_that_holds_torchs_memory_is_this_one() -> None:
    text = NEW.replace("Including non-PyTorch memory, this process has", "Process 96 has")
    found = read_oom(text)
    assert found.figures.process_bytes == b(23.2, GIB)
    assert found.processes == ()
    assert found.cause == "exhausted"


def test_one_unmarked_process_too_small_for_torchs_memory_is_another() -> None:
    text = NEW.replace("Including non-PyTorch memory, this process has 23.20 GiB", "Process 96 has 1.10 GiB")
    found = read_oom(text)
    assert found.figures.process_bytes is None
    assert [p.pid for p in found.processes] == [96]


def test_of_several_unmarked_processes_the_smallest_that_fits_is_taken_for_this_one() -> None:
    text = NEW.replace(
        "Including non-PyTorch memory, this process has 23.20 GiB",
        "Process 12 has 28.00 MiB memory in use. Process 13 has 4.06 GiB",
    ).replace("22.35 GiB is", "3.60 GiB is")
    found = read_oom(text)
    assert found.figures.process_bytes is None
    assert len(found.processes) == 2
    assert found.cause == "other_process"
    assert "19.15 GiB" in found.reason


def test_what_nobody_is_named_for_counts_as_others() -> None:
    text = NEW.replace("this process has 23.20 GiB", "this process has 9.00 GiB").replace("22.35", "8.40")
    assert fields(text)["cause"] == "other_process"


def test_without_a_process_sentence_others_must_hold_much() -> None:
    head = "CUDA out of memory. Tried to allocate 300.00 MiB. GPU 0 has a total capacity of 12.00 GiB of which "
    head += "100.00 MiB is free. "
    tail = (
        "Of the allocated memory {} GiB is allocated by PyTorch, and 50.00 MiB is reserved by PyTorch but unallocated."
    )
    assert fields(head + tail.format("10.90"))["cause"] == "exhausted"
    assert fields(head + tail.format("5.10"))["cause"] == "other_process"


def test_a_desktops_crumbs_do_not_explain_a_full_card() -> None:
    text = NEW.replace("Including", "Process 1200 has 44.00 MiB memory in use. Including")
    text = text.replace("640.00 MiB", "330.00 MiB").replace("371.40", "171.40")
    assert fields(text)["cause"] == "exhausted"


# -------------------------------------------------------------------- fragmentation, limits, nonsense


def test_idle_reserved_memory_beyond_the_request_is_fragmentation() -> None:
    text = NEW.replace("22.35 GiB is", "19.85 GiB is").replace("371.40 MiB", "2.86 GiB")
    assert fields(text)["cause"] == "fragmentation"


def test_a_little_idle_memory_is_not() -> None:
    text = (
        NEW.replace("640.00 MiB", "20.00 MiB")
        .replace("312.81", "12.81")
        .replace("371.40", "101.40")
        .replace("23.20", "23.50")
    )
    assert fields(text)["cause"] == "exhausted"


def test_a_memory_fraction_is_a_limit() -> None:
    text = NEW.replace("312.81 MiB is free", "12.10 GiB is free").replace("in use. Of", "in use. 11.76 GiB allowed; Of")
    found = fields(text.replace("23.20", "11.40").replace("22.35", "11.10"))
    assert found["limit_bytes"] == b(11.76, GIB)
    assert found["cause"] == "limit"


def test_a_memory_fraction_that_was_not_reached_is_no_limit() -> None:
    text = NEW.replace("in use. Of", "in use. 11.76 GiB allowed; Of").replace("23.20", "5.40").replace("22.35", "5.00")
    assert fields(text)["cause"] == "other_process"


def test_the_old_form_of_the_limit_is_read() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 5.10 GiB (GPU 0; 11.17 GiB total capacity; 0 bytes already allocated; "
        "10.92 GiB free; 5.00 GiB allowed; 0 bytes reserved in total by PyTorch)"
    )
    found = fields(text)
    assert (found["limit_bytes"], found["cause"], found["allocated_bytes"]) == (5 * GIB, "limit", 0)


def test_memory_that_was_free_explains_nothing() -> None:
    text = OLD.replace("1.20 GiB free", "7.20 GiB free").replace("13.70", "5.10").replace("14.10", "5.30")
    assert fields(text)["cause"] == "unknown"
    assert "free" in read_oom(text).reason


def test_a_request_beyond_the_card_is_exhausted() -> None:
    text = OLD.replace("2.25 GiB", "6080.27 GiB").replace("1.20 GiB free", "9.00 GiB free")
    assert fields(text)["cause"] == "exhausted"


@pytest.mark.parametrize("size", ["17179869184.00 GiB", "-2.00 GiB", "17179869183.88 GiB"])
def test_a_negative_size_is_said_to_be_nonsense(size: str) -> None:
    found = read_oom(NEW.replace("640.00 MiB", size))
    assert found.as_dict()["requested_bytes"] is None
    assert any(size.split()[0] in note for note in found.notes)
    assert found.cause == "unknown"
    assert "nonsense" in found.reason


def test_more_than_an_exabyte_is_nonsense_too() -> None:
    found = read_oom("RuntimeError: CUDA out of memory. Tried to allocate more than 1EB memory.")
    assert (found.kind, found.cause, found.figures.requested_bytes) == ("cuda_oom", "unknown", None)
    assert "nonsense" in found.reason


def test_a_process_size_that_the_driver_cannot_tell_is_left_out_of_the_judgement() -> None:
    text = NEW.replace("23.20 GiB", "17179869184.00 GiB")
    found = read_oom(text)
    assert found.as_dict()["process_bytes"] is None
    assert found.cause == "exhausted"
    assert any("2**64" in note for note in found.notes)


ASYNC = (
    "torch.OutOfMemoryError: Allocation on device 2 would exceed allowed memory. (out of memory)\n"
    "Currently allocated     : 21.30 GiB\nRequested               : 4.12 GiB\nDevice limit            : 24.00 GiB\n"
    "Free (according to CUDA): 1.05 GiB\nPyTorch limit (set by user-supplied memory fraction)\n"
    "                        : 17179869184.00 GiB\n"
)


def test_the_async_backends_form_is_read() -> None:
    found = fields(ASYNC)
    assert found == {
        "kind": "cuda_oom", "cause": "exhausted", "gpu_index": 2, "requested_bytes": b(4.12, GIB),
        "total_bytes": 24 * GIB, "free_bytes": b(1.05, GIB), "allocated_bytes": b(21.3, GIB),
    }  # fmt: skip
    assert any("no memory fraction" in note for note in read_oom(ASYNC).notes)


def test_the_async_backends_true_limit_is_one() -> None:
    text = ASYNC.replace("17179869184.00 GiB", "21.60 GiB").replace("1.05 GiB", "11.05 GiB").replace("21.30", "10.90")
    assert fields(text)["cause"] == "limit"


# -------------------------------------------------------------------- what happens to a text on its way


def wrapped(text: str, width: int, mark: str = "") -> str:
    return "\n".join(mark + text[i : i + width] for i in range(0, len(text), width))


@pytest.mark.parametrize("width", [19, 23, 29, 40, 72, 80, 97, 120])
@pytest.mark.parametrize("text", [OLD, NEW], ids=["old", "new"])
def test_hard_wrapped_lines_are_read_wherever_they_break(text: str, width: int) -> None:
    expected = OLD_FIELDS if text is OLD else NEW_FIELDS
    assert fields(wrapped(text, width)) == expected
    assert fields(wrapped(text, width, "> ")) == expected


@pytest.mark.parametrize(
    "prefix",
    [
        "[rank3]: ",
        "2031-05-12 07:01:02,345 - trainer - ERROR - ",
        "[2031-05-12 07:01:02,345] [ERROR] ",
        "(EngineCore pid=31337) ",
        "E0512 07:01:02.123456 140 torch/distributed/run.py:88] ",
        "2031-05-12T07:01:02.123456789Z stderr F ",
        "2031-05-12 07:01:02.123 | ERROR    | __main__:main:12 - ",
        "An error occurred: ",
        "| run 7 | failed | ",
        "**",
        "`",
        "# ",
        "&gt; ",
    ],
)
def test_prefixes_and_markup_do_not_matter(prefix: str) -> None:
    closing = {"**": "**", "`": "`", "| run 7 | failed | ": " |"}.get(prefix, "")
    assert fields(prefix + NEW + closing) == NEW_FIELDS


def test_a_representation_within_quotes_is_read() -> None:
    assert fields(f"worker died: OutOfMemoryError({NEW.partition(': ')[2]!r})") == NEW_FIELDS


def test_html_entities_and_escaped_newlines_are_read() -> None:
    text = NEW.replace(" GiB", "&nbsp;GiB").replace(". ", ".\\n")
    assert fields(text) == NEW_FIELDS


def test_terminal_colours_and_carriage_returns_are_read() -> None:
    text = f"50%|##  | 5/10\r60%|### | 6/10\r\n\x1b[31m{NEW}\x1b[0m\r\n"
    assert fields(text) == NEW_FIELDS


def test_a_truncated_text_gives_what_is_left() -> None:
    cut = NEW[: NEW.index(" is free")]
    found = fields(cut)
    assert found["requested_bytes"] == 640 * MIB
    assert found["total_bytes"] == b(23.52, GIB)
    assert found["cause"] == "unknown"
    without_head = "..." + OLD[OLD.index("ocate 2.25") :]
    found = fields(without_head)
    assert found["kind"] == "cuda_oom"
    assert found["reserved_bytes"] == b(14.1, GIB)


def test_a_notebooks_frames_before_the_message_are_no_obstacle() -> None:
    text = (
        "---------------------------------------------------------------------------\n"
        "OutOfMemoryError                          Traceback (most recent call last)\n"
        "Cell In[9], line 4\n      3 out = net(x)\n----> 4 out.sum().backward()\n\n" + NEW.removeprefix("torch.")
    )
    assert fields(text) == NEW_FIELDS
    assert read_oom(text).moment == "backward"


# -------------------------------------------------------------------- without figures


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "torch.AcceleratorError: CUDA error: out of memory",
        "RuntimeError: CUDA driver error: out of memory",
        "RuntimeError: cuda runtime error (2) : out of memory at /build/THC/generic/THCStorage.cu:66",
        "THCudaCheck FAIL file=/build/THC/generic/THCStorage.cu line=66 error=2 : out of memory",
        "torch.cuda.OutOfMemoryError: CUDA out of memory.",
        "torch.OutOfMemoryError",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[rank2]: RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtMatmul(x)`",
        "RuntimeError: Triton Error [CUDA]: out of memory",
        "Last error:\nFailed to CUDA calloc async 304 bytes",
        "terminate called after throwing an instance of 'c10::Error'\n  what():  CUDA error: out of memory",
        "- **Exception Type:** torch.OutOfMemoryError\n- **Exception Message:** Allocation on device \n",
        "!!! Exception during processing !!! Allocation on device 0\nTraceback (most recent call last):",
        'RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/x/c10/cuda/CUDACachingAllocator.cpp":1012',
        "RuntimeError: CUDA error: out of\nmemory",
    ],
)
def test_bare_messages_of_the_card_are_memory_of_unknown_cause(text: str) -> None:
    found = fields(text)
    assert found["kind"] == "cuda_oom"
    assert found["cause"] == "unknown"
    assert "requested_bytes" not in found


def test_rocms_libraries_are_told_from_cudas() -> None:
    assert fields("RuntimeError: HIP error: out of memory")["kind"] == "hip_oom"
    assert fields("RuntimeError: CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `x`")["kind"] == "hip_oom"


def test_the_allocators_warning_counts_and_is_called_one() -> None:
    text = (
        "[W731 10:11:12.131415 CUDACachingAllocator.cpp:4001] memory allocation failed with OOM on device 1 while "
        "trying to allocate 805306368 bytes (free: 123456789, total: 25251872768).\n"
    )
    found = fields(text)
    assert found == {
        "kind": "cuda_oom", "cause": "unknown", "gpu_index": 1, "requested_bytes": 805306368,
        "free_bytes": 123456789, "total_bytes": 25251872768,
    }  # fmt: skip
    assert any("warning" in note for note in read_oom(text).notes)
    assert fields(text + NEW) == NEW_FIELDS


def test_a_compiled_graphs_buffer_gives_shape_and_dtype() -> None:
    text = (
        "Traceback (most recent call last):\n"
        '  File "/w/train.py", line 301, in <module>\n    scaler.scale(loss).backward()\n'
        '  File "/tmp/torchinductor_me/xy/cxy.py", line 99, in call\n'
        "    buf7 = empty_strided_cuda((8, 512, 32000), (16384000, 32000, 1), torch.float32)\n" + NEW
    )
    assert fields(text) == {**NEW_FIELDS, "shape": [8, 512, 32000], "dtype": "float32"}
    found = read_oom(text)
    assert (found.buffer, found.moment) == ("buf7", "backward")
    older = text.replace("empty_strided_cuda", "empty_strided").replace(
        "torch.float32", "device='cuda', dtype=torch.float32"
    )
    assert fields(older) == fields(text)


def test_a_buffer_of_another_traceback_is_not_taken() -> None:
    text = (
        "Traceback (most recent call last):\n    buf7 = empty_strided_cuda((8, 4), (4, 1), torch.float32)\n"
        "TypeError: no\nTraceback (most recent call last):\n    y = model(x)\n" + NEW
    )
    assert fields(text) == NEW_FIELDS


def test_the_cpp_wrappers_failure_is_the_devices() -> None:
    text = (
        "RuntimeError: aoti_torch_empty_strided(2, int_array_3, int_array_4, cached_torch_dtype_float16, "
        "cached_torch_device_type_{}, 1, &buf4_handle) API call failed at /tmp/x.cpp, line 77"
    )
    assert fields(text.format("cuda")) == {"kind": "cuda_oom", "cause": "unknown", "dtype": "float16", "gpu_index": 1}
    assert fields(text.format("cpu")) == {"kind": "host_oom", "cause": "unknown", "dtype": "float16"}


@pytest.mark.parametrize(
    ("frame", "moment"),
    [
        ("    optimizer.step()", "optimizer"),
        ('  File "/v/torch/optim/adamw.py", line 9, in _init_group', "optimizer"),
        ("    scaler.scale(loss).backward()", "backward"),
        ("    loss = F.cross_entropy(logits, targets)", "loss"),
        ("    losses = estimate_loss()", "evaluation"),
        ("    out = model.generate(x, 50)", "sampling"),
        ("    model.to(device)", "loading"),
        ("    logits, loss = model(X, Y)", "forward"),
        ("    total = a + b", None),
    ],
)
def test_the_traceback_shows_the_moment(frame: str, moment: str | None) -> None:
    text = f'Traceback (most recent call last):\n  File "/w/train.py", line 3, in <module>\n{frame}\n{NEW}'
    assert read_oom(text).moment == moment


# -------------------------------------------------------------------- the host


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:99] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 987654321 bytes. Error code 12 (Cannot allocate memory)",
            {"cause": "exhausted", "requested_bytes": 987654321},
        ),
        (
            "RuntimeError: [enforce fail at ..\\c10\\core\\impl\\alloc_cpu.cpp:81] data. DefaultCPUAllocator: not "
            "enough memory: you tried to allocate 4194304 bytes.",
            {"cause": "exhausted", "requested_bytes": 4194304},
        ),
        (
            "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 1.22 GiB for an array with shape "
            "(40000, 4096) and data type float64",
            {"cause": "exhausted", "requested_bytes": b(1.22, GIB), "shape": [40000, 4096], "dtype": "float64"},
        ),
        (
            "MemoryError: Unable to allocate 833. MiB for an array with shape (109224747,) and data type int64",
            {"cause": "exhausted", "requested_bytes": 833 * MIB, "shape": [109224747], "dtype": "int64"},
        ),
        (
            "MemoryError: Unable to allocate array with shape (3, 99) and data type float32",
            {"cause": "exhausted", "shape": [3, 99], "dtype": "float32"},
        ),
        ("MemoryError", {"cause": "unknown"}),
        ("terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\nAborted",
         {"cause": "unknown"}),
        ("OSError: [Errno 12] Cannot allocate memory", {"cause": "exhausted"}),
        ("OSError: [WinError 1455] The paging file is too small for this operation", {"cause": "exhausted"}),
        ("memory allocation of 1073741824 bytes failed\nAborted", {"cause": "exhausted", "requested_bytes": GIB}),
        (
            "RuntimeError: unable to mmap 2147483648 bytes from file </w/model.bin>: Cannot allocate memory (12)",
            {"cause": "exhausted", "requested_bytes": 2 * GIB},
        ),
        (
            "Jul 03 04:05:06 box kernel: Out of memory: Killed process 4711 (python) total-vm:99kB, anon-rss:88kB",
            {"cause": "exhausted"},
        ),
        (
            "[ 99.5] oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),task=python,pid=42\n"
            "[ 99.6] Memory cgroup out of memory: Killed process 42 (python) total-vm:12kB, anon-rss:11kB",
            {"cause": "limit"},
        ),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.",
         {"cause": "limit"}),
        ("    Reason:       OOMKilled\n    Exit Code:    137", {"cause": "limit"}),
        ("./go.sh: line 4: 31337 Killed                  python train.py", {"cause": "unknown"}),
        ("step 3\nKilled\n", {"cause": "unknown"}),
        ("zsh: killed     python train.py", {"cause": "unknown"}),
        ("Process finished with exit code 137 (interrupted by signal 9: SIGKILL)", {"cause": "unknown"}),
        ("RuntimeError: DataLoader worker (pid 4242) is killed by signal: Killed.", {"cause": "unknown"}),
        ("  exitcode  : -9 (pid: 77)\n  traceback : Signal 9 (SIGKILL) received by PID 77", {"cause": "unknown"}),
        (
            "RuntimeError: Caught RuntimeError in pin memory thread for device 0.\n  data = pin_memory(data, device)\n"
            "RuntimeError: CUDA error: out of memory",
            {"cause": "unknown"},
        ),
    ],
)  # fmt: skip
def test_memory_of_the_host_is_told_from_the_cards(text: str, expected: dict[str, Any]) -> None:
    assert fields(text) == {"kind": "host_oom", **expected}


# -------------------------------------------------------------------- not memory


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("torch._inductor.exc.InductorError: No valid triton configs. OutOfMemoryError: out of resource: triton_mm "
         "Required: 150000 Hardware limit:101376", "Triton"),
        ("ERROR:torch._inductor.select_algorithm:Exception No valid triton configs. OutOfMemoryError: out of resource: "
         "triton_mm Required: 290000 Hardware limit:232448", "Triton"),
        ("out of resource: shared memory, Required: 140000, Hardware limit: 99000.", "Triton"),
        ("ResourceExhaustedError: OOM when allocating tensor with shape[9,9] on GPU:0 by GPU_0_bfc", "TensorFlow"),
        ("E tensorflow/stream_executor/cuda/cuda_driver.cc:9] failed to allocate 2.00G from device: "
         "CUDA_ERROR_OUT_OF_MEMORY: out of memory", "TensorFlow"),
        ("jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes", "JAX"),
        ("ggml_cuda_host_malloc: failed to allocate 99.00 MiB of pinned memory: out of memory", "llama.cpp"),
        ("CUDA error: out of memory\n  current device: 0, in function alloc at /s/ggml-cuda.cu:99", "llama.cpp"),
        ("paddle.fluid.core.ResourceExhaustedError: Out of memory error on GPU 0. Cannot allocate 1GB", "Paddle"),
        ("[ONNXRuntimeError] : 6 : onnxruntime::BFCArena Failed to allocate memory for requested buffer", "ONNX"),
        ("cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 1,024 bytes (so far: 0 bytes).", "CuPy"),
        ("FATAL ERROR: Reached heap limit Allocation failed - JavaScript heap out of memory", "JavaScript"),
        ('Exception in thread "main" java.lang.OutOfMemoryError: Java heap space', "Java"),
        ("RuntimeError: MPS backend out of memory (MPS allocated: 8.1 GB, max allowed: 9.0 GB). Tried to allocate "
         "99.00 MB on private pool.", "MPS"),
        ("XPU out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 11.00 GiB.", "XPU"),
        ("RuntimeError: NPU out of memory. Tried to allocate 8.00 GiB (NPU 0; 60.96 GiB total capacity; 13.22 GiB "
         "already allocated; 4.54 GiB free; 13.86 GiB reserved in total by PyTorch)", "NPU"),
        ("ValueError: the loss is nan", "dtype"),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", "not its own"),
        ("RuntimeError: CUDA error: device-side assert triggered", "check"),
        ("OSError: [Errno 28] No space left on device: '/w/ckpt.pt'", "disk"),
        ("RuntimeError: DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that dataloader's "
         "workers are out of shared memory.", "shared memory"),
        ("OSError: [Errno 24] Too many open files", "files"),
        ("ImportError: libgomp.so.1: cannot allocate memory in static TLS block", "thread data"),
        ("[E ProcessGroupNCCL.cpp:1] [Rank 1] Watchdog caught collective operation timeout: Work(SeqNum=3)", "NCCL"),
        ("    assert config.n_embd % config.n_head == 0\nAssertionError", "n_embd"),
        ("KeyError: 'wte'", "KeyError"),
        ("step 9: loss 3.1, max memory allocated: 10.42 GiB, reserved in total 11.02 GiB", "nothing"),
        ("|  CUDA OOMs: 0            |        cudaMalloc retries: 0         |", "nothing"),
        ("# avoid out of memory: keep the batch small", "nothing"),
        ("    except torch.cuda.OutOfMemoryError:\n        torch.cuda.empty_cache()", "nothing"),
        ("if 'out of memory' in str(e): raise RuntimeError('CUDA out of memory')", "nothing"),
        ("To avoid CUDA out of memory errors, lower the batch. A RuntimeError: CUDA error: out of memory can also come "
         "from another program.", "nothing"),
        ("### CUDA out of memory\n\nIf you see `torch.OutOfMemoryError: CUDA out of memory`, restart.", "nothing"),
        ("* **`RuntimeError: CUDA error: out of memory`**: reduce the batch size.", "nothing"),
        ("| `CUDA error: out of memory` | lower the batch |", "nothing"),
        ("If reserved memory is >> allocated memory try setting max_split_size_mb to avoid fragmentation.", "advice"),
        ("Exit code 137 means that a process was killed.", "nothing"),
        ("os.kill(pid, signal.SIGKILL)", "nothing"),
        ("Killed by a monster in level 3", "nothing"),
        ("", "no text"),
        ("\x00\xff\x01 binary \x7f garbage", "nothing"),
    ],
)  # fmt: skip
def test_what_is_no_memory_failure_is_said_and_fills_no_field(text: str, words: str) -> None:
    found = read_oom(text)
    assert fields(text) == {"kind": "not_memory", "cause": "unknown"}
    assert words in found.reason
    assert found.processes == ()


FULL = NEW.partition(": ")[2]


@pytest.mark.parametrize(
    "text",
    [
        "torch.OutOfMemoryError: " + FULL.replace("CUDA out", "XPU out"),
        "torch.OutOfMemoryError: NPU out of memory. Tried to allocate 512.00 MiB",
        "torch.OutOfMemoryError: MPS backend out of memory (MPS allocated: 7.00 GB)",
        "RuntimeError: Current platform can NOT allocate memory block with size larger than 4GB! Tried to allocate "
        "5.50 GiB (GPU 0; 11.00 GiB total capacity; 1.00 GiB already allocated; 2.00 GiB reserved in total by PyTorch)",
    ],
)
def test_other_devices_of_torch_are_not_explained(text: str) -> None:
    assert read_oom(text).kind == "not_memory"


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory? Seven things to try first",
        "Why it happens\n\n  \u2022 RuntimeError: CUDA out of memory halfway through an epoch\n",
        "# Help\n\nIf you see an error such as the one below, the batch is too large:\n```\n"
        "torch.OutOfMemoryError: CUDA out of memory.\n```\n",
        "Your notes say you're training and met RuntimeError: CUDA out of memory. Tried to allocate Y GiB.",
        "If you get `RuntimeError: CUDA out of memory. Tried to allocate 64.00 MiB`, use fewer tokens.",
        "exception torch.OutOfMemoryError\n\nException raised when there is no room on a device",
        "MemoryError\n===========\nWhat it is.",
        "Raises:\n    MemoryError: If the table does not fit",
        "Known problems\n\n**RuntimeError: CUDA error: out of memory**\n\nLower the block size.",
        "> `failed (exitcode: -9)`\n\nThis means that the host had no memory left.",
    ],
)
def test_documentation_that_quotes_a_failure_is_none(text: str) -> None:
    assert read_oom(text).kind == "not_memory"


@pytest.mark.parametrize(
    "text",
    [
        f"import torch\n\nx = torch.empty(9, device='cuda')\n# RuntimeError: {FULL}\n",
        f'    raise RuntimeError("{FULL}")',
        f'MESSAGE: Final[str] = "{FULL}"',
        f'    fail(\n        "{FULL}"\n    )',
        'TEXT: Final = "CUDA out of memory"',
        "    cudaErrorMemoryAllocation = 2,",
    ],
)
def test_source_code_that_holds_a_message_is_none(text: str) -> None:
    assert read_oom(text).kind == "not_memory"


@pytest.mark.parametrize(
    "text",
    [
        "GET /plan HTTP status 137",
        "iter 137: loss 3.1, code 137",
        "exit code: 137 checks passed",
        "$ kill -9 4711\n[1]+  Killed                  python train.py",
        "you tried to allocate 5 seats",
        "step 4: 9.10 GiB already allocated; 2.00 GiB free; 10.00 GiB reserved in total",
        "GPU 1 has a total capacity of 23.52 GiB of which 20.10 GiB is free.",
        "OSError: [Errno 12] Cannot allocate memory: '/dev/shm/psm_7'",
    ],
)
def test_numbers_and_kills_that_say_nothing_of_memory_are_none(text: str) -> None:
    assert read_oom(text).kind == "not_memory"


@pytest.mark.parametrize(
    ("text", "kind", "asked"),
    [
        ("# RuntimeError: CUDA error: out of memory\n\nHello, what can I do?", "cuda_oom", None),
        (f"## torch.OutOfMemoryError: {FULL}\n\nHello", "cuda_oom", 640 * MIB),
        ("For two days I get RuntimeError: CUDA error: out of memory when I train", "cuda_oom", None),
        ("box:12:34 [1] init.cc:9 NCCL WARN Cuda failure 'out of memory'", "cuda_oom", None),
        ("box:12:34 [1] alloc.h:9 NCCL WARN Failed to CUDA calloc 8388608 bytes", "cuda_oom", 8 * MIB),
        ("**Error out of memory at line 12 in file /w/csrc/ops.cu**\n\nMy system:", "cuda_oom", None),
        ("cuda failed with error 2 out of memory", "cuda_oom", None),
        ("step 7\n**Killed**\n", "host_oom", None),
        ("step 7\nKilled.", "host_oom", None),
        ("step 7\n\u5df2\u6740\u6b7b", "host_oom", None),
        ("Your session crashed after using all available RAM.", "host_oom", None),
        ("Your notebook tried to allocate more memory than is available.", "host_oom", None),
        ("The exit codes of the workers are {SIGKILL(-9), EXIT(1)}", "host_oom", None),
        (
            "RuntimeError: [enforce fail at alloc.cpp:5] posix_memalign(&data, 64, nbytes) == 0. 12 vs 0",
            "host_oom",
            None,
        ),
        ("MemoryError: Unable to allocate 3 GB for array with form (9, 9) and data type float64", "host_oom", 3 * GIB),
        (
            f"# Traceback (most recent call last):\n#   File 'x.py'\n# RuntimeError: {FULL}\nx = 1",
            "cuda_oom",
            640 * MIB,
        ),
    ],
)
def test_more_reports_of_memory_are_read(text: str, kind: str, asked: int | None) -> None:
    found = read_oom(text)
    assert (found.kind, found.figures.requested_bytes) == (kind, asked)


@pytest.mark.parametrize(
    "text",
    [
        "Some of your processes may have been killed by the cgroup out-of-memory handler.",
        "slurmstepd: error: *** JOB 7 ON n3 CANCELLED AT 2031-05-12 DUE TO MEMORY LIMIT ***",
    ],
)
def test_a_batch_systems_limit_is_one(text: str) -> None:
    assert fields(text) == {"kind": "host_oom", "cause": "limit"}


@pytest.mark.parametrize("end", ["reserved by PyTorch but un", "reserved by PyTorch bu", "reserved by PyTorch"])
def test_a_message_cut_within_a_word_keeps_its_last_figure(end: str) -> None:
    cut = NEW[: NEW.index(end) + len(end)]
    assert fields(cut)["reserved_unallocated_bytes"] == b(371.4, MIB)
    old = OLD[: OLD.index("already alloc") + len("already alloc")]
    assert fields(old)["allocated_bytes"] == b(13.7, GIB)


def test_an_echo_that_was_cut_off_does_not_hide_the_whole_message() -> None:
    assert fields(f"{NEW}\nFAILED test_x - {NEW[:220]}") == NEW_FIELDS


def test_a_small_request_beside_a_little_idle_memory_is_not_fragmentation() -> None:
    words = NEW.replace("640.00 MiB", "20.00 MiB").replace("312.81", "10.00").replace("23.20", "23.51")
    assert fields(words.replace("22.35", "22.51").replace("371.40", "471.40"))["cause"] == "exhausted"
    assert fields(words.replace("22.35", "20.51").replace("371.40 MiB", "2.50 GiB"))["cause"] == "fragmentation"


def test_a_large_request_that_as_much_idle_memory_could_hold_is_fragmentation() -> None:
    assert fields(NEW.replace("22.35", "21.85").replace("371.40", "771.40"))["cause"] == "fragmentation"


def test_the_oldest_torch_asked_for_a_segment_more_than_it_printed() -> None:
    words = (
        "CUDA out of memory. Tried to allocate 4.00 MiB (GPU 0; 7.93 GiB total capacity; 7.20 GiB already allocated; "
        "{} MiB free; 40.00 MiB cached)"
    )
    assert fields(words.format("6.00"))["cause"] == "exhausted"
    assert fields(words.format("60.00"))["cause"] == "unknown"


def test_a_run_that_went_on_and_was_interrupted_did_not_die_of_memory() -> None:
    assert (
        read_oom(f"caught {NEW}\n{PROGRESS}Traceback (most recent call last):\nKeyboardInterrupt").kind == "not_memory"
    )


# -------------------------------------------------------------------- several failures


PROGRESS = "iter 20: loss 5.8813, time 131.20ms, mfu 33.10%\niter 30: loss 5.7012, time 131.11ms, mfu 33.10%\n"


def test_of_several_memory_failures_the_last_counts() -> None:
    assert fields(f"{OLD}\n{PROGRESS}{NEW}") == NEW_FIELDS
    assert fields(f"{NEW}\n{PROGRESS}{OLD}") == OLD_FIELDS


def test_the_detailed_message_is_preferred_to_its_echo() -> None:
    assert fields(f"{NEW}\nRuntimeError: CUDA error: out of memory\n") == NEW_FIELDS


def test_errors_of_the_handling_are_secondary_and_said() -> None:
    during = "During handling of the above exception, another exception occurred:"
    found = read_oom(f"{NEW}\n\n{during}\n\nTraceback (most recent call last):\nKeyError: 'batch'\n")
    assert found.kind == "cuda_oom"
    assert any("KeyError" in note for note in found.notes)


def test_what_a_launcher_does_to_the_other_processes_is_secondary() -> None:
    text = (
        f"[rank0]: {NEW}\n[rank1]:[E ProcessGroupNCCL.cpp:5] Watchdog caught collective operation timeout: x\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n  exitcode  : -9 (pid: 8)\n"
        "  traceback : Signal 9 (SIGKILL) received by PID 8\n"
    )
    assert fields(text) == NEW_FIELDS


def test_a_caught_failure_after_which_the_run_died_of_something_else_is_that() -> None:
    found = read_oom(f"WARNING caught {NEW}\n{PROGRESS}Traceback (most recent call last):\nValueError: bad shard\n")
    assert found.kind == "not_memory"
    assert "ValueError" in found.reason
    assert any("earlier" in note for note in found.notes)


def test_a_caught_failure_after_which_the_run_went_on_is_said() -> None:
    found = read_oom(f"WARNING caught {NEW}\n{PROGRESS}")
    assert found.kind == "cuda_oom"
    assert any("went on" in note for note in found.notes)


def test_a_kill_after_another_failure_is_that_failures() -> None:
    text = "RuntimeError: CUDA error: an illegal memory access was encountered\n  exitcode  : -9 (pid: 8)\n"
    assert read_oom(text).kind == "not_memory"


def test_a_kill_long_after_a_survived_failure_is_the_hosts() -> None:
    assert read_oom(f"caught error {NEW}\n{PROGRESS}Killed\n").kind == "host_oom"


# -------------------------------------------------------------------- long texts


@pytest.mark.parametrize(
    "filling",
    [
        "iter 1: loss 3.2137, time 137.1ms, max memory allocated 9 GiB, killed 0, code 0\n",
        "x",
        "CUDA error: out of ",
        "tried to allocate ",
        "Error: memoryerror ",
        "unable to allocate (",
        "1",
        "50%|##  | 5/10\r",
    ],
)
def test_long_logs_and_endless_lines_take_no_time(filling: str) -> None:
    log = filling * (6 * MIB // len(filling))
    began = time.process_time()
    found: OomText = read_oom(f"{log}\n{NEW}\n")
    assert time.process_time() - began < 5
    assert found.figures.requested_bytes == 640 * MIB


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("OSError: The paging file is too small for this operation to complete. (os error 1455)", "exhausted"),
        ("May  3 04:05:06 box kernel: [ 77.1] Out of memory: Killed process 51 (python) total-vm:900kB", "exhausted"),
        (
            "May 13 14:15:16 box kernel: Killed process 61 (python3), UID 1000, total-vm:900kB, anon-rss:80kB",
            "exhausted",
        ),
        ("[ 12.9] oom_reaper: reaped process 71 (python), now anon-rss:0kB", "exhausted"),
        ("RuntimeError: mkl_malloc: failed to allocate memory", "exhausted"),
    ],
)
def test_hosts_say_it_in_many_ways(text: str, cause: str) -> None:
    assert (read_oom(text).kind, read_oom(text).cause) == ("host_oom", cause)


@pytest.mark.parametrize(
    "text",
    [
        '+    if state.reason == "OOMKilled":\n+        retry()',
        "RuntimeError: CUDA out of memory. Tried to allocate 3.00 GiB\n\nWhy it happens\nThe batch is too large.",
        "RuntimeError: CUDA out of memory. Tried to allocate 3.00 GiB\nReason for error: the batch is too large.",
    ],
)
def test_a_catalogue_of_errors_and_a_comparison_are_no_crash(text: str) -> None:
    assert read_oom(text).kind == "not_memory"
