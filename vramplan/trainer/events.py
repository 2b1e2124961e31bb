"""What the trainer reports while it works. It prints nothing itself: whoever called it renders these."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..units import gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of everything reported."""


TRAINING, EVALUATION = "training step", "evaluation"
"""What may run out of memory and be done again."""

OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An ``on_event`` for callers that do not listen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparationStarted(Event):
    """Tokenising begins. ``reason`` says why existing shards could not be used, or is empty when there were none."""

    files: int
    rows: int
    size_bytes: int
    directory: Path
    tokenizer_source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparationWaiting(Event):
    """Another process is writing shards into ``directory``; they may turn out to be the ones that are wanted."""

    directory: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparationProgress(Event):
    """Rows read and tokens written so far, of ``rows_total`` rows."""

    rows: int
    rows_total: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Event):
    """The shards are ready. ``reused`` when nothing had to be tokenised; ``notes`` says what is unusual about them."""

    directory: Path
    reused: bool
    documents: dict[str, int]
    train_tokens: int
    val_tokens: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A run begins or continues, with everything that should be known before the first step.

    ``tokens_per_step`` is ``batch_size x grad_accum x block_size``; ``epochs`` is how often the run will read the
    ``unique_tokens`` of its training blocks. ``first_loss_expected`` is ln(vocab_size), the loss of an untrained model.
    ``notes`` are sentences about what is unusual.
    """

    run_dir: Path
    device: str
    parameters: int
    batch_size: int
    grad_accum: int
    block_size: int
    tokens_per_step: int
    start_step: int
    total_steps: int
    token_budget: int
    unique_tokens: int
    blocks_per_epoch: int
    epochs: float
    val_tokens: int
    evaluation_blocks: int
    first_loss_expected: float
    flops_per_token: int
    peak_flops: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSkipped(Event):
    """A checkpoint is damaged; the one before it is tried."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """State was restored from ``checkpoint``, or begins anew (None) when the run never reached its first one."""

    checkpoint: Path | None
    step: int
    tokens_seen: int
    dropped_lines: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLogged(Event):
    """One metrics line. ``step`` counts finished optimizer steps; the loss is that step's own, before its update.

    ``step_seconds`` is the mean over the interval, without evaluation and saving. ``tokens_per_second`` and ``mfu`` are
    None for the first step of a process, which compiles and warms up; ``mfu`` also when the peak is unknown. The memory
    fields (bytes since the process began) are None on a CPU. ``run_seconds`` is the work of all sessions so far.
    """

    step: int
    total_steps: int
    tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float | None
    step_seconds: float
    mfu: float | None
    epoch: float
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    alloc_retries: int | None
    run_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """Mean loss over the evaluation ``blocks`` after ``step`` steps."""

    step: int
    val_loss: float
    best_val_loss: float
    blocks: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(val_loss)."""
        return math.exp(self.val_loss) if self.val_loss < 700 else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is on disk, read back and verified."""

    path: Path
    step: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested(Event):
    """A signal arrived: the current optimizer step is finished and saved first. A second one stops at once."""

    signal_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted(Event):
    """The run stopped early on a signal and is saved in ``checkpoint``."""

    run_dir: Path
    checkpoint: Path
    step: int
    total_steps: int
    signal_name: str
    signal_number: int

    @property
    def resume_command(self) -> tuple[str, ...]:
        """The words of the command that continues this run."""
        return ("vramplan", "train", "--resume", str(self.run_dir))


@dataclass(frozen=True, slots=True, kw_only=True)
class AlreadyFinished(Event):
    """The run to be resumed has nothing left to do."""

    run_dir: Path
    step: int
    best_val_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The run reached its last step. ``seconds`` is what this process spent training, evaluating and saving."""

    run_dir: Path
    step: int
    tokens: int
    last_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardEvent(Event, ABC):
    """Something was done so that the run goes on, after ``step`` steps."""

    step: int

    @property
    @abstractmethod
    def words(self) -> str:
        """What happened, in a sentence without its full stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchReduced(GuardEvent):
    """Memory ran out, or spilled to the host, after ``step`` steps: micro-batches are smaller from here on.

    ``outcome`` is ``out_of_memory`` (what was being done is done again) or ``spilled``; ``doing`` what was being done,
    ``compiled`` or not.
    """

    doing: str
    compiled: bool
    outcome: str
    reason: str
    batch_size_before: int
    batch_size: int
    grad_accum_before: int
    grad_accum: int
    estimated_bytes_before: int
    estimated_bytes: int

    @property
    def words(self) -> str:
        """What happened, and what is done about it."""
        what = "ran out" if self.outcome == "out_of_memory" else "spilled to the host"
        need = f"{gib(self.estimated_bytes)} instead of {gib(self.estimated_bytes_before)} by the estimate"
        return (
            f"memory {what} in the {self.doing} ({self.reason}): batch_size {self.batch_size_before} -> "
            f"{self.batch_size}, grad_accum {self.grad_accum_before} -> {self.grad_accum} ({need}); "
            "tokens per step and the order of the data stay the same"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileSwitched(GuardEvent):
    """The first compiled step of a run that began eager has succeeded."""

    @property
    def words(self) -> str:
        """What happened."""
        return "compiled from this step on"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileSkipped(GuardEvent):
    """A run that was to be compiled from this step on stays eager: by the estimate it would not fit."""

    reason: str

    @property
    def words(self) -> str:
        """What happened."""
        return f"stays eager: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileFellBack(GuardEvent):
    """The first compiled step, or evaluation, failed and is done again without: the run stays eager."""

    reason: str

    @property
    def words(self) -> str:
        """What happened."""
        return f"the first compiled pass failed ({self.reason}); it is done again, and the run stays eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeSeen(Event):
    """The loss or the gradient norm (``what``) of a step is far above its ``usual`` value: see :mod:`.watch`."""

    step: int
    what: str
    value: float
    usual: float
    times: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HoursUsed(Event):
    """The run has trained for ``max_hours`` and ends here, saved in ``checkpoint`` and evaluated."""

    run_dir: Path
    checkpoint: Path
    step: int
    total_steps: int
    max_hours: float
    val_loss: float | None

    @property
    def resume_command(self) -> tuple[str, ...]:
        """The words of the command that continues this run, for as long again."""
        return ("vramplan", "train", "--resume", str(self.run_dir), "--max-hours", f"{2 * self.max_hours:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingStarted(Event):
    """A tracker has begun; ``where`` is where its curves can be seen."""

    tracker: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingStopped(Event):
    """A tracker failed and is switched off; the run goes on."""

    tracker: str
    reason: str
