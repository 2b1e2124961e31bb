"""A failure explained with the configuration that failed: which tensor, what the model predicts, the smallest repair.

The prediction is put beside the memory there was. Where it is below that, the difference is unexplained and the answer
says so and by how much: no cause is made up.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..units import gib
from .allocator_settings import AllocatorSettings
from .culprit import Lookup, find_culprit
from .gpu import Gpu
from .levers import EXPANDABLE
from .memory import Estimate, context_bytes, estimate
from .oom_cause import holders
from .oom_fields import ABSURD_BYTES
from .oom_text import OomText
from .repair import smallest_repair
from .risk import needed_for
from .shape import Shape
from .step import StepConfig, tokens_per_step


@dataclass(frozen=True, slots=True)
class Available:
    """Bytes that the process could have had, and where the figure comes from, in words."""

    n_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of the configuration, in bytes, beside what was available (None: unknown).

    ``needs_bytes`` is what keeps the accepted risk; ``unexplained_bytes`` what was available beyond the predicted peak
    (None where the prediction explains the failure, or nothing is known to compare it with).
    """

    process_bytes: int
    peak_allocated_bytes: int
    peak_phase: str
    needs_bytes: int
    available: Available | None

    @property
    def unexplained_bytes(self) -> int | None:
        """How much memory the model thinks was left, although it ran out."""
        if self.available is None or self.process_bytes > self.available.n_bytes:
            return None
        return self.available.n_bytes - self.process_bytes

    def as_dict(self) -> dict[str, Any]:
        """``predicted`` of ``explain --json``."""
        return {
            "process_bytes": self.process_bytes,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_phase": self.peak_phase,
            "needs_bytes": self.needs_bytes,
            "unexplained_bytes": self.unexplained_bytes,
        }


