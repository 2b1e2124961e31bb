"""The tensor table of one eager training step, for our trainer and for the three scripts.

It follows the model line by line: what each operation allocates, what autograd keeps for the backward, and when each of
these is released. The order was read off real allocator traces of ``trainer.model`` (torch 2.13) and, for what CUDA
does differently, from the kernels' sources named beside the rows. What outlives a micro-step is in :mod:`state_rows`,
the loss in :mod:`loss_rows`.
"""

from __future__ import annotations

import numpy as np

from .loss_rows import LossRows
from .shape import Ints
from .state_rows import Saved, plain
from .tape import Row, Tape


class EagerStep(LossRows):
    """Writes the table of one optimizer step of ``shape`` under ``step`` onto a tape."""

    _dx: Row
    _embedding_mask: Row | None = None

    def write(self, *, evaluation: bool = True) -> Tape:
        """Persistent state, an evaluation, one micro-step (a later one when accumulating), the optimizer's update."""
        t = self.tape
        t.phase = "persistent"
        self._persistent()
        self._kept_gradients()
        if evaluation and not self.script:
            t.phase = "evaluation"
            self._evaluation()
        t.phase = "forward"
        self._kept_logits = self._caller_keeps()
        inputs = [t.new(name, "inputs", 8 * self.N) for name in ("tokens", "targets")]
        x = self._embedding_forward()
        saved = self._blocks_forward(x)
        final = self._norm_forward("ln_f")
        t.phase = "loss forward"
        loss = self._loss_forward()
        if not self.loss_outside:
            self._leave_forward()
        if self.step.loss == "chunked":
            t.free(final["ln_f"])  # its gradient is known already: only the model's local name held it
        if self.step.workload == "nanogpt":
            inputs += [t.new(f"next {name}", "inputs", 8 * self.N) for name in ("tokens", "targets")]
        t.phase = "loss backward"
        head_grad = self._loss_backward(loss)
        if self.step.loss == "full":
            t.free(final["ln_f"])  # the head's product has consumed it
        dx = self._norm_backward("ln_f", final, x, first=True)
        self._blocks_backward(saved, x, dx)
        t.phase = "embedding backward"
        self._embedding_backward(dx, head_grad)
        t.phase = "optimizer step"
        self._optimizer()
        t.free(*inputs)
        return t

    # ---------------------------------------------------------------- forward

    def _embedding_forward(self) -> Row:
        t, hN = self.tape, self.h * self.N
        w, h = self.w, self.h
        looked_up = t.new("token embeddings", "activations", w * hN)
        if self.script:
            # nanoGPT's locals tok_emb and pos_emb live until forward returns
            self._locals = [looked_up, t.new("position embeddings", "activations", w * h * self.shape.block_size)]
            t.new("position ids", "inputs", 8 * self.shape.block_size)
            x = t.new("block input", "activations", w * hN)
            if self.dropout:
                summed = x
                x = t.new("block input", "activations", w * hN)
                self._embedding_mask = t.new("dropout mask of the embeddings", "activations", hN)
                t.free(summed)
            return x
        x = t.row("block input", "activations", self.r * hN)
        if self.r == 4:
            t.alloc(x)
            t.free(looked_up)
            return x
        summed = t.new("embeddings with positions", "activations", 4 * hN)
        t.free(looked_up)
        t.alloc(x)
        t.free(summed)
        return x

    def _blocks_forward(self, x: Row) -> Saved:
        t = self.tape
        if self.step.checkpointing == "block":
            with t.repeat(self.shape.n_layer):
                self._block_transient(x)
            return Saved({})
        with t.repeat(self.shape.n_layer):
            saved = self._block_saved()
            branch = t.new("mlp output", "activations", self.e * self.h * self.N)
            self._drop_bias_copy("mlp.proj", saved)
            branch = self._drop(branch, "mlp", saved.rows)
            t.alloc(x)
            t.free(branch)
        return saved

    def _drop(self, branch: Row, name: str, kept: dict[str, Row]) -> Row:
        """Dropout of a branch: its output replaces it, and a mask of one byte per element is kept."""
        if not self.dropout:
            return branch
        t, hN = self.tape, self.h * self.N
        dropped = t.new(f"{name} output after dropout", "activations", self.e * hN)
        kept[f"{name}.mask"] = t.new(f"{name} dropout mask", "activations", hN)
        t.free(branch)
        return dropped

    def _block_saved(self) -> Saved:
        """A block's forward up to (not including) its last product, keeping everything the backward needs."""
        t, hN, e = self.tape, self.h * self.N, self.e
        kept: dict[str, Row] = {}
        saved = Saved(kept)
        kept |= self._norm_forward("ln_1").rows
        self._weight_copy("attn.qkv", 3 * self.h, self.h, kept)
        kept["qkv"] = t.new("attn.qkv output", "activations", self._unpadded(3 * e * hN))
        copied = t.new("attn.qkv output, padded later", "activations", self._padded(3 * e * hN)) if self.pads else None
        self._drop_bias_copy("attn.qkv", saved)
        t.free(self._full_norm)
        kept |= self._attention_forward()
        self._weight_copy("attn.proj", self.h, self.h, kept)
        branch = t.new("attn.proj output", "activations", e * hN)
        self._drop_bias_copy("attn.proj", saved)
        branch = self._drop(branch, "attention", kept)
        kept["mid"] = t.new("residual after attention", "activations", self.r * hN)
        t.free(branch, copied)
        kept |= self._norm_forward("ln_2").rows
        self._weight_copy("mlp.fc", 4 * self.h, self.h, kept)
        kept["fc"] = t.new("mlp.fc output", "activations", 4 * e * hN)
        self._drop_bias_copy("mlp.fc", saved)
        t.free(self._full_norm)
        kept["gelu"] = t.new("gelu output", "activations", 4 * e * hN)
        self._weight_copy("mlp.proj", self.h, 4 * self.h, kept)
        return saved

    def _block_transient(self, x: Row, *, keep_input: bool = True) -> None:
        """A block's forward that keeps only its input (activation checkpointing's first pass), or not even that."""
        t, hN, e = self.tape, self.h * self.N, self.e
        normed = self._norm_transient("ln_1")
        qkv = self._linear_transient("attn.qkv", 3 * self.h, self.h)
        attended = self._attention_forward()
        t.free(*(row for name, row in attended.items() if name not in ("attention", "joined")))
        branch = self._linear_transient("attn.proj", self.h, self.h)
        t.free(qkv, normed, attended["attention"], attended.get("joined"))
        mid = t.new("residual after attention", "activations", self.r * hN)
        t.free(branch)
        normed = self._norm_transient("ln_2")
        fc = self._linear_transient("mlp.fc", 4 * self.h, self.h)
        gelu = t.new("gelu output", "activations", 4 * e * hN)
        t.free(fc)
        branch = self._linear_transient("mlp.proj", self.h, 4 * self.h)
        t.free(gelu, normed)
        t.alloc(x)
        t.free(branch, mid)
        if not keep_input:
            t.free_oldest(x)

    def _norm_forward(self, name: str) -> Saved:
        """LayerNorm keeps its input (counted by its producer), mean and 1/std; the linear after it keeps its output."""
        t, kept = self.tape, dict[str, Row]()
        if self.casts and not self.autocast:
            kept[f"{name}.w"] = t.new(f"{name} weight copy", "weights", self.e * self.h)
            if self.shape.bias:
                kept[f"{name}.b"] = t.new(f"{name} bias copy", "weights", self.e * self.h)
        if self.autocast and self.e != 4:
            # autocast normalises in float32; the copy that the next product takes is what stays
            self._full_norm = t.new(f"{name} output, float32", "temporaries", 4 * self.h * self.N)
        else:
            self._full_norm = None
            kept[name] = t.new(f"{name} output", "activations", self.e * self.h * self.N)
        kept[f"{name}.mean"] = t.new(f"{name} mean", "activations", self.stat * self.N)
        kept[f"{name}.rstd"] = t.new(f"{name} 1/std", "activations", self.stat * self.N)
        if self._full_norm is not None:
            kept[name] = t.new(f"{name} output", "activations", self.e * self.h * self.N)
        return Saved(kept)

    def _norm_transient(self, name: str) -> Row:
        rows = self._norm_forward(name)
        self.tape.free(*(row for key, row in rows.rows.items() if key != name))
        return rows.rows[name]

    def _weight_copy(self, name: str, n_out: Ints, n_in: Ints, kept: dict[str, Row]) -> None:
        if not self.casts:
            return
        if self.shape.bias:
            kept[f"{name}.b"] = self.tape.new(f"{name} bias copy", "weights", self.e * n_out)
        kept[f"{name}.w"] = self.tape.new(f"{name} weight copy", "weights", self.e * n_out * n_in)

    def _drop_bias_copy(self, name: str, saved: Saved) -> None:
        """addmm does not keep the bias for the backward; autocast's cache keeps the copies until its context ends."""
        self.tape.free(saved.rows.pop(f"{name}.b", None))

    def _linear_transient(self, name: str, n_out: Ints, n_in: Ints) -> Row:
        copies: dict[str, Row] = {}
        self._weight_copy(name, n_out, n_in, copies)
        out = self.tape.new(f"{name} output", "activations", self.e * n_out * self.N)
        self.tape.free(*copies.values())
        return out

    def _attention_forward(self) -> dict[str, Row]:
        t, s = self.tape, self.shape
        kept: dict[str, Row] = {}
        if self.pads:
            kept["padded"] = t.new("padded q, k, v", "activations", self._padded(self._wide), times=3)
            kept["padded out"] = t.new("padded attention output", "activations", self._padded(self._wide))
        out = self.e * self.h * self.N
        kept["attention"] = t.new("attention output", "activations", self._unpadded(out))
        if self.pads:
            kept["joined"] = t.new("attention output, joined", "activations", self._padded(out))
        rows = s.block_size
        if self.cuda and not self.step.half:
            rows = -(-rows // 32) * 32  # memory-efficient attention aligns its log-sum-exp to 32 (ATen attention.cu)
        kept["lse"] = t.new("attention log-sum-exp", "activations", 4 * s.n_head * self.step.batch_size * rows)
        if self.cuda:
            kept["rng"] = t.new("attention rng state", "activations", 16, times=2)
        return kept

    @property
    def pads(self) -> bool:
        """Whether any candidate's heads are padded: FlashAttention takes widths in multiples of 8, and nothing else.

        scaled_dot_product_attention then keeps padded copies of q, k, v and its output, and not qkv (ATen
        transformers/attention.cpp, pad_last_dim).
        """
        return self.cuda and self.step.half and bool(np.any(np.asarray(self.shape.head_dim) % 8 != 0))

    @property
    def _wide(self) -> Ints:
        """Bytes of one padded tensor of all heads."""
        return self.e * self.N * self.shape.n_head * (-(-self.shape.head_dim // 8) * 8)

    def _padded(self, n_bytes: Ints) -> Ints:
        """``n_bytes`` where heads are padded, 0 elsewhere."""
        return plain(np.where(np.asarray(self.shape.head_dim) % 8 != 0, n_bytes, 0))

    def _unpadded(self, n_bytes: Ints) -> Ints:
        """``n_bytes`` where heads are not padded, 0 elsewhere."""
        return n_bytes - self._padded(n_bytes) if self.pads else n_bytes

    # ---------------------------------------------------------------- evaluation

    def _evaluation(self) -> None:
        """Forward and loss without autograd: a block's input goes when its output is there, and nothing is kept.

        It is never the highest phase: the training step's forward and loss hold the same and more.
        """
        t = self.tape
        inputs = [t.new(name, "inputs", 8 * self.N) for name in ("tokens", "targets")]
        x = self._embedding_forward()
        with t.repeat(self.shape.n_layer):
            self._block_transient(x, keep_input=False)
        hidden = self._norm_transient("ln_f")
        t.free(x)
        self._loss_only()
        t.free(hidden, *inputs)

    # ---------------------------------------------------------------- backward

    def _norm_backward(
        self, name: str, saved: Saved, x: Row, *, first: bool = False, carried: Row | None = None
    ) -> Row:
        """Gradient of a norm's input. Frees the incoming gradient, the saved input ``x`` and the statistics."""
        t, hN = self.tape, self.h * self.N
        incoming = self._dhidden
        if self.autocast and self.e != 4:
            wide = t.new("gradient of a norm's output, float32", "temporaries", 4 * hN)
            t.free(incoming)
            incoming = wide
        if first:
            self._dx = t.row("gradient of the residual stream", "temporaries", self.r * hN)
        t.alloc(self._dx)
        parts = ["weight", "bias"] if self.shape.bias else ["weight"]
        cast = self.casts and not self.autocast
        small = [t.row(f"{name}.{p} gradient", "gradients", (self.e if cast else self.w) * self.h) for p in parts]
        t.alloc(*small)
        t.free(incoming, x, saved[f"{name}.w"], saved[f"{name}.b"], saved[f"{name}.mean"], saved[f"{name}.rstd"])
        if carried is not None:
            t.free_oldest(carried)
        for p, row in zip(parts, small, strict=True):
            self._parameter_gradient(f"{name}.{p}", row, self.h, cast)
        return self._dx

    def _parameter_gradient(self, name: str, fresh: Row, elements: Ints, cast: bool) -> None:
        """A new gradient is cast to float32 if needed, then becomes ``.grad`` or is added to it in place."""
        t = self.tape
        if cast:
            full = t.new(f"{name} gradient, float32", "gradients", 4 * elements)
            t.free(fresh)
            fresh = full
        if self.accumulates:
            t.join(fresh)

    def _linear_backward(self, name: str, n_out: Ints, n_in: Ints, saved: Saved, frees: list[Row | None]) -> Row:
        """Gradients of input, weight and bias of one linear; ``frees`` are tensors only it still held."""
        t, e = self.tape, self.e
        dw = t.row(f"{name}.weight gradient", "gradients", e * n_out * n_in)
        din = t.row(f"{name} input gradient", "temporaries", e * n_in * self.N)
        t.alloc(*([din, dw] if self.shape.bias else [dw, din]))
        db = t.new(f"{name}.bias gradient", "gradients", e * n_out) if self.shape.bias else None
        t.free(*frees, saved[f"{name}.w"])
        self._parameter_gradient(f"{name}.weight", dw, n_out * n_in, self.casts)
        if db is not None:
            self._parameter_gradient(f"{name}.bias", db, n_out, self.casts)
        return din

    def _blocks_backward(self, saved: Saved, x: Row, dx: Row) -> None:
        t = self.tape
        with t.repeat(self.shape.n_layer):
            if self.step.checkpointing == "block":
                t.phase = "block recompute"
                saved = self._block_saved()  # stops early: the last product is not repeated
                self._drop_bias_copy("mlp.proj", saved)
            t.phase = "block backward"
            branch = self._branch_gradient(saved["mlp.mask"])
            din = self._linear_backward("mlp.proj", self.h, 4 * self.h, saved, [saved["gelu"], branch])
            dfc = self._gelu_backward(din, saved)
            self._dhidden = self._linear_backward("mlp.fc", 4 * self.h, self.h, saved, [dfc, saved["ln_2"]])
            self._norm_backward("ln_2", saved, saved.rows["mid"], carried=dx)
            branch = self._branch_gradient(saved["attention.mask"])
            datt = self._linear_backward("attn.proj", self.h, self.h, saved, [branch, saved["joined"]])
            dqkv = self._attention_backward(saved, datt)
            self._dhidden = self._linear_backward("attn.qkv", 3 * self.h, self.h, saved, [dqkv, saved["ln_1"]])
            self._norm_backward("ln_1", saved, x, carried=dx)

    def _gelu_backward(self, din: Row, saved: Saved) -> Row:
        dfc = self.tape.new("gelu input gradient", "temporaries", 4 * self.e * self.h * self.N)
        self.tape.free(din, saved["fc"])
        return dfc

    def _branch_gradient(self, mask: Row | None = None) -> Row | None:
        """The branch's own gradient: a narrow copy where the residual stream is wider, and another behind a dropout."""
        t, size = self.tape, self.e * self.h * self.N
        narrow = t.new("gradient of a branch", "temporaries", size) if self.r != self.e else None
        if mask is None:
            return narrow
        dropped = t.new("gradient of a branch before dropout", "temporaries", size)
        t.free(narrow, mask)
        return dropped

    def _attention_backward(self, saved: Saved, datt: Row) -> Row:
        t, s, e, hN = self.tape, self.shape, self.e, self.h * self.N
        wide: list[Row] = []
        if self.pads:
            size = self._padded(self._wide)
            wide = [t.row(f"gradient of padded {part}", "temporaries", size) for part in ("out", *"qkv")]
            t.alloc(wide[0])
            t.free(datt)
            datt = t.new("gradient of the attention output", "temporaries", self._unpadded(e * hN))
            t.alloc(*wide[1:])
        grads = [t.new(f"gradient of {part}", "temporaries", self._unpadded(e * hN)) for part in "qkv"]
        kernel: list[Row] = []
        if self.cuda and self.step.half:
            # FlashAttention-2 accumulates dq in float32, rows rounded to 128 and widths to 32 (flash_api.cpp, mha_bwd)
            rows = -(-s.block_size // 128) * 128 * self.step.batch_size * s.n_head
            width = -(-s.head_dim // 32) * 32
            kernel = [
                t.new("float32 accumulator of dq (kernel)", "temporaries", 4 * rows * width),
                t.new("softmax sums of dq (kernel)", "temporaries", 4 * rows),
            ]
        elif self.cuda:
            kernel = [t.new("attention delta (kernel)", "temporaries", 4 * s.n_head * self.N)]
        t.free(*kernel, datt, saved["qkv"], saved["lse"], saved["rng"], saved["padded"], saved["padded out"])
        t.free(saved["attention"], *wide[:1])
        wide = self._cut(wide[1:])
        dqkv = t.new("gradient of qkv", "temporaries", 3 * e * hN)
        t.free(*grads, *wide)
        return dqkv

    def _cut(self, padded: list[Row]) -> list[Row]:
        """The gradients of q, k and v without their padding: cut out one by one, then made contiguous one by one."""
        t = self.tape
        for how in ("cut", "contiguous"):
            fresh = []
            for part, old in zip("qkv", padded, strict=False):
                size = self._padded(self.e * self.h * self.N)
                fresh.append(t.new(f"gradient of {part}, {how}", "temporaries", size))
                t.free(old)
            padded = fresh
        return padded

    def _embedding_backward(self, dx: Row, head_grad: Row | None) -> None:
        t, h, s, w = self.tape, self.h, self.shape, self.w
        if self.r != w:
            wide = t.new("gradient of the embeddings, float32", "temporaries", w * h * self.N)
            t.free(dx)
            dx = wide
        if self._embedding_mask is not None:
            before = t.new("gradient of the embeddings before dropout", "temporaries", w * h * self.N)
            t.free(dx, self._embedding_mask)
            dx = before
        summed = t.new("position gradient, summed", "gradients", w * h * s.block_size)
        wpe = t.new("wpe gradient", "gradients", w * h * s.block_size)
        t.free(summed)
        if self.accumulates:
            t.join(wpe)
        wte = t.new("wte gradient", "gradients", w * s.vocab_size * h)
        t.free(dx)
        if head_grad is not None:
            t.free(head_grad)  # added in place to the tensor that waited
        if self.accumulates:
            t.join(wte)
