"""The part of the tensor table that outlives a micro-step: weights, gradients, optimizer states, workspaces.

Widths in the comments of the tables: h = n_embd, N = tokens of a micro-batch, V = vocabulary, e = bytes of the compute
dtype, w = bytes of a weight (and its gradient and moments), r = bytes of the residual stream.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np

from .allocator import MIN_BLOCK
from .autograd import Graph
from .shape import Ints, Shape
from .step import StepConfig
from .tape import Tape

STOCHASTIC_SLICE = 2**22
"""Elements that the stochastically rounding optimizer works on at once: its float32 temporaries stay small."""


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
        # With accumulation the gradients exist already; one table has one answer, so the search splits its candidates.
        self.accumulates = bool(np.all(np.asarray(step.grad_accum) > 1))
        super().__init__(Tape(MIN_BLOCK if self.cuda else 1))

    def _parameters(self) -> list[tuple[str, Ints, Ints]]:
        """(name, elements, copies) of every parameter tensor; block tensors are repeated n_layer times."""
        s, h = self.shape, self.h
        block: list[tuple[str, Ints]] = [
            ("ln_1.weight", h), ("attn.qkv.weight", s.qkv_width * h), ("attn.proj.weight", h * h),
            ("ln_2.weight", h), ("mlp.fc.weight", s.fc_width * h), ("mlp.proj.weight", h * s.mlp_width),
        ]  # fmt: skip
        if s.bias:
            block += [("attn.qkv.bias", s.qkv_width), ("attn.proj.bias", h)]
            block += [("mlp.fc.bias", s.fc_width), ("mlp.proj.bias", h)]
        outer: list[tuple[str, Ints]] = [("wte", s.vocab_size * h)]
        if s.positions == "learned":
            outer.append(("wpe", s.block_size * h))
        outer.append(("ln_f.weight", h))
        if s.norm_bias:
            block += [("ln_1.bias", h), ("ln_2.bias", h)]
            outer.append(("ln_f.bias", h))
        if not s.tied:
            outer.append(("lm_head", s.vocab_size * h))
        return [(n, k, 1) for n, k in outer] + [(n, k, s.n_layer) for n, k in block]

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
        for name, elements, copies in self._parameters():
            with t.repeat(copies):
                t.new(name, "weights", self.w * elements)
                self._optimizer_state(name, elements)
        if self.step.optimizer == "adamw8bit":
            t.new("quantisation maps", "optimizer", 1024, times=2)
        self._rotary_tables()

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
            for name, elements, copies in self._parameters():
                with self.tape.repeat(copies):
                    self.tape.new(f"{name} gradient", "gradients", self.w * elements)

    def _optimizer_state(self, name: str, elements: Ints) -> None:
        """AdamW's two moments. 8-bit: blocks of 256 with a float32 scale, tensors under 4096 elements in float32
        (bitsandbytes optim/optimizer.py, Optimizer2State.init_state). Muon: one momentum for matrices of the blocks."""
        t = self.tape
        if self.step.optimizer == "adamw-offload":
            return
        if self.step.optimizer == "muon" and _muon(name):
            t.new(f"{name} momentum", "optimizer", self.w * elements)
            return
        if self.step.optimizer == "adamw8bit":
            small = np.asarray(elements) < 4096
            state = np.where(small, 4 * elements, elements)
            scales = np.where(small, 0, 4 * -(-elements // 256))
            for moment in ("exp_avg", "exp_avg_sq"):
                t.new(f"{name} {moment}", "optimizer", plain(state))
                t.new(f"{name} {moment} scales", "optimizer", plain(scales))
            return
        t.new(f"{name} exp_avg", "optimizer", self.w * elements)
        t.new(f"{name} exp_avg_sq", "optimizer", self.w * elements)
        if self.step.optimizer != "adamw-stochastic" and not (self.cuda and self.step.optimizer == "adamw-foreach"):
            t.new(f"{name} step", "optimizer", 4)  # foreach keeps its counters on the CPU, ours is no tensor

    def _optimizer(self) -> None:
        if self.step.optimizer == "adamw-foreach":
            # sqrt of all second moments of a parameter group at once (torch/optim/adam.py, _multi_tensor_adam); the
            # hand-written loop has one group, the others one for matrices, which are nearly all, and one for the rest
            t, one_group = self.tape, self.step.workload in ("autocast", "plain")
            group = [(n, k, c) for n, k, c in self._parameters() if one_group or _is_matrix(n)]
            for name, elements, copies in group:
                with t.repeat(copies):
                    t.new(f"{name} denominator", "temporaries", self.w * elements)
        elif self.step.optimizer == "muon":
            self._newton_schulz()
        elif self.step.optimizer == "adamw-stochastic":
            largest = reduce(np.maximum, (elements for _, elements, _ in self._parameters()))
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


def _muon(name: str) -> bool:
    """Whether Muon updates this parameter: the blocks' matrices."""
    return name.startswith(("attn.", "mlp.")) and name.endswith(".weight")


def _is_matrix(name: str) -> bool:
    return not (name.startswith("ln_") or name.endswith(".bias"))


def plain(value: Any) -> Ints:
    """A 0-d array back to an int; arrays stay arrays."""
    array = np.asarray(value)
    return int(array) if array.ndim == 0 else array
