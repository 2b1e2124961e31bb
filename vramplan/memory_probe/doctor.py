"""What can keep a plan or a run from working on this machine: every topic with a verdict and a remedy.

Each topic is a function of the facts it judges, so that any machine can be put before it; :func:`examine` gathers the
facts of this one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from ..device import (
    GpuProcess,
    HostMemory,
    LiveGpu,
    compile_support,
    cpu_has_bf16,
    host_memory,
    installed_version,
    live_gpu,
)
from ..errors import ConfigError
from ..planner.first_steps import COMPILED
from ..planner.gpu import DESKTOP_RESERVE_BYTES, Gpu, find_gpu, kept_by_driver
from ..planner.memory import context_bytes
from ..planner.shape import Shape
from ..trainer.tokenizer import local_source
from ..units import GIB, gib
from . import machine
from .alloc_conf import VARIABLES, setting_names, settings_finding, variable_finding
from .finding import Finding
from .machine import Disk, Driver, TorchBuild, first_line, has_kernels

T = TypeVar("T")

TOPICS = (
    "card", "driver", "torch", "memory", "bfloat16", "compile", "allocator_variable", "allocator_settings", "spilling",
    "disk", "host_memory", "tokenizer", "replay",
)  # fmt: skip

OLDEST_TORCH = (2, 11)
"""As in pyproject.toml."""

LEAST_FREE_BYTES = GIB
"""With less free on a card there is nothing to plan: context, workspaces and 12 bytes per parameter take it all."""

CHECKPOINT_BYTES = 12 * Shape(n_layer=12, n_head=12, n_embd=768).parameters
"""A checkpoint of GPT-2's 124M: weights and two moments, 4 bytes each."""

CHECKPOINTS_AT_ONCE = 3
"""The two that ``train`` keeps, and the one it writes before it removes the older."""

SYSMEM_POLICY = "Manage 3D settings > CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback"
"""Where NVIDIA's control panel makes it an error (driver 546.01). WSL does not follow it (microsoft/WSL#11050)."""

SHOWN_PROCESSES = 6


def card_finding(live: LiveGpu | None, driver: Driver, torch: TorchBuild, on_bus: bool, visible: str | None) -> Finding:
    """Which card would be used. ``visible`` is CUDA_VISIBLE_DEVICES, ``on_bus`` whether the PCI bus shows a card."""
    if live is not None:
        capability = f", compute capability {_dotted(live.capability)}" if live.capability else ""
        facts = {
            "name": live.name,
            "total_bytes": live.total_bytes,
            "capability": live.capability,
            "cards": driver.cards,
        }
        more = f" The first of {driver.cards} in this machine." if driver.cards > 1 else ""
        text = f"{live.name}, {gib(live.total_bytes)}{capability}.{more}"
        if _in_catalogue(live) is not None:
            return Finding("card", "ok", text, "", facts)
        text += " It is not in the catalogue: memory can be planned, its speed is unknown."
        return Finding("card", "warning", text, "none needed; `vramplan gpus` lists cards to compare with", facts)
    facts = {"cards": driver.cards, "visible": visible}
    if driver.cards and visible is not None:
        text = (
            f'The driver has {driver.cards} card(s), but CUDA_VISIBLE_DEVICES="{visible}" shows none that can be asked.'
        )
        return Finding("card", "warning", text, "unset it, or give the size of the part you may use with --vram", facts)
    if driver.cards or driver.state in ("fails", "no pynvml"):
        return Finding("card", "unknown", "Whether a card can be used cannot be asked.", "see driver", facts)
    if on_bus:
        return Finding("card", "warning", "An NVIDIA card is on the bus, but no driver answers.", "see driver", facts)
    if torch.hip and torch.available:
        text = "torch sees an AMD card; plans know NVIDIA cards only."
        return Finding("card", "warning", text, "give its size with --vram; take the figures with care", facts)
    remedy = "plan for a named card (vramplan plan --gpu 4070), or train on this CPU (--gpu cpu)"
    return Finding("card", "warning", "No NVIDIA card with a driver is here.", remedy, facts)


