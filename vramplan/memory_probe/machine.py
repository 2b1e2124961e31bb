"""The facts that ``doctor`` judges: the driver, the torch build and its libraries, the kernel, the disk.

Every function answers whatever the machine looks like. torch is imported only by :func:`ask_torch`, and nothing is put
on a card: neither tensors nor a CUDA context.
"""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..device import installed_version

_ABSENT = (9, 12)
"""NVML_ERROR_DRIVER_NOT_LOADED and NVML_ERROR_LIBRARY_NOT_FOUND: there is no driver, rather than one in trouble."""

_DRIVER_MODELS = {0: "WDDM", 1: "TCC", 2: "MCDM"}
"""nvmlDriverModel_t in nvml.h, where TCC is called WDM."""

_LIBRARY = re.compile(r"(?:lib)?(c10(?:_cuda|_hip)?)\.(?:so|dll|dylib)[.\d]*")
_NVIDIA, _DISPLAY = "0x10de", "0x03"
"""Vendor, and the beginning of the class of display controllers, on the PCI bus."""


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's driver as NVML tells: ``cuda`` is the newest CUDA it runs, ``models`` those of its cards on Windows.

    ``state`` is "answers", "absent", "fails" (``error`` says how) or "no pynvml", where it cannot be asked.
    """

    state: Literal["answers", "absent", "fails", "no pynvml"]
    version: str = ""
    cuda: tuple[int, int] | None = None
    cards: int = 0
    models: tuple[str, ...] = ()
    error: str = ""


def ask_driver() -> Driver:
    """Ask NVML about the driver."""
    try:
        import pynvml as nvml
    except ImportError:
        return Driver("no pynvml")
    try:
        nvml.nvmlInit()
    except OSError as error:
        return Driver("absent", error=first_line(error))
    except nvml.NVMLError as error:
        return Driver("absent" if getattr(error, "value", None) in _ABSENT else "fails", error=first_line(error))
    try:
        cards = int(nvml.nvmlDeviceGetCount())
        return Driver("answers", str(nvml.nvmlSystemGetDriverVersion()), _cuda(nvml), cards, driver_models(nvml, cards))
    except nvml.NVMLError as error:
        return Driver("fails", error=first_line(error))
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _cuda(nvml: Any) -> tuple[int, int] | None:
    try:
        version = int(nvml.nvmlSystemGetCudaDriverVersion())
    except nvml.NVMLError:
        return None
    return version // 1000, version % 1000 // 10


def driver_models(nvml: Any, cards: int, platform: str = sys.platform) -> tuple[str, ...]:
    """WDDM, TCC or MCDM for each card under Windows; nothing elsewhere, and where the driver does not tell."""
    if platform != "win32":
        return ()
    try:
        numbers = [nvml.nvmlDeviceGetCurrentDriverModel(nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(cards)]
    except nvml.NVMLError:
        return ()
    return tuple(_DRIVER_MODELS.get(int(number), f"model {number}") for number in numbers)


def nvidia_on_the_bus(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether the PCI bus of this Linux shows an NVIDIA display controller, with or without a driver."""
    for device in _folders(devices):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
            if vendor == _NVIDIA and kind.startswith(_DISPLAY):
                return True
    return False


def _folders(parent: Path) -> list[Path]:
    try:
        return list(parent.iterdir())
    except OSError:
        return []


def is_wsl(proc: Path = Path("/proc")) -> bool:
    """Whether this Linux is Windows' own (WSL): its kernel is called so. False where /proc is absent."""
    for name in ("sys/kernel/osrelease", "version"):
        with contextlib.suppress(OSError):
            if "microsoft" in (proc / name).read_text(encoding="utf-8", errors="replace").lower():
                return True
    return False


# ---------------------------------------------------------------- torch


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """An installed torch. ``version`` is None without one; ``error`` is why it cannot be imported.

    ``cuda`` and ``hip`` are what it was built for, ``available`` whether it can use a card now (``notice`` is what it
    said when it was asked), ``architectures`` what it has kernels for: ``sm_89``, ``compute_120``.
    """

    version: str | None
    cuda: str | None = None
    hip: str | None = None
    available: bool = False
    architectures: tuple[str, ...] = ()
    notice: str = ""
    error: str = ""


def ask_torch() -> TorchBuild:
    """Import torch and ask it; a torch that fails, in whatever way, is an answer."""
    version = installed_version("torch")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            import torch

            said.clear()  # what it said while it was imported is not about the card
            available = torch.cuda.is_available()
            return TorchBuild(
                version=str(torch.__version__),
                cuda=torch.version.cuda,
                hip=torch.version.hip,
                available=available,
                architectures=tuple(torch.cuda.get_arch_list()) if available else (),
                notice=first_line(said[-1].message) if said and not available else "",
            )
        except Exception as error:  # a missing DLL, a half-finished installation, a numpy of the wrong age: no matter
            return TorchBuild(version, error=first_line(error))


def has_kernels(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a torch with kernels for these runs on a card of this compute capability.

    Machine code (``sm_86``) runs on its own major version from its minor version on, with the letter ``a`` only where
    both are equal; PTX (``compute_90``) is translated for every later card. (CUDA C++ Programming Guide, compatibility)
    """
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if found is None:
            continue
        built = int(found[2]), int(found[3])
        if built == capability or (found[1] == "compute" and not found[4] and built < capability):
            return True
        if found[4] != "a" and built[0] == capability[0] and built[1] < capability[1]:
            return True
    return False


def torch_libraries() -> Path | None:
    """The folder of torch's shared libraries, found without importing it; None without a torch."""
    try:
        found = importlib.util.find_spec("torch")
    except (ImportError, ValueError):  # ValueError: something that is not a package was put into sys.modules
        return None
    places = found.submodule_search_locations if found is not None else None
    return Path(places[0]) / "lib" if places else None


def names_in_libraries(folder: Path, names: Iterable[str]) -> dict[str, frozenset[str]]:
    """Which of these names each library of torch's allocator holds: ``{"c10": {...}, "c10_cuda": {...}}``.

    Only a name that is a string of its own counts, as what is given to ``getenv`` must be: error messages mention
    variables that are not read. The libraries have 2 MB, so this takes a twentieth of a second.
    """
    wanted, found = tuple(names), {}
    for path in _folders(folder):
        library = _LIBRARY.fullmatch(path.name)
        if library is None:
            continue
        try:
            with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
                found[library[1]] = frozenset(name for name in wanted if _stands_alone(content, os.fsencode(name)))
        except (OSError, ValueError):  # ValueError: an empty file
            continue
    return found


def _stands_alone(content: mmap.mmap, name: bytes) -> bool:
    at = content.find(name + b"\0")
    while at > 0 and 0x20 <= content[at - 1] < 0x7F:  # the end of a longer text
        at = content.find(name + b"\0", at + 1)
    return at >= 0


# ---------------------------------------------------------------- disk


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system that would hold ``path``: ``looked_at`` is the nearest folder above it that exists."""

    looked_at: Path
    free_bytes: int
    writable: bool


def ask_disk(path: Path) -> Disk:
    """Free space where ``path`` is or would be. Raises OSError when the system does not tell."""
    path = path.absolute()
    existing = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    return Disk(existing, shutil.disk_usage(existing).free, existing.is_dir() and os.access(existing, os.W_OK))


def first_line(error: object, limit: int = 200) -> str:
    """What went wrong, as one line of at most ``limit`` characters; the type where there is no text."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= limit else text[:limit] + "..."
