"""The modern options compute what their papers say, and their hand-written backwards are the true ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.trainer.model import GPT
from vramplan.trainer.pointwise import EPSILON, rms_norm, rotary_tables, rotate, softcap, squared_relu, swiglu

SMALL = Shape(n_layer=2, n_head=4, n_embd=32, vocab_size=97, block_size=24)
STEP = StepConfig(batch_size=2, dtype="float32", loss="full", device="cpu")
COS, SIN = rotary_tables(6, 8, torch.float32)
VARIANTS: dict[str, dict[str, Any]] = {
    "rmsnorm": {"norm": "rmsnorm"},
    "rmsnorm with biases": {"norm": "rmsnorm", "bias": True},
    "rotary": {"positions": "rotary"},
    "swiglu": {"mlp": "swiglu"},
    "swiglu with biases": {"mlp": "swiglu", "bias": True},
    "relu2": {"mlp": "relu2"},
    "grouped": {"n_kv_head": 2},
    "one key": {"n_kv_head": 1, "bias": True},
    "qk_norm": {"qk_norm": True},
    "softcap": {"logit_softcap": 15.0},
    "all": {
        "norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "n_kv_head": 2, "qk_norm": True,
        "logit_softcap": 15.0, "tied": False,
    },
}  # fmt: skip


def turn_as_complex(x: Tensor) -> Tensor:
    """Rotary positions as the paper has them: multiplication with e^(i m theta)."""
    half = x.shape[-1] // 2
    theta = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * theta
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones(()).double(), angle)
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "rms_norm": (rms_norm, lambda x: x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()),
    "rotate": (lambda x: rotate(x, COS, SIN), turn_as_complex),
    "squared_relu": (squared_relu, lambda x: x.clamp(min=0) ** 2),
    "swiglu": (swiglu, lambda x: x[..., :4] / (1 + (-x[..., :4]).exp()) * x[..., 4:]),
    "softcap": (lambda x: softcap(x, 2.0), lambda x: 2 * torch.tanh(x / 2)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_and_its_gradient_are_those_of_the_formula(name: str) -> None:
    ours, formula = OPERATIONS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    weights = torch.randn_like(formula(y))
    (ours(x) * weights).sum().backward()
    (formula(y) * weights).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(ours(x), formula(y))
    torch.testing.assert_close(x.grad, y.grad)


def test_the_gradient_of_a_norms_weight() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    a, b = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    g = torch.randn(3, 5, 8)
    rms_norm(x, w).backward(g)
    F.rms_norm(a, (8,), b, EPSILON).backward(g)
    for ours, theirs in ((x.grad, a.grad), (w.grad, b.grad)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(name: str, dtype: torch.dtype) -> None:
    ours, formula = OPERATIONS[name]
    if name == "rotate":
        cos, sin = rotary_tables(6, 8, dtype)
        ours = lambda x: rotate(x, cos, sin)  # noqa: E731
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 8).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    out, exact = ours(x), formula(wide)
    assert out.dtype == dtype
    out.sum().backward()
    exact.sum().backward()
    assert x.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(x.grad.float(), wide.grad, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_model_has_the_parameters_that_the_shape_counts(name: str) -> None:
    shape = replace(SMALL, **VARIANTS[name])
    assert GPT(shape, STEP).parameter_count() == shape.parameters
    matrices = sum(p.numel() for n, p in GPT(shape, STEP).blocks.named_parameters() if p.dim() == 2)
    assert matrices == shape.n_layer * shape.block_matrices


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_and_looks_only_back(name: str) -> None:
    shape = replace(SMALL, **VARIANTS[name])
    model = GPT(shape, STEP)
    torch.manual_seed(0)
    tokens = torch.randint(0, 97, (2, 25))
    first = model(tokens[:, :-1], tokens[:, 1:])
    assert first.item() == pytest.approx(math.log(97), abs=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    with torch.no_grad():
        assert model(tokens[:, :-1], tokens[:, 1:]) < 0.7 * first
        other = tokens[:, :-1].clone()
        other[:, 12:] = 0
        before, after = model.hidden(tokens[:, :-1]), model.hidden(other)
        torch.testing.assert_close(before[:, :12], after[:, :12])
        assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "saver",
    [{"loss": "chunked", "loss_chunk_tokens": 10}, {"checkpointing": "block"}, {"checkpointing": "selective"}],
    ids=str,
)
def test_savers_leave_loss_and_gradients_as_they_are(name: str, saver: dict[str, Any]) -> None:
    shape = replace(SMALL, **VARIANTS[name])
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, 97, (2, 24)), torch.randint(0, 97, (2, 24))
    plain, saving = GPT(shape, STEP), GPT(shape, replace(STEP, **saver))
    losses = [model(tokens, targets) for model in (plain, saving)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for (n, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert p.grad is not None, n
        torch.testing.assert_close(p.grad, q.grad, msg=n)


def test_rotary_positions_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    cos, sin = rotary_tables(20, 8, torch.float32)

    def score(i: int, j: int) -> float:
        rows = torch.zeros(1, 20, 1, 8)
        rows[0, i, 0], at = q, rows.clone()
        at[0, j, 0] = k
        return float(rotate(rows, cos, sin)[0, i, 0] @ rotate(at, cos, sin)[0, j, 0])

    assert score(5, 2) == pytest.approx(score(15, 12), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


def test_a_group_of_queries_shares_its_key() -> None:
    """Two keys for four queries are as four keys of which neighbours are equal."""
    grouped = GPT(replace(SMALL, n_kv_head=2), STEP)
    full = GPT(SMALL, STEP)
    for few, many in zip(grouped.blocks, full.blocks, strict=True):
        w = few.attn.qkv.weight.detach()
        keys, values = (w[a : a + 16].view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) for a in (32, 48))
        many.attn.qkv.weight.data = torch.cat((w[:32], keys, values))
        for a, b in ((few.attn.proj, many.attn.proj), (few.mlp.fc, many.mlp.fc), (few.mlp.proj, many.mlp.proj)):
            b.weight.data = a.weight.data
    full.wte.data, full.wpe.data = grouped.wte.data, grouped.wpe.data
    tokens = torch.randint(0, 97, (2, 24))
    torch.testing.assert_close(grouped.hidden(tokens), full.hidden(tokens))


@pytest.mark.parametrize("name", ["plain", "rmsnorm", "all"])
def test_a_float32_residual_stream_rounds_less(name: str) -> None:
    """Half-precision products either way; the sums of twelve layers are what the wider stream keeps."""
    shape = replace(SMALL, n_layer=12, **VARIANTS.get(name, {}))
    tokens = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    hidden = {}
    for label, settings in {
        "float32": {"dtype": "float32"},
        "compute": {"dtype": "bfloat16"},
        "wide": {"dtype": "bfloat16", "residual": "float32"},
    }.items():
        model = GPT(shape, replace(STEP, **settings), seed=5)
        seen: list[torch.dtype] = []
        model.blocks[-1].register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.dtype))
        hidden[label] = model.hidden(tokens)
        assert seen == [torch.bfloat16 if label == "compute" else torch.float32]
        assert hidden[label].dtype == model.dtype
        model(tokens, tokens).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    error = {
        label: float((hidden[label].detach().float() - hidden["float32"].detach()).norm())
        for label in ("compute", "wide")
    }
    assert error["wide"] < 0.8 * error["compute"]


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
def test_a_float32_residual_stream_recomputes_the_same(checkpointing: Any) -> None:
    tokens = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    found = []
    for how in ("none", checkpointing):
        step = replace(STEP, dtype="bfloat16", residual="float32", checkpointing=how)
        model = GPT(SMALL, step, seed=5)
        model(tokens, tokens).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)
