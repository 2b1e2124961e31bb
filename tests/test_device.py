"""The live machine: NVML in every mood, host memory from recorded files, what is installed. No GPU is needed."""

from __future__ import annotations

import importlib.machinery
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from vramplan import device
from vramplan.device import (
    GpuProcess,
    HostMemory,
    compile_support,
    cpu_has_bf16,
    host_memory,
    installed_version,
    linux_memory,
    live_gpu,
    program_name,
    triton_available,
    vm_stat_available,
)
from vramplan.errors import VramplanError
from vramplan.units import GIB, KIB, MIB


class NVMLError(Exception):
    """As pynvml's: carries NVML's return code."""

    def __init__(self, value: int = 999) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class NVMLLibraryMismatchError(Exception):
    """As pynvml's: deliberately not an NVMLError."""


NOT_FOUND, NO_PERMISSION, NOT_SUPPORTED, DRIVER_NOT_LOADED = 6, 4, 3, 9


class FakeNvml(types.ModuleType):
    """pynvml with one or more RTX 4070s, a desktop and a browser. Anything set to an exception is raised."""

    NVMLError = NVMLError
    NVMLLibraryMismatchError = NVMLLibraryMismatchError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.open = 0
        self.uuids = ["GPU-aaaa1111", "GPU-bbbb2222"]
        self.compute: object = [self.process(900, 500 * MIB), self.process(901, 2 * GIB)]
        self.graphics: object = [self.process(900, 700 * MIB), self.process(77, None)]
        self.names: dict[int, object] = {
            900: "/opt/google/chrome/chrome --type=gpu-process --ozone-platform=x11",
            901: r"C:\Program Files\Python 3\python.exe",
            77: "/usr/lib/xorg/Xorg",
        }
        self.memory: object = SimpleNamespace(total=12282 * MIB, free=8487 * MIB, used=3795 * MIB)
        self.capability: object = (8, 9)
        self.init: object = None
        self.shutdown: object = None

    @staticmethod
    def process(pid: int, used: int | None) -> SimpleNamespace:
        return SimpleNamespace(pid=pid, usedGpuMemory=used)

    def _give(self, value: object) -> object:
        assert self.open == 1, "asked while NVML is shut down"
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlInit(self) -> None:  # noqa: N802
        if isinstance(self.init, Exception):
            raise self.init
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._give(self.shutdown)
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return self._give(index if 0 <= index < len(self.uuids) else NVMLError(2))

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return self._give(self.uuids[handle])

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return self._give(f"NVIDIA GeForce RTX 407{handle}")

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return self._give("570.86.16")

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:  # noqa: N802
        return self._give(self.memory)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> object:  # noqa: N802
        return self._give(self.capability)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> object:  # noqa: N802
        return self._give(self.compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> object:  # noqa: N802
        return self._give(self.graphics)

    def nvmlSystemGetProcessName(self, pid: int) -> object:  # noqa: N802
        return self._give(self.names.get(pid, NVMLError(NOT_FOUND)))


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


# ---------------------------------------------------------------- the card


def test_free_memory_is_what_nvml_says_not_what_the_name_promises(nvml: FakeNvml) -> None:
    card = live_gpu()
    assert card is not None
    assert (card.index, card.name, card.driver) == (0, "NVIDIA GeForce RTX 4070", "570.86.16")
    assert (card.total_bytes, card.free_bytes) == (12282 * MIB, 8487 * MIB)
    assert card.capability == (8, 9)
    assert nvml.open == 0


def test_processes_are_named_merged_and_sorted_by_what_they_hold(nvml: FakeNvml) -> None:
    card = live_gpu()
    assert card is not None
    assert card.processes == (
        GpuProcess(901, "python.exe", 2 * GIB),
        GpuProcess(900, "chrome", 700 * MIB),
        GpuProcess(77, "Xorg", None),
    )


def test_a_figure_survives_a_second_list_that_does_not_know_it(nvml: FakeNvml) -> None:
    nvml.compute, nvml.graphics = [nvml.process(900, 5 * MIB)], [nvml.process(900, None)]
    assert live_gpu().processes == (GpuProcess(900, "chrome", 5 * MIB),)


def test_all_bits_set_means_not_available(nvml: FakeNvml) -> None:
    nvml.compute, nvml.graphics = [nvml.process(900, 2**64 - 1)], []
    assert live_gpu().processes == (GpuProcess(900, "chrome", None),)


@pytest.mark.parametrize("error", [NVMLError(NOT_SUPPORTED), NVMLLibraryMismatchError("other version")])
def test_drivers_without_a_process_list_still_tell_free_memory(nvml: FakeNvml, error: Exception) -> None:
    nvml.compute = nvml.graphics = error
    nvml.capability = NVMLError(NOT_SUPPORTED)
    card = live_gpu()
    assert card is not None
    assert (card.free_bytes, card.processes, card.capability) == (8487 * MIB, (), None)
    assert nvml.open == 0


def test_process_name_comes_from_proc_when_nvml_may_not_tell(
    nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_PROC", tmp_path)
    for pid in (900, 901):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text("somebody\n")
    nvml.names = {900: NVMLError(NO_PERMISSION), 901: NVMLError(NOT_FOUND), 77: NVMLError(NO_PERMISSION)}
    names = {p.pid: p.name for p in live_gpu().processes}
    # 901 is outside our container: the same number in our /proc would be someone else
    assert names == {900: "somebody", 901: "unknown", 77: "unknown"}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/usr/bin/gnome-shell", "gnome-shell"),
        ("/opt/google/chrome/chrome --type=gpu-process", "chrome"),
        (r"C:\Program Files\Mozilla Firefox\firefox.exe", "firefox.exe"),
        ("python3", "python3"),
        ("", ""),
    ],
)
def test_program_name_drops_folder_and_arguments(command: str, name: str) -> None:
    assert program_name(command) == name


