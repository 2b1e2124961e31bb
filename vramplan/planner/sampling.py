"""The tensor table of sampling: weights, the cache of keys and values, the prompt in one pass, then token by token."""

from __future__ import annotations

from dataclasses import replace

from .attention import Kernel
from .autograd import Tensor
from .eager import EagerStep
from .shape import Ints, Shape
from .step import StepConfig
from .tape import Tape


class Sampling(EagerStep):
    """Writes the table of ``batch_size`` sequences being continued after prompts of ``prompt`` tokens each."""

    def __init__(
        self, shape: Shape, step: StepConfig, prompt: Ints, workspace_bytes: int = 0, kernel: Kernel = "flash"
    ) -> None:
        plain = replace(step, compile=False, checkpointing="none", grad_accum=1, workload="vramplan")
        super().__init__(shape, plain, workspace_bytes, kernel)
        self.prompt = prompt

    def write(self, *, evaluation: bool = True) -> Tape:
        """Weights and cache as ``persistent``; phases ``prompt`` and ``next token``."""
        t, s, batch = self.tape, self.shape, self.step.batch_size
        t.phase = "persistent"
        if self.workspace_bytes:
            t.new("cuBLAS workspace", "workspace", self.workspace_bytes)
        self._weights()
        self._rotary_tables()
        with t.repeat(s.n_layer):
            t.new("cache of keys and values", "activations", self.e * batch * s.block_size * s.kv_width, times=2)
        with self.unrecorded():
            for phase, tokens in (("prompt", self.prompt), ("next token", 1)):
                t.phase = phase
                self.N = batch * tokens
                self._one_pass(batch)
        t.close()
        return t

    def _one_pass(self, batch: Ints) -> None:
        tokens = self.new("tokens", "inputs", 8 * self.N)
        self.wte = self.leaf()
        stream: list[Tensor] = [self._embedding()]
        with self.tape.repeat(self.shape.n_layer):
            held = stream[0]
            stream.append(self.block(stream.pop()))
            del held
        hidden = self.half("ln_f", self.norm("ln_f", stream[0]))
        del stream
        copy = self.head_copy()
        logits = self.new("logits of the last position", "logits_and_loss", self.e * batch * self.V)
        del copy
        if self.e == 2:
            logits = self.new("logits of the last position, float32", "logits_and_loss", 4 * batch * self.V)
        if self.shape.logit_softcap:
            logits = self.new("capped logits", "logits_and_loss", 4 * batch * self.V)
        del tokens, hidden, logits
