"""The machine we run on: the live GPU and who holds its memory, host memory, what is installed.

Never imports torch, so that ``plan`` answers in milliseconds; NVML is loaded when a card is asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import VramplanError

MIN_TRITON_CAPABILITY = (7, 0)
"""Below this inductor refuses the card (torch/_inductor/scheduler.py: GPUTooOldForTriton)."""

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")

_NVML_NOT_FOUND = 6
"""NVML_ERROR_NOT_FOUND: no process of that number here, as for one that runs outside our container."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process with memory on the card. ``used_bytes`` is None where the driver does not tell (Windows desktops)."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class LiveGpu:
    """A card as NVML sees it now. ``total_bytes`` is nvidia-smi's total, ``free_bytes`` what nobody holds.

    ``processes`` come largest first; under WSL2 and in containers the list can be empty though memory is held.
    """

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    driver: str
    capability: tuple[int, int] | None
    processes: tuple[GpuProcess, ...]


def live_gpu(index: int = 0) -> LiveGpu | None:
    """Ask NVML about a card, or return None: no NVML library, no driver, no such card, or no memory figure from it.

    ``index`` counts the cards that CUDA_VISIBLE_DEVICES leaves visible, in the order of nvidia-smi.
    """
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError, OSError):
        return None
    try:
        handle = _handle(nvml, index)
        if handle is None:
            return None
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return LiveGpu(
            index=index,
            name=_text(nvml.nvmlDeviceGetName(handle)),
            total_bytes=int(memory.total),
            free_bytes=int(memory.free),
            driver=_text(nvml.nvmlSystemGetDriverVersion()),
            capability=_capability(nvml, handle),
            processes=_processes(nvml, handle, int(memory.total)),
        )
    except nvml.NVMLError:
        return None
    finally:
        _shut_down(nvml)


def _shut_down(nvml: Any) -> None:
    with contextlib.suppress(nvml.NVMLError):  # a driver that was unloaded meanwhile needs no goodbye
        nvml.nvmlShutdown()


def _handle(nvml: Any, index: int) -> Any | None:
    """Handle of the ``index``-th visible card, None when hidden. CUDA_VISIBLE_DEVICES holds numbers or UUIDs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(index)
    entries = [entry.strip() for entry in visible.split(",")]
    if not 0 <= index < len(entries):
        return None
    if entries[index].isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(entries[index]))
    if entries[index].startswith("GPU-"):
        return _handle_by_uuid(nvml, entries[index])
    return None


def _handle_by_uuid(nvml: Any, prefix: str) -> Any | None:
    """Handle of the card whose UUID begins so: CUDA accepts a unique prefix, NVML only the whole."""
    for number in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(prefix):
            return handle
    return None


def _capability(nvml: Any, handle: Any) -> tuple[int, int] | None:
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except nvml.NVMLError:
        return None
    return int(major), int(minor)


def _processes(nvml: Any, handle: Any, total_bytes: int) -> tuple[GpuProcess, ...]:
    """Compute and graphics processes, each once with the larger of its two figures, largest first."""
    used: dict[int, int | None] = {}
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            found = ask(handle)
        except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):
            continue  # WSL2 has no process list, drivers before 510 another version of it
        for process in found:
            n_bytes = process.usedGpuMemory
            known = n_bytes is not None and n_bytes <= total_bytes  # "not available" is all bits set
            before = used.get(process.pid)
            used[process.pid] = max(int(n_bytes), before or 0) if known else before
    listed = [GpuProcess(pid, _process_name(nvml, pid), n_bytes) for pid, n_bytes in used.items()]
    return tuple(sorted(listed, key=lambda p: (-(p.used_bytes or 0), p.pid)))


def _process_name(nvml: Any, pid: int) -> str:
    """Name of the program without folder and arguments, "unknown" when nobody says."""
    try:
        name = program_name(_text(nvml.nvmlSystemGetProcessName(pid)))
        if name:
            return name
    except nvml.NVMLError as error:
        if getattr(error, "value", None) == _NVML_NOT_FOUND:
            return "unknown"  # in a container the same number can be somebody else's in /proc
    except UnicodeDecodeError:
        pass
    try:
        return (_PROC / str(pid) / "comm").read_text(encoding="utf-8", errors="replace").strip() or "unknown"
    except OSError:
        return "unknown"


def program_name(command: str) -> str:
    r"""``/opt/google/chrome/chrome --type=gpu-process`` -> ``chrome``; knows Windows paths too."""
    path = re.split(r"\s-", command, maxsplit=1)[0].strip()
    return re.split(r"[/\\]", path)[-1]


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


# ---------------------------------------------------------------- host memory


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of main memory: all, and what a new process may take now. ``limit_source`` names who set the lower one."""

    total_bytes: int
    available_bytes: int
    limit_source: str


def host_memory() -> HostMemory:
    """Ask the operating system, and on Linux also the control groups of this process; the smallest wins.

    Raises VramplanError when the system does not tell.
    """
    if sys.platform == "win32":
        return _windows_memory()
    if sys.platform == "darwin":
        return _mac_memory()
    return linux_memory(_PROC, _CGROUPS)


