"""RunConfig: the one contract. ``plan`` writes it, ``probe`` and ``train`` read it, as TOML.

Sections: ``[model]`` the shape, ``[step]`` what decides memory, ``[train]`` the optimisation, ``[data]`` the text,
``[plan]`` where the settings came from and what they were expected to need.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ConfigError, Problem, did_you_mean
from .files import write_text
from .planner.risk import CERTAINTY, LARGEST_RISK
from .planner.shape import PADDED_GPT2_VOCAB, TOKENS_PER_PARAMETER, MLPKind, Norm, Positions, Shape, check_shape
from .planner.step import (
    DEFAULT_LOSS_CHUNK,
    Checkpointing,
    DeviceKind,
    DType,
    Loss,
    Optimizer,
    Residual,
    StepConfig,
    Workload,
    check,
    check_step,
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(_Section):
    """The shape of the GPT."""

    n_layer: int = Field(ge=1)
    n_head: int = Field(ge=1)
    n_embd: int = Field(ge=1)
    vocab_size: int = Field(default=PADDED_GPT2_VOCAB, ge=1)
    block_size: int = Field(default=1024, ge=1)
    bias: bool = False
    tied: bool = True
    norm: Norm = "layernorm"
    positions: Positions = "learned"
    mlp: MLPKind = "gelu"
    n_kv_head: int = Field(default=0, ge=0, description="heads of keys and values; 0: as many as n_head")
    qk_norm: bool = False
    logit_softcap: float = Field(default=0.0, ge=0, description="soft limit of the logits; 0: off")


class StepSection(_Section):
    """How one optimizer step is run."""

    batch_size: int = Field(ge=1)
    grad_accum: int = Field(default=1, ge=1)
    dtype: DType = "bfloat16"
    compile: bool = False
    loss: Loss = "chunked"
    loss_chunk_tokens: int = Field(default=DEFAULT_LOSS_CHUNK, ge=1)
    checkpointing: Checkpointing = "none"
    optimizer: Optimizer = "adamw-fused"
    residual: Residual = Field(
        default="compute", description="dtype of the residual stream: of activations, or float32"
    )
    workload: Workload = "vramplan"
    device: DeviceKind = "cuda"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    torch: str = Field(default="", description="release that the plan was made for; empty: any")


Schedule = Literal["cosine", "wsd", "constant"]
"""How the learning rate goes on after the warm-up: see :mod:`vramplan.trainer.schedule`."""

TrackerName = Literal["tensorboard", "wandb", "trackio"]
WITH_PROJECT: tuple[TrackerName, ...] = ("wandb", "trackio")
_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class TrainSection(_Section):
    """The optimisation. Exactly one of ``token_budget`` and ``max_steps`` ends the run; ``max_steps`` wins."""

    learning_rate: float = Field(default=6e-4, gt=0)
    min_learning_rate: float = Field(default=6e-5, ge=0)
    warmup_steps: int = Field(default=700, ge=0)
    schedule: Schedule = "cosine"
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="wsd: the last part of the steps, which decays")
    weight_decay: float = Field(default=0.1, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    grad_clip: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")
    token_budget: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    max_hours: float | None = Field(default=None, gt=0, description="of training, over all sessions of the run")
    eval_interval: int = Field(default=250, ge=1, description="optimizer steps between evaluations")
    eval_batches: int = Field(default=20, ge=1, description="micro-batches per evaluation")
    log_interval: int = Field(default=10, ge=1, description="optimizer steps between metric lines")
    checkpoint_interval: int = Field(default=250, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1)
    guard: bool = Field(default=True, description="when memory runs out, do the step again in smaller micro-batches")
    compile_after: int | None = Field(default=None, ge=1, description="start eager, compile after so many steps")
    seed: int = Field(default=1337, ge=0, lt=2**63)
    track: tuple[str, ...] = Field(default=(), strict=False, description="trackers, such as wandb:PROJECT")


class DataSection(_Section):
    """Where the text is inside the Parquet files, and how it is split."""

    text_column: str = "text"
    validation_fraction: float = Field(default=0.005, gt=0, lt=0.5)
    shard_tokens: int = Field(default=100_000_000, ge=1024)


class PlanSection(_Section):
    """What the planner expected when it wrote this file. Informative; ``train`` compares it with the machine."""

    gpu: str | None = None
    total_bytes: int | None = Field(default=None, ge=1, description="the card's, or what was given for it")
    budget_bytes: int | None = Field(default=None, ge=1, description="of these, what the run may take")
    process_bytes: int | None = Field(default=None, ge=1)
    peak_allocated_bytes: int | None = Field(default=None, ge=1)
    tokens_per_second: float | None = Field(default=None, gt=0)
    oom_risk: float | None = Field(default=None, ge=0, le=1)
    max_risk: float | None = Field(default=None, ge=CERTAINTY, le=LARGEST_RISK)
    target_parameters: int | None = Field(default=None, ge=1)
    version: str | None = None


class RunConfig(_Section):
    """A complete, validated run: :meth:`load`, :meth:`parse` or :meth:`build` it, :meth:`save` it."""

    model: ModelSection
    step: StepSection
    train: TrainSection = TrainSection()
    data: DataSection = DataSection()
    plan: PlanSection = PlanSection()

    @property
    def shape(self) -> Shape:
        """The planner's view of ``[model]``."""
        return Shape(**self.model.model_dump())

    @property
    def step_config(self) -> StepConfig:
        """The planner's view of ``[step]``."""
        return StepConfig(**self.step.model_dump())

    @property
    def tokens_per_step(self) -> int:
        """batch_size x grad_accum x block_size."""
        return self.step.batch_size * self.step.grad_accum * self.model.block_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps until the end: ``max_steps``, or the token budget (default 20 per parameter), rounded up."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        budget = self.train.token_budget or TOKENS_PER_PARAMETER * int(self.shape.parameters)
        return -(-budget // self.tokens_per_step)

    @classmethod
    def build(cls, shape: Shape, step: StepConfig, **sections: dict[str, Any]) -> Self:
        """Make a run configuration from planner types plus optional ``train=``, ``data=``, ``plan=`` dictionaries."""
        model = {name: _plain(getattr(shape, name)) for name in ModelSection.model_fields}
        settings = {name: _plain(getattr(step, name)) for name in StepSection.model_fields}
        return cls.parse({"model": model, "step": settings, **sections})

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "") -> Self:
        """Validate a nested dictionary. Raises ConfigError with *all* problems, unknown keys included."""
        try:
            config = cls.model_validate(data)
        except ValidationError as error:
            problems = [_problem(cls, e) for e in error.errors()]
            raise ConfigError([*problems, *_section_problems(data)], source) from None
        problems = [*check(config.shape, config.step_config), *_train_problems(config.train, config.step)]
        if problems:
            raise ConfigError(problems, source)
        return config

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a TOML file. Raises ConfigError when it is missing, not TOML, or not a valid run."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a mark
        except FileNotFoundError:
            raise ConfigError(Problem("config", str(path), "does not exist")) from None
        except OSError as error:
            raise ConfigError(Problem("config", str(path), f"cannot be read ({error.strerror})")) from None
        except UnicodeDecodeError as error:
            raise ConfigError(Problem("config", str(path), f"is not UTF-8 text ({error.reason})")) from None
        return cls.from_toml(text, str(path))

    @classmethod
    def from_toml(cls, text: str, source: str = "") -> Self:
        """Read TOML text that came from ``source``. Raises ConfigError."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(Problem("config", source, f"is not valid TOML ({error})")) from None
        return cls.parse(data, source)

    def to_toml(self) -> str:
        """The configuration as TOML, without unset values."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def save(self, path: str | Path) -> None:
        """Write the TOML atomically: a temporary file beside it, flushed, then renamed. Raises ConfigError."""
        write_text(path, self.to_toml(), "config")


