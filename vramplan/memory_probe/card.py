"""Real steps on a card: what torch's allocator and the driver say, how long a step takes, and whether it fits."""

from __future__ import annotations

import gc
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import live_gpu
from ..errors import VramplanError
from ..planner.shape import Shape
from ..planner.step import StepConfig, tokens_per_step
from ..trainer.checkpoint import all_finite, plain_state_dict
from ..trainer.memory_errors import out_of_memory
from ..trainer.model import GPT
from ..trainer.phase_peaks import PhasePeaks
from ..trainer.step import TrainStep
from .cpu import Phase, probe_optimizer, random_batches, trainer
from .scripts import Draw, ScriptLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class CardMeasurement:
    """Peaks in bytes since before the model was built (None on a CPU); ``outcome`` is ``fits`` or ``out_of_memory``.

    ``context_bytes`` is what the driver counts for the card beyond torch's allocator, before the model is built (of all
    its processes); ``process_bytes`` what it charges this process with at the end. ``phase_peaks`` are the most bytes
    allocated within each phase; a compiled step shows only forward and backward together, and the update. ``seconds``
    are those of the optimizer steps after the first two, ``reference_ratio`` theirs over those of a fixed step run
    between them (a CPU only, and when timed), ``error`` the first line of what went wrong.
    """

    outcome: str
    allocated_bytes: int | None
    reserved_bytes: int | None
    context_bytes: int | None
    process_bytes: int | None
    retries: int | None
    phase_peaks: dict[str, int]
    seconds: tuple[float, ...]
    first_step_seconds: float | None
    first_step_peak_bytes: int | None
    tokens_per_second: float | None
    reference_ratio: float | None
    loss: float | None
    error: str = ""


WARM_UP = 2
"""Steps that are not timed: in the first kernels are compiled and tuned, in the second the allocator settles."""


MOST_STEPS = 200
"""Steps after which even the shortest ones have been timed well enough."""


def measure_card(
    shape: Shape,
    step: StepConfig,
    device: torch.device,
    *,
    steps: int = 4,
    cap_bytes: int | None = None,
    everything: bool = False,
    seconds: float = 0.0,
    doing: Callable[[str], None] = lambda what: None,
) -> CardMeasurement:
    """Run ``steps`` optimizer steps of the workload on ``device``, more if they do not take ``seconds``.

    On a CPU a fixed step is timed beside each; twice ``seconds`` for both together are enough then.
    ``cap_bytes`` is what the process may have, context included, as on a smaller card (``context_bytes`` is taken off
    for the allocator). ``everything``: also save a checkpoint and resume from it. ``doing`` is told what is being done.
    Everything is released afterwards. Errors other than a lack of memory are raised.
    """
    context = _fresh_start(device)
    _set_cap(device, None if cap_bytes is None else cap_bytes - (context or 0))
    log = _Log(device)
    error = ""
    try:
        _run(shape, step, log, (steps, seconds), everything, doing)
    except (RuntimeError, MemoryError) as failure:
        if not out_of_memory(failure):
            raise
        error = (str(failure).splitlines() or [type(failure).__name__])[0]
    finally:
        _set_cap(device, None)
    log.peaks.enter("")
    stats: dict[str, Any] = dict(torch.cuda.memory_stats(device)) if device.type == "cuda" else {}
    timed = tuple(log.seconds[WARM_UP:])
    total = int(tokens_per_step(shape, step))
    result = CardMeasurement(
        outcome="out_of_memory" if error else "fits",
        allocated_bytes=max(log.peaks.found.values(), default=None),
        reserved_bytes=stats.get("reserved_bytes.all.peak"),
        context_bytes=context,
        process_bytes=_process_bytes(context, stats) if stats else None,
        retries=stats.get("num_alloc_retries"),
        phase_peaks=log.peaks.found,
        seconds=timed,
        first_step_seconds=log.seconds[0] if log.seconds else None,
        first_step_peak_bytes=log.first_peak,
        tokens_per_second=total / statistics.median(timed) if timed else None,
        reference_ratio=_ratio(timed, log.references[WARM_UP:]),
        loss=log.loss,
        error=error,
    )
    _fresh_start(device)
    return result


class _Log:
    """What a measurement sees as it goes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.references: list[float] = []
        """Of the fixed step after each, on a CPU."""
        self.loss: float | None = None
        self.first_peak: int | None = None
        self.peaks = PhasePeaks.of(device)

    def timed_less_than(self, seconds: float) -> bool:
        """Whether the steps after the warm-up took less, and less than twice as long with the fixed ones."""
        timed, beside = sum(self.seconds[WARM_UP:]), sum(self.references[WARM_UP:])
        return timed < seconds and timed + beside < 2 * seconds


class FollowedPhase(Phase):
    """Tells the peaks when the phase changes."""

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer, peaks: PhasePeaks) -> None:
        self._peaks, self._name = peaks, ""
        super().__init__(model, optimizer)

    @property
    def name(self) -> str:
        """The phase's name, as in the tensor table."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        if name != self._name:
            self._peaks.enter(name)
        self._name = name


REFERENCE = (
    Shape(n_layer=2, n_head=4, n_embd=128, vocab_size=4096, block_size=128),
    StepConfig(batch_size=4, dtype="float32", loss="full", device="cpu"),
)
"""A step that is run between those of a timed CPU probe: how fast the machine was just then."""


