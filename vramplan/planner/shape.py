"""The dimensions of a GPT: parameters, FLOPs, what is legal, and the candidates near a target size.

Numeric fields may be Python integers or numpy arrays that broadcast together; every formula here works on both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..errors import Problem, did_you_mean

Ints = Any  # an int, or a numpy integer array: the formulas below do not care

Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rotary"]
MLPKind = Literal["gelu", "swiglu", "relu2"]

GPT2_VOCAB = 50257
PADDED_GPT2_VOCAB = 50304
"""GPT-2's 50,257 tokens rounded up to a multiple of 64, which tensor cores prefer (nanoGPT's choice)."""

TOKENS_PER_PARAMETER = 20
"""Compute-optimal (Hoffmann et al. 2022); how long a run lasts that says nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One decoder. By default GPT-2's: learned positions, LayerNorm before each branch, a GELU MLP four times as wide.

    ``bias`` gives every linear layer and LayerNorm a bias; ``tied`` shares the token embedding with the output head.
    ``n_kv_head`` below ``n_head`` groups queries (0: as many as ``n_head``); ``mlp`` "swiglu" is gated, "relu2" squares
    a ReLU; ``qk_norm`` divides queries and keys by their root mean square; ``logit_softcap`` c makes the logits
    c tanh(logits / c) (0: off).
    """

    n_layer: Ints
    n_head: Ints
    n_embd: Ints
    vocab_size: Ints = PADDED_GPT2_VOCAB
    block_size: Ints = 1024
    bias: bool = False
    tied: bool = True
    norm: Norm = "layernorm"
    positions: Positions = "learned"
    mlp: MLPKind = "gelu"
    n_kv_head: Ints = 0
    qk_norm: bool = False
    logit_softcap: float = 0.0

    @property
    def head_dim(self) -> Ints:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key and a value."""
        if isinstance(self.n_kv_head, int) and isinstance(self.n_head, int):
            return self.n_kv_head not in (0, self.n_head)
        return not isinstance(self.n_kv_head, int) or self.n_kv_head > 0

    @property
    def kv_width(self) -> Ints:
        """Width of all keys (or all values) of a token."""
        return self.n_kv_head * self.head_dim if self.grouped else self.n_embd

    @property
    def qkv_width(self) -> Ints:
        """Outputs of the projection into queries, keys and values."""
        return self.n_embd + 2 * self.kv_width

    @property
    def mlp_width(self) -> Ints:
        """Inputs of the MLP's second matrix: 4 h; gated 8/3 h rounded up to 64, which costs as many parameters."""
        return -(-8 * self.n_embd // 192) * 64 if self.mlp == "swiglu" else 4 * self.n_embd

    @property
    def fc_width(self) -> Ints:
        """Outputs of the MLP's first matrix: when gated, gate and value side by side."""
        return 2 * self.mlp_width if self.mlp == "swiglu" else self.mlp_width

    @property
    def position_parameters(self) -> Ints:
        """The table of learned positions."""
        return self.block_size * self.n_embd if self.positions == "learned" else 0

    @property
    def embedding_parameters(self) -> Ints:
        """Token embedding plus learned positions."""
        return self.vocab_size * self.n_embd + self.position_parameters

    @property
    def head_parameters(self) -> Ints:
        """The output head's own weights: none when tied."""
        return 0 if self.tied else self.vocab_size * self.n_embd

    @property
    def norm_parameters(self) -> Ints:
        """Weight, and for a LayerNorm with biases the bias, of one norm."""
        return self.n_embd * (2 if self.norm_bias else 1)

    @property
    def norm_bias(self) -> bool:
        """Whether norms have a bias: an RMSNorm never does."""
        return self.bias and self.norm == "layernorm"

    @property
    def block_matrices(self) -> Ints:
        """Elements of one block's four matrices: 12 h^2 in GPT-2's layout."""
        return self.n_embd * (self.qkv_width + self.n_embd + self.fc_width + self.mlp_width)

    @property
    def block_parameters(self) -> Ints:
        """Weights of one block: four matrices, two norms, and their biases if any."""
        biases = self.qkv_width + self.fc_width + 2 * self.n_embd if self.bias else 0
        return self.block_matrices + 2 * self.norm_parameters + biases

    @property
    def parameters(self) -> Ints:
        """All trainable parameters, shared ones once."""
        outside = self.embedding_parameters + self.head_parameters + self.norm_parameters
        return outside + self.n_layer * self.block_parameters

    @property
    def matmul_parameters(self) -> Ints:
        """Parameters that multiply activations: the blocks' matrices and the (possibly tied) head."""
        return self.block_matrices * self.n_layer + self.vocab_size * self.n_embd

    @property
    def flops_per_token(self) -> Ints:
        """Model FLOPs of a forward and backward pass per token, the numerator of MFU.

        6 x (parameters without positions) + 12 L h T, not halved for causality (PaLM, appendix B).
        """
        return 6 * (self.parameters - self.position_parameters) + 12 * self.n_layer * self.n_embd * self.block_size

    @property
    def label(self) -> str:
        """``12L/12H/768E``."""
        return f"{self.n_layer}L/{self.n_head}H/{self.n_embd}E"

    @property
    def variant(self) -> tuple[str, ...]:
        """Words for what differs from GPT-2's layout; empty where nothing does. (Biases and tying are both GPT's.)"""
        words = [
            ("RMSNorm", self.norm == "rmsnorm"),
            ("rotary positions", self.positions == "rotary"),
            ("SwiGLU", self.mlp == "swiglu"),
            ("squared ReLU", self.mlp == "relu2"),
            (f"{self.n_kv_head} key head" + "s" * (self.n_kv_head != 1), self.grouped),
            ("QK-norm", self.qk_norm),
            (f"logits capped at {self.logit_softcap:g}", self.logit_softcap > 0),
        ]
        return tuple(word for word, present in words if present)


LARGEST = {"n_layer": 1000, "n_head": 1024, "n_embd": 65_536, "vocab_size": 10_000_000, "block_size": 1_048_576}
"""Beyond these a value is taken for a slip; no published GPT comes near."""

SHAPE_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "positions": get_args(Positions),
    "mlp": get_args(MLPKind),
}