def driver_finding(driver: Driver, torch: TorchBuild, on_bus: bool) -> Finding:
    """Whether the driver answers, and is new enough for the CUDA that torch was built with."""
    facts = {"state": driver.state, "version": driver.version, "cuda": driver.cuda, "error": driver.error}
    if driver.state == "no pynvml":
        remedy = "pip install nvidia-ml-py"
        return Finding("driver", "unknown", "It cannot be asked: nvidia-ml-py is not installed.", remedy, facts)
    if driver.state == "fails":
        remedy = "restart the machine (a driver that was updated needs it); if that does not help, install it again"
        return Finding("driver", "problem", f"The driver is in trouble: {driver.error}.", remedy, facts)
    if driver.state == "absent" and on_bus:
        remedy = "install NVIDIA's driver; in a container, start it with access to the card (docker run --gpus all)"
        return Finding("driver", "problem", "An NVIDIA card is on the bus, but no driver answers.", remedy, facts)
    if driver.state == "absent":
        return Finding("driver", "unknown", "No NVIDIA driver, and no card that would need one.", "", facts)
    text = f"{driver.version}{f', runs CUDA up to {_dotted(driver.cuda)}' if driver.cuda else ''}."
    built = _major(torch.cuda)
    if driver.cuda and built > driver.cuda[0] and not torch.available:
        text += f" This torch was built for CUDA {torch.cuda}, which it cannot run."
        remedy = f"update the driver, or install a torch built for CUDA {driver.cuda[0]}"
        return Finding("driver", "problem", text, remedy, facts)
    return Finding("driver", "ok", text, "", facts)


def torch_finding(torch: TorchBuild, live: LiveGpu | None) -> Finding:
    """Whether torch imports, is new enough, and can use the card that is here."""
    facts = {
        "version": torch.version, "cuda": torch.cuda, "hip": torch.hip, "available": torch.available,
        "architectures": list(torch.architectures), "error": torch.error,
    }  # fmt: skip
    if torch.version is None:
        remedy = "pip install torch; planning works without it"
        return Finding("torch", "problem", f"torch is not installed: {torch.error}.", remedy, facts)
    if torch.error:
        remedy = "install it again in a fresh environment (on Windows also Microsoft's Visual C++ redistributable)"
        return Finding("torch", "problem", f"torch {torch.version} cannot be imported: {torch.error}", remedy, facts)
    built = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "CPUs only"
    text = f"{torch.version}, built for {built}."
    if () < _release(torch.version) < OLDEST_TORCH:
        remedy = f'pip install --upgrade "torch>={_dotted(OLDEST_TORCH)}"'
        return Finding("torch", "problem", f"{text} vramplan needs {_dotted(OLDEST_TORCH)}.", remedy, facts)
    if live is None:
        return Finding("torch", "ok", text, "", facts)
    if not torch.cuda:
        remedy = "pip uninstall torch, then install the CUDA build with the command that pytorch.org shows"
        return Finding("torch", "problem", f"{text} It cannot use the {live.name}.", remedy, facts)
    if not torch.available:
        said = f": {torch.notice}" if torch.notice else "."
        remedy = "see driver; if that is well, restart the machine, then install torch again"
        return Finding("torch", "problem", f"{text} It cannot use the {live.name}{said}", remedy, facts)
    if live.capability and torch.architectures and not has_kernels(torch.architectures, live.capability):
        text += (
            f" It has no kernels for compute capability {_dotted(live.capability)}: {', '.join(torch.architectures)}."
        )
        remedy = (
            "install a torch build that has them: a newer one for a new card, one for an older CUDA for an old card"
        )
        return Finding("torch", "problem", text, remedy, facts)
    return Finding("torch", "ok", f"{text} It can use the card.", "", facts)


def memory_finding(live: LiveGpu | None) -> Finding:
    """What is free on the card, and who holds the rest.

    A warning when others hold more than the 0.75 GiB that ``plan`` keeps back on a named card (beside what the driver
    itself takes), a problem when less than LEAST_FREE_BYTES is left.
    """
    if live is None:
        return Finding("memory", "unknown", "No card whose memory could be asked.")
    card = _in_catalogue(live)
    own = kept_by_driver(live.total_bytes) if card is None else card.total_bytes - card.usable_bytes
    others = max(0, live.total_bytes - live.free_bytes - own)
    holders = [{"pid": p.pid, "name": p.name, "used_bytes": p.used_bytes} for p in live.processes]
    facts = {
        "total_bytes": live.total_bytes, "free_bytes": live.free_bytes, "held_by_others_bytes": others,
        "processes": holders,
    }  # fmt: skip
    named = ", ".join(map(_holder, live.processes[:SHOWN_PROCESSES])) or "the driver does not say which"
    text = f"{gib(live.free_bytes)} of {gib(live.total_bytes)} is free."
    if others or live.processes:
        text += f" Programs hold about {gib(others)}: {named}."
    if live.free_bytes < LEAST_FREE_BYTES:
        return Finding("memory", "problem", f"{text} No training fits.", "end what holds the memory", facts)
    if others > DESKTOP_RESERVE_BYTES:
        remedy = "close what you can (browsers hold most); plan with what is free: vramplan plan --gpu auto"
        return Finding("memory", "warning", text, remedy, facts)
    return Finding("memory", "ok", text, "", facts)


