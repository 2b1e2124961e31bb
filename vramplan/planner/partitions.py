"""What compiled steps were traced to keep from forward to backward, by release of torch and family of configurations.

A family is everything that decides which tensors are kept; how large they are follows from a configuration's sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .allocator import MIN_BLOCK
from .shape import Ints, Shape
from .step import StepConfig, release

Row = tuple[int, str, int, str]
"""How often; elements as a product of named dimensions such as ``N h``; bytes per element; where it is made."""

MOST_FACTORS = 3
"""No tensor that was traced is a product of more."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Saved tensors as rows: those of every layer, and those besides.

    A row besides the layers counts negative where the first layer keeps something else than the others.
    """

    layer: tuple[Row, ...]
    outside: tuple[Row, ...]

    def layer_bytes(self, shape: Shape, step: StepConfig) -> Ints:
        """What one layer of this configuration keeps, in bytes as CUDA's allocator hands them out; vectorised."""
        return sum(n * rounded(product(elements, shape, step) * width) for n, elements, width, _ in self.layer)


Traced = Mapping[tuple[str, str], Partition]
"""By release (:func:`short`) and family."""


def short(torch_version: str) -> str:
    """``2.13`` for ``2.13.1+cu130``."""
    return ".".join(map(str, release(torch_version)))


def family(shape: Shape, step: StepConfig) -> str:
    """The options that decide which tensors a compiled step keeps, in words that stay the same."""
    half = "bfloat16" if step.dtype == "float16" else step.dtype
    options = {
        "bias": shape.bias, "tied": shape.tied, "norm": shape.norm, "positions": shape.positions, "mlp": shape.mlp,
        "grouped": shape.grouped, "qk_norm": shape.qk_norm, "softcap": shape.logit_softcap > 0,
        "workload": step.workload, "loss": step.loss, "checkpointing": step.checkpointing,
        "dtype": "float32" if half == "tf32" else half, "residual": step.residual, "dropout": step.dropout > 0,
    }  # fmt: skip
    return " ".join(f"{name}={str(value).lower()}" for name, value in options.items())


def partition_of(traced: Traced, shape: Shape, step: StepConfig) -> Partition | None:
    """What a compiled step of this family was traced to keep under its torch; None where nobody did."""
    return traced.get((short(step.torch), family(shape, step))) if traced and step.torch else None


def rounded(n_bytes: Ints) -> Ints:
    """As many bytes as CUDA's allocator hands out."""
    return -(-n_bytes // MIN_BLOCK) * MIN_BLOCK


def dimensions(shape: Shape) -> dict[str, Ints]:
    """Names for the widths of a model."""
    return {
        "h": shape.n_embd, "kv": shape.kv_width, "qkv": shape.qkv_width, "mlp": shape.mlp_width, "fc": shape.fc_width,
        "V": shape.vocab_size, "n_head": shape.n_head, "n_kv_head": shape.n_kv_head,
    }  # fmt: skip


def positions(shape: Shape, step: StepConfig) -> dict[str, Ints]:
    """Names for the rows of an activation: N tokens, T positions, T32 positions rounded up to 32."""
    B, T = step.batch_size, shape.block_size
    return {"N": B * T, "T": T, "B n_head T32": B * shape.n_head * (-(-T // 32) * 32)}


def product(symbol: str, shape: Shape, step: StepConfig) -> Ints:
    """The elements that a product of named dimensions stands for. Raises ValueError for a name that is none."""
    known = {**dimensions(shape), **positions(shape, step)}
    if symbol in known:
        return known[symbol]
    names = symbol.split()
    unknown = [name for name in names if not (_is_number(name) or name in known)]
    if unknown or not 0 < len(names) <= MOST_FACTORS:
        raise ValueError(f"{unknown or symbol!r} is no dimension")
    return math.prod(int(name) if _is_number(name) else known[name] for name in names)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()
