"""Elementwise operations of the modern options, each keeping for its backward only what it cannot do without.

Written as PyTorch's own operations they would keep twice as much and make several full-size temporaries on the way
back. Inside a compiled graph the plain formulas stand instead: there the compiler fuses and decides.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
"""Added to the mean square before its root."""


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Divide by the root mean square of the last dimension, then multiply by ``weight`` (width,) if there is one.

    CUDA has a fused kernel that keeps its input and the float32 reciprocal roots; elsewhere :class:`_RMSNorm` does.
    """
    if has_fused_norm(x) or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], weight, EPSILON)
    out: Tensor = _RMSNorm.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


def has_fused_norm(x: Tensor) -> bool:
    """Whether PyTorch runs the norm of ``x`` as one kernel."""
    return x.is_cuda


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        wide = x.float()
        scale = (wide * wide).mean(-1, keepdim=True).add_(EPSILON).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed = wide * scale
        return (normed if weight is None else normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        along = grad.float() * normed
        grad_weight = None if weight is None else along.flatten(0, -2).sum(0).to(weight.dtype)
        if weight is not None:
            along.mul_(weight)
        normed.mul_(along.mean(-1, keepdim=True))
        out = grad.float() * weight if weight is not None else grad.float().clone()
        return out.sub_(normed).mul_(scale).to(x.dtype), grad_weight


def rotary_tables(positions: int, width: int, dtype: torch.dtype, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines (positions, 1, width) and sines (positions, 1, width / 2) of rotary positions (arXiv:2104.09864).

    Computed in float32: half precision cannot tell large positions apart.
    """
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)[:, None, :]
    return angles.cos().repeat(1, 1, 2).to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + width/2) of ``x`` (B, T, heads, width) by the angle of their position.

    ``cos`` (T, 1, width) and ``sin`` (T, 1, width / 2) as :func:`rotary_tables` makes them.
    """
    if torch.compiler.is_compiling():
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b * sin, a * sin), -1)
    out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is turned back: nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = x * cos
    (a, b), (to_a, to_b) = x.chunk(2, -1), out.chunk(2, -1)
    to_a.addcmul_(b, sin, value=-direction)
    to_b.addcmul_(a, sin, value=direction)
    return out


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (arXiv:2109.08668)."""
    if torch.compiler.is_compiling():
        return F.relu(x).square()
    out: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
    return out


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(grad).mul_(2)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) x value, for ``x`` (..., 2 width) that holds gate and value side by side (arXiv:2002.05202)."""
    if torch.compiler.is_compiling():
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value
    out: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only: the gate's activation is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, value = x.chunk(2, -1)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, -1)
        out = torch.empty_like(x)
        to_gate, to_value = out.chunk(2, -1)
        torch.mul(grad, value, out=to_gate)
        torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        torch.mul(F.silu(gate), grad, out=to_value)
        return out


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap): close to ``x`` where that is small, never beyond ``cap``. 0 leaves ``x`` alone."""
    if not cap:
        return x
    if torch.compiler.is_compiling():
        return cap * torch.tanh(x / cap)
    out: Tensor = _SoftCap.apply(x, cap)  # type: ignore[no-untyped-call]
    return out


class _SoftCap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float) -> Tensor:
        out = (x / cap).tanh_().mul_(cap)
        ctx.save_for_backward(out)
        ctx.cap = cap
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return (out / ctx.cap).square_().neg_().add_(1).mul_(grad), None