def _plain(value: Any) -> Any:
    """A numpy scalar as the Python number it stands for; TOML and strict validation know no other."""
    return value.item() if hasattr(value, "item") else value


S = TypeVar("S", bound=_Section)


def _section_problems(data: dict[str, Any]) -> list[Problem]:
    """Cross-field problems of the sections whose known keys are sound, when something else is not."""
    problems: list[Problem] = []
    if (model := _known_part(ModelSection, data.get("model"))) is not None:
        problems += check_shape(Shape(**model.model_dump()))
    if (step := _known_part(StepSection, data.get("step"))) is not None:
        problems += check_step(StepConfig(**step.model_dump()))
    if (train := _known_part(TrainSection, data.get("train", {}))) is not None:
        problems += _train_problems(train, None)
    return problems


def _known_part(section: type[S], data: Any) -> S | None:
    """A section without its unknown keys, or None when it is unsound: then it is reported field by field."""
    if not isinstance(data, dict):
        return None
    try:
        return section.model_validate({key: value for key, value in data.items() if key in section.model_fields})
    except ValidationError:
        return None


def _train_problems(t: TrainSection, step: StepSection | None) -> list[Problem]:
    problems = tracker_problems(t.track, "train.track")
    if step is not None and step.optimizer == "adamw-in-backward" and t.grad_clip > 0:
        rule = "needs every gradient at once, and adamw-in-backward uses each up as it comes"
        problems.append(Problem("train.grad_clip", t.grad_clip, rule, "use 0, or another optimizer"))
    if step is not None and step.optimizer == "adamw-in-backward" and t.compile_after is not None:
        rule = "is impossible with adamw-in-backward, which a compiled graph would make pointless"
        problems.append(Problem("train.compile_after", t.compile_after, rule, "leave it out, or use another optimizer"))
    if step is not None and step.compile and t.compile_after is not None:
        rule = "is for a run that starts eager, and this one is compiled from its first step"
        remedy = "set step.compile=false, or leave it out"
        problems.append(Problem("train.compile_after", t.compile_after, rule, remedy))
    if t.min_learning_rate > t.learning_rate:
        remedy = f"use at most {t.learning_rate:g}"
        problems.append(Problem("train.min_learning_rate", t.min_learning_rate, "is above learning_rate", remedy))
    return problems