@dataclass(frozen=True, slots=True)
class Remedy:
    """The smallest change that would have fitted ``within_bytes``; tokens per step stay.

    ``environment`` is an environment variable instead of a change to the configuration. ``why`` says what
    ``within_bytes`` is. Sizes are those of the whole process.
    """

    changes: tuple[str, ...]
    shape: Shape
    step: StepConfig
    before_bytes: int
    after_bytes: int
    within_bytes: int
    why: str
    speed_ratio: float | None = None
    environment: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """``repair`` of ``explain --json``."""
        return {
            "changes": list(self.changes),
            "environment": self.environment,
            "config": asdict(self.step),
            "tokens_per_step": int(tokens_per_step(self.shape, self.step)),
            "process_bytes_before": self.before_bytes,
            "process_bytes_after": self.after_bytes,
            "within_bytes": self.within_bytes,
            "why": self.why,
            "speed_ratio": self.speed_ratio,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything there is to say: the text's own words, and with a configuration tensor, prediction and repair."""

    found: OomText
    shape: Shape | None = None
    step: StepConfig | None = None
    lookup: Lookup | None = None
    predicted: Prediction | None = None
    repair: Remedy | None = None
    available: Available | None = None
    advice: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()


def explain(
    found: OomText,
    config: tuple[Shape, StepConfig] | None = None,
    gpu: Gpu | None = None,
    given: Available | None = None,
    max_risk: float = 0.01,
    planned: Available | None = None,
) -> Explanation:
    """Put a text beside a configuration.

    What was available is what is ``given``, else what the text's figures say, else what the run was ``planned`` for.
    """
    if not found.is_memory:
        return Explanation(found)
    available = given or available_in(found, gpu) or planned
    if config is None:
        return Explanation(found, available=available, advice=advice(found, None))
    shape, step = config
    full = estimate(shape, step, gpu)
    if found.kind == "host_oom" and step.device != "cpu":
        return Explanation(found, shape, step, available=None, advice=advice(found, step))
    predicted = Prediction(
        full.process_bytes, full.peak_allocated_bytes, full.peak_phase, round(needed_for(full, max_risk)), available
    )
    found = _by_the_model(found, predicted)
    return Explanation(
        found, shape, step, find_culprit(found, full), predicted, _remedy(found, full, gpu, predicted, max_risk),
        available, advice(found, step), full.caveats,
    )  # fmt: skip


def _by_the_model(found: OomText, predicted: Prediction) -> OomText:
    """Where the text does not say why: whether the step was too large for what there was, by its prediction."""
    asked = found.figures.requested_bytes
    nonsense = found.figures.beyond_bounds or (asked is not None and not 0 <= asked < ABSURD_BYTES)
    available = predicted.available
    if found.cause != "unknown" or nonsense or available is None or predicted.process_bytes <= available.n_bytes:
        return found
    needs = f"by the model the step needs {gib(predicted.process_bytes)}, of {gib(available.n_bytes)} there were"
    return replace(found, cause="exhausted", reason=needs)


def available_in(found: OomText, gpu: Gpu | None = None) -> Available | None:
    """What the text says that the process could have: free and its own, or all but the others', within any limit."""
    f, held = found.figures, holders(found.figures)
    best: Available | None = None
    if f.free_bytes is not None and held.process is not None:
        best = Available(f.free_bytes + held.process, "what the text says was free, and what this process held")
    elif f.total_bytes is not None and held.others is not None and not held.derived:
        best = Available(f.total_bytes - held.others, "the card's total less what the text says others held")
    elif f.free_bytes is not None and held.reserved is not None:
        context = context_bytes(gpu)
        best = Available(
            f.free_bytes + held.reserved + context,
            "what the text says was free, what torch had reserved, and a CUDA context",
        )
    elif f.total_bytes is not None:
        best = Available(f.total_bytes, "the whole card; the text does not say what others held")
    if f.limit_bytes is not None and f.limit_bytes < ABSURD_BYTES:
        limit = Available(f.limit_bytes + context_bytes(gpu), "the memory fraction that was set, and a CUDA context")
        best = limit if best is None or limit.n_bytes < best.n_bytes else best
    if best is not None and f.total_bytes is not None and best.n_bytes > f.total_bytes:
        best = Available(f.total_bytes, "the whole card")
    return best


def _remedy(found: OomText, full: Estimate, gpu: Gpu | None, predicted: Prediction, max_risk: float) -> Remedy | None:
    """For fragmentation the allocator's setting, where the replay says that it is enough; else the smallest change."""
    available = predicted.available
    fits = available is not None and predicted.needs_bytes <= available.n_bytes
    if available is not None and not fits:
        within, why = available.n_bytes, f"fits {gib(available.n_bytes)}, {available.source}"
    else:
        within = full.process_bytes - 1
        why = "what failed had less memory than the model says it needed; this needs less than that"
    if found.cause == "fragmentation":
        settings = AllocatorSettings(expandable_segments=True)
        packed = estimate(full.shape, full.step, gpu, settings)
        if needed_for(packed, max_risk) <= within or (fits and packed.process_bytes < full.process_bytes):
            return Remedy((EXPANDABLE,), full.shape, full.step, full.process_bytes, packed.process_bytes, within, why,
                          environment=EXPANDABLE)  # fmt: skip
    found_repair = smallest_repair(full.shape, full.step, gpu, within, max_risk)
    if found_repair is None:
        return None
    return Remedy(found_repair.changes, full.shape, found_repair.step, full.process_bytes,
                  found_repair.estimate.process_bytes, within, why, found_repair.speed_ratio)  # fmt: skip


_HOST_ADVICE = (
    "Host memory: fewer DataLoader workers, smaller prefetch, data read in pieces or memory-mapped; a checkpoint is "
    "loaded best with map_location='cpu' and mmap=True. vramplan has no model of other programs' host memory."
)
_ADVICE = {
    "exhausted": "The step itself is too large for the card: a smaller micro-batch with more accumulation keeps the "
    "tokens per step.",
    "fragmentation": f"Set {EXPANDABLE} before torch is imported (PYTORCH_CUDA_ALLOC_CONF before torch 2.9; not on "
    "Windows), or make a little room with a smaller micro-batch.",
    "other_process": "Free the card first: nvidia-smi lists who holds it; a notebook's kernel, an earlier run that did "
    "not end and the desktop are the usual ones. `vramplan doctor` names them.",
    "limit": "Raise the limit (torch.cuda.set_per_process_memory_fraction, the framework's memory share), or make the "
    "step smaller.",
    "unknown": "",
}
_NONSENSE = (
    "Look for a negative or overflowed shape or index at that line; CUDA_LAUNCH_BLOCKING=1 makes it the true line. A "
    "driver in a bad state is cured by restarting the machine (WSL: wsl --shutdown)."
)
UNEXPLAINED = (
    "other processes on the card at that moment (a desktop, a browser, a notebook's kernel)",
    "a transient of the first compiled step, while kernels are tuned",
    "evaluation, sampling or a second model in the same process",
    "a spill limit of Windows or WSL",
)
"""What usually stands behind a failure that the model does not explain."""


def advice(found: OomText, step: StepConfig | None) -> tuple[str, ...]:
    """What can be done, from the cause alone."""
    if found.kind == "host_oom":
        if found.cause == "limit":
            return ("A limit was hit: raise the group's or job's memory limit, or need less.", _HOST_ADVICE)
        if step is not None and step.optimizer == "adamw-offload":
            return (
                "adamw-offload keeps the optimizer's states in host memory: another optimizer frees it.",
                _HOST_ADVICE,
            )
        return (_HOST_ADVICE,)
    asked = found.figures.requested_bytes
    if found.figures.beyond_bounds or (asked is not None and not 0 <= asked < ABSURD_BYTES):
        return (_NONSENSE,)
    return (_ADVICE[found.cause],) if _ADVICE[found.cause] else ()
