"""The tables of the other workloads against their loops, run whole on fake tensors with CUDA's operators and casts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from dispatcher import seen_by_the_dispatcher
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from vramplan.memory_probe.fake import cuda_operators
from vramplan.memory_probe.meter import TensorMeter, Timeline
from vramplan.memory_probe.scripts import ScriptLoop
from vramplan.planner.memory import estimate
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig

TOLERANCE = 0.0005
GPT2 = Shape(n_layer=12, n_head=12, n_embd=768)
FEW_WORDS = replace(GPT2, vocab_size=512)
DEEP = Shape(n_layer=24, n_head=16, n_embd=1024, bias=True, tied=False)


class CudaAutocast(TorchFunctionMode):
    """The casts that CUDA's autocast makes, in its order. (A CPU's autocast has other lists and another order.)

    Products take half-precision copies, those of weights once per autocast context; LayerNorm runs in float32;
    cross_entropy's log_softmax in the dtype it is given and its nll_loss on a float32 copy.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.copies = dtype, dict[int, Tensor]()

    def __exit__(self, *error: Any) -> None:
        self.copies.clear()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return func(*(self._half(a) for a in args), **kwargs)
        if func is F.layer_norm:
            return func(args[0].float(), *args[1:], **kwargs)
        if func is F.cross_entropy:
            scores, targets = args
            return F.nll_loss(F.log_softmax(scores, dim=1).float(), targets)
        return func(*args, **kwargs)

    def _half(self, a: Tensor | None) -> Tensor | None:
        if a is None or a.dtype == self.dtype:
            return a
        if not a.is_leaf:
            return a.to(self.dtype)
        if id(a) not in self.copies:
            self.copies[id(a)] = a.to(self.dtype)
        return self.copies[id(a)]


def measured(shape: Shape, step: StepConfig) -> Timeline:
    """The third step of the loop, on fake tensors."""

    @contextmanager
    def casts(_: str, dtype: torch.dtype) -> Iterator[None]:
        with CudaAutocast(dtype):
            yield

    autocast: Callable[..., Any] = mock.patch.object(torch, "autocast", casts)
    with FakeTensorMode(), cuda_operators(shape, step), autocast, TensorMeter(granularity=512) as meter:
        loop = ScriptLoop(shape, step, torch.device("cpu"))

        def draw() -> tuple[Tensor, Tensor]:
            size = (step.batch_size, shape.block_size)
            return torch.randint(0, shape.vocab_size, size), torch.randint(0, shape.vocab_size, size)

        for _ in range(3):
            gc.collect()
            meter.restart()
            loop.run(draw)
    return meter.timeline


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (GPT2, {"workload": "plain", "dropout": 0.1}),
        (DEEP, {"workload": "plain", "grad_accum": 2}),
        (FEW_WORDS, {"workload": "plain", "dropout": 0.1, "optimizer": "adamw-foreach"}),
        (GPT2, {"workload": "autocast", "optimizer": "adamw-foreach"}),
        (DEEP, {"workload": "autocast"}),
        (FEW_WORDS, {"workload": "autocast", "grad_accum": 2, "dropout": 0.1}),
        (GPT2, {"workload": "nanogpt"}),
        (replace(GPT2, bias=True), {"workload": "nanogpt", "grad_accum": 2, "dropout": 0.1}),
        (FEW_WORDS, {"workload": "nanogpt", "batch_size": 16}),
        (replace(FEW_WORDS, n_head=4, n_embd=172), {"workload": "nanogpt"}),
    ],
)
def test_the_table_of_a_script_is_what_its_loop_needs(shape: Shape, settings: dict[str, Any], dtype: Any) -> None:
    step = replace(StepConfig(batch_size=4, loss="full", dtype=dtype), **settings)
    assert seen_by_the_dispatcher(estimate(shape, step).table)[0] == pytest.approx(
        measured(shape, step).peak.live_bytes, rel=TOLERANCE
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("workload", ["nanogpt", "autocast", "plain"])
@pytest.mark.parametrize("compile", [False, True])
def test_the_loops_train(workload: Any, compile: bool) -> None:
    shape = Shape(n_layer=1, n_head=2, n_embd=32, vocab_size=64, block_size=16)
    step = StepConfig(batch_size=4, grad_accum=2, dtype="float32", loss="full", workload=workload, compile=compile)
    torch.manual_seed(0)
    loop = ScriptLoop(shape, step, torch.device("cpu"))
    tokens = torch.randint(0, 64, (4, 17))

    def draw() -> tuple[Tensor, Tensor]:
        return tokens[:, :-1], tokens[:, 1:]

    def loss() -> float:
        with torch.no_grad():
            logits, _ = loop.model(tokens[:, :-1])
            return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    before = loss()
    for _ in range(20):
        loop.run(draw)
    assert loss() < 0.9 * before
