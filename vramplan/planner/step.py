"""How one optimizer step is run: everything besides the shape that decides memory and speed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..errors import ConfigError, Problem, did_you_mean
from .shape import Ints, Shape, check_shape

DType = Literal["float32", "tf32", "bfloat16", "float16", "pure-bfloat16"]
Loss = Literal["full", "chunked"]
Checkpointing = Literal["none", "selective", "block"]
Optimizer = Literal[
    "adamw-fused", "adamw-foreach", "adamw8bit", "adamw-in-backward", "adamw-offload", "adamw-stochastic", "muon"
]
Residual = Literal["compute", "float32"]
Workload = Literal["vramplan", "nanogpt", "autocast", "plain"]
DeviceKind = Literal["cuda", "cpu"]

Version = tuple[int, int]

LARGEST_COUNT = 2**30
"""Beyond this a batch, an accumulation or a slice is taken for a slip."""

DEFAULT_LOSS_CHUNK = 1024
"""Tokens per slice of the chunked loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """One training step. ``batch_size`` and ``grad_accum`` may be numpy arrays; the rest selects a tensor table.

    ``dtype`` is that of activations and products; weights and states are float32, except with ``pure-bfloat16``, whose
    optimizer rounds stochastically or has float32 masters on the host. ``tf32`` is float32 with products on tensor
    cores.

    ``residual`` is the dtype of the residual stream: that of the activations, or float32, in which norms are then
    computed too.

    ``workload`` names the script: ``vramplan`` is our trainer; ``nanogpt`` is nanoGPT's train.py; ``autocast`` the
    common hand-written loop (``cross_entropy(logits.float())`` under autocast, logits kept by the caller); ``plain``
    the loop that has everything in one dtype, weights and optimizer states included, and computes the loss in a
    function of its own (``cross_entropy(logits)``, logits dropped when it returns). ``dropout`` of embeddings and
    branches is known for the scripts; attention's own costs nothing. ``torch`` is the release that will run it, such as
    "2.13"; empty for the newest that the tables know.
    """

    batch_size: Ints = 1
    grad_accum: Ints = 1
    dtype: DType = "bfloat16"
    compile: bool = False
    loss: Loss = "chunked"
    loss_chunk_tokens: Ints = DEFAULT_LOSS_CHUNK
    checkpointing: Checkpointing = "none"
    optimizer: Optimizer = "adamw-fused"
    residual: Residual = "compute"
    workload: Workload = "vramplan"
    device: DeviceKind = "cuda"
    dropout: float = 0.0
    torch: str = ""

    @property
    def half(self) -> bool:
        """Whether activations are two bytes wide."""
        return self.dtype not in ("float32", "tf32")

    @property
    def wide_residual(self) -> bool:
        """Whether our trainer's residual stream is wider than its activations."""
        return self.residual == "float32" and self.half and self.workload == "vramplan"

    @property
    def pure(self) -> bool:
        """Whether weights, gradients and optimizer states are as narrow as activations."""
        return self.dtype == "pure-bfloat16" or self.workload == "plain"


SCRIPTS = {
    "nanogpt": "nanoGPT's train.py", "autocast": "the hand-written autocast loop", "plain": "the plain loop",
}  # fmt: skip
"""Workloads that are other people's scripts: GPT-2's layout, and none of our savers."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Settings that cannot be combined: ``field`` is the one to blame, ``rule`` says with what."""

    field: str
    applies: Callable[[StepConfig], bool]
    rule: str
    remedy: str


def _in_backward(step: StepConfig) -> bool:
    return step.optimizer == "adamw-in-backward"


CONFLICTS = (
    Conflict(
        "grad_accum", lambda s: _in_backward(s) and bool(np.any(np.asarray(s.grad_accum) > 1)),
        "is impossible where each gradient is used up in the backward", "use 1, or another optimizer",
    ),
    Conflict(
        "dtype", lambda s: _in_backward(s) and s.dtype == "float16",
        "must be unscaled as a whole before the update, which in the backward it cannot be", "use bfloat16",
    ),
    Conflict(
        "compile", lambda s: _in_backward(s) and s.compile,
        "returns all gradients at once, so that adamw-in-backward would save nothing",
        "use compile=false, or another optimizer",
    ),
    Conflict(
        "residual", lambda s: s.dtype == "pure-bfloat16" and s.residual == "float32",
        "would be normalised by weights in bfloat16", "use residual=compute, or dtype=bfloat16",
    ),
    Conflict(
        "optimizer",
        lambda s: s.dtype == "pure-bfloat16" and s.optimizer not in ("adamw-stochastic", "adamw-offload"),
        "would lose small updates of weights in pure-bfloat16",
        "use adamw-stochastic, or adamw-offload, which has float32 masters on the host",
    ),
    Conflict(
        "optimizer", lambda s: s.dtype != "pure-bfloat16" and s.optimizer == "adamw-stochastic",
        "rounds to bfloat16 weights, and these are float32", "use dtype=pure-bfloat16",
    ),
    Conflict(
        "optimizer", lambda s: s.optimizer == "adamw-offload" and s.device == "cpu",
        "moves states to host memory, where a CPU has them anyway", "use adamw-fused",
    ),
)  # fmt: skip
"""What cannot be combined; planner, validator and search all read it. Clipping is another (``runconfig``): a gradient
that is used up in the backward has no global norm yet."""

