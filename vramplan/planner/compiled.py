"""The tensor table of one compiled training step (torch.compile, inductor).

What the forward keeps was read from the joint graph after torch 2.13's min-cut partition, for one and two layers:
with a half-precision residual stream 32 h per token and layer (64 h in float32, 36 h under autocast), the half copies
of the matrices, and the logits once. GELU's input and output are both kept. Different from eager:

* normalisation, casts and GELU's backward are fused: no float32 copies of norm outputs, no second 4 h gradient;
* the loss keeps only the logits; their gradient is a buffer of its own beside them. Our trainer does not return the
  logits, so inductor may overwrite them (AOTAutograd's donated buffers): it does on a CPU; on CUDA no card has
  confirmed it, and the table keeps both;
* under checkpointing the head's product is scheduled last, so the gradient of the logits lives through the blocks;
* all parameter gradients are outputs of one backward graph, so with accumulation a whole second set exists at its end;
* with the chunked loss only the transformer is compiled as a graph (a graph over the slices would keep every slice's
  head gradient), and the slice's arithmetic is one fused kernel without a float32 copy of its logits.
"""

from __future__ import annotations

import numpy as np

from .eager import EagerStep
from .shape import Ints, Shape
from .state_rows import Saved, plain
from .step import StepConfig
from .tape import Row


