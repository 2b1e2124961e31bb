"""The doctor's judgement: machines good and bad are put before it, and none of them may end the examination."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vramplan import device
from vramplan.device import GpuProcess, HostMemory, LiveGpu
from vramplan.memory_probe import doctor, machine
from vramplan.memory_probe.alloc_conf import honoured, setting_names, settings_finding, variable_finding
from vramplan.memory_probe.doctor import (
    CHECKPOINT_BYTES,
    OLDEST_TORCH,
    TOPICS,
    bfloat16_finding,
    card_finding,
    compile_finding,
    disk_finding,
    driver_finding,
    examine,
    host_memory_finding,
    memory_finding,
    replay_finding,
    spilling_finding,
    tokenizer_finding,
    torch_finding,
)
from vramplan.memory_probe.finding import Finding, worst
from vramplan.memory_probe.machine import (
    Disk,
    Driver,
    TorchBuild,
    ask_disk,
    ask_driver,
    ask_torch,
    driver_models,
    first_line,
    has_kernels,
    is_wsl,
    names_in_libraries,
    nvidia_on_the_bus,
    torch_libraries,
)
from vramplan.units import GIB, MIB

CUDA, HIP, ANY = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"

RTX4070 = LiveGpu(
    index=0,
    name="NVIDIA GeForce RTX 4070",
    total_bytes=12282 * MIB,
    free_bytes=11700 * MIB,
    driver="570.86.16",
    capability=(8, 9),
    processes=(GpuProcess(77, "Xorg", 60 * MIB),),
)
DRIVER = Driver("answers", "570.86.16", (12, 8), 1)
NO_DRIVER = Driver("absent", error="NVML Shared Library Not Found")
TORCH = TorchBuild("2.13.0+cu128", cuda="12.8", available=True, architectures=("sm_80", "sm_86", "sm_90", "sm_120"))
CPU_TORCH = TorchBuild("2.13.0+cpu")

# as they were found in the wheels of torch 2.6 and 2.15, and in a CPU build of 2.13
TORCH_2_6 = {"c10": frozenset[str](), "c10_cuda": frozenset({CUDA, "backend"})}
TORCH_2_15 = {"c10": frozenset({CUDA, HIP, ANY}), "c10_cuda": frozenset({CUDA, ANY, "backend"})}
TORCH_CPU = {"c10": frozenset({CUDA, HIP, ANY})}


def says(finding: Finding, verdict: str, *words: str) -> None:
    assert finding.verdict == verdict, finding
    for word in words:
        assert word in f"{finding.text} | {finding.remedy}", finding
    assert verdict in ("ok", "unknown") or finding.remedy


# ---------------------------------------------------------------- card, driver, torch


def test_a_known_card_is_well() -> None:
    says(card_finding(RTX4070, DRIVER, TORCH, True, None), "ok", "RTX 4070", "11.99 GiB", "8.9")
    assert "first of 2" in card_finding(RTX4070, replace(DRIVER, cards=2), TORCH, True, None).text


def test_a_card_that_is_not_in_the_catalogue_is_said_to_be_unknown() -> None:
    says(card_finding(replace(RTX4070, name="NVIDIA RTX 9990"), DRIVER, TORCH, True, None), "warning", "catalogue")


def test_no_card_is_a_warning_with_two_ways_on() -> None:
    says(card_finding(None, NO_DRIVER, CPU_TORCH, False, None), "warning", "--gpu 4070", "--gpu cpu")
    says(driver_finding(NO_DRIVER, CPU_TORCH, False), "unknown")
    says(torch_finding(CPU_TORCH, None), "ok")


def test_cards_that_are_hidden_are_not_absent() -> None:
    says(card_finding(None, DRIVER, TORCH, True, ""), "warning", 'CUDA_VISIBLE_DEVICES=""', "unset")
    says(card_finding(None, DRIVER, TORCH, True, "MIG-1"), "warning", "MIG-1", "--vram")


def test_a_card_of_another_maker_is_named() -> None:
    rocm = TorchBuild("2.13.0+rocm6", hip="6.4", available=True)
    says(card_finding(None, NO_DRIVER, rocm, False, None), "warning", "AMD")


def test_a_card_on_the_bus_without_a_driver_is_a_problem_of_the_driver() -> None:
    says(card_finding(None, NO_DRIVER, CPU_TORCH, True, None), "warning", "see driver")
    says(driver_finding(NO_DRIVER, CPU_TORCH, True), "problem", "install", "--gpus all")


def test_a_driver_in_trouble_is_not_an_absent_one() -> None:
    broken = Driver("fails", error="Driver/library version mismatch")
    says(driver_finding(broken, TORCH, True), "problem", "mismatch", "restart")
    says(card_finding(None, broken, TORCH, True, None), "unknown")


def test_without_the_library_nothing_is_claimed() -> None:
    says(driver_finding(Driver("no pynvml"), TORCH, False), "unknown", "pip install nvidia-ml-py")
    says(card_finding(None, Driver("no pynvml"), TORCH, False, None), "unknown")


def test_a_driver_too_old_for_the_torch_build() -> None:
    says(driver_finding(DRIVER, TORCH, True), "ok", "570.86.16", "12.8")
    newer = TorchBuild("2.13.0+cu130", cuda="13.0", notice="The NVIDIA driver on your system is too old")
    says(driver_finding(DRIVER, newer, True), "problem", "CUDA 13.0", "update the driver", "CUDA 12")
    says(torch_finding(newer, RTX4070), "problem", "too old", "see driver")
    assert driver_finding(DRIVER, replace(newer, available=True), True).verdict == "ok"  # with NVIDIA's cuda-compat
    assert driver_finding(replace(DRIVER, cuda=(12, 2)), TORCH, True).verdict == "ok"  # same major version


def test_a_torch_for_cpus_on_a_machine_with_a_card() -> None:
    says(torch_finding(CPU_TORCH, RTX4070), "problem", "CPUs only", "RTX 4070", "CUDA build")
    says(torch_finding(TORCH, RTX4070), "ok", "can use the card")


def test_a_torch_that_is_absent_broken_or_old() -> None:
    says(torch_finding(TorchBuild(None, error="No module named 'torch'"), None), "problem", "pip install torch")
    broken = TorchBuild("2.13.0", error="libcudart.so.13: cannot open shared object file")
    says(torch_finding(broken, None), "problem", "libcudart", "install it again")
    says(torch_finding(replace(TORCH, version="2.6.0+cu124"), RTX4070), "problem", "needs 2.11")
    assert torch_finding(replace(TORCH, version="2.11.0a0+git1"), RTX4070).verdict == "ok"


def test_the_oldest_torch_is_the_projects() -> None:
    project = tomllib.loads((Path(doctor.__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}" in project["project"]["dependencies"]


def test_a_card_newer_or_older_than_the_kernels_of_torch() -> None:
    for capability in ((7, 0), (10, 0)):
        card = replace(RTX4070, capability=capability)
        says(torch_finding(TORCH, card), "problem", "no kernels", ".".join(map(str, capability)))


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_86"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["compute_90"], (12, 0), True),
        (["compute_90a"], (12, 0), False),
        (["compute_120"], (9, 0), False),
        (["sm_120"], (12, 0), True),
        (["gfx90a"], (9, 0), False),
    ],
)
def test_machine_code_and_ptx_run_where_nvidia_says(architectures: Any, capability: Any, runs: bool) -> None:
    assert has_kernels(architectures, capability) is runs


# ---------------------------------------------------------------- memory, bfloat16, compile


def test_a_desktop_is_well_and_a_browser_is_named() -> None:
    says(memory_finding(RTX4070), "ok", "11.43 GiB of 11.99 GiB", "Xorg (pid 77) 60.0 MiB")
    browser = GpuProcess(900, "chrome", 2_500_000_000)
    busy = replace(RTX4070, free_bytes=11994 * MIB - 2_900_000_000, processes=(browser, *RTX4070.processes))
    found = memory_finding(busy)
    says(found, "warning", "9.01 GiB of 11.99 GiB", "2.70 GiB", "chrome (pid 900) 2.33 GiB, Xorg", "--gpu auto")
    assert found.facts["held_by_others_bytes"] == 2_900_000_000
    assert found.facts["processes"][0] == {"pid": 900, "name": "chrome", "used_bytes": 2_500_000_000}


def test_the_warning_begins_where_plan_stops_reserving() -> None:
    at = 11994 * MIB - 3 * GIB // 4
    assert memory_finding(replace(RTX4070, free_bytes=at)).verdict == "ok"
    assert memory_finding(replace(RTX4070, free_bytes=at - 1)).verdict == "warning"


def test_a_full_card_is_a_problem_even_if_nobody_is_named() -> None:
    says(memory_finding(replace(RTX4070, free_bytes=GIB - 1, processes=())), "problem", "does not say which")
    says(memory_finding(None), "unknown")


def test_windows_names_programs_without_figures() -> None:
    shown = replace(RTX4070, processes=(GpuProcess(4, "dwm.exe", None),))
    assert "dwm.exe (pid 4)." in memory_finding(shown).text


def test_turing_has_no_bfloat16_and_ada_has() -> None:
    says(bfloat16_finding(RTX4070, False), "ok", "8.9")
    says(bfloat16_finding(replace(RTX4070, capability=(7, 5)), True), "warning", "7.5", "float16")
    says(bfloat16_finding(replace(RTX4070, capability=None), True), "ok", "8.9")  # the catalogue knows
    says(bfloat16_finding(replace(RTX4070, name="?", capability=None), True), "unknown")
    says(bfloat16_finding(None, False), "unknown", "float32")


def test_compile_needs_a_card_and_triton() -> None:
    says(compile_finding(RTX4070, True, "Triton is installed, so compile is possible.", "3.4"), "ok", "(Triton 3.4)")
    missing = "Compile is left out: Triton is not installed (pip install triton brings it)."
    says(compile_finding(RTX4070, False, missing, None), "warning", "pip install triton", "install what is missing")
    says(compile_finding(replace(RTX4070, capability=(6, 1)), False, "too old", "3.4"), "warning", "none for this card")
    says(compile_finding(None, True, "", "3.4"), "unknown", "Triton 3.4")


# ---------------------------------------------------------------- the allocator


@pytest.mark.parametrize(
    ("libraries", "names"),
    [
        (TORCH_2_6, (CUDA,)),
        (TORCH_2_15, (CUDA, ANY)),
        (TORCH_CPU, (CUDA, HIP, ANY)),
        ({"c10": frozenset({ANY}), "c10_cuda": frozenset()}, (ANY,)),
        ({"c10": frozenset()}, ()),
        ({}, ()),
    ],
)
def test_the_part_for_cards_decides_which_variables_count(libraries: Any, names: tuple[str, ...]) -> None:
    assert honoured(libraries) == names
    found = variable_finding(libraries)
    assert found.facts["honoured"] == list(names)
    says(found, "ok" if names else "unknown", *names)


def test_nothing_set_is_what_plans_assume() -> None:
    says(settings_finding({"PATH": "x"}, TORCH_2_15, "linux"), "ok", "defaults")
    says(settings_finding({ANY: "expandable_segments:True"}, TORCH_2_15, "linux"), "ok", "understood", "--alloc-conf")


def test_a_variable_that_this_torch_does_not_read_is_not_believed() -> None:
    says(settings_finding({ANY: "expandable_segments:True"}, TORCH_2_6, "linux"), "warning", "not read", f"name {CUDA}")
    says(settings_finding({HIP: "expandable_segments:True"}, TORCH_2_15, "linux"), "warning", "not read")
    says(settings_finding({ANY: "expandable_segments:True"}, {}, "linux"), "unknown", "not known")
    both = {HIP: "max_split_size_mb:64", ANY: "max_split_size_mb:64"}
    found = settings_finding(both, TORCH_2_15, "linux")
    says(found, "warning", f"unset {HIP}")
    assert found.facts["effective"] == ANY


def test_of_two_that_disagree_the_old_name_wins_even_when_it_is_empty() -> None:
    for old in ("max_split_size_mb:64", ""):
        found = settings_finding({ANY: "expandable_segments:True", CUDA: old}, TORCH_2_15, "linux")
        says(found, "warning", "disagree", f'{CUDA}="{old}"')
        assert found.facts["effective"] == CUDA
    same = {ANY: "max_split_size_mb:64", CUDA: "max_split_size_mb:64"}
    assert settings_finding(same, TORCH_2_15, "linux").verdict == "ok"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("garbage_collection_threshold:7", "between 0 and 1"),
        ("expandable_segments:yes", "True or False"),
        ("expandable_segments=True", "known neither here nor to this torch"),
        ("max_split_size:128", "did you mean max_split_size_mb"),
        ("large_segment_size_mb:64,max_split_size_mb:32", "must not be below"),
        (":5", "known neither"),
    ],
)
def test_a_variable_that_does_not_parse_is_a_problem(value: str, words: str) -> None:
    says(settings_finding({ANY: value}, TORCH_2_15, "linux"), "problem", words, f"correct {ANY}")


@pytest.mark.parametrize("value", ["backend:cudaMallocAsync", "roundup_power2_divisions:[256:1,512:2,>:4]"])
def test_what_torch_knows_and_plans_do_not_is_a_warning(value: str) -> None:
    says(settings_finding({ANY: f"max_split_size_mb:128,{value}"}, TORCH_2_15, "linux"), "warning", value)
    assert settings_finding({ANY: value}, TORCH_CPU, "linux").verdict == "warning"  # a CPU build lacks many names


def test_settings_that_windows_lacks_and_a_cache_that_is_off() -> None:
    says(settings_finding({ANY: "expandable_segments:True"}, TORCH_2_15, "win32"), "warning", "Windows")
    off = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    says(settings_finding(off, TORCH_2_15, "linux"), "warning", "unset PYTORCH_NO_CUDA_MEMORY_CACHING")


def test_the_names_to_look_up_are_those_in_the_variables() -> None:
    environ = {CUDA: "a:1, b:[x:1,y:2],,:3", ANY: "c", "OTHER": "d:1"}
    assert setting_names(environ) == {"a", "b", "c"}


def test_only_a_string_of_its_own_counts_as_a_name_in_a_library(tmp_path: Path) -> None:
    (tmp_path / "libc10_cuda.so").write_bytes(
        b"ELF\0set PYTORCH_ALLOC_CONF\0" + b"PYTORCH_ALLOC_CONF=x\0" + b"\x01PYTORCH_CUDA_ALLOC_CONF\0"
    )
    (tmp_path / "c10.dll").write_bytes(b"PYTORCH_ALLOC_CONF\0")
    (tmp_path / "libc10_hip.so").write_bytes(b"")
    (tmp_path / "libc10d_test.so").write_bytes(b"\0PYTORCH_HIP_ALLOC_CONF\0")
    found = names_in_libraries(tmp_path, [CUDA, HIP, ANY, "\udcff"])
    assert found == {"c10_cuda": frozenset({CUDA}), "c10": frozenset({ANY})}
    assert names_in_libraries(tmp_path / "absent", [CUDA]) == {}


def test_the_installed_torch_is_asked_through_its_own_libraries() -> None:
    folder = torch_libraries()
    assert folder is not None
    assert importlib.util.find_spec("torch") is not None
    names = honoured(names_in_libraries(folder, [CUDA, HIP, ANY]))
    assert {CUDA, ANY} <= set(names)  # torch 2.11 and later; older ones are not supported


# ---------------------------------------------------------------- spilling, disk, host, tokenizer


def test_only_linux_and_tcc_raise_an_error() -> None:
    says(spilling_finding(False, (), "linux", RTX4070), "ok")
    says(spilling_finding(False, ("TCC",), "win32", RTX4070), "ok", "TCC")
    wsl = spilling_finding(True, (), "linux", RTX4070)
    says(wsl, "warning", "WSL", "budget")
    assert "Sysmem" not in wsl.remedy
    for models in (("WDDM",), ("TCC", "MCDM"), ()):
        says(spilling_finding(False, models, "win32", RTX4070), "warning", "Prefer No Sysmem Fallback", "budget")
    says(spilling_finding(False, (), "win32", None), "unknown")


@pytest.mark.parametrize(
    ("release", "wsl"),
    [("5.15.167.4-microsoft-standard-WSL2", True), ("4.4.0-19041-Microsoft", True), ("6.8.0-49-generic", False)],
)
def test_wsl_is_known_by_its_kernel(tmp_path: Path, release: str, wsl: bool) -> None:
    assert not is_wsl(tmp_path)
    (tmp_path / "version").write_text(f"Linux version {release} (root@host)")
    assert is_wsl(tmp_path) is wsl
    (tmp_path / "version").unlink()
    (tmp_path / "sys" / "kernel").mkdir(parents=True)
    (tmp_path / "sys" / "kernel" / "osrelease").write_text(f"{release}\n")
    assert is_wsl(tmp_path) is wsl


@pytest.mark.parametrize(("vendor", "kind", "found"), [("0x10de", "0x030000", True), ("0x10de", "0x040300", False),
                                                       ("0x1002", "0x030000", False)])  # fmt: skip
def test_only_display_controllers_of_nvidia_count(tmp_path: Path, vendor: str, kind: str, found: bool) -> None:
    (tmp_path / "0000:00:00.0").mkdir()
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "vendor").write_text(f"{vendor}\n")
    (tmp_path / "0000:01:00.0" / "class").write_text(f"{kind}\n")
    assert nvidia_on_the_bus(tmp_path) is found
    assert not nvidia_on_the_bus(tmp_path / "absent")


def test_the_disk_is_held_against_checkpoints_of_124m() -> None:
    assert CHECKPOINT_BYTES == 12 * 124_373_760
    roomy = Disk(Path("runs"), 3 * CHECKPOINT_BYTES, True)
    says(disk_finding(roomy), "ok", "4.17 GiB")
    says(disk_finding(replace(roomy, free_bytes=3 * CHECKPOINT_BYTES - 1)), "warning", "124M", "1.39 GiB")
    says(disk_finding(replace(roomy, free_bytes=CHECKPOINT_BYTES)), "warning")
    says(disk_finding(replace(roomy, free_bytes=CHECKPOINT_BYTES - 1)), "problem", "1.39 GiB")
    says(disk_finding(replace(roomy, writable=False)), "problem", "cannot be written")


def test_the_disk_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    found = ask_disk(tmp_path / "runs" / "first")
    assert (found.looked_at, found.writable) == (tmp_path, True)
    assert found.free_bytes > 0
    (tmp_path / "file").write_text("")
    assert not ask_disk(tmp_path / "file").writable


def test_host_memory_must_hold_python_and_a_checkpoint() -> None:
    needed = 300 * MIB + CHECKPOINT_BYTES
    says(host_memory_finding(HostMemory(8 * GIB, needed, "MemAvailable")), "ok", "MemAvailable")
    says(host_memory_finding(HostMemory(8 * GIB, needed - 1, "cgroup limit")), "warning", "cgroup limit", "1.68 GiB")


def test_a_tokenizer_that_must_be_downloaded_is_a_warning() -> None:
    says(tokenizer_finding("0.9", "tiktoken's cache in /x", ()), "ok", "no network")
    says(tokenizer_finding("0.9", None, ("tiktoken's cache: none",)), "warning", "cache: none", "vramplan[offline]")
    says(tokenizer_finding(None, None, ()), "problem", "pip install tiktoken")


def test_it_says_how_estimates_are_replayed() -> None:
    says(replay_finding(True), "ok", "compiled loop")
    says(replay_finding(False), "ok", "in Python", "C compiler")


# ---------------------------------------------------------------- asking


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


def nvml(monkeypatch: pytest.MonkeyPatch, **changes: Callable[..., Any]) -> types.ModuleType:
    module = types.ModuleType("pynvml")
    functions: dict[str, Any] = {
        "NVMLError": NVMLError,
        "NVMLLibraryMismatchError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlSystemGetDriverVersion": lambda: "570.86.16",
        "nvmlSystemGetCudaDriverVersion": lambda: 12080,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetCurrentDriverModel": lambda handle: 0,
    }
    for name, function in (functions | changes).items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def fails(error: Exception) -> Callable[..., Any]:
    def function(*_: object) -> None:
        raise error

    return function


def test_the_driver_is_asked_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nvml(monkeypatch)
    assert ask_driver() == Driver("answers", "570.86.16", (12, 8), 1)
    assert driver_models(module, 2, "win32") == ("WDDM", "WDDM")
    assert driver_models(module, 2, "linux") == ()
    nvml(monkeypatch, nvmlSystemGetCudaDriverVersion=fails(NVMLError(3)))
    assert ask_driver().cuda is None
    module = nvml(monkeypatch, nvmlDeviceGetCurrentDriverModel=fails(NVMLError(3)))
    assert driver_models(module, 1, "win32") == ()


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"nvmlInit": fails(NVMLError(12))}, "absent"),
        ({"nvmlInit": fails(NVMLError(9))}, "absent"),
        ({"nvmlInit": fails(OSError("libnvidia-ml.so.1"))}, "absent"),
        ({"nvmlInit": fails(NVMLError(18))}, "fails"),
        ({"nvmlDeviceGetCount": fails(NVMLError(999)), "nvmlShutdown": fails(NVMLError(1))}, "fails"),
    ],
)
def test_an_absent_driver_and_one_in_trouble(monkeypatch: pytest.MonkeyPatch, changes: Any, state: str) -> None:
    nvml(monkeypatch, **changes)
    found = ask_driver()
    assert (found.state, bool(found.error)) == (state, True)


def test_real_pynvml_has_every_name_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pytest.importorskip("pynvml")
    fake = nvml(monkeypatch)
    assert [name for name in vars(fake) if name.startswith("nvml") and not hasattr(real, name)] == []
    assert (real.NVML_ERROR_DRIVER_NOT_LOADED, real.NVML_ERROR_LIBRARY_NOT_FOUND) == machine._ABSENT
    assert (real.NVML_DRIVER_WDDM, real.NVML_DRIVER_WDM) == (0, 1)


def test_the_real_torch_answers() -> None:
    import torch

    found = ask_torch()
    assert (found.version, found.cuda, found.error) == (torch.__version__, torch.version.cuda, "")


def test_what_torch_says_about_the_driver_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    import torch

    def unavailable() -> bool:
        warnings.warn("CUDA initialization: the driver is too old\nmore", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    assert ask_torch().notice == "CUDA initialization: the driver is too old"


class _Broken:
    """A finder under which importing torch fails as with a missing library."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")