def bfloat16_finding(live: LiveGpu | None, cpu_bf16: bool) -> Finding:
    """Whether the card multiplies bfloat16: compute capability 8.0 and later."""
    card = _in_catalogue(live) if live is not None else None
    capability = (live.capability if live is not None else None) or (card.capability if card is not None else None)
    facts = {"capability": capability, "cpu": cpu_bf16}
    if live is None:
        cpu = "multiplies it in hardware" if cpu_bf16 else "does not: plans for it take float32"
        return Finding("bfloat16", "unknown", f"No card to judge; this CPU {cpu}.", "", facts)
    if capability is None:
        remedy = "give --dtype float16 if the card is older than 2020"
        return Finding("bfloat16", "unknown", "The driver does not tell the compute capability.", remedy, facts)
    if capability >= (8, 0):
        return Finding("bfloat16", "ok", f"Compute capability {_dotted(capability)} has it.", "", facts)
    text = f"Compute capability {_dotted(capability)} does not have it; 8.0 and later do."
    return Finding("bfloat16", "warning", text, "use --dtype float16, which train runs with loss scaling", facts)


def compile_finding(live: LiveGpu | None, possible: bool, why: str, triton: str | None) -> Finding:
    """Whether torch.compile works here; ``possible`` and ``why`` are what ``compile_support`` says."""
    facts = {"possible": possible, "triton": triton}
    if live is None:
        here = f"Triton {triton} is installed" if triton else "Triton is not installed"
        return Finding("compile", "unknown", f"No card to compile for; {here}.", "", facts)
    if possible:
        return Finding("compile", "ok", f"{why[:-1]}{f' (Triton {triton})' if triton else ''}.", "", facts)
    old = live.capability is not None and live.capability < (7, 0)
    remedy = (
        "none for this card" if old else "install what is missing; until then plan --gpu auto makes plans without it"
    )
    return Finding("compile", "warning", why, remedy, facts)


def spilling_finding(wsl: bool, models: tuple[str, ...], platform: str, live: LiveGpu | None) -> Finding:
    """Whether too much memory is an error here, or spills silently to host memory (WSL2, and Windows' WDDM)."""
    facts = {"wsl": wsl, "driver_models": list(models), "platform": platform}
    remedy = "trust the plan's budget and the probe, not the absence of an error"
    spills = "asking for more memory than the card has raises nothing: it spills to host memory, many times slower."
    if wsl:
        return Finding("spilling", "warning", f"WSL: {spills}", remedy, facts)
    if platform != "win32":
        text = "Asking for more memory than the card has is an error here; nothing spills to host memory."
        return Finding("spilling", "ok", text, "", facts)
    if live is None:
        return Finding("spilling", "unknown", "Windows, and no card whose driver model could be asked.", "", facts)
    if models and set(models) == {"TCC"}:
        return Finding("spilling", "ok", "Windows' TCC driver: too much memory is an error.", "", facts)
    model = next((name for name in models if name != "TCC"), "not told, taken as WDDM")
    remedy += f"; in NVIDIA's control panel: {SYSMEM_POLICY}"
    return Finding("spilling", "warning", f"Windows, driver model {model}: {spills}", remedy, facts)


def disk_finding(disk: Disk) -> Finding:
    """Whether checkpoints can be written.

    A problem when not even one of a 124M model fits (12 bytes per parameter, 1.39 GiB), a warning when three do not:
    the two that are kept, and the one that is written before the older is removed.
    """
    facts = {"path": str(disk.looked_at), "free_bytes": disk.free_bytes, "checkpoint_bytes": CHECKPOINT_BYTES}
    text = f"{gib(disk.free_bytes)} free in {disk.looked_at}."
    one = f"A checkpoint of a 124M model takes {gib(CHECKPOINT_BYTES)}"
    if not disk.writable:
        return Finding("disk", "problem", f"{disk.looked_at} cannot be written.", "write runs elsewhere: --out", facts)
    if disk.free_bytes < CHECKPOINT_BYTES:
        return Finding("disk", "problem", f"{text} {one}.", "free some, or write runs elsewhere", facts)
    if disk.free_bytes < CHECKPOINTS_AT_ONCE * CHECKPOINT_BYTES:
        text += f" {one}, and up to {CHECKPOINTS_AT_ONCE} are there at once."
        return Finding("disk", "warning", text, "free some, or write runs elsewhere", facts)
    return Finding("disk", "ok", text, "", facts)


def host_memory_finding(memory: HostMemory) -> Finding:
    """Whether a 124M run can be resumed: Python with torch, and the checkpoint, which is loaded into host memory."""
    needed = context_bytes(None, "cpu") + CHECKPOINT_BYTES
    facts = {"total_bytes": memory.total_bytes, "available_bytes": memory.available_bytes, "needed_bytes": needed}
    text = f"{gib(memory.available_bytes)} of {gib(memory.total_bytes)} is available ({memory.limit_source})."
    if memory.available_bytes >= needed:
        return Finding("host_memory", "ok", text, "", facts)
    text += f" Resuming a 124M run takes {gib(needed)}: Python with torch, and the checkpoint."
    return Finding("host_memory", "warning", text, "close programs, raise the container's limit, or add swap", facts)


