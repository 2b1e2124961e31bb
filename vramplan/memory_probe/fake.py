"""Whole training steps on fake tensors: shapes, order and lifetimes are real, no byte is allocated.

A step of a model that no machine at hand could hold takes seconds. For ``device="cuda"`` the operators are those that a
CUDA device would run (fused attention with its log-sum-exp and generator state, LayerNorm with float32 statistics) and
sizes are rounded as its allocator does. What a kernel takes and returns inside one operation is not seen; the tensor
table has rows named ``(kernel)`` for it, and for the workspaces of cuBLAS.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ConfigError, Problem
from ..planner.allocator import MIN_BLOCK
from ..planner.attention import KERNELS, Capability, Kernel, kernel_numbers
from ..planner.memory import DEFAULT_CAPABILITY
from ..planner.shape import Shape
from ..planner.step import StepConfig, check
from ..trainer import model, pointwise
from .cpu import StepMeasurement, follow, measurement, random_batches
from .meter import TensorMeter


def measure_fake_step(
    shape: Shape,
    step: StepConfig,
    *,
    steps: int = 2,
    grad_clip: float = 1.0,
    capability: Capability = DEFAULT_CAPABILITY,
) -> StepMeasurement:
    """Run ``steps`` eager optimizer steps and an evaluation; figures are those of the last step and the evaluation.

    For CUDA the attention kernel is the one that a card of ``capability`` picks.

    Raises ConfigError for settings that fake tensors cannot follow: compiled steps, float16 (its loss scaler looks at
    values; bfloat16 has the same memory) and 8-bit states (a library's own kernels).
    """
    _check(shape, step)
    granularity = MIN_BLOCK if step.device == "cuda" else 1
    with FakeTensorMode(), cuda_operators(shape, step, capability), TensorMeter(granularity=granularity) as meter:
        train, phase = follow(shape, step, meter, grad_clip)
        persistent = 0
        for _ in range(steps):
            gc.collect()  # checkpointing leaves reference cycles behind
            meter.restart()
            persistent = meter.live_bytes
            for tokens, targets in random_batches(shape, step):
                train.micro_step(tokens, targets)
            train.update()
            del tokens, targets
        gc.collect()
        phase.stay("evaluation")
        with torch.no_grad():
            for tokens, targets in random_batches(shape, step):
                train.model(tokens, targets)
    return measurement(meter, persistent)


@contextlib.contextmanager
def cuda_operators(shape: Shape, step: StepConfig, capability: Capability = DEFAULT_CAPABILITY) -> Iterator[None]:
    """Within the block the model's operations are those of ``step.device``."""
    if step.device != "cuda":
        yield
        return
    statistics = _CudaStatistics()  # type: ignore[no-untyped-call]
    kernel = KERNELS[int(kernel_numbers(shape, step, capability))]
    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention_of(kernel)),
        mock.patch.object(F, "dropout", _dropout),
        mock.patch.object(F, "rms_norm", _rms_norm),
        mock.patch.object(pointwise, "has_fused_norm", always),
        mock.patch.object(model, "kernel_groups", always if "flash" in kernel else never),
        statistics,
    ):
        yield


def _dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """CUDA's own operator, which keeps a mask of one byte per element."""
    out: Tensor = torch.ops.aten.native_dropout(x, p, training)[0]
    return out


def always(_: Tensor) -> bool:
    """Yes, whatever is asked; a mock would keep what it was called with."""
    return True


def never(_: Tensor) -> bool:
    """No, whatever is asked."""
    return False


def _rms_norm(x: Tensor, width: tuple[int, ...], weight: Tensor | None, eps: float) -> Tensor:
    out: Tensor = _FusedNorm.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


class _FusedNorm(torch.autograd.Function):
    """What CUDA's aten._fused_rms_norm gives and keeps; on other devices that operator is made of several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        return dx, None if weight is None else torch.empty_like(weight)


def attention_of(kernel: Kernel) -> Callable[..., Tensor]:
    """scaled_dot_product_attention where CUDA picks ``kernel``.

    FlashAttention takes head widths in multiples of 8: others are padded (ATen transformers/attention.cpp).
    """
    aten = torch.ops.aten

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, dropout_p: float = 0.0, enable_gqa: bool = False
    ) -> Tensor:
        out: Tensor
        if kernel == "math":
            out = aten._scaled_dot_product_attention_math(q, k, v, None, dropout_p, is_causal)[0]
            return out
        if kernel == "efficient":
            out = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout_p, is_causal)[0]
            return out
        width = q.shape[-1]
        if kernel == "padded flash":
            q, k, v = (F.pad(part, (0, 8 - width % 8)) for part in (q, k, v))
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
        return out[..., :width]

    return attention


class _CudaStatistics(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """LayerNorm's mean and 1/std are float32 on CUDA whatever the input is; on a CPU they have the input's dtype."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_layer_norm.default:
            out, mean, rstd = result
            return out, mean.float(), rstd.float()
        return result


def _check(shape: Shape, step: StepConfig) -> None:
    problems = check(shape, step)
    if step.compile:
        problems.append(Problem("compile", True, "cannot be followed on fake tensors", "use compile=false"))
    if step.dtype == "float16":
        problems.append(Problem("dtype", "float16", "cannot be followed on fake tensors", "use bfloat16: same memory"))
    if step.optimizer == "adamw8bit":
        problems.append(Problem("optimizer", "adamw8bit", "cannot be followed on fake tensors", "use adamw-fused"))
    if step.workload != "vramplan":
        problems.append(Problem("workload", step.workload, "is not our trainer", "use workload=vramplan"))
    if problems:
        raise ConfigError(problems)