def tracker_problems(track: Iterable[str], field: str) -> list[Problem]:
    """What is wrong with a list of trackers: unknown ones, projects that cannot be, the same tracker twice."""
    problems: list[Problem] = []
    names: list[str] = []
    for entry in track:
        name, colon, project = entry.partition(":")
        if name not in get_args(TrackerName):
            problems.append(Problem(field, entry, "is not a tracker", did_you_mean(name, get_args(TrackerName))))
        elif colon and name not in WITH_PROJECT:
            problems.append(Problem(field, entry, "names a project, and has none", f"write {name}"))
        elif colon and not _PROJECT.fullmatch(project):
            rule = "is not a project's name: letters, digits, '.', '_' and '-', at most 100"
            problems.append(Problem(field, entry, rule, f"such as {name}:my-project"))
        elif name in names:
            problems.append(Problem(field, entry, "is the second of its kind", "name each tracker once"))
        names.append(name)
    return problems


def _problem(model: type[BaseModel], error: Any) -> Problem:
    """Turn one pydantic error into field, value, rule and remedy."""
    path = [str(part) for part in error["loc"]]
    dotted = ".".join(path)
    if error["type"] == "extra_forbidden" and len(path) == 1 and isinstance(error["input"], dict):
        return Problem(dotted, "missing", "is not a known section", _unknown_key_remedy(model, path))
    if error["type"] == "extra_forbidden":
        return Problem(dotted, error["input"], "is not a known key", _unknown_key_remedy(model, path))
    if error["type"] == "missing":
        remedy = f"add {path[-1]} to [{path[0]}]" if path[1:] else f"add a section [{path[0]}]"
        return Problem(dotted, "missing", "is required", remedy)
    if error["type"] == "model_type":
        return Problem(dotted, error["input"], "is not a section", f"write [{dotted}] and its keys below")
    if error["type"] == "literal_error":
        known = [w.strip(" '") for w in str(error["ctx"]["expected"]).replace(" or ", ",").split(",")]
        return Problem(dotted, error["input"], "is not one of the choices", did_you_mean(str(error["input"]), known))
    message = str(error["msg"])
    return Problem(dotted, error["input"], message.replace("Input should", "should"))


def _unknown_key_remedy(model: type[BaseModel], path: list[str]) -> str:
    """Where a key belongs that is right in another section, or else what it may be a misspelling of."""
    home = next((name for name in model.model_fields if path[-1] in _known_keys(model, [name])), None)
    if home is not None and path[-1] not in model.model_fields:
        return f"it belongs in [{home}]"
    return did_you_mean(path[-1], _known_keys(model, path[:-1]))


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    fields = model.model_fields
    for part in path:
        annotation = fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        fields = annotation.model_fields
    return list(fields)


LEARNING_RATES = ((125e6, 6e-4), (350e6, 3e-4), (760e6, 2.5e-4), (1.3e9, 2e-4), (2.7e9, 1.6e-4), (6.7e9, 1.2e-4))
"""Peak learning rate by parameters (GPT-3, Brown et al. 2020, table 2.1)."""
SMALL_MODEL_EXPONENT, LARGEST_RATE = -0.47, 3e-3
"""Below 125M the rate goes on rising with the slope of the table between 125M and 1.3B, up to a stable maximum."""


def suggested_training(
    parameters: int, tokens_per_step: int, token_budget: int, max_steps: int | None
) -> dict[str, Any]:
    """Values for ``[train]`` that follow from size and length: learning rate, warm-up, intervals, the end of the run.

    The learning rate is that of the GPT-3 model nearest in size, higher for smaller ones; it decays to a tenth. Warm-up
    is 2 % of the steps, at most 700.
    """
    size, peak = min(LEARNING_RATES, key=lambda row: abs(math.log(row[0] / parameters)))
    if parameters < LEARNING_RATES[0][0]:
        peak = round(min(LARGEST_RATE, peak * (parameters / size) ** SMALL_MODEL_EXPONENT), 5)
    steps = max_steps or -(-token_budget // tokens_per_step)
    ends = {"max_steps": max_steps} if max_steps else {"token_budget": token_budget}
    interval = max(1, min(250, steps // 4))
    return {
        "learning_rate": peak,
        "min_learning_rate": round(peak / 10, 9),
        "warmup_steps": min(700, max(1, steps // 50)),
        "eval_interval": interval,
        "checkpoint_interval": interval,
        "log_interval": max(1, min(10, steps // 20)),
        **ends,
    }