def _reference() -> Callable[[], float]:
    """Runs a fixed step and returns its seconds."""
    train = trainer(*REFERENCE)
    train.allocate()
    train(random_batches(*REFERENCE), 1e-3)

    def run() -> float:
        start = time.perf_counter()
        train(random_batches(*REFERENCE), 1e-3)
        return time.perf_counter() - start

    return run


def _run(
    shape: Shape,
    step: StepConfig,
    log: _Log,
    least: tuple[int, float],
    everything: bool,
    doing: Callable[[str], None],
) -> None:
    """``least``: steps, and seconds of those that are timed."""
    device = log.device

    def draw() -> tuple[Tensor, Tensor]:
        size = (step.batch_size, shape.block_size)
        tokens, targets = (torch.randint(0, shape.vocab_size, size) for _ in range(2))
        return tokens.to(device), targets.to(device)

    doing("building the model")
    if step.workload == "vramplan":
        ours = _OurStep(shape, step, log, draw, doing)
        run: Callable[[], float | None] = ours
    else:
        ours, loop = None, ScriptLoop(shape, step, device)
        log.peaks.enter("step")
        run = lambda: loop.run(draw)  # noqa: E731
    steps, seconds = least
    reference = _reference() if seconds and device.type == "cpu" else None
    number = 0
    while number < steps or (log.timed_less_than(seconds) and number < MOST_STEPS):
        doing("compiling and running the first step" if step.compile and not number else f"running step {number + 1}")
        _wait(device)
        start = time.perf_counter()
        log.loss = run()
        _wait(device)
        log.seconds.append(time.perf_counter() - start)
        if reference is not None:
            log.references.append(reference())
        if not number:
            log.first_peak = max(log.peaks.found.values(), default=None)
        number += 1
    if ours is not None and everything:
        ours.save_and_resume()


class _OurStep:
    """Our trainer's step with what surrounds it in a run."""

    def __init__(self, shape: Shape, step: StepConfig, log: _Log, draw: Draw, doing: Callable[[str], None]) -> None:
        self._shape, self._step, self._log, self._draw, self._doing = shape, step, log, draw, doing
        log.peaks.enter("persistent")
        self._train = self._build()
        self._train.allocate()
        log.peaks.enter("evaluation")
        doing("evaluating")
        self._train.evaluate([draw()])
        self._follow()

    def _build(self) -> TrainStep:
        model = GPT(self._shape, self._step).to(self._log.device)
        optimizer = probe_optimizer(model, self._step)
        return TrainStep(model, optimizer, self._step, grad_clip=1.0, device=self._log.device)

    def _follow(self) -> None:
        peaks, optimizer = self._log.peaks, self._train.optimizer
        if self._step.compile:  # hooks of modules would break the graph
            optimizer.register_step_pre_hook(lambda *_: peaks.enter("optimizer step"))
        elif peaks.active:
            FollowedPhase(self._train.model, optimizer, peaks)

    def __call__(self) -> float:
        """One optimizer step; its loss. Raises VramplanError when that is no number."""
        if self._step.compile:
            self._log.peaks.enter("forward and backward")
        loss = self._train((self._draw() for _ in range(self._step.grad_accum)), 1e-3).loss
        if not math.isfinite(loss):
            raise VramplanError(f"the loss is not finite ({loss})")
        return loss

    def save_and_resume(self) -> None:
        """Write a checkpoint, drop everything, build it again from the file, and take a step."""
        with tempfile.TemporaryFile() as file:
            self._doing("saving a checkpoint")
            self._log.peaks.enter("checkpoint save")
            all_finite(self._train.model)
            torch.save([plain_state_dict(self._train.model), self._train.optimizer.state_dict()], file)
            del self._train
            gc.collect()
            file.seek(0)
            self._doing("resuming")
            self._log.peaks.enter("resume")
            self._train = self._build()
            weights, states = torch.load(file, map_location="cpu", weights_only=True)
            self._train.model.load_state_dict(weights)
            self._train.optimizer.load_state_dict(states)
        del weights, states
        self._train((self._draw() for _ in range(self._step.grad_accum)), 1e-3)


def _ratio(seconds: Sequence[float], references: Sequence[float]) -> float | None:
    """Median of each step over the reference beside it, which a disturbance slows down as well."""
    return statistics.median(a / b for a, b in zip(seconds, references, strict=True)) if references else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fresh_start(device: torch.device) -> int | None:
    """Drop what earlier measurements left; the bytes of the process outside torch's allocator, where NVML says."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
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


def _process_bytes(context: int | None, stats: dict[str, Any]) -> int | None:
    """The most that the process held: context and reserved at their peak, or what the driver charges it with now."""
    live = live_gpu()
    own = [p.used_bytes for p in live.processes if p.pid == os.getpid() and p.used_bytes] if live else []
    if context is not None:  # memory that was given back before the end is in it
        own.append(context + int(stats["reserved_bytes.all.peak"]))
    return max(own, default=None)


def _set_cap(device: torch.device, allocator_bytes: int | None) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if allocator_bytes is None else min(1.0, allocator_bytes / total)
        torch.cuda.set_per_process_memory_fraction(share, device)
