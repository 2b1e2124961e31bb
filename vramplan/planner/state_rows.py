"""The part of the tensor table that outlives a micro-step: weights, gradients, optimizer states, workspaces.

Widths in the comments of the tables: h = n_embd, N = tokens of a micro-batch, V = vocabulary, e = bytes of the compute
dtype, w = bytes of a weight (and its gradient and moments), r = bytes of the residual stream.
"""

from __future__ import annotations

from functools import cached_property, reduce
from typing import Any, NamedTuple

import numpy as np

from .allocator import MIN_BLOCK
from .autograd import Graph
from .shape import Ints, Shape
from .step import StepConfig
from .tape import Tape

STOCHASTIC_SLICE = 2**22
"""Elements that the stochastically rounding optimizer works on at once: its float32 temporaries stay small."""


class Parameter(NamedTuple):
    """A parameter tensor, how many elements it has, and its bytes as the allocator hands them out."""

    name: str
    elements: Ints
    size: Ints


class Parameters(NamedTuple):
    """Parameter tensors of which there are ``copies`` each."""

    copies: Ints
    tensors: list[Parameter]


class StateRows(Graph):
    """Knows the configuration's widths and writes its persistent rows and the optimizer's."""

    def __init__(self, shape: Shape, step: StepConfig, workspace_bytes: int = 0) -> None:
        self.shape, self.step = shape, step
        self.cuda = step.device == "cuda"
        self.script = step.workload != "vramplan"
        self.autocast = step.workload in ("nanogpt", "autocast")
        self.loss_outside = step.workload in ("autocast", "plain")  # the model has returned when it is computed
        self.dropout = step.dropout > 0
        self.h: Ints = shape.n_embd
        self.V: Ints = shape.vocab_size
        self.N: Ints = step.batch_size * shape.block_size
        self.e = 2 if step.half else 4
        self.w = self.e if step.pure else 4
        self.casts = self.e != self.w  # every product takes half-precision copies of its weights
        self.wide_norms = self.autocast or step.wide_residual  # computed in float32, with float32 weights
        self.r = 4 if self.wide_norms else self.e
        # LayerNorm statistics: float32 on CUDA, as the input on CPU
        self.stat = 4 if self.cuda or not step.half or self.wide_norms else 2
        self.workspace_bytes = workspace_bytes
        # With accumulation the gradients exist already; one table has one answer (memory.kinds tells them apart).
        self.accumulates = bool(np.all(np.asarray(step.grad_accum) > 1))
        super().__init__(Tape(MIN_BLOCK if self.cuda else 1))

    @cached_property
    def _parameters(self) -> list[Parameters]:
        """Every parameter tensor, in the order in which the model lists them."""
        s, h = self.shape, self.h

        def parameter(name: str, elements: Ints) -> Parameter:
            return Parameter(name, elements, self.tape.rounded(self.w * elements))

        def norm(name: str) -> list[Parameter]:
            return [parameter(f"{name}.{part}", h) for part in ("weight", "bias") if part == "weight" or s.norm_bias]

        def linear(name: str, n_out: Ints, n_in: Ints) -> list[Parameter]:
            weight = parameter(f"{name}.weight", n_out * n_in)
            return [weight, parameter(f"{name}.bias", n_out)] if s.bias else [weight]

        outer = [parameter("wte", s.vocab_size * h)]
        if s.positions == "learned":
            outer.append(parameter("wpe", s.block_size * h))
        if not s.tied:
            outer.append(parameter("lm_head", s.vocab_size * h))
        block = [
            *norm("ln_1"), *linear("attn.qkv", s.qkv_width, h), *linear("attn.proj", h, h),
            *norm("ln_2"), *linear("mlp.fc", s.fc_width, h), *linear("mlp.proj", h, s.mlp_width),
        ]  # fmt: skip
        return [Parameters(1, outer), Parameters(s.n_layer, block), Parameters(1, norm("ln_f"))]

    def _parameter_groups(self) -> list[list[Parameters]]:
        """The same as the optimizer has them: what Muon updates, then matrices, which decay, and vectors.

        The hand-written loops have one group.
        """
        if self.step.workload in ("autocast", "plain"):
            return [self._parameters]

        def kind(name: str) -> int:
            return 2 if not _is_matrix(name) else 0 if self._by_muon(name) else 1

        groups: list[list[Parameters]] = [[], [], []]
        for copies, tensors in self._parameters:
            for number, group in enumerate(groups):
                if own := [tensor for tensor in tensors if kind(tensor.name) == number]:
                    group.append(Parameters(copies, own))
        return [group for group in groups if group]

    def _by_muon(self, name: str) -> bool:
        """Whether Muon updates this parameter: the blocks' matrices."""
        return self.step.optimizer == "muon" and name.startswith(("attn.", "mlp.")) and _is_matrix(name)

    def write_state(self) -> None:
        """Write only what lives as long as the run: weights, optimizer states, workspaces."""
        self.tape.phase = "persistent"
        self._persistent()

    def _persistent(self) -> None:
        t = self.tape
        if self.workspace_bytes:
            # one cuBLAS handle for the forward's thread, one for autograd's (ATen/cuda/CublasHandlePool.cpp)
            t.new("cuBLAS workspace", "workspace", self.workspace_bytes, times=2)
        if self.step.dtype == "float16":
            t.new("loss scale and growth tracker", "optimizer", 4, times=2)
        self._weights()
        for group in self._parameter_groups():
            for copies, tensors in group:
                with t.repeat(copies):
                    for tensor in tensors:
                        self._optimizer_state(*tensor)
        if self.step.optimizer == "adamw8bit":
            t.new("quantisation maps", "optimizer", 1024, times=2)
        self._rotary_tables()

    def _weights(self) -> None:
        """In the order in which they reach the card: a module's own come after those of the modules in it."""
        outer, *others = self._parameters
        for copies, tensors in (outer, *others) if self.script else (*others, outer):
            with self.tape.repeat(copies):
                for name, _, size in tensors:
                    self.tape.keep(name, "weights", size)

    def _rotary_tables(self) -> None:
        s = self.shape
        if s.positions == "rotary":
            self.tape.new("cosines of rotary positions", "inputs", self.e * s.block_size * s.head_dim)
            self.tape.new("sines of rotary positions", "inputs", self.e * s.block_size * s.head_dim // 2)

    def _kept_gradients(self) -> None:
        """With accumulation our trainer keeps ``.grad`` allocated from before step 0 on.

        In a script it appears in the first micro-step's backward and goes after the update; then it is None.
        """
        if self.accumulates:
            for copies, tensors in self._parameters:
                with self.tape.repeat(copies):
                    for name, _, size in tensors:
                        self.tape.keep(f"{name} gradient", "gradients", size)

    def _optimizer_state(self, name: str, elements: Ints, size: Ints) -> None:
        """AdamW's two moments. 8-bit: blocks of 256 with a float32 scale, tensors under 4096 elements in float32
        (bitsandbytes optim/optimizer.py, Optimizer2State.init_state). Muon: one momentum for matrices of the blocks."""
        t = self.tape
        if self.step.optimizer == "adamw-offload":
            return
        if self._by_muon(name):
            t.keep(f"{name} momentum", "optimizer", size)
            return
        if self.step.optimizer == "adamw8bit":
            small = np.asarray(elements) < 4096
            state = t.rounded(plain(np.where(small, 4 * elements, elements)))
            scales = t.rounded(plain(np.where(small, 0, 4 * -(-elements // 256))))
            for moment in ("exp_avg", "exp_avg_sq"):
                t.keep(f"{name} {moment}", "optimizer", state)
                t.keep(f"{name} {moment} scales", "optimizer", scales)
            return
        t.keep(f"{name} exp_avg", "optimizer", size)
        t.keep(f"{name} exp_avg_sq", "optimizer", size)
        if self.step.optimizer != "adamw-stochastic" and not (self.cuda and self.step.optimizer == "adamw-foreach"):
            t.new(f"{name} step", "optimizer", 4)  # foreach keeps its counters on the CPU, ours is no tensor

    def _optimizer(self) -> None:
        if self.step.optimizer == "adamw-foreach":
            # sqrt of all second moments of a parameter group at once (torch/optim/adam.py, _multi_tensor_adam); of two
            # groups that of the matrices, which are nearly all, comes first
            for copies, tensors in self._parameter_groups()[0]:
                with self.tape.repeat(copies):
                    for name, _, size in tensors:
                        self.tape.keep(f"{name} denominator", "temporaries", size)
        elif self.step.optimizer == "muon":
            self._newton_schulz()
        elif self.step.optimizer == "adamw-stochastic":
            largest = reduce(np.maximum, (tensor.elements for _, tensors in self._parameters for tensor in tensors))
            piece = 4 * np.minimum(largest, STOCHASTIC_SLICE)
            names = ("gradient", "first moment", "second moment", "rounding")
            taken = [self.new(f"a slice's {name}, float32", "temporaries", plain(piece)) for name in names[:3]]
            del taken[0]
            taken += [self.new(f"a slice's {name}", "temporaries", plain(piece)) for name in ("weight", names[3])]
            del taken

    def _newton_schulz(self) -> None:
        """Muon's update of the largest matrix: bfloat16 iterates and Gram matrices (torch/optim/_muon.py)."""
        h, widest = self.h, self.shape.fc_width
        update = self.new("momentum of a matrix", "temporaries", 4 * widest * h)
        iterate = self.new("Newton-Schulz iterate", "temporaries", 2 * widest * h)
        narrow = plain(np.minimum(widest, h))
        gram = [self.new("Gram matrix", "temporaries", 2 * narrow * narrow) for _ in range(2)]
        following = self.new("Newton-Schulz iterate", "temporaries", 2 * widest * h)
        del update, iterate, gram, following


def _is_matrix(name: str) -> bool:
    return not (name.startswith("ln_") or name.endswith(".bias"))


def plain(value: Any) -> Ints:
    """A 0-d array back to an int; arrays stay arrays."""
    array = np.asarray(value)
    return int(array) if array.ndim == 0 else array
