"""The GPT that vramplan trains: GPT-2's layout or its modern variants, with every change of precision written out.

There is no autocast anywhere: master weights are float32, and each tensor is cast where this file says so. The same
casts happen on a CPU and on a GPU, so a CPU pass confirms the planner's tensor table byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..planner.attention import takes_flash
from ..planner.shape import Shape
from ..planner.step import StepConfig
from .cache import KVCache, LayerCache
from .loss import next_token_loss
from .pointwise import rms_norm, rotary_tables, rotate, softcap, squared_relu, swiglu

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the positions at hand, as :func:`rotary_tables` makes them."""

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "pure-bfloat16": torch.bfloat16,
}


class Linear(nn.Module):
    """``y = x W^T + b`` with float32 weights of shape (out, in), cast to the input's dtype for the product."""

    def __init__(self, n_in: int, n_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of ``x``."""
        return F.linear(x, *self.cast(x.dtype))

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the product takes them."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.weight.to(dtype), bias


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension; statistics are computed in float32 by the kernel."""

    def __init__(self, width: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) in the residual stream's dtype -> the same in the compute dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, 1e-5).to(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, with a weight and no bias."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) in the residual stream's dtype -> the same in the compute dtype."""
        return rms_norm(x, self.weight.to(x.dtype)).to(self.dtype)


def norm(shape: Shape, dtype: torch.dtype) -> LayerNorm | RMSNorm:
    """The normalisation that ``shape`` asks for; what it returns has ``dtype``."""
    return RMSNorm(shape.n_embd, dtype) if shape.norm == "rmsnorm" else LayerNorm(shape.n_embd, shape.bias, dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention through PyTorch's fused kernel; several queries may share a key and a value."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.qkv = Linear(shape.n_embd, shape.qkv_width, shape.bias)
        self.proj = Linear(shape.n_embd, shape.n_embd, shape.bias)

    def forward(self, qkv: Tensor, rotary: Rotary | None, past: LayerCache | None = None) -> Tensor:
        """(B, T, qkv_width) projections -> (B, T, h). ``past``: T new tokens, 1 or all, after those of the cache."""
        s = self.shape
        B, T, _ = qkv.shape
        q, k, v = (
            part.view(B, T, -1, s.head_dim) for part in torch.split(qkv, [s.n_embd, s.kv_width, s.kv_width], dim=2)
        )
        if s.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if past is not None:
            k, v = past.extend(k, v)
        y = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out: Tensor = self.proj(y.transpose(1, 2).reshape(B, T, s.n_embd))
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (B, heads, T, width); ``k`` and ``v`` may have fewer heads, and more tokens before one."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and not kernel_groups(q):
        k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))
    causal = q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] < q.shape[1])


def kernel_groups(q: Tensor) -> bool:
    """Whether the fused kernel takes fewer keys than queries. On CUDA only FlashAttention does; any other way would
    hold the scores."""
    if not q.is_cuda:
        return True
    half = q.dtype != torch.float32
    return bool(takes_flash(q.shape[-1], half, torch.cuda.get_device_capability(q.device)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "swiglu": swiglu, "relu2": squared_relu}


class MLP(nn.Module):
    """Four times as wide as the residual stream with GELU or a squared ReLU; or gated, with as many parameters."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[shape.mlp]
        self.fc = Linear(shape.n_embd, shape.fc_width, shape.bias)
        self.proj = Linear(shape.mlp_width, shape.n_embd, shape.bias)


class Block(nn.Module):
    """Pre-norm transformer block. With selective checkpointing norms and activations are computed again when needed."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *, selective: bool = False) -> None:
        super().__init__()
        self.dtype, self.selective = dtype, selective
        self.ln_1 = norm(shape, dtype)
        self.attn = Attention(shape)
        self.ln_2 = norm(shape, dtype)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rotary: Rotary | None = None, past: LayerCache | None = None) -> Tensor:
        """(B, T, h), and the tables of rotary positions if there are any -> (B, T, h)."""
        x = x + self.attn(self._project(self.ln_1, self.attn.qkv, x), rotary, past)
        return x + self._project(self.mlp.activation, self.mlp.proj, self._project(self.ln_2, self.mlp.fc, x))

    def _project(self, before: Callable[[Tensor], Tensor], linear: Linear, x: Tensor) -> Tensor:
        """``linear(before(x))``. Selective: only ``x`` is kept; ``before`` is run again, the product is not.

        The compiler would repeat a product that lies between two recomputed parts; so there it is outside of them.
        """
        if not (self.selective and torch.is_grad_enabled()):
            return linear(before(x))  # type: ignore[no-any-return]
        if torch.compiler.is_compiling():
            return F.linear(*_recomputed(lambda x: (before(x), *linear.cast(self.dtype)), x))
        return _recomputed(lambda x: linear(before(x)), x)  # type: ignore[no-any-return]


def _recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` of which the arguments are kept; the backward calls it again, up to what it needs."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class GPT(nn.Module):
    """A GPT of ``shape``, run as ``step`` says (dtype, loss, activation checkpointing).

    The residual stream has the compute dtype, or float32 where ``step`` says so. Initialisation follows GPT-2:
    normal(0, 0.02), and the projections into the residual stream scaled by 1/sqrt(2 n_layer).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, step: StepConfig, seed: int = 1337) -> None:
        super().__init__()
        self.shape, self.step = shape, step
        self.dtype = DTYPES[step.dtype]
        self.stream_dtype = torch.float32 if step.residual == "float32" else self.dtype
        self.wte = nn.Parameter(torch.empty(shape.vocab_size, shape.n_embd))
        learned = shape.positions == "learned"
        self.wpe = nn.Parameter(torch.empty(shape.block_size, shape.n_embd)) if learned else None
        if not learned:
            cos, sin = rotary_tables(shape.block_size, shape.head_dim, self.dtype)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        selective = step.checkpointing == "selective"
        self.blocks = nn.ModuleList(Block(shape, self.dtype, selective=selective) for _ in range(shape.n_layer))
        self.ln_f = norm(shape, self.dtype)
        self.lm_head = None if shape.tied else nn.Parameter(torch.empty(shape.vocab_size, shape.n_embd))
        self._initialise(seed)
        if step.pure:
            for p in self.parameters():
                p.data = p.data.to(self.dtype)

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            std = 0.02 / math.sqrt(2 * self.shape.n_layer) if name.endswith("proj.weight") else 0.02
            nn.init.normal_(p, 0.0, std, generator=generator)

    @property
    def head(self) -> Tensor:
        """The output head's float32 weight, (V, h): the token embedding when tied."""
        return self.wte if self.lm_head is None else self.lm_head

    def parameter_count(self) -> int:
        """Number of trainable parameters, shared ones once."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, h) after the last norm, in the compute dtype.

        With a ``cache`` the tokens come after those in it: all of a prompt at once, then one by one.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        x = F.embedding(tokens, self.wte)
        if self.wpe is not None:
            x = x + self.wpe[start:end]
        rotary = None if self.wpe is not None else (self.cos[start:end], self.sin[start:end])
        x = x.to(self.stream_dtype)
        recompute = self.step.checkpointing == "block" and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            past = cache.layers[i] if cache is not None else None
            x = _recomputed(block, x, rotary) if recompute else block(x, rotary, past)
        out: Tensor = self.ln_f(x)
        return out

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token cross-entropy of (B, T) int64 tokens and targets: a float32 scalar."""
        return next_token_loss(self.hidden(tokens), self.head, targets, self.step, self.shape.logit_softcap)

    def logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 -> (B, V) float32 logits of the token that follows the last position."""
        x = self.hidden(tokens, cache)[:, -1]
        return softcap(F.linear(x, self.head.to(x.dtype)).float(), self.shape.logit_softcap)
