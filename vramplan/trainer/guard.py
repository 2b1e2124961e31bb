"""What happens when memory runs out in the middle of a run: the same step again, in smaller pieces.

A step that failed has changed no weight: optimizer states exist before step 0, so the update asks for nothing new, and
it is the last thing a step does. Its gradients are dropped, the data goes back to where the step began, the micro-batch
becomes the next smaller divisor of the configured one and accumulation grows by the same factor. So tokens per step and
the order of the data stay exactly as they were; only sums are formed in another order. It never grows back by itself.

This trainer runs on one device, so there are no other ranks that would have to agree.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

import torch

from ..planner.memory import estimate
from ..planner.shape import Shape
from ..planner.step import StepConfig
from ..units import gib
from .events import (
    EVALUATION,
    TRAINING,
    CompileFellBack,
    CompileSkipped,
    CompileSwitched,
    GuardEvent,
    MicroBatchReduced,
)
from .memory_errors import out_of_memory
from .split import Split
from .step import TrainStep

T = TypeVar("T")


class HalfApplied(BaseException):
    """Memory ran out while weights were being updated. Seen only by what ends the run."""


class SpillCheck(Protocol):
    """Asked after a step that raised nothing: whether memory was moved to the host all the same, and why; else ''."""

    def __call__(self, *, reserved_bytes: int, tokens_per_second: float) -> str:
        """A sentence, or an empty string."""
        ...


class Guard:
    """Runs what may run out of memory, and what to do then. ``split`` is the present division of a step, ``whole``
    that of the configuration.
    """

    def __init__(
        self,
        shape: Shape,
        train_step: TrainStep,
        device: torch.device,
        emit: Callable[[GuardEvent], None],
        *,
        enabled: bool = True,
        spilled: SpillCheck | None = None,
    ) -> None:
        self.shape, self.train_step, self.device, self.emit = shape, train_step, device, emit
        self.enabled, self.spilled = enabled, spilled
        self.whole = self.split = Split(int(train_step.step.batch_size), int(train_step.step.grad_accum))
        self._on_trial: set[str] = set()
        self._settled = 0

    def use(self, split: Split) -> None:
        """Divide steps like this from here on."""
        self.split, self._settled = split, 0
        self.train_step.resplit(split.batch_size, split.grad_accum)

    def protect(self, step: int, doing: str, attempt: Callable[[], T], undo: Callable[[], None]) -> T:
        """The result of ``attempt``, repeated in smaller pieces while memory runs out; ``undo`` goes before each.

        Raises what the attempt raised when it was something else, or when there is nothing smaller; HalfApplied
        when the weights were being updated.
        """
        while True:
            try:
                result = attempt()
                break
            except Exception as error:
                if not self._can_go_on(error, doing):
                    undo()
                    raise
                reason = _first_line(error)
            # only here, outside the except block, have the error and the tensors of its frames been let go
            undo()
            self._release_memory()
            self.train_step.forget()
            if doing in self._on_trial:
                self._back_to_eager(step, reason)
            else:
                self._reduce(step, reason, doing)
        if doing in self._on_trial:
            self._on_trial.remove(doing)
            if doing == TRAINING:
                self._settled = 0
                self.emit(CompileSwitched(step=step))
        return result

    def after_step(self, step: int, tokens: int, seconds: float) -> None:
        """Look for memory that went to the host without an exception; then later steps are divided further.

        The first steps of a session, and after each change, are slow for other reasons.
        """
        self._settled += 1
        if self.spilled is None or not self.enabled or self.device.type != "cuda":
            return
        if self._settled <= WARM_UP or not self._candidates():
            return
        reserved = torch.cuda.memory_reserved(self.device)
        reason = self.spilled(reserved_bytes=reserved, tokens_per_second=tokens / seconds)
        if reason:
            self._release_memory()
            self._reduce(step, reason, TRAINING, kind="spilled")

    def try_compiled(self, step: int) -> None:
        """Compile from here on if the estimate says that it fits; the first step and the first evaluation prove it."""
        wanted = replace(self.train_step.step, compile=True)
        if not self._fits(wanted):
            need = estimate(self.shape, wanted).peak_reserved_bytes
            self.emit(CompileSkipped(step=step, reason=f"compiled it is estimated at {gib(need)}, more than is free"))
            return
        self._on_trial = {TRAINING, EVALUATION}  # each is a graph of its own
        try:
            self.train_step.run_compiled()
        except Exception as error:  # a compiler that cannot even be loaded
            self._back_to_eager(step, _first_line(error))

    # ---------------------------------------------------------------- when it failed

    def _can_go_on(self, error: Exception, doing: str) -> bool:
        memory = isinstance(error, RuntimeError | MemoryError) and out_of_memory(error)
        if self.train_step.applying:
            if memory:
                words = f"memory ran out while the weights were being updated ({_first_line(error)})"
                raise HalfApplied(f"{words}: this step can be neither kept nor repeated") from error
            return False
        if doing in self._on_trial:
            return True
        return memory and self.enabled and bool(self._candidates())

    def _candidates(self) -> list[Split]:
        """Smaller splits; none where gradients cannot accumulate."""
        if self.train_step.step.optimizer == "adamw-in-backward":
            return []
        return self.whole.below(self.split.batch_size)

    def _reduce(self, step: int, reason: str, doing: str, kind: str = "out_of_memory") -> None:
        before, candidates = self.split, self._candidates()
        now = self.train_step.step
        after = next((s for s in candidates if self._fits(_with(now, s))), candidates[-1])
        needed = tuple(estimate(self.shape, _with(now, s)).process_bytes for s in (before, after))
        self.use(after)
        self.emit(
            MicroBatchReduced(
                step=step,
                doing=doing,
                compiled=now.compile,
                outcome=kind,
                reason=reason,
                batch_size_before=before.batch_size,
                batch_size=after.batch_size,
                grad_accum_before=before.grad_accum,
                grad_accum=after.grad_accum,
                estimated_bytes_before=needed[0],
                estimated_bytes=needed[1],
            )
        )

    def _back_to_eager(self, step: int, reason: str) -> None:
        self._on_trial = set()
        self.train_step.run_eagerly()
        self._release_memory()
        self.emit(CompileFellBack(step=step, reason=reason))

    def _fits(self, wanted: StepConfig) -> bool:
        """Whether a step needs no more than is free with what this process holds; a CPU's estimate is not binding."""
        if self.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        return estimate(self.shape, wanted).peak_reserved_bytes <= free + torch.cuda.memory_reserved(self.device)

    def _release_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # a device that is lost says so at the next attempt
                torch.cuda.empty_cache()


WARM_UP = 2
"""Steps that compile, tune kernels and fill caches."""


def _with(step: StepConfig, split: Split) -> StepConfig:
    return replace(step, batch_size=split.batch_size, grad_accum=split.grad_accum)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