@pytest.mark.parametrize("error", [NVMLError(DRIVER_NOT_LOADED), OSError("libnvidia-ml.so.1")])
def test_no_driver_means_no_card(nvml: FakeNvml, error: Exception) -> None:
    nvml.init = error
    assert live_gpu() is None
    assert nvml.open == 0


def test_no_library_means_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert live_gpu() is None


def test_a_card_that_vanishes_means_no_card_and_nvml_is_still_shut_down(nvml: FakeNvml) -> None:
    nvml.memory = NVMLError(15)
    assert live_gpu() is None
    assert live_gpu(7) is None
    assert nvml.open == 0


def test_trouble_at_shutdown_does_not_hide_the_answer(nvml: FakeNvml) -> None:
    nvml.shutdown = NVMLError(1)
    assert live_gpu() is not None


@pytest.mark.parametrize(
    ("visible", "index", "name"),
    [
        ("1", 0, "NVIDIA GeForce RTX 4071"),
        ("1,0", 1, "NVIDIA GeForce RTX 4070"),
        ("GPU-bbbb", 0, "NVIDIA GeForce RTX 4071"),
        ("", 0, None),
        ("-1", 0, None),
        ("0", 1, None),
        ("GPU-cccc", 0, None),
        ("MIG-1234", 0, None),
    ],
)
def test_only_visible_cards_count(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str, index: int, name: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    card = live_gpu(index)
    assert (card.name if card else None) == name
    assert nvml.open == 0


def test_real_pynvml_has_every_name_that_is_used() -> None:
    pynvml = pytest.importorskip("pynvml")
    for name in [n for n in vars(FakeNvml) if n.startswith(("nvml", "NVML"))]:
        assert hasattr(pynvml, name), name
    assert pynvml.NVML_ERROR_NOT_FOUND == NOT_FOUND


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA driver here")
def test_real_card_is_described() -> None:
    card = live_gpu()
    assert card is not None
    assert 0 < card.free_bytes <= card.total_bytes
    assert card.name
    assert card.capability is not None


# ---------------------------------------------------------------- host memory

MEMINFO = "MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\nHugePages_Total:  0\n"


@pytest.fixture
def system(tmp_path: Path):
    """``system(cgroup line, {file: text})`` -> folders standing for /proc and /sys/fs/cgroup."""

    def make(cgroup: str | None = None, files: dict[str, str] | None = None, meminfo: str = MEMINFO):
        proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        cgroups.mkdir()
        (proc / "meminfo").write_text(meminfo)
        if cgroup is not None:
            (proc / "self" / "cgroup").write_text(cgroup)
        for name, text in (files or {}).items():
            (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
            (cgroups / name).write_text(text)
        return proc, cgroups

    return make


def test_available_memory_is_the_kernels_not_the_free_column(system) -> None:
    memory = linux_memory(*system())
    assert memory == HostMemory(32_000_000 * KIB, 20_000_000 * KIB, "MemAvailable")


def test_cgroup_2_limit_wins_when_it_is_smaller_and_page_cache_counts_as_available(system) -> None:
    files = {
        "jobs/me/memory.max": f"{4 * GIB}\n",
        "jobs/me/memory.current": f"{3 * GIB}\n",
        "jobs/me/memory.stat": f"anon 1\nactive_file 5\ninactive_file {1 * GIB}\n",
    }
    proc, cgroups = system("0::/jobs/me\n", files)
    memory = linux_memory(proc, cgroups)
    assert (memory.total_bytes, memory.available_bytes) == (4 * GIB, 2 * GIB)
    assert memory.limit_source == f"cgroup limit in {cgroups / 'jobs' / 'me'}"


def test_a_parents_limit_holds_for_its_children(system) -> None:
    files = {
        "jobs/memory.max": f"{2 * GIB}",
        "jobs/memory.current": f"{GIB}",
        "jobs/memory.stat": "inactive_file 0\n",
        "jobs/me/memory.max": "max\n",
        "jobs/me/memory.current": "5",
        "jobs/me/memory.stat": "inactive_file 0\n",
    }
    assert linux_memory(*system("0::/jobs/me\n", files)).available_bytes == GIB


def test_cgroup_1_limit_is_read_from_the_mount_when_the_path_is_the_hosts(system) -> None:
    files = {
        "memory/memory.limit_in_bytes": f"{6 * GIB}",
        "memory/memory.usage_in_bytes": f"{5 * GIB}",
        "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
    }
    memory = linux_memory(*system("9:cpu:/x\n4:memory:/docker/0123abc\n0::/\n", files))
    assert (memory.total_bytes, memory.available_bytes) == (6 * GIB, GIB + GIB // 2)


def test_no_limit_and_generous_limits_change_nothing(system) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": f"{5 * GIB}",
        "memory/memory.stat": "total_inactive_file 0\n",
    }
    assert linux_memory(*system("4:memory:/\n", files)).limit_source == "MemAvailable"


def test_a_group_over_its_limit_has_nothing_left(system) -> None:
    files = {"memory.max": f"{GIB}", "memory.current": f"{2 * GIB}", "memory.stat": "inactive_file 0\n"}
    assert linux_memory(*system("0::/\n", files)).available_bytes == 0


def test_unusable_meminfo_is_one_clear_error(system, tmp_path: Path) -> None:
    proc, cgroups = system(meminfo="MemTotal: 5 kB\n")
    with pytest.raises(VramplanError, match=r"no MemAvailable.*--vram"):
        linux_memory(proc, cgroups)
    with pytest.raises(VramplanError, match=r"cannot be read.*--vram"):
        linux_memory(tmp_path / "nowhere", cgroups)


def test_this_machine_has_memory() -> None:
    memory = host_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_vm_stat_of_a_mac() -> None:
    shown = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10000.\n"
        "Pages active:                            300000.\n"
        "Pages inactive:                           20000.\n"
        "Pages speculative:                         1000.\n"
    )
    assert vm_stat_available(shown) == 31_000 * 16_384
    with pytest.raises(VramplanError):
        vm_stat_available("no such luck")


def test_mac_without_vm_stat_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **options: object) -> None:
        raise FileNotFoundError("vm_stat")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(VramplanError, match="vm_stat"):
        host_memory()


