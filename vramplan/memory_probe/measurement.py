"""One measured configuration: what was run, how it ended, what it needed, and what had been expected."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import ConfigError, Problem
from ..planner.shape import Shape
from ..planner.step import StepConfig, check
from ..runconfig import ModelSection, StepSection
from ..units import parse_time

Outcome = Literal["fits", "out_of_memory", "spilled", "not_memory", "timed_out", "killed"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)

Method = Literal["", "tensors counted", "allocator events", "allocator statistics"]

Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class Measurement(BaseModel):
    """Sizes in bytes, times in seconds; None is what could not be measured, or was not.

    ``architecture`` is the compute capability (``8.9``) or ``cpu``: residuals of one are evidence for it only.
    ``method`` says where the sizes come from: torch's allocator statistics on a card, every tensor counted by the
    dispatcher on a CPU, the CPU allocator's own events for a compiled step. ``process_bytes`` is what the driver
    charges the process with, on a CPU its largest resident memory. ``expected_*`` are the estimate's figures.
    ``phase_peaks`` are the most bytes allocated within each phase. ``cap_bytes`` is the limit it ran under, if any,
    ``limit_bytes`` what the card had free for it, or that limit,
    ``alloc_conf`` its PYTORCH_ALLOC_CONF.
    ``first_step_*``: where a compiled step also compiles and tunes its kernels.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    id: str = Field(pattern="^[0-9a-f]{8,64}$")
    when: str
    version: str
    model: ModelSection
    step: StepSection
    outcome: Outcome
    reason: str = ""
    device: str = ""
    architecture: str = Field(pattern=r"^(cpu|\d+\.\d+|unknown)$")
    driver: str | None = None
    torch: str | None = None
    cap_bytes: Bytes | None = None
    limit_bytes: Bytes | None = None
    alloc_conf: str = ""
    method: Method = ""
    allocated_bytes: Bytes | None = None
    reserved_bytes: Bytes | None = None
    process_bytes: Bytes | None = None
    context_bytes: Bytes | None = None
    retries: Bytes | None = None
    phase_peaks: dict[str, Bytes] = {}
    step_seconds: tuple[Seconds, ...] = ()
    tokens_per_second: Rate | None = None
    first_step_seconds: Seconds | None = None
    first_step_peak_bytes: Bytes | None = None
    wall_seconds: Seconds = 0.0
    loss: float | None = None
    reference_ratio: Rate | None = None
    expected_allocated_bytes: Bytes = 0
    expected_reserved_bytes: Bytes = 0
    expected_process_bytes: Bytes = 0
    expected_tokens_per_second: Rate | None = None

    @field_validator("when")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        try:
            parse_time(value)
        except ConfigError:
            raise ValueError("should be a time such as 2026-11-21T09:30:00+00:00") from None
        return value

    @property
    def shape(self) -> Shape:
        """The planner's view of ``model``."""
        return Shape(**self.model.model_dump())

    @property
    def step_config(self) -> StepConfig:
        """The planner's view of ``step``."""
        return StepConfig(**self.step.model_dump())

    @property
    def mode(self) -> str:
        """``eager`` or ``compiled``."""
        return "compiled" if self.step.compile else "eager"

    @property
    def configuration(self) -> str:
        """A short name for what was run, the same for every measurement of it: a hash of shape, step and settings."""
        step = self.step.model_dump(exclude={"torch"})
        text = json.dumps([self.model.model_dump(), step, self.alloc_conf], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def completed(self) -> bool:
        """Whether the steps came to their end, so that the peaks are those of whole steps."""
        return self.outcome in ("fits", "spilled")

    @property
    def allocated_error(self) -> float | None:
        """Measured over expected allocated bytes, less 1; None unless it completed."""
        return self._error(self.allocated_bytes, self.expected_allocated_bytes)

    @property
    def process_error(self) -> float | None:
        """The same of the process as the driver counts it; on a CPU None, whose libraries' scratch is no tensor."""
        if self.architecture == "cpu":
            return None
        return self._error(self.process_bytes, self.expected_process_bytes)

    @property
    def residual(self) -> float | None:
        """The error that counts as evidence: of the process, or of the allocated bytes where that is not known.

        Of a step that ran out of memory which should have sufficed it is the least that it can have been.
        """
        if self.ran_out_unexpectedly:
            return (self.limit_bytes or 0) / self.expected_process_bytes - 1
        error = self.process_error
        return self.allocated_error if error is None else error

    @property
    def ran_out_unexpectedly(self) -> bool:
        """Whether the estimate would have let it in, and it ran out of the card's memory all the same."""
        known = self.limit_bytes is not None and self.expected_process_bytes > 0 and self.architecture != "cpu"
        return known and self.outcome == "out_of_memory" and self.expected_process_bytes <= (self.limit_bytes or 0)

    def _error(self, measured: int | None, expected: int) -> float | None:
        return measured / expected - 1 if self.completed and measured and expected else None

    def line(self) -> str:
        """One line of JSON, in ASCII wherever it is printed, that :meth:`read` takes back exactly."""
        return json.dumps(self.model_dump(mode="json"))

    @classmethod
    def read(cls, text: str | bytes, source: str = "") -> Self:
        """Read one JSON object. Raises ConfigError with every problem, settings that no step could have included."""
        try:
            found = cls.model_validate_json(text)
        except ValidationError as error:
            problems = [
                Problem(".".join(map(str, e["loc"])) or "measurement", _start(e["input"]), _rule(str(e["msg"])))
                for e in error.errors()
            ]
            raise ConfigError(problems, source) from None
        if wrong := check(found.shape, found.step_config):
            raise ConfigError(wrong, source)
        return found


def _start(value: object) -> str:
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))[:60]


def _rule(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should", "should")