class CompiledStep(EagerStep):
    """Writes the table of a compiled step; what it does not override is as in eager mode."""

    _late: Row | None = None

    def __init__(self, shape: Shape, step: StepConfig, workspace_bytes: int = 0) -> None:
        super().__init__(shape, step, workspace_bytes)
        self._outputs: list[Row] = []  # gradients that the backward graph returns, once
        self._block_outputs: list[Row] = []  # and once per block

    def _norm_forward(self, name: str) -> Saved:
        t = self.tape
        return Saved(
            {
                name: t.new(f"{name} output", "activations", self.e * self.h * self.N),
                f"{name}.mean": t.new(f"{name} mean", "activations", self.stat * self.N),
                f"{name}.rstd": t.new(f"{name} 1/std", "activations", self.stat * self.N),
            }
        )

    def _block_transient(self, x: Row, *, keep_input: bool = True) -> None:
        """As in eager mode, but a buffer goes after its last use, not when the function that named it returns."""
        t, hN, e = self.tape, self.h * self.N, self.e
        normed = self._norm_transient("ln_1")
        qkv = self._linear_transient("attn.qkv", 3 * self.h, self.h)
        t.free(normed)
        attended = self._attention_forward()
        t.free(qkv, *(row for name, row in attended.items() if name not in ("attention", "joined")))
        branch = self._linear_transient("attn.proj", self.h, self.h)
        t.free(attended["attention"], attended.get("joined"))
        mid = t.new("residual after attention", "activations", self.r * hN)
        t.free(branch)
        if not keep_input:
            t.free_oldest(x)
        normed = self._norm_transient("ln_2")
        fc = self._linear_transient("mlp.fc", 4 * self.h, self.h)
        t.free(normed)
        gelu = t.new("gelu output", "activations", 4 * e * hN)
        t.free(fc)
        branch = self._linear_transient("mlp.proj", self.h, 4 * self.h)
        t.free(gelu)
        t.alloc(x)
        t.free(branch, mid)

    def _weight_copy(self, name: str, n_out: Ints, n_in: Ints, kept: dict[str, Row]) -> None:
        if self.casts:  # bias copies are fused into the product's epilogue
            kept[f"{name}.w"] = self.tape.new(f"{name} weight copy", "weights", self.e * n_out * n_in)

    def _full_loss(self) -> Saved:
        if self.step.workload == "plain":  # its loss is a function outside the compiled model
            return super()._full_loss()
        t, VN = self.tape, self.V * self.N
        kept: dict[str, Row] = {}
        if self.casts:
            kept["head.w"] = t.new("head weight copy", "weights", 2 * self.V * self.h)
        kept["logits"] = t.new("logits", "logits_and_loss", self.e * VN)
        if self.loss_outside:
            self._leave_forward()
        kept["lse"] = t.new("maximum and log-sum of the logits", "logits_and_loss", 4 * self.N, times=2)
        kept["scalars"] = t.new("loss scalars", "logits_and_loss", 4, times=3)
        return Saved(kept)

    def _chunked_loss(self) -> Saved:
        t, h, V, e = self.tape, self.h, self.V, self.e
        c = plain(np.minimum(self.step.loss_chunk_tokens, self.N))
        copy = t.new("head weight copy", "weights", 2 * V * h) if e == 2 else None
        kept = {
            "grad_x": t.new("gradient of the hidden state", "gradients", e * h * self.N),
            "grad_head": t.new("gradient of the head", "gradients", 4 * V * h),
            "scalars": t.new("loss scalars", "logits_and_loss", 4, times=3),
        }
        with t.repeat(-(-self.N // c)):
            logits = t.new("logits of a slice", "logits_and_loss", e * V * c)
            grad = t.new("gradient of a slice's logits", "logits_and_loss", e * V * c)
            t.free(logits)
            if e == 2:
                t.free(t.new("head gradient of a slice", "temporaries", 2 * V * h))
            t.free(grad)
        t.free(copy)
        return Saved(kept)

    def _loss_only(self) -> None:
        """Full: one graph, log-softmax is fused into sums over each row. Chunked: the slices run as in eager mode."""
        if self.step.loss == "chunked":
            super()._loss_only()
            return
        t = self.tape
        copy = t.new("head weight copy", "weights", 2 * self.V * self.h) if self.e == 2 else None
        logits = t.new("evaluation logits", "logits_and_loss", self.e * self.V * self.N)
        t.free(copy, t.new("maximum and log-sum of the logits", "logits_and_loss", 4 * self.N, times=2), logits)

    def _loss_backward(self, loss: Saved) -> Row | None:
        t = self.tape
        if self.step.loss == "chunked" or self.step.workload == "plain":
            return super()._loss_backward(loss)
        t.free(loss["scalars"], loss["lse"])
        if self.script or self.cuda:
            dlogits = t.new("gradient of the logits", "logits_and_loss", self.e * self.V * self.N)
        else:
            dlogits = loss.rows["logits"]  # overwritten in place
        own = loss["logits"] if self.cuda and not self.script else None
        dw = t.new("gradient of the head", "gradients", self.e * self.V * self.h)
        self._dhidden = t.new("gradient of the hidden state", "temporaries", self.e * self.h * self.N)
        t.free(loss["head.w"], own)
        if self.step.checkpointing == "block":
            self._late = dlogits
        else:
            t.free(dlogits)
        if self.shape.tied:
            return dw
        self._parameter_gradient("lm_head", dw, self.V * self.h, self.casts)
        return None

    def _norm_backward(
        self, name: str, saved: Saved, x: Row, *, first: bool = False, carried: Row | None = None
    ) -> Row:
        t, hN = self.tape, self.h * self.N
        incoming = self._dhidden
        if first:
            self._dx = t.row("gradient of the residual stream", "temporaries", self.r * hN)
        t.alloc(self._dx)
        for part in ["weight", "bias"] if self.shape.bias else ["weight"]:
            self._outputs.append(t.new(f"{name}.{part} gradient", "gradients", self.w * self.h))
        t.free(incoming, x, saved[f"{name}.mean"], saved[f"{name}.rstd"])
        if carried is not None:
            t.free_oldest(carried)
        return self._dx

    def _parameter_gradient(self, name: str, fresh: Row, elements: Ints, cast: bool) -> None:
        """Every gradient stays until the graph returns, whether ``.grad`` exists or not."""
        if cast:
            full = self.tape.new(f"{name} gradient, float32", "gradients", self.w * elements)
            self.tape.free(fresh)
            fresh = full
        self._outputs.append(fresh)

    def _blocks_backward(self, saved: Saved, x: Row, dx: Row) -> None:
        outside = len(self._outputs)
        super()._blocks_backward(saved, x, dx)
        self._block_outputs = self._outputs[outside:]
        del self._outputs[outside:]

    def _gelu_backward(self, din: Row, saved: Saved) -> Row:
        self.tape.free(saved["fc"])
        return din  # rewritten in place

    def _embedding_backward(self, dx: Row, head_grad: Row | None) -> None:
        t, h, s = self.tape, self.h, self.shape
        t.free(self._late)
        self._outputs.append(t.new("wpe gradient", "gradients", self.w * h * s.block_size))
        self._outputs.append(t.new("wte gradient", "gradients", self.w * s.vocab_size * h))
        t.free(dx, head_grad)
        if self.accumulates:  # the graph has returned: each gradient is added to ``.grad`` and gone
            t.join(*self._outputs)
            with t.repeat(s.n_layer):
                t.join(*self._block_outputs)
