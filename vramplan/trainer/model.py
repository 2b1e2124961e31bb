"""The GPT that vramplan trains: GPT-2's layout, with every change of precision written out.

There is no autocast anywhere: master weights are float32, and each tensor is cast where this file says so. The same
casts happen on a CPU and on a GPU, so a CPU pass confirms the planner's tensor table byte for byte.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..planner.shape import Shape
from ..planner.step import StepConfig
from .loss import next_token_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Linear(nn.Module):
    """``y = x W^T + b`` with float32 weights of shape (out, in), cast to the input's dtype for the product."""

    def __init__(self, n_in: int, n_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension; statistics are computed in float32 by the kernel."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same, in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, 1e-5)


class Attention(nn.Module):
    """Causal multi-head self-attention through PyTorch's fused kernel."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head = shape.n_head
        self.qkv = Linear(shape.n_embd, 3 * shape.n_embd, shape.bias)
        self.proj = Linear(shape.n_embd, shape.n_embd, shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, h) -> (B, T, h)."""
        B, T, h = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, h // self.n_head).transpose(1, 2) for part in self.qkv(x).split(h, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(B, T, h))
        return out


class MLP(nn.Module):
    """Four times as wide as the residual stream, with GELU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc = Linear(shape.n_embd, 4 * shape.n_embd, shape.bias)
        self.proj = Linear(4 * shape.n_embd, shape.n_embd, shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, h) -> (B, T, h)."""
        out: Tensor = self.proj(F.gelu(self.fc(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(shape.n_embd, shape.bias)
        self.attn = Attention(shape)
        self.ln_2 = LayerNorm(shape.n_embd, shape.bias)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, h) -> (B, T, h)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A GPT of ``shape``, run as ``step`` says (dtype, loss, activation checkpointing).

    The residual stream has the compute dtype. Initialisation follows GPT-2: normal(0, 0.02), and the projections into
    the residual stream scaled by 1/sqrt(2 n_layer).
    """

    def __init__(self, shape: Shape, step: StepConfig, seed: int = 1337) -> None:
        super().__init__()
        self.shape, self.step = shape, step
        self.dtype = DTYPES[step.dtype]
        self.wte = nn.Parameter(torch.empty(shape.vocab_size, shape.n_embd))
        self.wpe = nn.Parameter(torch.empty(shape.block_size, shape.n_embd))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.ln_f = LayerNorm(shape.n_embd, shape.bias)
        self.lm_head = None if shape.tied else nn.Parameter(torch.empty(shape.vocab_size, shape.n_embd))
        self._initialise(seed)

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

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, h) after the last LayerNorm, in the compute dtype."""
        x = (F.embedding(tokens, self.wte) + self.wpe[: tokens.shape[1]]).to(self.dtype)
        recompute = self.step.checkpointing == "block" and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if recompute else block(x)
        out: Tensor = self.ln_f(x)
        return out

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token cross-entropy of (B, T) int64 tokens and targets: a float32 scalar."""
        return next_token_loss(self.hidden(tokens), self.head, targets, self.step)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, V) float32 logits of the token that follows the last position."""
        x = self.hidden(tokens)[:, -1]
        return F.linear(x, self.head.to(x.dtype)).float()