def test_a_torch_that_cannot_be_loaded_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Broken(), *sys.meta_path])
    found = ask_torch()
    assert found.version is not None
    assert "libcudart" in found.error
    by_topic = {finding.topic: finding for finding in examine()}
    says(by_topic["torch"], "problem", "libcudart")
    assert list(by_topic) == list(TOPICS)


def test_a_torch_that_fails_on_import_still_has_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('[WinError 126] c10.dll')\n")
    (tmp_path / "torch" / "lib" / "c10_cuda.dll").write_bytes(b"\0PYTORCH_CUDA_ALLOC_CONF\0")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {finding.topic: finding for finding in examine()}
    says(found["torch"], "problem", "WinError 126")
    assert found["allocator_variable"].facts["honoured"] == [CUDA]


def test_a_torch_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert torch_libraries() is None
    by_topic = {finding.topic: finding for finding in examine()}
    assert by_topic["torch"].verdict == "problem"
    assert by_topic["allocator_variable"].verdict == "unknown"


def test_no_error_ends_the_examination(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml(monkeypatch, nvmlInit=fails(RuntimeError("segment of doom")))
    monkeypatch.setattr(device, "_PROC", tmp_path / "absent")
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("nvidia_on_the_bus", "names_in_libraries", "is_wsl", "ask_disk"):
        monkeypatch.setattr(machine, name, fails(ValueError("nothing works")))
    monkeypatch.setattr(doctor, "local_source", fails(ImportError("no regex")))
    found = {finding.topic: finding for finding in examine()}
    assert list(found) == list(TOPICS)
    says(found["driver"], "problem", "segment of doom")
    says(found["host_memory"], "unknown", "meminfo")
    for topic in ("spilling", "disk"):
        says(found[topic], "unknown", "nothing works")
    says(found["tokenizer"], "unknown", "no regex")


def test_the_machine_of_a_4070_owner_with_everything_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The facts reach the judgements: each one is read from where the examination reads it."""
    nvml(monkeypatch)
    monkeypatch.setattr(doctor, "live_gpu", lambda: replace(RTX4070, free_bytes=9 * GIB, capability=(6, 1)))
    monkeypatch.setattr(machine, "ask_torch", lambda: CPU_TORCH)
    monkeypatch.setattr(machine, "is_wsl", lambda: True)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    monkeypatch.setattr(doctor, "host_memory", lambda: HostMemory(GIB, 1, "test"))
    monkeypatch.setattr(doctor, "local_source", lambda: (None, ()))
    monkeypatch.setenv(ANY, "garbage_collection_threshold:7")
    monkeypatch.delenv(CUDA, raising=False)
    monkeypatch.delenv(HIP, raising=False)
    found = {finding.topic: finding.verdict for finding in examine(tmp_path)}
    assert found == {
        "card": "ok", "driver": "ok", "torch": "problem", "memory": "warning", "bfloat16": "warning",
        "compile": "warning", "allocator_variable": "ok", "allocator_settings": "problem", "spilling": "warning",
        "disk": "problem", "host_memory": "warning", "tokenizer": "warning", "replay": "ok",
    }  # fmt: skip


def test_verdicts_have_an_order_and_errors_one_line() -> None:
    assert worst(["ok", "problem", "warning"]) == "problem"
    assert worst(["unknown", "ok"]) == "unknown"
    assert worst([]) == "ok"
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line("x" * 999)) == 203
