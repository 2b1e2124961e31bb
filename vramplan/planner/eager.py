"""The tensor table of one eager training step, for our trainer and for the three scripts.

It is the model's forward once more, in symbols: the same calls, the same names alive for the same time. The backward
follows from it (:mod:`autograd`). What each operation takes is in :mod:`operations`, the loss in :mod:`loss_rows`, what
outlives a micro-step in :mod:`state_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .autograd import Memory, Node, Tensor
from .loss_rows import LossRows
from .shape import Ints
from .state_rows import plain
from .tape import Tape

Operation = Callable[[Tensor], Tensor]

LIKE_ALL_FURTHER = 3
"""Layers of an evaluation that are listed: where nothing is kept, the next ones take and return the same blocks."""


class EagerStep(LossRows):
    """Writes the table of one optimizer step of ``shape`` under ``step`` onto a tape."""

    early = False
    """Whether a buffer goes after its last use, and not when the function that named it returns."""

    def write(self, *, evaluation: bool = True) -> Tape:
        """Persistent state, an evaluation, one micro-step (a later one when accumulating), the optimizer's update."""
        t = self.tape
        t.phase = "persistent"
        self._persistent()
        self._kept_gradients()
        if evaluation and not self.script:
            t.phase = "evaluation"
            with self.unrecorded():
                self._evaluation()
            t.phase = "checkpoint save"
            self._save()
        self.kept_gradients = []
        batch = self._micro_step()
        t.phase = "optimizer step"
        self._optimizer()
        del batch
        t.close()
        return t

    def _micro_step(self) -> Memory:
        """Forward and backward; the batch, which is still there during the update."""
        t = self.tape
        t.phase = "forward"
        if self.autocast:  # the loop's name still holds the previous micro-step's while the next forward runs
            self.caller_logits = self.logits_rows("logits of the previous micro-step", self.e, self.N)
        batch = self._batch()
        self.wte = self.leaf()
        self.head = self.wte if self.shape.tied else self.leaf()
        x = self._embedding()
        outside = self.taken()
        with t.repeat(self.shape.n_layer):
            x = self.layer(x)
        blocks = self.taken()
        normed = self.norm("ln_f", x)
        hidden = self.half("ln_f", normed)
        if self.autocast:
            self.locals = [*self.locals, normed.memory]
        del x, normed
        t.phase = "loss forward"
        loss = self.loss(hidden)
        if not self.loss_outside:
            self.leave_forward()
        del hidden
        if self.step.workload == "nanogpt":
            batch += self._batch("next ")
        t.phase = "loss backward"
        self._backward(loss, self.taken())
        del loss
        self.in_blocks(blocks)
        t.phase = "embedding backward"
        self.run(outside)
        self._returned()
        return batch

    def _backward(self, loss: Tensor, nodes: list[Node]) -> None:
        self.begin_backward(loss, ())
        self.run(nodes)

    def in_blocks(self, blocks: list[Node]) -> None:
        """The backward of every block."""
        self.tape.phase = "block backward"
        with self.tape.repeat(self.shape.n_layer):
            self.run(blocks)

    def _returned(self) -> None:
        """The backward is over."""

    def _batch(self, which: str = "") -> Memory:
        return tuple(s for name in ("tokens", "targets") for s in self.new(which + name, "inputs", 8 * self.N))

    # ---------------------------------------------------------------- embedding

    def _embedding(self) -> Tensor:
        """Token embeddings, with learned positions, in the residual stream's dtype."""
        if self.script:
            return self._script_embedding()
        x = self._looked_up(
            "block input" if self.shape.positions == "rotary" and self.r == self.w else "token embeddings"
        )
        if self.shape.positions == "learned":
            x = self._with_positions(x, "block input" if self.r == self.w else "embeddings with positions")
        return x if self.r == self.w else self._narrowed(x)

    def _script_embedding(self) -> Tensor:
        """nanoGPT's names tok_emb and pos_emb live until its forward returns."""
        h, s, w = self.h, self.shape, self.w
        tokens = self._looked_up("token embeddings")
        self.locals = [tokens.memory, self.new("position embeddings", "activations", w * h * s.block_size)]
        self.locals.append(self.new("position ids", "inputs", 8 * s.block_size))
        x = self._with_positions(tokens, "embeddings with positions" if self.dropout else "block input")
        return self.drop("block input", x, w)

    def _looked_up(self, name: str) -> Tensor:
        size = self.w * self.h * self.N

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new("wte gradient", "gradients", self.w * self.V * self.h)]

        return self.result(self.new(name, "activations", size), [self.wte], backward)

    def _with_positions(self, x: Tensor, name: str) -> Tensor:
        size = self.w * self.h * self.shape.block_size

        def sliced(_: Memory) -> Sequence[Memory]:
            return [self.new("wpe gradient", "gradients", size)]

        def backward(grad: Memory) -> Sequence[Memory]:
            return [grad, self.new("position gradient, summed", "gradients", size)]

        positions = self.result((), [self.leaf()], sliced)
        return self.result(self.new(name, "activations", self.w * self.h * self.N), [x, positions], backward)

    def _narrowed(self, x: Tensor) -> Tensor:
        def backward(_: Memory) -> Sequence[Memory]:
            return [self.new("gradient of the embeddings, float32", "temporaries", 4 * self.h * self.N)]

        return self.result(self.new("block input", "activations", self.r * self.h * self.N), [x], backward)

    # ---------------------------------------------------------------- blocks

    def layer(self, x: Tensor) -> Tensor:
        """One block, as checkpointing has it."""
        return self._checkpointed(x) if self.step.checkpointing == "block" else self.block(x)

    def block(self, x: Tensor) -> Tensor:
        """Pre-norm transformer block."""
        (row,) = (storage.row for storage in x.memory)
        mid = self.residual(x, self.drop("attention branch", self.attend(self._qkv(x)), self.e))
        del x
        return self.residual(mid, self.drop("mlp branch", self.mlp(mid), self.e), row)

    def _qkv(self, x: Tensor) -> Tensor:
        return self._normed_project("ln_1", "attn.qkv", x, self.shape.qkv_width)

    def attend(self, qkv: Tensor) -> Tensor:
        """Causal self-attention."""
        s = self.shape
        q, k, v = self.split(qkv)
        if self.early:
            del qkv
        if s.qk_norm:
            q = self._rms_norm("q", q, self.h, weighted=False, rows=self.N * s.n_head)
            k = self._rms_norm("k", k, s.kv_width, weighted=False, rows=self.N * (s.kv_width // s.head_dim))
        if s.positions == "rotary":
            q, k = self.rotate("q", q, self.h), self.rotate("k", k, s.kv_width)
        y = self.attention(q, k, v)
        if self.early:
            del q, k, v
        return self.linear("attn.proj", y, self.h, self.h)

    def mlp(self, x: Tensor) -> Tensor:
        """Two matrices and an activation function between them."""
        s = self.shape
        return self._project(
            self.activation, "mlp.proj", lambda y: y,
            self._normed_project("ln_2", "mlp.fc", x, s.fc_width), self.h, s.mlp_width,
        )  # fmt: skip

    def _normed_project(self, norm: str, name: str, x: Tensor, n_out: Ints) -> Tensor:
        """Our norm returns what products take; under autocast the product makes the copy, beside the norm's output."""
        if self.autocast:
            before, cast = (lambda x: self.norm(norm, x)), (lambda y: self.half(norm, y))
        else:
            before, cast = (lambda x: self.half(norm, self.norm(norm, x))), (lambda y: y)
        return self._project(before, name, cast, x, n_out, self.h)

    def _project(self, before: Operation, name: str, cast: Operation, x: Tensor, n_out: Ints, n_in: Ints) -> Tensor:
        """A linear layer of ``before(x)``. Selective checkpointing keeps ``x`` only; the product is not repeated."""
        if self.step.checkpointing == "selective" and self.recording and not self.stop_at:
            return self.recomputed(lambda x: self.linear(name, before(x), n_out, n_in), x, name)
        y = before(x)
        if self.early:
            del x
        return self.linear(name, cast(y), n_out, n_in)

    def _checkpointed(self, x: Tensor) -> Tensor:
        """Keeps the block's input only."""
        return self.recomputed(self.block, x, "mlp.proj", "block recompute")

    def recomputed(self, function: Operation, x: Tensor, last: str, phase: str = "") -> Tensor:
        """``function(x)`` of which only ``x`` is kept; the backward runs it again, up to the product ``last``."""
        with self.unrecorded():
            y = function(x)
        again = [x.memory]

        def backward(grads: list[Memory]) -> Sequence[Memory]:
            before, backward_phase = self.taken(), self.tape.phase
            self.tape.phase = phase or backward_phase
            if phase and self.r != self.e:  # the block's last sum needs nothing recomputed, and comes first
                self.branch_gradient = self.new_branch_gradient()
            self.stop_at = last
            given = Node([], self._nothing, [], [()])
            y = function(Tensor(again.pop(), given, 0))
            self.stop_at = ""
            nodes, self.nodes = self.nodes, before
            self.tape.phase = backward_phase
            self.begin_backward(y, grads.pop())
            del y
            self.run(nodes)
            return given.grads

        out = self.result(y.memory, [x], backward)
        if isinstance(out.source, Node):
            out.source.consumes = True
        return out

    @staticmethod
    def _nothing(*_: Memory) -> Sequence[Memory]:
        return []

    # ---------------------------------------------------------------- besides training

    def _save(self) -> None:
        """Whether every weight is a number is asked of its sum; then tensors go to the host one by one.

        Resuming takes nothing on the card that the run does not keep: it is read into host memory.
        """
        sums = []
        for copies, tensors in self._parameters:
            with self.tape.repeat(copies):
                sums.append(self.new("sum of a weight", "temporaries", 4, times=len(tensors)))
        for copies, _ in self._parameters:
            with self.tape.repeat(copies):
                del sums[0]

    def _evaluation(self) -> None:
        """Forward and loss without autograd: a block's input goes when its output is there, and nothing is kept.

        It is never the highest phase: the training step's forward and loss hold the same and more.
        """
        batch = self._batch()
        self.wte = self.leaf()
        self.head = self.wte if self.shape.tied else self.leaf()
        stream = [self._embedding()]
        with self.tape.repeat(plain(np.minimum(self.shape.n_layer, LIKE_ALL_FURTHER))):
            held = None if self.early else stream[0]
            stream.append(self.block(stream.pop()))
            del held
        hidden = self.half("ln_f", self.norm("ln_f", stream[0]))
        del stream
        self.evaluation_loss(hidden)
        del hidden, batch