def divisors(n: int) -> tuple[int, ...]:
    """Every positive divisor of ``n``, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def check_shape(shape: Shape) -> list[Problem]:
    """List everything that makes a shape impossible, each with the nearest legal values. Empty when legal."""
    problems = []
    for field in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size"):
        value = getattr(shape, field)
        if value < 1:
            problems.append(Problem(field, value, "must be at least 1"))
        elif value > LARGEST[field]:
            problems.append(Problem(field, value, f"is beyond the largest that is planned for, {LARGEST[field]}"))
    for field, known in SHAPE_CHOICES.items():
        value = getattr(shape, field)
        if value not in known:
            problems.append(Problem(field, value, "is not one of the choices", did_you_mean(str(value), known)))
    if shape.n_kv_head < 0:
        problems.append(Problem("n_kv_head", shape.n_kv_head, "must be at least 0 (0: as many as n_head)"))
    if not 0 <= shape.logit_softcap < math.inf:
        problems.append(Problem("logit_softcap", shape.logit_softcap, "must be at least 0 (0: off)"))
    if problems:
        return problems
    if shape.n_embd % shape.n_head:
        problems.append(
            Problem(
                "n_embd",
                shape.n_embd,
                f"is not divisible by n_head={shape.n_head}",
                "use " + "; or ".join(describe_alternatives(shape)),
            )
        )
    elif shape.positions == "rotary" and shape.head_dim % 2:
        rule = f"is odd (n_embd={shape.n_embd} / n_head={shape.n_head}): rotary positions turn pairs"
        problems.append(Problem("head_dim", shape.head_dim, rule, "use another n_head, or positions=learned"))
    if shape.grouped and shape.n_head % shape.n_kv_head:
        near = ", ".join(str(d) for d in divisors(shape.n_head))
        problems.append(
            Problem("n_kv_head", shape.n_kv_head, f"does not divide n_head={shape.n_head}", f"use one of {near}")
        )
    return problems


def describe_alternatives(shape: Shape) -> list[str]:
    """Words for each legal neighbour of an indivisible shape, good ones first."""
    return [
        f"n_embd={s.n_embd} with n_head={s.n_head} (head_dim {s.head_dim}{awkward(s.head_dim)}, "
        f"{s.parameters / 1e6:.1f}M parameters)"
        for s in legal_neighbours(shape)
    ]


def awkward(head_dim: int) -> str:
    """Words for a head width that fused attention has to pad; empty for good ones."""
    if head_dim % 8:
        return ", not a multiple of 8: attention pads it"
    return ""


def legal_neighbours(shape: Shape) -> list[Shape]:
    """Legal shapes near one whose width its heads do not divide.

    First the same width with head counts that give head_dim 64, 32 or 128; then head_dim 64 with this head count; then
    the nearest widths with head_dim a multiple of 8, and the nearest of all.
    """
    h, heads = shape.n_embd, shape.n_head
    found: list[Shape] = []

    def offer(n_head: int, n_embd: int) -> None:
        shared = shape.n_kv_head if n_head % max(1, shape.n_kv_head) == 0 else 0
        candidate = replace(shape, n_head=n_head, n_embd=n_embd, n_kv_head=shared)
        if 1 <= n_head <= min(n_embd, LARGEST["n_head"]) and candidate not in found:
            found.append(candidate)

    same_width = [h // d for d in (64, 32, 128) if h % d == 0]
    if not same_width:
        small = [k for k in range(1, math.isqrt(h) + 1) if h % k == 0]
        same_width = sorted({*small, *(h // k for k in small)}, key=lambda k: (abs(k - heads), k))[:2]
    for n_head in sorted(same_width, key=lambda k: (abs(k - heads), k))[:2]:
        offer(n_head, h)
    offer(heads, 64 * heads)
    step = 8 * heads
    for n_embd in (h // step * step, h // step * step + step, h // heads * heads, h // heads * heads + heads):
        if n_embd > 0:
            offer(heads, n_embd)
    return found
