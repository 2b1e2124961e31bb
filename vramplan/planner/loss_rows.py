"""The loss in the tensor table: full or chunked, in our trainer and in the scripts; eager."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .autograd import Memory, Tensor
from .operations import Operations
from .shape import Ints
from .state_rows import plain


class LossRows(Operations):
    """From the hidden state (the last norm's output) to the loss."""

    head: Tensor
    model_logits: Memory = ()
    caller_logits: Memory = ()
    """What the loop's own name holds, until it is bound anew."""
    locals: Sequence[Memory] = ()
    """What the model's names hold until its forward returns."""

    def logits_rows(self, name: str, width: int, tokens: Ints) -> Memory:
        """A tensor of ``tokens`` x vocabulary, ``width`` bytes each."""
        return self.new(name, "logits_and_loss", width * self.V * tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's product; keeps the hidden state and the head's half-precision copy."""
        w = self.cast("head.weight", self.V * self.h, self.head)

        def backward(_: Memory) -> Sequence[Memory]:
            dw = self.new("gradient of the head", "gradients", self.e * self.V * self.h)
            return [self.new("gradient of the hidden state", "temporaries", self.e * self.h * self.N), dw]

        return self.result(self.logits_rows("logits", self.e, self.N), [hidden, w], backward, [hidden.memory, w.memory])

    def loss(self, hidden: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return self._chunked_loss(hidden) if self.step.loss == "chunked" else self._full_loss(hidden)

    def _full_loss(self, hidden: Tensor) -> Tensor:
        scores = self.logits(hidden)
        if self.autocast:
            self.model_logits = scores.memory
        if self.loss_outside:
            self.leave_forward()
        if self.upcasts:
            scores = self._upcast(scores)
        scores = self._capped(scores)
        return self._cross_entropy(scores)

    def leave_forward(self) -> None:
        """The model's locals go, and the caller's name is bound to the new logits."""
        self.locals, self.caller_logits, self.model_logits = (), self.model_logits, ()

    @property
    def upcasts(self) -> bool:
        """Whether a float32 copy of half-precision logits goes into the loss."""
        return self.e == 2 and self.step.workload in ("vramplan", "autocast")

    def _upcast(self, logits: Tensor) -> Tensor:
        def backward(_: Memory) -> Sequence[Memory]:
            return [self.logits_rows("gradient of the logits, half", 2, self.N)]

        return self.result(self.logits_rows("logits, float32", 4, self.N), [logits], backward)

    def _capped(self, scores: Tensor) -> Tensor:
        """The soft limit keeps its output (``trainer.pointwise``)."""
        if not self.shape.logit_softcap:
            return scores
        out = self.logits_rows("capped logits", 4, self.N)

        def backward(_: Memory) -> Sequence[Memory]:
            return [self.logits_rows("gradient of the logits before their cap", 4, self.N)]

        return self.result(out, [scores], backward, [out])

    def _cross_entropy(self, scores: Tensor) -> Tensor:
        """log_softmax and nll_loss; each keeps log-probabilities.

        Under CUDA autocast log_softmax runs in half precision, and nll_loss on a float32 copy (nanoGPT).
        """
        width = 4 if self.upcasts else self.e
        logp = self.logits_rows("log-probabilities", width, self.N)

        def through_softmax(_: Memory) -> Sequence[Memory]:
            return [self.logits_rows("gradient of the logits", width, self.N)]

        def narrowed(_: Memory) -> Sequence[Memory]:
            return [self.logits_rows("gradient of the log-probabilities, half", 2, self.N)]

        picked = self.result(logp, [scores], through_softmax, [logp])
        if self.casts and width == 2:
            wide = self.logits_rows("log-probabilities, float32", 4, self.N)
            picked = self.result(wide, [picked], narrowed)
            width = 4
        scalars = self.new("loss scalars", "logits_and_loss", 4, times=3)

        def chosen(_: Memory) -> Sequence[Memory]:
            return [self.logits_rows("gradient of the log-probabilities", width, self.N)]

        return self.result(scalars, [picked], chosen, [picked.memory, scalars])

    # ---------------------------------------------------------------- in slices

    def _chunked_loss(self, hidden: Tensor) -> Tensor:
        """Gradients of hidden state and head are formed here, slice by slice (``trainer.loss``)."""
        h, V = self.h, self.V
        c = plain(np.minimum(self.step.loss_chunk_tokens, self.N))
        copy = self.head_copy()
        grads = (
            self.new("gradient of the hidden state", "gradients", self.e * h * self.N),
            self.new("gradient of the head", "gradients", 4 * V * h),
        )
        scalars = self.new("loss scalars", "logits_and_loss", 4, times=3)
        with self.tape.repeat(-(-self.N // c)):
            self._slice(c)
        del copy
        if self.w == 2:
            grads = (grads[0], self.new("gradient of the head, half", "gradients", 2 * V * h))
        return self.result(scalars, [hidden, self.head], lambda _: grads, [scalars])

    def head_copy(self) -> Memory:
        """The head's weight in half precision, made without a gradient."""
        return self.new("head.weight copy", "weights", 2 * self.V * self.h) if self.casts else ()

    def _slice(self, c: Ints) -> None:
        """Logits of ``c`` tokens, their gradient, and its products with the weight and the hidden state."""
        scores = self.logits_rows("logits of a slice", self.e, c)
        if self.e == 2:
            scores = self.logits_rows("probabilities of a slice, float32", 4, c)
        slope = self.logits_rows("slope of a slice's cap", 4, c) if self.shape.logit_softcap else ()
        vectors = self.new("per-token target score, maximum and sum", "temporaries", 4 * c, times=3)
        logarithms = self.new("per-token logarithms", "temporaries", 4 * c, times=2)
        del logarithms, slope
        if self.e == 2:
            grad = self.logits_rows("gradient of a slice's logits", 2, c)
            del scores, vectors
            product = self.new("head gradient of a slice", "temporaries", 2 * self.V * self.h)
            del product, grad

    def evaluation_loss(self, hidden: Tensor) -> None:
        """The loss of an evaluation: all logits at once, or slices half as long as training's, worked on in place."""
        scalars = self.new("loss scalars", "logits_and_loss", 4, times=3)
        if self.step.loss == "full":
            loss = self._full_loss(hidden)
            del loss
        else:
            c = -(-plain(np.minimum(self.step.loss_chunk_tokens, self.N)) // 2)
            copy = self.head_copy()
            with self.tape.repeat(-(-self.N // c)):
                scores = self.logits_rows("evaluation logits", self.e, c)
                if self.e == 2:
                    scores = self.logits_rows("evaluation logits, float32", 4, c)
                vectors = self.new("per-token target score, maximum and sum", "temporaries", 4 * c, times=4)
                del vectors, scores
            del copy
        del scalars
