"""Attention in the tensor table: projections split into heads, rotary positions, and the kernels; eager."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .attention import REGISTERS, Kernel, efficient_workspace
from .autograd import Memory, Tensor
from .shape import Ints, Shape
from .state_rows import StateRows, plain
from .step import StepConfig


class AttentionRows(StateRows):
    """From the projection into queries, keys and values to attention's output, joined over the heads."""

    def __init__(self, shape: Shape, step: StepConfig, workspace_bytes: int = 0, kernel: Kernel = "flash") -> None:
        super().__init__(shape, step, workspace_bytes)
        self.kernel = kernel
        self.one_head = bool(np.all(np.asarray(shape.n_head) == 1))
        self.alone = self.one_head or bool(np.all(np.asarray(step.batch_size) == 1))
        """Whether there is one sequence, or one head: heads and sequences then are one dimension without a copy."""

    @property
    def pads(self) -> bool:
        """Whether heads are padded: scaled_dot_product_attention then keeps padded copies of q, k, v and its output
        (ATen transformers/attention.cpp, pad_last_dim)."""
        return self.kernel == "padded flash"

    @property
    def repeats(self) -> bool:
        """Whether keys and values are repeated: of CUDA's kernels only FlashAttention takes fewer than queries."""
        return self.shape.grouped and self.kernel in ("efficient", "math")

    # ---------------------------------------------------------------- heads

    def split(self, qkv: Tensor) -> list[Tensor]:
        """Views of queries, keys and values; backward joins their gradients."""
        s = self.shape

        def backward(*_: Memory) -> Sequence[Memory]:
            return [self.new("gradient of qkv", "temporaries", self.e * s.qkv_width * self.N)]

        parts = self.results([qkv.memory] * 3, [qkv], backward)
        return [self._made_contiguous(part, name) for part, name in zip(parts, "qkv", strict=True)]

    def _made_contiguous(self, x: Tensor, name: str) -> Tensor:
        """The gradient of a part that was padded, repeated or moved for products is copied to be joined with others.

        Norms and rotations of queries and keys leave gradients that need no copy.
        """
        changed = name != "v" and (self.shape.qk_norm or self.shape.positions == "rotary")
        repeated = self.repeats and name != "q"
        moved = self.kernel == "math" and name != "k" and not self.one_head
        if changed or not (self.pads or repeated or moved):
            return x

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new(f"gradient of {name}, contiguous", "temporaries", self._part(name))]

        return self.result(x.memory, [x], backward)

    def _part(self, name: str) -> Ints:
        """Bytes of the queries, the keys or the values, as they are projected."""
        return self.e * (self.h if name == "q" else self.shape.kv_width) * self.N

    def rotate(self, name: str, x: Tensor, width: Ints) -> Tensor:
        """Rotary positions keep nothing but their tables."""
        size = self.e * width * self.N

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new(f"gradient of {name}, turned back", "temporaries", size)]

        return self.result(self.new(f"{name}, turned", "activations", size), [x], backward)

    def _repeat_heads(self, name: str, x: Tensor) -> Tensor:
        """Keys or values once for every query that shares them, where the kernel wants them so."""
        if not self.repeats:
            return x

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new(f"gradient of {name}, summed", "temporaries", self._part(name))]

        return self.result(self.new(f"{name}, repeated", "activations", self.e * self.h * self.N), [x], backward)

    # ---------------------------------------------------------------- fused kernels

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """scaled_dot_product_attention: a fused kernel keeps q, k, v, its output and the log-sum-exp."""
        k, v = self._repeat_heads("k", k), self._repeat_heads("v", v)
        if self.kernel == "math":
            return self._composite(q, k, v)
        widths = [self.h, *([self.h if self.repeats else self.shape.kv_width] * 2)]
        sizes = [self._in_heads(width) for width in widths]
        if self.pads:
            q, k, v = (self._pad(part, name, size) for part, name, size in zip((q, k, v), "qkv", sizes, strict=True))
        out = self.new(f"{self._padded}attention output", "activations", sizes[0])
        if self.kernel == "efficient" and self.step.half:
            self._outside_registers("float32 accumulator of the output (kernel)", 4 * self.h * self.N)
        saved = self._statistics()

        def backward(_: Memory) -> Sequence[Memory]:
            grads = [
                self.new(f"gradient of {self._padded}{name}", "temporaries", size)
                for name, size in zip("qkv", sizes, strict=True)
            ]
            work = self._flash_work(sizes[0]) if self.kernel != "efficient" else self._efficient_work()
            del work
            return grads

        attended = self.result(out, [q, k, v], backward, [q.memory, k.memory, v.memory, out, *saved])
        return self._cut(attended) if self.pads else attended

    def _statistics(self) -> list[Memory]:
        """Kept beside the output. Memory-efficient attention aligns its log-sum-exp to 32 (ATen attention.cu)."""
        s, rows = self.shape, self.shape.block_size
        rows = -(-rows // 32) * 32 if self.kernel == "efficient" else rows
        saved = [self.new("attention log-sum-exp", "activations", 4 * s.n_head * self.step.batch_size * rows)]
        return [*saved, *([self.new("attention rng state", "activations", 16, times=2)] if self.cuda else [])]

    def _flash_work(self, size: Ints) -> list[Memory]:
        """What FlashAttention-2's backward takes: dq is accumulated in float32, rows rounded to 128 and widths to 32
        (flash_api.cpp, mha_bwd)."""
        s = self.shape
        if not self.cuda:
            return []
        rows = -(-s.block_size // 128) * 128 * self.step.batch_size * s.n_head
        width = -(-s.head_dim // 32) * 32
        taken = [
            self.new("float32 accumulator of dq (kernel)", "temporaries", 4 * rows * width),
            self.new("softmax sums of dq (kernel)", "temporaries", 4 * rows),
        ]
        if s.grouped:  # gradients of k and v for every query, before they are summed (the same function)
            taken += [self.new(f"gradient of {part} for every query (kernel)", "temporaries", size) for part in "kv"]
        return taken

    def _efficient_work(self) -> list[Memory]:
        """What the memory-efficient backward takes: the sums over each head of output times gradient, which its kernels
        for half precision form themselves, and accumulators (attention_backward.cu)."""
        s = self.shape
        if not self.step.half:
            product = self.new("output times its gradient (kernel)", "temporaries", 4 * self.h * self.N)
            sums = self.new("attention delta, by token (kernel)", "temporaries", 4 * s.n_head * self.N)
        delta = self.new("attention delta (kernel)", "temporaries", 4 * s.n_head * self.N)
        if not self.step.half:
            del product, sums
        heads = s.n_head * self.step.batch_size
        taken = efficient_workspace(heads, s.head_dim, s.block_size, self.step.half)
        return [delta, self.new("accumulators of the gradients (kernel)", "temporaries", plain(taken))]

    def _outside_registers(self, name: str, n_bytes: Ints) -> None:
        """Takes ``n_bytes`` for a moment where registers do not hold what a kernel accumulates."""
        held = self.new(name, "temporaries", plain(np.where(np.asarray(self.shape.head_dim) > REGISTERS, n_bytes, 0)))
        del held

    # ---------------------------------------------------------------- padded heads

    @property
    def _padded(self) -> str:
        return "padded " if self.pads else ""

    def _in_heads(self, width: Ints) -> Ints:
        """Bytes of ``width`` per token as the kernel takes them: in heads that are a multiple of 8 wide."""
        d = self.shape.head_dim
        return self.e * self.N * (width // d * (-(-d // 8) * 8) if self.pads else width)

    def _pad(self, x: Tensor, name: str, size: Ints) -> Tensor:
        """A padded copy; its gradient is cut back."""

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new(f"gradient of {name}, cut", "temporaries", self._part(name))]

        return self.result(self.new(f"padded {name}", "activations", size), [x], backward)

    def _cut(self, attended: Tensor) -> Tensor:
        """Attention's output without its padding, joined over the heads."""
        size = self._in_heads(self.h)

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new("gradient of padded out", "temporaries", size)]

        if self.one_head:  # which is joined as it is, padding left out
            return self.result(attended.memory, [attended], backward)
        out = self.new("attention output, joined", "activations", self.e * self.h * self.N)
        return self.result(out, [attended], backward)

    # ---------------------------------------------------------------- without a fused kernel

    def _composite(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Products and a softmax in float32, as torch composes them: scores are held for every head (ATen
        transformers/attention.cpp, _scaled_dot_product_attention_math)."""
        s, full = self.shape, 4 * self.h * self.N
        tokens = self.N // self.step.batch_size
        scores = 4 * s.n_head * self.N * tokens
        wide = [self._widened(part, name) for part, name in zip((q, k, v), "qkv", strict=True)]
        queries = self._scaled(wide[0], "q")
        mask = self._causal_mask(tokens)
        keys = self._scaled(wide[1], "k")
        folded = [self._folded(queries, "q, scaled"), self._folded(keys, "k, scaled", self.repeats)]
        raw = self._product("attention scores", scores, (folded[0], folded[1]), (full, full))
        del keys, folded
        weights = self._softmax(raw, scores)
        del raw
        if self.dropout:
            weights = self._drop_scores(weights, scores)
        narrow = self.new("attention weights, half", "temporaries", scores // 2) if self.step.half else ()
        values = self._folded(wide[2], "v", self.repeats)
        name = "attention output, float32" if self.step.half else "attention output"
        out = self._product(name, full, (weights, values), (scores, full))
        del values, weights
        out = self._narrowed_output(out)
        del queries, mask, wide, narrow
        if self.one_head:  # which is joined as it is
            return out
        joined = self.new("attention output, joined", "activations", self.e * self.h * self.N)
        return self.result(joined, [out], lambda grad: [grad])

    def _widened(self, x: Tensor, name: str) -> Tensor:
        if not self.step.half:
            return x

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new(f"gradient of {name}, half", "temporaries", self.e * self.h * self.N)]

        return self.result(self.new(f"{name}, float32", "activations", 4 * self.h * self.N), [x], backward)

    def _scaled(self, x: Tensor, name: str) -> Tensor:
        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new(f"gradient of {name}, scaled", "temporaries", 4 * self.h * self.N)]

        return self.result(self.new(f"{name}, scaled", "activations", 4 * self.h * self.N), [x], backward)

    def _causal_mask(self, tokens: Ints) -> Memory:
        """Of bytes first, then of float32."""
        square = self.new("causal mask, all ones", "temporaries", tokens * tokens)
        lower = self.new("causal mask", "temporaries", tokens * tokens)
        del square
        mask = self.new("causal mask, float32", "temporaries", 4 * tokens * tokens)
        del lower
        return mask

    def _folded(self, x: Tensor, name: str, adjacent: bool = False) -> Tensor:
        """Heads and sequences as one dimension, for a batched product: a copy, unless there is one of either, or they
        are ``adjacent`` already, as what was repeated is."""
        if self.alone or adjacent:
            return x
        copy = self.new(f"{name}, folded", "activations", 4 * self.h * self.N)
        return self.result(copy, [x], lambda grad: [grad])

    def _product(self, name: str, size: Ints, factors: tuple[Tensor, Tensor], sizes: tuple[Ints, Ints]) -> Tensor:
        """A batched product, which keeps both factors (``sizes`` bytes); the second one's gradient comes first."""

        def backward(_: Memory) -> Sequence[Memory]:
            second = self.new(f"{name}: gradient of the second factor", "temporaries", sizes[1])
            return [self.new(f"{name}: gradient of the first factor", "temporaries", sizes[0]), second]

        kept = [factor.memory for factor in factors]
        return self.result(self.new(name, "activations", size), factors, backward, kept)

    def _softmax(self, raw: Tensor, scores: Ints) -> Tensor:
        """Keeps its result. A mask of bytes finds the rows that are masked as a whole (_safe_softmax)."""
        weights = self.new("attention weights", "activations", scores)
        masked = self.new("scores that are masked (kernel)", "temporaries", scores // 4)
        del masked

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new("gradient of the scores", "temporaries", scores)]

        return self.result(weights, [raw], backward, [weights])

    def _drop_scores(self, weights: Tensor, scores: Ints) -> Tensor:
        out = self.new("attention weights after dropout", "activations", scores)
        mask = self.new("attention weights: dropout mask", "activations", scores // 4)

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new("gradient of the attention weights before dropout", "temporaries", scores)]

        return self.result(out, [weights], backward, [mask])

    def _narrowed_output(self, out: Tensor) -> Tensor:
        """In the dtype that was asked for; its gradient is widened, and folded for the product."""
        full = 4 * self.h * self.N

        def folded(grad: Memory) -> Sequence[Memory]:
            return [grad if self.alone else self.new("gradient of the attention output, folded", "temporaries", full)]

        out = self.result(out.memory, [out], folded)
        if not self.step.half:
            return out

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new("gradient of the attention output, float32", "temporaries", full)]

        return self.result(self.new("attention output", "activations", self.e * self.h * self.N), [out], backward)
