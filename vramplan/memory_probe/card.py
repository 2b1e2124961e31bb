"""Real steps on a card: what torch's allocator and the driver say, how long a step takes, and whether it fits."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import live_gpu
from ..planner.shape import Shape
from ..planner.step import StepConfig, tokens_per_step
from ..trainer.memory_errors import out_of_memory
from ..trainer.model import GPT
from ..trainer.step import TrainStep
from .cpu import probe_optimizer
from .scripts import Draw, ScriptLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class CardMeasurement:
    """Peaks in bytes since before the model was built (None on a CPU); ``outcome`` is ``fits`` or ``out_of_memory``.

    ``context_bytes`` is what the driver counts for the card beyond torch's allocator, before the model is built (of all
    its processes); ``seconds`` are those of the optimizer steps after the first two, ``error`` the first line of what
    went wrong.
    """

    outcome: str
    allocated_bytes: int | None
    reserved_bytes: int | None
    context_bytes: int | None
    retries: int | None
    seconds: tuple[float, ...]
    tokens_per_second: float | None
    error: str = ""


def measure_card(
    shape: Shape, step: StepConfig, device: torch.device, *, steps: int = 4, cap_bytes: int | None = None
) -> CardMeasurement:
    """Run ``steps`` optimizer steps of the workload on ``device``.

    ``cap_bytes`` is what the process may have, context included, as on a smaller card (``context_bytes`` is taken off
    for the allocator). Everything is released afterwards. Errors other than a lack of memory are raised.
    """
    context = _fresh_start(device)
    _set_cap(device, None if cap_bytes is None else cap_bytes - (context or 0))
    seconds: list[float] = []
    error = ""
    try:
        _run(shape, step, device, steps, seconds)
    except (RuntimeError, MemoryError) as failure:
        if not out_of_memory(failure):
            raise
        error = (str(failure).splitlines() or [type(failure).__name__])[0]
    finally:
        _set_cap(device, None)
    cuda = device.type == "cuda"
    stats: dict[str, Any] = dict(torch.cuda.memory_stats(device)) if cuda else {}
    timed = tuple(seconds[2:])
    total = int(tokens_per_step(shape, step))
    result = CardMeasurement(
        outcome="out_of_memory" if error else "fits",
        allocated_bytes=stats.get("allocated_bytes.all.peak"),
        reserved_bytes=stats.get("reserved_bytes.all.peak"),
        context_bytes=context,
        retries=stats.get("num_alloc_retries"),
        seconds=timed,
        tokens_per_second=total / statistics.median(timed) if timed else None,
        error=error,
    )
    _fresh_start(device)
    return result


def _run(shape: Shape, step: StepConfig, device: torch.device, steps: int, seconds: list[float]) -> None:
    def draw() -> tuple[Tensor, Tensor]:
        size = (step.batch_size, shape.block_size)
        tokens, targets = (torch.randint(0, shape.vocab_size, size) for _ in range(2))
        return tokens.to(device), targets.to(device)

    run = (
        _our_step(shape, step, device, draw) if step.workload == "vramplan" else _script_step(shape, step, device, draw)
    )
    for _ in range(steps):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)


def _our_step(shape: Shape, step: StepConfig, device: torch.device, draw: Draw) -> Any:
    model = GPT(shape, step).to(device)
    optimizer = probe_optimizer(model, step)
    train = TrainStep(model, optimizer, step, grad_clip=1.0, device=device)
    train.allocate()
    train.evaluate([draw()])
    return lambda: train((draw() for _ in range(step.grad_accum)), 1e-3)


def _script_step(shape: Shape, step: StepConfig, device: torch.device, draw: Draw) -> Any:
    loop = ScriptLoop(shape, step, device)
    return lambda: loop.run(draw)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fresh_start(device: torch.device) -> int | None:
    """Drop what earlier measurements left; the bytes of the process outside torch's allocator, where NVML says."""
    torch.compiler.reset()
    gc.collect()
    if device.type != "cuda":
        return None
    a = torch.ones(64, 64, device=device)
    (a @ a).sum().item()  # the context, and cuBLAS
    del a
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.reset_accumulated_memory_stats(device)
    live = live_gpu()
    if live is None:
        return None
    return max(0, live.total_bytes - live.free_bytes - torch.cuda.memory_reserved(device))


def _set_cap(device: torch.device, allocator_bytes: int | None) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if allocator_bytes is None else min(1.0, allocator_bytes / total)
        torch.cuda.set_per_process_memory_fraction(share, device)