@pytest.mark.parametrize("works", [True, False])
def test_windows_is_asked_through_kernel32(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    import ctypes

    def fill(pointer: object) -> int:
        status = pointer._obj  # what ctypes.byref points to
        assert status.length == ctypes.sizeof(status)
        status.total, status.available = 16 * GIB, 9 * GIB
        return int(works)

    kernel32 = SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    if works:
        assert host_memory() == HostMemory(16 * GIB, 9 * GIB, "GlobalMemoryStatusEx")
    else:
        with pytest.raises(VramplanError, match="GlobalMemoryStatusEx"):
            host_memory()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu sse avx512_bf16 avx2", True), ("fpu amx_bf16 amx_tile", True), ("fpu sse avx2 avx512f", False)],
)
def test_bf16_is_a_flag_of_the_cpu(tmp_path: Path, flags: str, expected: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: avx512_bf16 lookalike\nflags\t\t: {flags}\nbugs\t\t: none\n")
    assert cpu_has_bf16(path) is expected
    assert not cpu_has_bf16(tmp_path / "absent")


# ---------------------------------------------------------------- what is installed


def test_installed_versions_are_read_without_importing() -> None:
    assert (installed_version("torch") or "").startswith("2.")
    assert installed_version("no-such-package-here") is None


def pretend_triton(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    spec = importlib.machinery.ModuleSpec("triton", None) if installed else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name == "triton" else None)


def test_triton_is_found_by_its_spec_and_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert triton_available()
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))  # its __spec__ is None
    assert not triton_available()


def test_a_card_elsewhere_is_assumed_to_compile_and_that_is_said() -> None:
    assert compile_support((8, 9)) == (True, "Compile assumes Linux with Triton.")
    assert compile_support(None)[0]


@pytest.mark.parametrize("here", [True, False])
def test_cards_older_than_volta_do_not_compile(monkeypatch: pytest.MonkeyPatch, here: bool) -> None:
    pretend_triton(monkeypatch, installed=True)
    possible, reason = compile_support((6, 1), here=here, platform="linux")
    assert not possible
    assert "7.0" in reason
    assert "6.1" in reason


def test_this_machine_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_triton(monkeypatch, installed=False)
    possible, reason = compile_support((8, 9), here=True, platform="win32")
    assert not possible
    assert "triton-windows" in reason
    assert not compile_support((8, 9), here=True, platform="linux")[0]


def test_triton_on_linux_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_triton(monkeypatch, installed=True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    possible, reason = compile_support((7, 0), here=True, platform="linux")
    assert not possible
    assert "C compiler" in reason
    assert compile_support((7, 0), here=True, platform="win32")[0]  # triton-windows brings its own
    monkeypatch.setenv("CC", "/opt/cc")
    assert compile_support((7, 0), here=True, platform="linux")[0]
