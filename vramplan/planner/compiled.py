"""The tensor table of one compiled training step (torch.compile, inductor).

What the forward keeps was read from the joint graph after the min-cut partition of torch 2.11, 2.13 and 2.15: with a
half-precision residual stream 32 h per token and layer (64 h in float32, 36 h under autocast), the half copies of the
matrices, and the logits once. GELU's input and output are both kept. Different from eager:

* normalisation, casts and GELU's backward are fused: no float32 copies of norm outputs, no second 4 h gradient;
* the loss keeps only the logits; their gradient is a buffer of its own beside them. Our trainer does not return the
  logits, so inductor may overwrite them (AOTAutograd's donated buffers): it does on a CPU; on CUDA no card has
  confirmed it, and the table keeps both;
* a tied head's gradient is added to the embedding's at the end, out of place. In float32 the head's product is joined
  with that sum, so the gradient of the logits and the hidden state live through the blocks; in half precision the
  product comes first (read in inductor's code for a CPU, torch 2.13);
* all parameter gradients are outputs of one backward graph, so with accumulation a whole second set exists at its end;
* with the chunked loss only the transformer is compiled as a graph (a graph over the slices would keep every slice's
  head gradient), and the slice's arithmetic is one fused kernel without a float32 copy of its logits;
* a buffer goes after its last use, not when the function that named it returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .autograd import Leaf, Memory, Node, Tensor
from .eager import EagerStep
from .shape import Ints
from .state_rows import plain

TRACED_TORCH = ((2, 11), (2, 13), (2, 15))
"""Releases whose partition was traced (``partitions.json``). The table keeps what they keep, and they keep the same;
releases between them are taken to do so too."""


class CompiledStep(EagerStep):
    """Writes the table of a compiled step; what it does not override is as in eager mode."""

    early = True
    beyond: Ints = 0
    """Bytes that each layer keeps, as was traced, beyond what is listed here."""
    late: Memory = ()
    """What the head's product needs, where it comes last."""
    sums_embedding = False
    """Whether the graph adds the head's share to the embedding's gradient."""
    block_outputs: Sequence[Memory] = ()
    for_next_block: Sequence[Memory] = ()
    """Buffers of a recomputed block that inductor uses again in the next one."""

    def leaf(self) -> Tensor:
        """A parameter; its gradient is an output of the backward graph."""
        return Tensor((), Leaf(self._output, latest=True))

    def _output(self, grad: Memory) -> None:
        """Every gradient stays until the graph returns, whether ``.grad`` exists or not."""
        self.kept_gradients.append(grad)

    def in_blocks(self, blocks: list[Node]) -> None:
        """The backward of every block; what it returns is apart, because there is one of each for every block."""
        outside, self.kept_gradients = self.kept_gradients, []
        super().in_blocks(blocks)
        self.block_outputs, self.kept_gradients = self.kept_gradients, outside

    def _returned(self) -> None:
        """With accumulation each gradient is added to ``.grad`` once the graph has returned, and gone."""
        if not self.accumulates:
            return
        for grad in (*self.kept_gradients, *self.block_outputs):
            for storage in grad:
                storage.joins = True
        del grad, storage
        self.kept_gradients = []
        with self.tape.repeat(self.shape.n_layer):
            self.block_outputs = ()

    def layer(self, x: Tensor) -> Tensor:
        """Also keeps what this release was traced to keep, and the table does not know."""
        if np.any(self.beyond):
            more = self.new("kept by this torch, not in the table", "activations", self.beyond)
            x = self.result(x.memory, [x], lambda grad: [grad], [more])
            del more
        return super().layer(x)

    # ---------------------------------------------------------------- operations

    def cast(self, name: str, elements: Ints, parameter: Tensor | None = None) -> Tensor:
        """A half-precision copy of a matrix; those of biases and norms are fused into their use."""
        parameter = parameter or self.leaf()
        if not self.casts:
            return parameter
        copied = not name.endswith(".bias")

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new(f"{name} gradient, float32", "gradients", self.w * elements)]

        copy = self.new(f"{name} copy", "weights", self.e * elements) if copied else ()
        return self.result(copy, [parameter], backward)

    def linear_gradients(self, name: str, n_out: Ints, n_in: Ints, kept: list[Memory]) -> Sequence[Memory]:
        """The weight's first; then the input goes before its gradient is made. Not where the input is recomputed: that
        happens as late as it can, and its gradient needs no recomputation."""
        if self.step.checkpointing != "none":
            return super().linear_gradients(name, n_out, n_in, kept)
        dw = self.new(f"{name}.weight gradient", "gradients", self.e * n_out * n_in)
        bias = [self.new(f"{name}.bias gradient", "gradients", self.e * n_out)] if self.shape.bias else []
        del kept[0]
        return [self.new(f"{name} input gradient", "temporaries", self.e * n_in * self.N), dw, *bias]

    def half(self, name: str, x: Tensor) -> Tensor:
        """Norms write what the next product takes."""
        return x

    def _layer_norm(self, name: str, x: Tensor) -> Tensor:
        parts = ["weight", "bias"] if self.shape.norm_bias else ["weight"]
        out = self.new(f"{name} output", "activations", self.e * self.h * self.N)
        saved = [self.new(f"{name} {what}", "activations", self.stat * self.N) for what in ("mean", "1/std")]

        def backward(_: Memory) -> Sequence[Memory]:
            dx = self.new(f"{name} input gradient", "temporaries", self.r * self.h * self.N)
            return [dx, *(self.new(f"{name}.{p} gradient", "gradients", self.w * self.h) for p in parts)]

        return self.result(out, [x, *(self.leaf() for _ in parts)], backward, [x.memory, *saved])

    def _rms_norm(self, name: str, x: Tensor, elements: Ints, weighted: bool, rows: Ints | None = None) -> Tensor:
        """One kernel each way, whatever the device. The stream's gradient is written over the one that was given; that
        of queries or keys, which are read where they lie, is not."""
        size = self.e * elements * self.N
        out = self.new(f"{name} output", "activations", size)
        scale = self.new(f"{name} 1/rms", "activations", 4 * (self.N if rows is None else rows))

        def backward(grad: Memory) -> Sequence[Memory]:
            if weighted:
                return [grad, self.new(f"{name}.weight gradient", "gradients", self.w * elements)]
            return [self.new(f"{name} input gradient", "temporaries", size), ()]

        return self.result(out, [x, self.leaf() if weighted else Tensor()], backward, [x.memory, scale])

    def activation(self, x: Tensor) -> Tensor:
        """GELU's gradient is written over the one it was given; the gate's is twice as wide, and needs its own."""
        s = self.shape
        gated = s.mlp == "swiglu"
        if gated and self.step.checkpointing == "selective":
            return super().activation(x)
        out = self.new(f"{s.mlp} output", "activations", self.e * s.mlp_width * self.N)
        wide = self.e * s.fc_width * self.N
        kept = [x.memory]

        def backward(grad: Memory) -> Sequence[Memory]:
            if not gated:
                return [grad]
            again = self._gate_again()
            dx = self.new("swiglu input gradient", "temporaries", wide)
            if again:
                self.for_next_block = [again, grad, dx, *kept]
            return [dx]

        return self.result(out, [x], backward, kept)

    def _gate_again(self) -> Memory:
        """The activation of the gate, where a recomputed block has made it anew."""
        if self.step.checkpointing == "none":
            return ()
        return self.new("activation of the gate, again", "temporaries", self.e * self.shape.mlp_width * self.N)

    def _checkpointed(self, x: Tensor) -> Tensor:
        """The wide buffers of a gated MLP are not freed within the block: inductor keeps them for the next one's, which
        are as large. It believes that this does not raise the peak, for it counts the halves of the gate's gradient
        beside the whole (its ``estimate_peak_memory``); but attention's backward comes on top of them."""
        out = super()._checkpointed(x)
        node = out.source
        if isinstance(node, Node):
            inner = node.rule

            def backward(grads: list[Memory]) -> Sequence[Memory]:
                given = inner(grads)
                self.for_next_block = []
                return given

            node.rule = backward
        return out

    # ---------------------------------------------------------------- embedding

    def _looked_up(self, name: str) -> Tensor:
        size = self.w * self.V * self.h

        def backward(_: Memory) -> Sequence[Memory]:
            scattered = self.new("wte gradient, of the tokens", "gradients", size) if self.sums_embedding else ()
            whole = self.new("wte gradient", "gradients", size)
            self.late = ()
            del scattered
            return [whole]

        out = self.new(name, "activations", self.w * self.h * self.N)
        return self.result(out, [self.wte], backward)

    def _with_positions(self, x: Tensor, name: str) -> Tensor:
        def backward(grad: Memory) -> Sequence[Memory]:
            return [grad, self.new("wpe gradient", "gradients", self.w * self.h * self.shape.block_size)]

        out = self.new(name, "activations", self.w * self.h * self.N)
        return self.result(out, [x, self.leaf()], backward)

    def _narrowed(self, x: Tensor) -> Tensor:
        out = self.new("block input", "activations", self.r * self.h * self.N)
        return self.result(out, [x], lambda grad: [grad])

    # ---------------------------------------------------------------- loss

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's output where the loss is outside the graph.

        A vocabulary that tensor cores do not like is padded on the way: copies of weight and logits, and back, of their
        gradient for either product (inductor's pad_mm; whether it pads is decided by a timing, here taken for granted).
        """
        units = 8 if self.e == 2 else 4
        if not self.cuda or np.all(np.asarray(self.V) % units == 0):
            return super().logits(hidden)
        rows = -(-self.V // units) * units
        pads = np.asarray(self.V) % units != 0
        weight, scores = (plain(np.where(pads, self.e * rows * n, 0)) for n in (self.h, self.N))
        own = plain(np.where(pads, weight, self.e * self.V * self.h))
        w = self.cast("head.weight", self.V * self.h, self.head)
        padded = self.new("head.weight, padded", "temporaries", weight)
        wide = self.new("logits, padded", "logits_and_loss", scores)
        del padded
        out = self.logits_rows("logits", self.e, self.N)
        del wide

        def backward(_: Memory) -> Sequence[Memory]:
            first = self.new("gradient of the logits, padded", "logits_and_loss", scores)
            dw = self.new("gradient of the head", "gradients", own)
            del first
            second = self.new("gradient of the logits, padded", "logits_and_loss", scores)
            padded = self.new("head.weight, padded", "temporaries", weight)
            dx = self.new("gradient of the hidden state", "temporaries", self.e * self.h * self.N)
            del second, padded
            return [dx, dw]

        return self.result(out, [hidden, w], backward, [hidden.memory, w.memory])

    def _full_loss(self, hidden: Tensor) -> Tensor:
        if self.step.workload == "plain":  # its loss is a function outside the compiled model
            return super()._full_loss(hidden)
        wide = self.casts and not self.shape.tied
        w = self.cast("head.weight", self.V * self.h, self.head) if wide else self._tied_head()
        logits = self.logits_rows("logits", self.e, self.N)
        if self.autocast:
            self.model_logits = logits
        if self.loss_outside:
            self.leave_forward()
        if self.shape.logit_softcap:  # read twice, so inductor writes them out (seen in its code for a CPU)
            capped = self.logits_rows("capped logits, float32", 4, self.N)
            del capped
        statistics = [self.new("maximum and log-sum of the logits", "logits_and_loss", 4 * self.N, times=2)]
        statistics.append(scalars := self.new("loss scalars", "logits_and_loss", 4, times=3))
        overwritten = () if self.script or self.cuda else logits
        donated = [] if self.script else [logits]
        kept, last = hidden.memory, self.shape.tied and not self.casts
        self.sums_embedding = self.shape.tied

        def backward(_: Memory) -> Sequence[Memory]:
            dlogits = overwritten or self.logits_rows("gradient of the logits", self.e, self.N)
            statistics.clear()
            dw: Memory = ()
            if last:
                self.late = dlogits + kept
            else:
                dw = self.new("gradient of the head", "gradients", self.e * self.V * self.h)
            return [self.new("gradient of the hidden state", "temporaries", self.e * self.h * self.N), dw]

        saved = [hidden.memory, w.memory, *donated]
        return self.result(scalars, [hidden, w], backward, saved)

    def _tied_head(self) -> Tensor:
        """Its gradient is added to the embedding's in half precision: no float32 copy of its own."""
        copy = self.new("head.weight copy", "weights", self.e * self.V * self.h) if self.casts else ()
        return self.result(copy, [self.head], lambda grad: [grad])

    def _chunked_loss(self, hidden: Tensor) -> Tensor:
        if not self.shape.tied:  # outside the graph: its gradient is complete at once
            self.head = super().leaf()
        return super()._chunked_loss(hidden)

    def _slice(self, c: Ints) -> None:
        logits = self.logits_rows("logits of a slice", self.e, c)
        grad = self.logits_rows("gradient of a slice's logits", self.e, c)
        del logits
        product = self.new("head gradient of a slice", "temporaries", 2 * self.V * self.h) if self.e == 2 else ()
        del grad, product

    def evaluation_loss(self, hidden: Tensor) -> None:
        """Full: one graph, log-softmax is fused into sums over each row. Chunked: the slices run as in eager mode."""
        if self.step.loss == "chunked":
            super().evaluation_loss(hidden)
            return
        copy = self.head_copy()
        logits = self.logits_rows("evaluation logits", self.e, self.N)
        lse = self.new("maximum and log-sum of the logits", "logits_and_loss", 4 * self.N, times=2)
        del copy, logits, lse
