"""Short reports that memory ran out: the words of CUDA, its libraries, the host's allocators, kernels and shells.

They count where they stand as a program prints them: at the beginning of a line, or after an error's name or a log
level. What spoke of them in prose, in comments or in source code is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .oom_fields import Figures, figures_in, without_prefix
from .oom_report import Event, Kind, framework_of
from .oom_talk import CODE, TALK, TALK_AFTER, line_of, literal, talks, taught

_TRITON = re.compile(r"(?i)out of resource|no valid triton configs")
"""What inductor wraps in an OutOfMemoryError, and what is none."""

_NOT_RAM = re.compile(r"ibv_|/dev/shm|memlock|low memory condition")
"""What was refused was locked or shared memory, or nothing yet."""

NEAR = 1000
"""Characters of an endless line on either side of a phrase in which another framework's name counts."""

Reader = Callable[[str, int, int, "re.Match[str]"], Event | None]


def _bare(kind: Kind, says: str, *, limited: bool = False, final: bool = False) -> Reader:
    """Reads a phrase that says no figures."""

    def read(text: str, first: int, last: int, at: re.Match[str]) -> Event | None:
        line = line_of(text, first, last)
        if talks(line, at.start() - first, at.end() - first) or literal(text, first, last):
            return None
        if taught(text, first, last):
            return None
        near = text[max(first, at.start() - NEAR) : min(last, at.end() + NEAR)]
        around = text[max(0, first - 300, at.start() - NEAR) : min(last + 300, at.end() + NEAR)]
        if kind != "host_oom" and framework_of(around) is not None:
            return None
        if framework_of(near) is not None or _TRITON.search(near) or (kind == "host_oom" and _NOT_RAM.search(near)):
            return None
        own = kind
        if kind == "cuda_oom" and re.search(r"\bhip|rocm|rocblas|miopen", line, re.IGNORECASE):
            own = "hip_oom"
        pinned = kind != "host_oom" and re.search(
            r"pin_memory|pin memory|cudaHostAlloc|hipHostMalloc|CachingHostAlloc|HostAllocator", around
        )
        if pinned:
            return Event(start=first, end=last, kind="host_oom", weight="words", line=line.strip(),
                         says="pinned host memory could not be had", limited=limited, final=final)  # fmt: skip
        device = re.search(r"(?i)allocation on device (\d{1,3})\b", line)
        return Event(start=first, end=last, kind=own, weight="words", line=line.strip(), says=says, limited=limited,
                     final=final, figures=Figures(gpu_index=int(device[1]) if device else None))  # fmt: skip

    return read


_ARRAY = re.compile(
    r"unable\s+to\s+allocate\s+([^(]{0,40}?)\s*(?:for\s+an\s+)?array\s+with\s+(?:shape|form)\s+\(([\d,\s]{0,120})\)"
    r"(?:\s+and\s+data\s+type\s+([\w<>|\[\]]{1,20}))?",
    re.IGNORECASE,
)


def _array(text: str, first: int, last: int, at: re.Match[str]) -> Event | None:
    """Reads NumPy's message; before 1.17 it did not say the size."""
    found = _ARRAY.match(text, at.start())
    if found is None or CODE.match(line_of(text, first, last)):
        return None
    asked = re.sub(r"([KMGT])B", r"\1iB", found[1])  # NumPy counts in 1024s, also where a translation writes GB
    return Event(
        start=first, end=max(last, found.end()), kind="host_oom", weight="figures", line=text[first:last].strip(),
        says="NumPy could not allocate an array", figures=figures_in("Tried to allocate " + asked), final=True,
        shape=tuple(int(n) for n in re.findall(r"\d{1,15}", found[2])), dtype=found[3],
    )  # fmt: skip


def _sized(says: str, kind: Kind = "host_oom") -> Reader:
    """Reads an allocator's message that says how much it was asked for, and nothing else."""

    def read(text: str, first: int, last: int, at: re.Match[str]) -> Event | None:
        line = line_of(text, first, last)
        found = re.search(r"(\d{1,20})\s*(bytes|gb|mb)?", text[at.start() : at.end()], re.IGNORECASE)
        if found is None or CODE.match(line) or framework_of(line) is not None:
            return None
        asked = figures_in(f"Tried to allocate {found[1]} {found[2] or 'bytes'}")
        return Event(start=first, end=last, kind=kind, weight="figures", line=line.strip(), says=says, figures=asked,
                     final=kind == "host_oom")  # fmt: skip

    return read


