"""Next-token cross-entropy: over all logits at once, or in slices that never hold them all.

The full loss keeps float32 log-probabilities for every token and vocabulary entry until the backward. The chunked loss
computes the gradients of hidden state and head already in the forward, slice by slice, so only one slice of logits
exists at a time; the price is that the head's float32 gradient lives from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..planner.step import StepConfig
from .pointwise import softcap

Slice = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def next_token_loss(hidden: Tensor, head: Tensor, targets: Tensor, step: StepConfig, cap: float = 0.0) -> Tensor:
    """Mean cross-entropy as a float32 scalar.

    ``hidden`` (B, T, h) in the compute dtype, ``head`` (V, h) of the weights' dtype, ``targets`` (B, T) int64;
    ``cap`` is the soft limit of the logits, 0 for none.
    """
    x, y = hidden.flatten(0, 1), targets.flatten()
    if step.loss == "full":
        return F.cross_entropy(softcap(F.linear(x, head.to(x.dtype)).float(), cap), y)
    if not torch.is_grad_enabled():
        return _chunked_loss_only(x, head, y, step.loss_chunk_tokens, cap)
    fused = _compiled_slice() if step.compile else _slice
    chunks = step.loss_chunk_tokens
    loss: Tensor = _ChunkedCrossEntropy.apply(x, head, y, chunks, cap, fused)  # type: ignore[no-untyped-call]
    return loss


def _chunked_loss_only(x: Tensor, head: Tensor, y: Tensor, chunk: int, cap: float) -> Tensor:
    """The loss of an evaluation, in slices of half the length: never more than a training slice, compiled or not."""
    weight = head.to(x.dtype)
    total = torch.zeros((), device=x.device)
    chunk = -(-min(chunk, len(y)) // 2)
    for xs, ys in zip(torch.split(x, chunk), torch.split(y, chunk), strict=True):
        scores = F.linear(xs, weight).float()
        if cap:
            scores.div_(cap).tanh_().mul_(cap)
        picked, top = scores.gather(1, ys[:, None]), scores.amax(1, keepdim=True)
        total += (scores.sub_(top).exp_().sum(1, keepdim=True).log() + top - picked).sum()
        del scores, picked, top
    return total / y.numel()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients of the summed loss are formed in the forward and scaled by grad_output / N in the backward.

    Scaling last keeps float16 gradients of single tokens away from underflow: they are softmax minus one-hot, within
    [-1, 1], until the loss scale has arrived.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, y: Tensor, chunk: int, cap: float, fused: Slice) -> Tensor:
        weight = head.to(x.dtype)
        grad_x = torch.empty_like(x)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        total = torch.zeros((), device=x.device)
        for xs, ys, gs in zip(torch.split(x, chunk), torch.split(y, chunk), torch.split(grad_x, chunk), strict=True):
            loss, grad_logits = fused(F.linear(xs, weight), ys, cap)
            total += loss
            torch.mm(grad_logits, weight, out=gs)
            if x.dtype == grad_head.dtype:
                grad_head.addmm_(grad_logits.t(), xs)
            else:
                grad_head += grad_logits.t() @ xs
            del grad_logits
        grad_head = grad_head.to(head.dtype)
        ctx.save_for_backward(grad_x, grad_head)
        ctx.tokens = y.numel()
        return total / y.numel()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x, grad_head = ctx.saved_tensors
        scale = grad_output / ctx.tokens
        return grad_x.mul_(scale), grad_head.mul_(scale), None, None, None, None


def _slice(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Summed loss of one slice (float32 scalar) and softmax minus one-hot (c, V) in the dtype of ``logits``.

    Everything after the float32 copy happens in place: one (c, V) float32 buffer serves scores, exponentials and
    probabilities; a soft limit needs another for its slope.
    """
    dtype, index = logits.dtype, targets[:, None]
    scores = logits.float()
    del logits
    slope = None
    if cap:
        slope = scores.div_(cap).tanh_().square().neg_().add_(1)
        scores.mul_(cap)
    picked = scores.gather(1, index)
    top = scores.amax(1, keepdim=True)
    scores.sub_(top).exp_()
    total = scores.sum(1, keepdim=True)
    loss = (total.log() + top - picked).sum()
    scores.div_(total)
    scores.scatter_add_(1, index, torch.full_like(top, -1.0))
    if slope is not None:
        scores.mul_(slope)
        del slope
    return loss, scores.to(dtype)


def _fusable_slice(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The same as :func:`_slice` for the compiler: comparing with an index fuses, scattering needs a buffer more."""
    raw, index = logits.float(), targets[:, None]
    scores = cap * torch.tanh(raw / cap) if cap else raw
    lse = torch.logsumexp(scores, 1, keepdim=True)
    loss = (lse - scores.gather(1, index)).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == index
    gradient = (scores - lse).exp() - hit.to(scores.dtype)
    if cap:
        gradient = gradient * (1 - torch.tanh(raw / cap).square())
    return loss, gradient.to(logits.dtype)


@cache
def _compiled_slice() -> Slice:
    """One fused kernel that goes from logits to their gradient without a float32 copy."""
    compiled: Slice = torch.compile(_fusable_slice, dynamic=False)
    return compiled
