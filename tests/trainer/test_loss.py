"""Both losses are cross-entropy: same value, same gradients, and the same again without autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vramplan.planner.step import StepConfig
from vramplan.trainer.loss import next_token_loss

FULL = StepConfig(batch_size=2, dtype="float32", loss="full", device="cpu")
V, H = 97, 24


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden state (2, 35, H), head (V, H) and targets: 70 tokens, which no slice below divides."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 35, H, generator=g).to(dtype).requires_grad_()
    head = torch.randn(V, H, generator=g).mul_(0.5).requires_grad_()
    return hidden, head, torch.randint(0, V, (2, 35), generator=g)


def reference() -> tuple[Tensor, Tensor, Tensor]:
    hidden, head, targets = (t.double() if t.is_floating_point() else t for t in tensors())
    loss = F.cross_entropy((hidden @ head.t()).flatten(0, 1), targets.flatten())
    return (loss, *torch.autograd.grad(loss, (hidden, head)))


@pytest.mark.parametrize(
    "step", [FULL, *(replace(FULL, loss="chunked", loss_chunk_tokens=c) for c in (1, 32, 70, 999))]
)
def test_value_and_gradients_are_those_of_cross_entropy(step: StepConfig) -> None:
    hidden, head, targets = tensors()
    loss = next_token_loss(hidden, head, targets, step)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    found = (loss, *torch.autograd.grad(loss, (hidden, head)))
    for value, expected in zip(found, reference(), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert float(next_token_loss(hidden, head, targets, step)) == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_half_precision_stays_near(loss: str, dtype: torch.dtype) -> None:
    hidden, head, targets = tensors(dtype)
    step = replace(FULL, loss=loss, loss_chunk_tokens=32, dtype=str(dtype).removeprefix("torch."))
    value = next_token_loss(hidden, head, targets, step)
    grad_hidden, grad_head = torch.autograd.grad(value, (hidden, head))
    assert (grad_hidden.dtype, grad_head.dtype) == (dtype, torch.float32)
    expected, expected_hidden, expected_head = reference()
    value, expected = value.detach(), expected.detach()
    assert float(value) == pytest.approx(float(expected), rel=0.01)
    for grad, right in ((grad_hidden, expected_hidden), (grad_head, expected_head)):
        assert float((grad.double() - right).norm() / right.norm()) < 0.02
    with torch.no_grad():
        assert float(next_token_loss(hidden, head, targets, step)) == pytest.approx(float(value), rel=1e-5)


def test_an_outer_factor_scales_the_gradients() -> None:
    hidden, head, targets = tensors()
    step = replace(FULL, loss="chunked", loss_chunk_tokens=16)
    scaled = torch.autograd.grad(next_token_loss(hidden, head, targets, step) * 1024.0, (hidden, head))
    plain = torch.autograd.grad(next_token_loss(hidden, head, targets, step), (hidden, head))
    for one, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(one, other * 1024.0)


def test_very_large_logits_do_not_overflow() -> None:
    hidden, head, targets = tensors()
    step = replace(FULL, loss="chunked", loss_chunk_tokens=16)
    large, expected = (next_token_loss(hidden * 1e4, head, targets, s) for s in (step, FULL))
    assert torch.isfinite(large)
    torch.testing.assert_close(large, expected)
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(hidden * 1e4, head, targets, step), expected)