def tokenizer_finding(tiktoken: str | None, source: str | None, failures: tuple[str, ...]) -> Finding:
    """Where GPT-2's tokens would come from; ``source`` is None when only a download is left."""
    facts = {"tiktoken": tiktoken, "source": source, "failures": list(failures)}
    if tiktoken is None:
        return Finding("tokenizer", "problem", "tiktoken is not installed.", "pip install tiktoken", facts)
    if source is not None:
        return Finding("tokenizer", "ok", f"From {source}: no network needed.", "", facts)
    text = f"Only tiktoken's download is left ({'; '.join(failures)}): the first run needs a network."
    return Finding("tokenizer", "warning", text, 'pip install "vramplan[offline]"', facts)


def replay_finding(compiled: bool) -> Finding:
    """Whether estimates replay the allocator in C."""
    if compiled:
        return Finding("replay", "ok", "The allocator is replayed by a compiled loop.", "", {"compiled": True})
    text = "The allocator is replayed in Python: an estimate says the same and takes several times as long."
    remedy = "where that matters, install a C compiler and Python's headers, then vramplan again"
    return Finding("replay", "ok", text, remedy, {"compiled": False})


# ---------------------------------------------------------------- this machine


def examine(out: Path | None = None) -> list[Finding]:
    """Look at this machine: one finding for each of TOPICS, in their order, whatever fails. ``out``: where runs go."""
    driver = _asked(machine.ask_driver, lambda error: Driver("fails", error=first_line(error)))
    live = _asked(live_gpu, lambda _: None)
    torch = _asked(machine.ask_torch, lambda error: TorchBuild(None, error=first_line(error)))
    on_bus = _asked(machine.nvidia_on_the_bus, lambda _: False)
    environ = dict(os.environ)
    libraries = _asked(lambda: _libraries(environ), lambda _: {})
    findings: dict[str, Callable[[], Finding]] = {
        "card": lambda: card_finding(live, driver, torch, on_bus, environ.get("CUDA_VISIBLE_DEVICES")),
        "driver": lambda: driver_finding(driver, torch, on_bus),
        "torch": lambda: torch_finding(torch, live),
        "memory": lambda: memory_finding(live),
        "bfloat16": lambda: bfloat16_finding(live, cpu_has_bf16()),
        "compile": lambda: _compile(live),
        "allocator_variable": lambda: variable_finding(libraries),
        "allocator_settings": lambda: settings_finding(environ, libraries, sys.platform),
        "spilling": lambda: spilling_finding(machine.is_wsl(), driver.models, sys.platform, live),
        "disk": lambda: disk_finding(machine.ask_disk(out or Path())),
        "host_memory": lambda: host_memory_finding(host_memory()),
        "tokenizer": _tokenizer,
        "replay": lambda: replay_finding(COMPILED),
    }
    return [_asked(findings[topic], _failed(topic)) for topic in TOPICS]


def _libraries(environ: Mapping[str, str]) -> dict[str, frozenset[str]]:
    folder = machine.torch_libraries()
    return machine.names_in_libraries(folder, (*VARIABLES, *setting_names(environ))) if folder else {}


def _compile(live: LiveGpu | None) -> Finding:
    possible, why = compile_support(live.capability if live is not None else None, here=True)
    triton = installed_version("triton") or installed_version("triton-windows")
    return compile_finding(live, possible, why, triton)


def _tokenizer() -> Finding:
    tiktoken = installed_version("tiktoken")
    return tokenizer_finding(tiktoken, *(local_source() if tiktoken else (None, ())))


def _asked(ask: Callable[[], T], otherwise: Callable[[Exception], T]) -> T:
    """The answer, or what stands for it: an examination goes on whatever it meets."""
    try:
        return ask()
    except Exception as error:
        return otherwise(error)


def _failed(topic: str) -> Callable[[Exception], Finding]:
    return lambda error: Finding(topic, "unknown", f"It could not be looked at: {first_line(error)}")


def _in_catalogue(live: LiveGpu) -> Gpu | None:
    try:
        return find_gpu(live.name, total_bytes=live.total_bytes)
    except ConfigError:
        return None


def _holder(process: GpuProcess) -> str:
    used = f" {gib(process.used_bytes)}" if process.used_bytes else ""
    return f"{process.name} (pid {process.pid}){used}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _major(version: str | None) -> int:
    head = (version or "").partition(".")[0]
    return int(head) if head.isdigit() else 0