_SYSLOG = re.compile(r"^\s*[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \S{1,80} kernel:")
"""What the system's log puts before a line of the kernel's; "May" is a month there."""


def _kernel(text: str, first: int, last: int, at: re.Match[str]) -> Event | None:
    """Reads the kernel's out-of-memory killer."""
    line = text[first:last]
    before = _SYSLOG.sub("", line[: at.start() - first])
    if TALK.search(without_prefix(before)) or CODE.match(line):
        return None
    limited = "cgroup" in at[0] or "memcg" in at[0]
    says = "the kernel killed a process of a group at its memory limit" if limited else (
        "the kernel killed a process because the host's memory was exhausted")  # fmt: skip
    return Event(start=first, end=last, kind="host_oom", weight="figures", line=line.strip(), says=says,
                 limited=limited, final=not limited)  # fmt: skip


def _killed(says: str, *, limited: bool = False) -> Reader:
    """Reads that a process was killed, by whatever."""

    def read(text: str, first: int, last: int, at: re.Match[str]) -> Event | None:
        line = text[first:last]
        before = line[: at.start() - first]
        if CODE.match(line) or TALK.search(before) or TALK_AFTER.match(line[at.end() - first :]):
            return None
        if taught(text, first, last) or _KILLING.search(text, max(0, first - 200), at.start()):
            return None
        return Event(start=first, end=last, kind="host_oom", weight="killed", line=line.strip(), says=says,
                     limited=limited)  # fmt: skip

    return read


_KILLING = re.compile(r"(?m)\bkill +-(?:s +)?(?:9|KILL|SIGKILL)\b|^[$#>% ]{0,4}(?:pkill|killall) ")
"""Somebody who kills it himself."""


def _wrapper(text: str, first: int, last: int, at: re.Match[str]) -> Event | None:
    """Reads inductor's C++ wrapper: aoti_torch_empty_strided(..., dtype, device type, index, ...) failed."""
    line = text[first:last]
    if talks(line, at.start() - first, at.end() - first):
        return None
    device = re.search(r"device_type_(\w+)|,\s*(\d+)\s*,\s*(\d+)\s*,\s*&", line)
    host = device is not None and (device[1] == "cpu" or device[2] == "0")
    dtype = re.search(r"torch_dtype_(\w+)", line)
    index = re.search(r",\s*(\d+)\s*,\s*&", line)
    return Event(start=first, end=last, kind="host_oom" if host else "cuda_oom", weight="words", line=line.strip(),
                 says="a compiled graph could not allocate a buffer", dtype=dtype[1] if dtype else None,
                 figures=Figures(gpu_index=int(index[1]) if index and not host else None))  # fmt: skip


_WINDOWS = "Windows had no more memory to promise (RAM and paging file)"
_SIGKILL = "a process was killed by SIGKILL"
_CODE_KILLED = "a process was killed (exit code 137 or -9)"
_SHELL = (
    r"(?m)^(?:[^\n]{0,120}: line \d{1,6}:\s+\d{1,8}\s+|\[\d+\][+-]?\s+(?:\d+\s+)?|zsh: |(?:/bin/)?(?:ba)?sh: "
    r"|make[^\n]{0,80}\] )?killed(?=\s*$|\s{2,}|\s+python|:? 9\b)"
)
"""What shells print of a job that was killed."""
_EXITED = (
    r"\b(?:exit\w*|return(?:ed|code| code)|terminated)\b[^\n]{{0,24}}?[\s:=(]{}\b"
    r"(?!\s+(?!(?:on|in|at|after|by|from|and|for|while|pid|time)\b)[a-z])"
)
"""An exit code, not followed by what else there were so many of."""
_CUDA = "a CUDA call ran out of memory, outside torch's allocator or without its figures"
_CARD = "memory of the card ran out; the message has no figures"
_LIBRARY = "a library could not allocate its workspace"
_NCCL = "NCCL could not allocate its buffers"
_NVML = "torch failed while it was composing an out-of-memory message"
_CPP = "a C++ program could not allocate host memory"
_PYTHON = "Python could not allocate host memory"
_SYSTEM = "the system refused host memory"
_REFUSED = "a library's allocation of host memory was refused"
_VM = "a notebook's machine had no more memory"
_CONTAINER = "a container was killed at its memory limit"
_BATCH = "the batch system killed it at its memory limit"