def linux_memory(proc: Path, cgroups: Path) -> HostMemory:
    """Host memory from a ``/proc`` and a ``/sys/fs/cgroup``. Raises VramplanError when meminfo cannot be used."""
    path = proc / "meminfo"
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise _unknown_memory(f"{path} cannot be read ({error.strerror})") from None
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s*(\d+) kB$", text, re.MULTILINE)}
    if "MemTotal" not in sizes or "MemAvailable" not in sizes:
        raise _unknown_memory(f"{path} has no MemTotal or no MemAvailable")
    memory = HostMemory(sizes["MemTotal"], sizes["MemAvailable"], "MemAvailable")
    for group in _memory_groups(proc, cgroups):
        limited = _group_memory(group)
        if limited is not None:
            left, limit = limited
            total = min(memory.total_bytes, limit)
            memory = (
                HostMemory(total, left, f"cgroup limit in {group}")
                if left < memory.available_bytes
                else HostMemory(total, memory.available_bytes, memory.limit_source)
            )
    return memory


def _memory_groups(proc: Path, cgroups: Path) -> list[Path]:
    """Folders of this process's memory control groups, innermost first: version 2 and version 1."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    groups: list[Path] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if controllers not in ("", "memory"):
            continue
        root = cgroups / "memory" if controllers else cgroups
        own = root / inside.strip("/")
        groups += [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return groups


def _group_memory(group: Path) -> tuple[int, int] | None:
    """What is left of a control group's limit, and the limit, in bytes; None without a limit."""
    for limit_file, usage_file, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((group / limit_file).read_text(encoding="ascii"))  # "max" is no number: no limit
            usage = int((group / usage_file).read_text(encoding="ascii"))
            stat = (group / "memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):
            continue
        cache = re.search(rf"^{inactive} (\d+)$", stat, re.MULTILINE)
        # the kernel drops unused file pages before it kills anyone
        return max(0, limit - usage + (int(cache.group(1)) if cache else 0)), limit
    return None


def _unknown_memory(why: str) -> VramplanError:
    return VramplanError(f"This machine's memory is not known: {why}. Give a size with --vram 8GiB.")


def _mac_memory() -> HostMemory:
    import subprocess

    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        shown = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise _unknown_memory(f"vm_stat does not tell ({error})") from None
    return HostMemory(total, min(total, vm_stat_available(shown)), "vm_stat")


def vm_stat_available(shown: str) -> int:
    """Bytes of free, inactive and speculative pages in what macOS's ``vm_stat`` prints. Raises VramplanError."""
    size = re.search(r"page size of (\d+) bytes", shown)
    pages = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)\.", shown, re.MULTILINE)
    if size is None or not pages:
        raise _unknown_memory("vm_stat prints nothing that can be read")
    return int(size.group(1)) * sum(map(int, pages))


def _windows_memory() -> HostMemory:
    import ctypes

    class MemoryStatus(ctypes.Structure):  # MEMORYSTATUSEX in sysinfoapi.h
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in (
                "total", "available", "total_page_file", "available_page_file",
                "total_virtual", "available_virtual", "available_extended_virtual",
            )),
        )  # fmt: skip

    status = MemoryStatus()
    status.length = ctypes.sizeof(status)
    kernel32: Any = getattr(ctypes, "windll").kernel32  # noqa: B009  (absent from ctypes elsewhere)
    if not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise _unknown_memory("GlobalMemoryStatusEx fails")
    return HostMemory(int(status.total), int(status.available), "GlobalMemoryStatusEx")


def cpu_has_bf16(cpuinfo: Path = _PROC / "cpuinfo") -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); False where /proc/cpuinfo is absent."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.group(1).split())


# ---------------------------------------------------------------- what is installed


def process_lives(pid: int) -> bool:
    """Whether there is a process of that number; where that cannot be asked for (Windows), True."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, without importing it; None when it is not there."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def triton_available() -> bool:
    """Whether ``import triton`` would find something: torch's Linux builds bring it, on Windows ``triton-windows``."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # something that is not a package was put into sys.modules
        return False


def compile_support(
    capability: tuple[int, int] | None, *, here: bool = False, platform: str | None = None
) -> tuple[bool, str]:
    """Whether torch.compile works on a card with this compute capability, and a sentence that says why.

    ``here``: the card is in this machine, so Triton and a C compiler are looked for; otherwise it is assumed to be
    on Linux with both. ``platform`` stands in for ``sys.platform``.
    """
    if capability is not None and capability < MIN_TRITON_CAPABILITY:
        shown = ".".join(map(str, capability))
        return False, f"Compile is left out: Triton needs compute capability 7.0, this card has {shown}."
    platform = platform or sys.platform
    if not here:
        if platform == "win32" and not triton_available():
            return (
                False,
                "Compile is left out: no Triton on this Windows; --compile on if the card is in a Linux machine.",
            )
        return True, "Compile assumes Linux with Triton."
    if not triton_available():
        remedy = "pip install triton-windows brings it" if platform == "win32" else "pip install triton brings it"
        return False, f"Compile is left out: Triton is not installed ({remedy})."
    if platform == "linux" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return False, "Compile is left out: Triton needs a C compiler, and neither gcc nor clang is here (or set CC)."
    return True, "Triton is installed, so compile is possible."
