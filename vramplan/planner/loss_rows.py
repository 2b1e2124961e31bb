"""The loss in the tensor table: full or chunked, in our trainer and in the scripts; eager."""

from __future__ import annotations

import numpy as np

from .state_rows import Saved, StateRows, plain
from .tape import Row


class LossRows(StateRows):
    """Writes the rows of the loss; leaves the gradient of the hidden state in ``_dhidden``."""

    _dhidden: Row

    def _loss_forward(self) -> Saved:
        return self._chunked_loss() if self.step.loss == "chunked" else self._full_loss()

    def _full_loss(self) -> Saved:
        t, VN = self.tape, self.V * self.N
        kept: dict[str, Row] = {}
        if self.casts:
            kept["head.w"] = t.new("head weight copy", "weights", 2 * self.V * self.h)
        logits = t.new("logits", "logits_and_loss", self.e * VN)
        if self.loss_outside:
            self._leave_forward()
        if self.autocast:
            kept["logits"] = logits
        if self.e == self.w:
            kept["logp"] = t.new("log-probabilities", "logits_and_loss", self.e * VN)
        elif self.step.workload == "nanogpt":
            # under CUDA autocast log_softmax runs in half precision and nll_loss on a float32 copy that it keeps
            kept["logp"] = t.new("log-probabilities", "logits_and_loss", 2 * VN)
            kept["logp32"] = t.new("log-probabilities, float32", "logits_and_loss", 4 * VN)
        else:
            upcast = t.new("logits, float32", "logits_and_loss", 4 * VN)
            if not self.autocast:
                t.free(logits)
            kept["logp"] = t.new("log-probabilities", "logits_and_loss", 4 * VN)
            t.free(upcast)
        if self.e == self.w and not self.autocast:
            t.free(logits)
        kept["scalars"] = t.new("loss scalars", "logits_and_loss", 4, times=3)
        return Saved(kept)

    def _chunked_loss(self) -> Saved:
        """Gradients of hidden state and head are formed here, slice by slice (trainer.loss)."""
        t, h, V = self.tape, self.h, self.V
        c = plain(np.minimum(self.step.loss_chunk_tokens, self.N))
        slices = -(-self.N // c)
        copy = t.new("head weight copy", "weights", 2 * V * h) if self.e == 2 else None
        kept = {
            "grad_x": t.new("gradient of the hidden state", "gradients", self.e * h * self.N),
            "grad_head": t.new("gradient of the head", "gradients", 4 * V * h),
            "scalars": t.new("loss scalars", "logits_and_loss", 4, times=3),
        }
        with t.repeat(slices):
            logits = t.new("logits of a slice", "logits_and_loss", self.e * V * c)
            if self.e == 2:
                scores = t.new("probabilities of a slice, float32", "logits_and_loss", 4 * V * c)
                t.free(logits)
            vectors = t.new("per-token target score, maximum and sum", "temporaries", 4 * c, times=3)
            t.free(t.new("per-token logarithms", "temporaries", 4 * c, times=2))
            if self.e == 2:
                grad = t.new("gradient of a slice's logits", "logits_and_loss", 2 * V * c)
                t.free(scores, vectors)
                product = t.new("head gradient of a slice", "temporaries", 2 * V * h)
                t.free(product, grad)
            else:
                t.free(vectors, logits)
        t.free(copy)
        return Saved(kept)

    def _loss_only(self) -> None:
        """The loss of an evaluation: all logits at once, or slices half as long as training's, worked on in place."""
        t, V = self.tape, self.V
        c = self.N if self.step.loss == "full" else -(-plain(np.minimum(self.step.loss_chunk_tokens, self.N)) // 2)
        scalars = t.new("loss scalars", "logits_and_loss", 4, times=3)
        copy = t.new("head weight copy", "weights", 2 * V * self.h) if self.e == 2 else None
        with t.repeat(-(-self.N // c)):
            logits = t.new("evaluation logits", "logits_and_loss", self.e * V * c)
            if self.step.loss == "full":
                t.free(copy)
            if self.e == 2:
                scores = t.new("evaluation logits, float32", "logits_and_loss", 4 * V * c)
                t.free(logits)
                logits = scores
            if self.step.loss == "full":
                t.free(t.new("evaluation log-probabilities", "logits_and_loss", 4 * V * c))
            else:
                t.free(t.new("per-token target score, maximum and sum", "temporaries", 4 * c, times=4))
            t.free(logits)
        if self.step.loss == "chunked":
            t.free(copy)
        t.free(scalars)

    def _loss_backward(self, loss: Saved) -> Row | None:
        """Leaves the gradient of the hidden state alive; returns the head's gradient when it must wait (tied)."""
        t, VN = self.tape, self.V * self.N
        if self.step.loss == "chunked":
            t.free(loss["scalars"])
            self._dhidden = loss.rows["grad_x"]
            return self._head_gradient(loss.rows["grad_head"])
        wide = self.e if self.e == self.w else 4
        dlogp = t.new("gradient of the log-probabilities", "logits_and_loss", wide * VN)
        t.free(loss["scalars"], loss["logp32"])
        if loss["logp32"] is not None:
            half = t.new("gradient of the log-probabilities, half", "logits_and_loss", 2 * VN)
            t.free(dlogp)
            dlogp = half
        width = 2 if loss["logp32"] is not None else wide
        dlogits = t.new("gradient of the logits", "logits_and_loss", width * VN)
        t.free(dlogp, loss["logp"])
        if self.e < width:
            half = t.new("gradient of the logits, half", "logits_and_loss", 2 * VN)
            t.free(dlogits)
            dlogits = half
        dw = t.new("gradient of the head", "gradients", self.e * self.V * self.h)
        self._dhidden = t.new("gradient of the hidden state", "temporaries", self.e * self.h * self.N)
        t.free(dlogits, loss["head.w"])
        if self.casts:
            full = t.new("gradient of the head, float32", "gradients", 4 * self.V * self.h)
            t.free(dw)
            dw = full
        return self._head_gradient(dw)

    def _head_gradient(self, dw: Row) -> Row | None:
        """Tied: waits in autograd's input buffer for the embedding's share. Untied: becomes or joins ``.grad``."""
        if self.shape.tied:
            return dw
        if self.accumulates:
            self.tape.join(dw)
        return None