_PHRASES: tuple[tuple[str, str, Reader], ...] = (
    ("tried to allocate", r"you\s+tried\s+to\s+allocate\s+(?:\d+\s*(?:bytes|gb|mb)|\d{6})",
     _sized("torch's allocator of host memory was refused")),
    ("defaultcpuallocator", r"defaultcpuallocator: (?:not enough memory|can't allocate memory)",
     _bare("host_oom", "torch's allocator of host memory was refused", final=True)),
    ("unable to allocate", r"unable\s+to\s+allocate\b[^(]{0,60}array\s+with\s+(?:shape|form)", _array),
    ("memory allocation of", r"memory allocation of \d+ bytes failed", _sized(_REFUSED)),
    ("alloc of size", r"alloc of size \d+ failed", _sized(_REFUSED)),
    ("unable to mmap", r"unable to mmap \d+ bytes", _sized("a file could not be mapped into host memory")),
    ("posix_memalign", r"posix_memalign\([^)\n]{0,60}\) == 0\. 12 vs 0", _bare("host_oom", _SYSTEM, final=True)),
    ("all available ram", r"(?:your )?session crashed after using all available ram",
     _bare("host_oom", _VM, final=True)),
    ("than is available", r"(?:your )?notebook tried to allocate more memory than is available",
     _bare("host_oom", _VM, final=True)),
    ("out of memory: kill", r"(?:memory cgroup )?out of memory: kill", _kernel),
    ("oom-kill:constraint", r"oom-kill:constraint=constraint_\w+", _kernel),
    ("invoked oom-killer", "", _kernel),
    ("total-vm:", r"killed process \d+ \([^)\n]{1,80}\),? (?:uid \d+, )?total-vm:", _kernel),
    ("oom_reaper", r"oom_reaper: reaped process", _kernel),
    ("out of", r"(?:cuda|hip)\s+(?:(?:runtime|driver)\s+)?(?:error|failure|failed\s+with\s+error)[\s:(]{0,4}\d*"
     r"[)\s:']{0,5}out\s+of\s+memory", _bare("cuda_oom", _CUDA)),
    ("out of memory", r"(?:cuda|hip) error \([^)\n]{1,80}\): out of memory|cudamalloc failed: out of memory",
     _bare("cuda_oom", _CUDA)),
    ("out of memory", r"(?:error=2 |triton error \[(?:cuda|hip)\]): out of memory", _bare("cuda_oom", _CUDA)),
    ("out of memory at", r"error out of memory at line \d+ in file", _bare("cuda_oom", _CUDA)),
    ("out of", r"(?:cuda|hip)\s+out\s+of\s+memory(?!\?|[a-z]|[ \t]+(?!(?:while|trying|tried|at|on|during|when"
     r"|after|in|error|exception)\b)[a-z])", _bare("cuda_oom", _CARD)),
    ("out_of_memory", r"(?:cuda|hip)_error_out_of_memory(?!\s*=)", _bare("cuda_oom", _CUDA)),
    ("errormemoryallocation", r"cudaerrormemoryallocation(?!\s*=)", _bare("cuda_oom", _CUDA)),
    ("erroroutofmemory", r"hiperroroutofmemory", _bare("hip_oom", _CUDA)),
    ("alloc_failed", r"(?:cublas|cudnn|cusolver|cusparse|cufft|hipblas|miopen|rocblas)_\w{0,60}alloc_failed",
     _bare("cuda_oom", _LIBRARY)),
    ("allocation_failed", r"cudnn_status_\w{0,60}allocation_failed", _bare("cuda_oom", _LIBRARY)),
    ("failed to cuda", r"failed to cuda (?:malloc|calloc|host alloc)(?: async)? \d{5,18} bytes",
     _sized(_NCCL, "cuda_oom")),
    ("failed to cuda", r"failed to cuda (?:malloc|calloc|host alloc)", _bare("cuda_oom", _NCCL)),
    ("nvml_success", r"nvml_success == .{0,60}internal assert failed.{0,80}cachingallocator", _bare("cuda_oom", _NVML)),
    ("outofmemoryerror", r"(?m)(?:torch\.)?(?:cuda\.)?outofmemoryerror(?=:|\(['\"]|[\s'\"`*)]*$)",
     _bare("cuda_oom", _CARD)),
    ("allocation on device", r"(?m)allocation on device[ \t]*\d*(?:\W{0,3}$| would exceed allowed memory)",
     _bare("cuda_oom", _CARD)),
    ("aoti_torch_empty_strided", r"aoti_torch_empty_strided.{0,300}?(?:failed|error)", _wrapper),
    ("bad_alloc", r"std::bad_alloc", _bare("host_oom", _CPP)),
    ("mkl_malloc", r"mkl_malloc: failed to allocate memory", _bare("host_oom", _CPP, final=True)),
    ("bad allocation", r"runtimeerror: bad allocation", _bare("host_oom", _CPP)),
    ("memoryerror", r"(?m)[\w.]{0,60}memoryerror(?=[ \t]*:|[ \t]*$)", _bare("host_oom", _PYTHON)),
    ("allocate memory", r"(?:can ?not|can't) allocate memory(?! in static)", _bare("host_oom", _SYSTEM, final=True)),
    ("os error 12", r"os error 12\b", _bare("host_oom", _SYSTEM, final=True)),
    ("paging file", r"paging file is too small(?: for this operation to complete)?(?:\W{0,3}\(os error 1455\))?",
     _bare("host_oom", _WINDOWS, final=True)),
    ("1455", r"(?:os error |winerror |error code: <)1455", _bare("host_oom", _WINDOWS, final=True)),
    ("not enough memory resources", "", _bare("host_oom", _WINDOWS, final=True)),
    ("killed signal", r"killed signal terminated program", _killed("a compiler was killed")),
    ("oomkilled", r"(?<!== ['\"])oomkilled(?!\W{0,4}false)", _killed(_CONTAINER, limited=True)),
    ("oom", r"oom[-_]kill event|oom killed", _killed(_BATCH, limited=True)),
    ("out of memory", r"task \d+: out of memory", _killed(_BATCH, limited=True)),
    ("out-of-memory handler", r"(?:some of your processes may have been )?killed by the cgroup out-of-memory handler",
     _killed(_BATCH, limited=True)),
    ("memory limit", r"exceeded (?:job |step )?memory limit|due to memory limit", _killed(_BATCH, limited=True)),
    ("sigkill(-9)", r"exit codes of the workers are \{[^}\n]{0,200}sigkill\(-9\)", _killed(_SIGKILL)),
    ("sigkill", r"\(sigkill\) received by pid|<signals\.sigkill|signal sigkill|9: sigkill", _killed(_SIGKILL)),
    ("signal", r"\bsignal:? 9\b|by signal: killed", _killed(_SIGKILL)),
    ("137", _EXITED.format(137), _killed(_CODE_KILLED)),
    ("-9", _EXITED.format(-9), _killed(_CODE_KILLED)),
    ("killed", _SHELL, _killed("a process was killed")),
    ("killed", r"(?m)^[ \t>]{0,8}[*`]{0,3}killed[.!]?[*`]{0,3}[ \t]*$", _killed("a process was killed")),
    ("已杀死", r"(?m)^[^\n]{0,200}已杀死[ \t]*$", _killed("a process was killed")),
)  # fmt: skip
PHRASES = tuple((needle, re.compile(pattern or re.escape(needle)), read) for needle, pattern, read in _PHRASES)
"""What to look for in lower case, what must stand around it in the line, and how that is read; telling ones first."""