OPTIMIZER_WORDS: dict[Optimizer, str] = {
    "adamw-fused": "fused AdamW",
    "adamw8bit": "8-bit AdamW states",
    "adamw-offload": "AdamW states in host memory",
}
"""What a change to one of these is called; others go by their name."""

CHECKPOINTING_WORDS: dict[Checkpointing, str] = {
    "none": "no activation checkpointing",
    "selective": "selective checkpointing",
    "block": "activation checkpointing",
}

CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": get_args(DType),
    "loss": get_args(Loss),
    "checkpointing": get_args(Checkpointing),
    "optimizer": get_args(Optimizer),
    "residual": get_args(Residual),
    "workload": get_args(Workload),
    "device": get_args(DeviceKind),
}


def check_step(step: StepConfig) -> list[Problem]:
    """List everything that makes the settings impossible or mutually exclusive. Empty when legal."""
    problems = []
    for field in ("batch_size", "grad_accum", "loss_chunk_tokens"):
        value = getattr(step, field)
        if value < 1:
            problems.append(Problem(field, value, "must be at least 1"))
        elif value > LARGEST_COUNT:
            problems.append(Problem(field, value, f"is beyond the largest that is planned for, {LARGEST_COUNT}"))
    for field, known in CHOICES.items():
        value = getattr(step, field)
        if value not in known:
            problems.append(Problem(field, value, "is not one of the choices", did_you_mean(str(value), known)))
    if not 0 <= step.dropout < 1:
        problems.append(Problem("dropout", step.dropout, "must be at least 0 and below 1"))
    elif step.dropout and step.workload == "vramplan":
        problems.append(Problem("dropout", step.dropout, "does not exist in this trainer", "use 0"))
    elif step.dropout and step.device == "cpu":
        rule = "makes a CPU hold the attention scores, which is not modelled"
        problems.append(Problem("dropout", step.dropout, rule, "use 0, or device=cuda"))
    if step.workload == "plain" and step.dtype == "float16":
        problems.append(Problem("dtype", "float16", "as the weights' own dtype does not train", "use bfloat16"))
    if step.torch and not re.match(r"\d+\.\d+", step.torch):
        problems.append(Problem("torch", step.torch, "is not a version", "such as 2.13"))
    problems += [Problem(c.field, getattr(step, c.field), c.rule, c.remedy) for c in CONFLICTS if c.applies(step)]
    script = SCRIPTS.get(step.workload)
    if script is not None:
        if step.loss == "chunked":
            problems.append(Problem("loss", "chunked", f"does not exist in {script}", "use loss=full"))
        if step.checkpointing != "none":
            problems.append(Problem("checkpointing", step.checkpointing, f"does not exist in {script}", "use none"))
        if step.optimizer not in ("adamw-fused", "adamw-foreach"):
            problems.append(Problem("optimizer", step.optimizer, f"does not exist in {script}", "use adamw-fused"))
        if step.residual != "compute":
            rule = f"cannot be chosen in {script}"
            problems.append(Problem("residual", step.residual, rule, "use residual=compute, or workload=vramplan"))
        if step.dtype in ("tf32", "pure-bfloat16"):
            remedy = "use bfloat16 (pure, with workload=plain)" if "pure" in step.dtype else "use float32"
            problems.append(Problem("dtype", step.dtype, f"does not exist in {script}", remedy))
    return problems


def check(shape: Shape, step: StepConfig) -> list[Problem]:
    """List everything that is wrong with a shape, with a step, and with both together. Empty when legal."""
    problems = [*check_shape(shape), *check_step(step)]
    if step.workload in SCRIPTS and shape.variant:
        rule = f"does not exist in {SCRIPTS[step.workload]}"
        problems += [Problem("model", word, rule, "use GPT-2's layout, or workload=vramplan") for word in shape.variant]
    return problems


def release(version: str) -> Version:
    """(2, 13) of ``2.13.0+cu130``. Raises ConfigError for what is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ConfigError(Problem("torch version", version, "is not a version", "such as 2.13.0"))
    return int(found[1]), int(found[2])


def tokens_per_step(shape: Shape, step: StepConfig) -> Ints:
    """batch_size x grad_accum x block_size."""
    return step.batch_size * step.grad_accum * shape.block_size
