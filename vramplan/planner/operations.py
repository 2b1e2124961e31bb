"""The operations of a GPT as eager PyTorch runs them: what each allocates, and what it keeps for its backward.

Read off real allocator traces of ``trainer.model`` (torch 2.13) and, for what CUDA does differently, from the kernels'
sources named beside the rows. For the widths e, w, r, h and N see :mod:`state_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

from .attention_rows import AttentionRows
from .autograd import Leaf, Memory, Tensor
from .shape import Ints
from .tape import Row


class Operations(AttentionRows):
    """Each method is one operation: its arguments are tensors, its result is a new one (or a view)."""

    kept_gradients: list[Memory]
    stop_at = ""
    """While something is recomputed: its last product, which is not repeated."""
    branch_gradient: Memory = ()
    """A branch's gradient that is there before the branch is recomputed."""

    # ---------------------------------------------------------------- parameters

    def leaf(self) -> Tensor:
        """A parameter."""
        return Tensor((), Leaf(self.finish_gradient))

    def finish_gradient(self, grad: Memory) -> None:
        """A complete gradient becomes ``.grad``, or is added to it in place and goes."""
        for storage in grad:
            storage.joins = self.accumulates
        if not self.accumulates and self.step.optimizer != "adamw-in-backward":  # which has used it up
            self.kept_gradients.append(grad)

    def cast(self, name: str, elements: Ints, parameter: Tensor | None = None) -> Tensor:
        """A parameter as products take it: a half-precision copy where the master weights are wider."""
        parameter = parameter or self.leaf()
        if not self.casts:
            return parameter

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new(f"{name} gradient, float32", "gradients", self.w * elements)]

        return self.result(self.new(f"{name} copy", "weights", self.e * elements), [parameter], backward)

    # ---------------------------------------------------------------- linear layers

    def linear(self, name: str, x: Tensor, n_out: Ints, n_in: Ints) -> Tensor:
        """Keeps its input and the (copy of the) weight, not the bias."""
        size = self.e * n_out * self.N
        b = self.cast(f"{name}.bias", n_out) if self.shape.bias else None
        w = self.cast(f"{name}.weight", n_out * n_in)
        out: Memory = ()
        if name != self.stop_at:
            out = self.new(f"{name} output", "activations", size)

        kept = [x.memory, w.memory]
        inputs = [x, w, *([b] if b else [])]
        return self.result(out, inputs, lambda _: self.linear_gradients(name, n_out, n_in, kept))

    def linear_gradients(self, name: str, n_out: Ints, n_in: Ints, kept: list[Memory]) -> Sequence[Memory]:
        """Of input, weight and bias. ``kept`` are the input and the weight, which go when all of them are there."""

        def weight() -> Memory:
            return self.new(f"{name}.weight gradient", "gradients", self.e * n_out * n_in)

        def given() -> Memory:
            return self.new(f"{name} input gradient", "temporaries", self.e * n_in * self.N)

        if not self.shape.bias:  # mm's backward makes the second operand's gradient first, addmm's does not
            dw = weight()
            return [given(), dw]
        dx, dw = given(), weight()
        return [dx, dw, self.new(f"{name}.bias gradient", "gradients", self.e * n_out)]

    # ---------------------------------------------------------------- normalisation

    def norm(self, name: str, x: Tensor) -> Tensor:
        """The norm of the shape, over the residual stream."""
        return self._rms_norm(name, x, self.h, True) if self.shape.norm == "rmsnorm" else self._layer_norm(name, x)

    def _layer_norm(self, name: str, x: Tensor) -> Tensor:
        """Keeps its input, mean and 1/std, and its own parameters' copies."""
        casts = self.casts and not self.wide_norms
        width = 4 if self.wide_norms else self.e
        parts = ["weight", "bias"] if self.shape.norm_bias else ["weight"]
        own = [self.cast(f"{name}.{p}", self.h) if casts else self.leaf() for p in parts]
        category = "temporaries" if width != self.e else "activations"
        out = self.new(f"{name} output" + (", float32" if width != self.e else ""), category, width * self.h * self.N)  # type: ignore[arg-type]
        saved = [self.new(f"{name} {what}", "activations", self.stat * self.N) for what in ("mean", "1/std")]

        def backward(_: Memory) -> Sequence[Memory]:
            dx = self.new(f"{name} input gradient", "temporaries", self.r * self.h * self.N)
            narrow = self.e if casts else self.w
            return [dx, *(self.new(f"{name}.{p} gradient", "gradients", narrow * self.h) for p in parts)]

        return self.result(out, [x, *own], backward, [x.memory, *saved, *(p.memory for p in own)])

    def _rms_norm(self, name: str, x: Tensor, elements: Ints, weighted: bool, rows: Ints | None = None) -> Tensor:
        """Keeps its input, the float32 reciprocal roots (one per row) and the weight's copy.

        ``elements`` per token are divided among ``rows`` per micro-batch (one per token unless given).
        """
        wide = weighted and self.step.wide_residual
        width, rows = 4 if wide else self.e, self.N if rows is None else rows
        size = width * elements * self.N
        w = (self.leaf() if wide else self.cast(f"{name}.weight", elements)) if weighted else Tensor()
        if not self.cuda:
            return self._rms_norm_by_hand(name, x, w, elements, rows)
        copied = self._made_dense(name, size, weighted)
        out = self.new(f"{name} output", "activations", size)
        scale = self.new(f"{name} 1/rms", "activations", 4 * rows)
        del copied

        def backward(_: Memory) -> Sequence[Memory]:
            copied = self._made_dense(name, size, weighted)
            dx = self.new(f"{name} input gradient", "temporaries", size)
            dw = self.new(f"{name}.weight gradient", "gradients", width * elements) if weighted else ()
            del copied
            return [dx, dw]

        return self.result(out, [x, w], backward, [x.memory, w.memory, scale])

    def _made_dense(self, name: str, size: Ints, weighted: bool) -> Memory:
        """A copy of queries or keys, views into the projection, for the kernel (ATen layer_norm_kernel.cu)."""
        return () if weighted else self.new(f"{name} input, contiguous (kernel)", "temporaries", size)

    def _rms_norm_by_hand(self, name: str, x: Tensor, w: Tensor, elements: Ints, rows: Ints) -> Tensor:
        """Where there is no fused kernel: ``trainer.pointwise``, in float32."""
        weighted = w.source is not None or bool(w.memory)
        half = self.e == 2 and not (weighted and self.step.wide_residual)
        size = self.e * elements * self.N

        def full(what: str, present: bool = True) -> Memory:
            return self.new(f"{name} {what}", "temporaries", 4 * elements * self.N) if present else ()

        widened, squares = full("input, float32", half), full("squares")
        scale = self.new(f"{name} 1/rms", "activations", 4 * rows)
        del squares
        normed = full("normalised", weighted or half)
        out = normed if half and not weighted else self.new(f"{name} output", "activations", 4 * elements * self.N)
        if half:
            out = self.new(f"{name} output, half", "activations", size)
        del widened, normed

        def backward(_: Memory) -> Sequence[Memory]:
            widened = full("input, float32", half)
            normed = full("normalised")
            del widened
            widened = full("gradient, float32", half)
            along = full("gradient along the input")
            del widened
            dw: Memory = ()
            if weighted:
                dw = self.new(f"{name}.weight gradient, summed", "gradients", 4 * elements)
                dw = self.new(f"{name}.weight gradient", "gradients", 2 * elements) if half else dw
            mean = self.new(f"{name} gradient along the input, mean", "temporaries", 4 * rows)
            del mean
            widened = full("gradient, float32", half and weighted)
            dx = full("input gradient")
            del widened
            if half:
                dx = self.new(f"{name} input gradient, half", "temporaries", size)
            del normed, along
            return [dx, dw]

        return self.result(out, [x, w], backward, [x.memory, w.memory, scale])

    def half(self, name: str, x: Tensor) -> Tensor:
        """The copy of a float32 norm's output that is made for the next product."""
        if not (self.wide_norms and self.casts):
            return x

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new(f"{name} output gradient, float32", "temporaries", 4 * self.h * self.N)]

        return self.result(self.new(f"{name} output", "activations", self.e * self.h * self.N), [x], backward)

    # ---------------------------------------------------------------- residual stream

    def new_branch_gradient(self) -> Memory:
        """The stream's gradient as a narrower branch takes it."""
        return self.new("gradient of a branch", "temporaries", self.e * self.h * self.N)

    def residual(self, x: Tensor, branch: Tensor, row: Row | None = None) -> Tensor:
        """x + branch, as another instance of ``row`` if that is given."""
        out: Memory = ()
        if row is None:
            out = self.new("residual after attention", "activations", self.r * self.h * self.N)
        elif branch.memory:  # a recomputed block stops before its last product
            out = self.again(row)

        def backward(grad: Memory) -> Sequence[Memory]:
            """Both get the same tensor, except where the branch is narrower."""
            if self.r == self.e:
                return [grad, grad]
            branch, self.branch_gradient = self.branch_gradient or self.new_branch_gradient(), ()
            return [grad, branch]

        return self.result(out, [x, branch], backward)

    def drop(self, what: str, x: Tensor, width: int) -> Tensor:
        """Dropout keeps a mask of one byte per element."""
        if not self.dropout:
            return x
        hN = self.h * self.N
        out = self.new(f"{what} after dropout", "activations", width * hN)
        mask = self.new(f"{what}: dropout mask", "activations", hN)

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new(f"gradient of {what} before dropout", "temporaries", width * hN)]

        return self.result(out, [x], backward, [mask])

    # ---------------------------------------------------------------- activation functions

    def activation(self, x: Tensor) -> Tensor:
        """GELU, squared ReLU or the gate: all keep their input only (``trainer.pointwise``)."""
        s, e = self.shape, self.e
        out = self.new(f"{s.mlp} output", "activations", e * s.mlp_width * self.N)

        def backward(_: Memory) -> Sequence[Memory]:
            dx = self.new(f"{s.mlp} input gradient", "temporaries", e * s.fc_width * self.N)
            if s.mlp == "swiglu":
                again = self.new("activation of the gate, again", "temporaries", e * s.mlp_width * self.N)
                del again
            return [dx]

        return self.result(out, [x], backward, [x.memory])
