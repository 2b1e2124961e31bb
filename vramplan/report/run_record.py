"""A record of a training run: one form for our run directories and for the logs of other trainers.

Everything here is plain data without torch. A loss that was not a number is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..planner.shape import Shape
from ..planner.step import StepConfig
from ..runconfig import Schedule
from ..trainer.schedule import learning_rate

Curve = tuple[tuple[int, float | None], ...]
"""(step, loss) in the order of the steps, as the run numbered them."""


LARGEST_LOSS = 1e6
"""Beyond this a loss is as good as infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The learning rates a run was told to have; the arguments of :func:`vramplan.trainer.schedule.learning_rate`.

    nanoGPT's ``lr_decay_iters`` is ``total_steps`` here; ``decay_lr=False`` is a constant rate without warm-up.
    """

    schedule: Schedule
    peak: float
    minimum: float
    warmup_steps: int
    total_steps: int
    decay_fraction: float = 0.2

    def at(self, step: int) -> float:
        """Learning rate of the step that follows ``step`` finished ones."""
        return learning_rate(
            step, schedule=self.schedule, peak=self.peak, minimum=self.minimum, warmup_steps=self.warmup_steps,
            total_steps=self.total_steps, decay_fraction=self.decay_fraction,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SpikeLine:
    """A step whose loss or gradient norm (``what``) was far above its ``usual`` value."""

    step: int
    what: str
    value: float
    usual: float


@dataclass(frozen=True, slots=True)
class Happening:
    """Something out of the ordinary that a run wrote down: ``kind`` is ``guard`` or ``stopped``."""

    step: int
    kind: Literal["guard", "stopped"]
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What was expected of the run: parameters asked for, bytes, tokens per second. None where nobody said."""

    parameters: int | None = None
    gpu: str | None = None
    budget_bytes: int | None = None
    process_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known about a run.

    ``first_loss`` is that of the weights before their first update, None where the record begins later.
    ``losses`` are single training steps, ``train_evaluations`` and ``validation`` means over evaluation batches.
    ``step_seconds`` are (step, seconds of one optimizer step) without evaluations and without the first of a process.
    ``printed_parameters`` is what a log said, without positions; ``printed_mfu`` its last MFU, over an A100's peak.
    ``processes`` is the number of data-parallel processes, None where it is not known. ``unique_tokens`` counts each
    token of the training data once. ``from_scratch`` says whether the weights were drawn at random; None: not known.
    ``device`` is what the run said it ran on. ``missing`` names what a reader would have to be told.
    """

    title: str
    program: Literal["vramplan", "nanogpt"]
    shape: Shape | None = None
    step: StepConfig | None = None
    rates: Rates | None = None
    planned: Planned = field(default_factory=Planned)
    printed_parameters: int | None = None
    vocab_size: int | None = None
    tokens_per_step: int | None = None
    processes: int | None = 1
    steps_done: int = 0
    total_steps: int | None = None
    from_scratch: bool | None = None
    first_loss: float | None = None
    losses: Curve = ()
    train_evaluations: Curve = ()
    validation: Curve = ()
    step_seconds: tuple[tuple[int, float], ...] = ()
    printed_mfu: float | None = None
    unique_tokens: int | None = None
    device: str = ""
    spikes: tuple[SpikeLine, ...] = ()
    spikes_resolution: int = 1
    happenings: tuple[Happening, ...] = ()
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    alloc_retries: int | None = None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parameters_without_positions(self) -> int | None:
        """What the shape has, unless the log printed another number; nanoGPT prints two decimals of a million."""
        if self.shape is None or not self.shape_confirmed:
            return self.printed_parameters
        return int(self.shape.parameters - self.shape.position_parameters)

    @property
    def parameters(self) -> int | None:
        """All trainable parameters, with positions; known only with a shape."""
        if self.shape is None:
            return None
        if self.printed_parameters is not None and not self.shape_confirmed:
            return self.printed_parameters + int(self.shape.position_parameters)
        return int(self.shape.parameters)

    @property
    def shape_confirmed(self) -> bool:
        """Whether shape and printed count agree (or nothing was printed): the count has two decimals of a million."""
        if self.shape is None or self.printed_parameters is None:
            return True
        counted = int(self.shape.parameters - self.shape.position_parameters)
        return abs(counted - self.printed_parameters) <= max(10_000, counted // 1000)

    @property
    def flops_per_token(self) -> int | None:
        """6 x parameters without positions + 12 L h T: the numerator of MFU, not halved for causality."""
        if self.shape is None or self.parameters_without_positions is None:
            return None
        attention = 12 * self.shape.n_layer * self.shape.n_embd * self.shape.block_size
        return int(6 * self.parameters_without_positions + attention)

    @property
    def tokens_seen(self) -> int | None:
        """Finished steps x tokens per step."""
        return self.steps_done * self.tokens_per_step if self.tokens_per_step is not None else None


def loss_of(value: Any) -> float | None:
    """A loss that can be worked with, None for anything else."""
    sound = isinstance(value, int | float) and math.isfinite(value) and abs(value) <= LARGEST_LOSS
    return float(value) if sound else None


def finite(curve: Iterable[tuple[int, float | None]]) -> list[tuple[int, float]]:
    """The points of a curve that are numbers."""
    return [(step, loss) for step, loss in curve if loss is not None]
