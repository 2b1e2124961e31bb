"""The other people's scripts that the planner knows, as real loops: what ``workload`` means, in code that runs.

A GPT of GPT-2's layout from torch's own modules, and one optimizer step of it as nanoGPT's ``train.py`` runs it, as the
usual hand-written autocast loop does, and as a loop does that has everything in one dtype. What each keeps alive
(names in the caller's scope, the batch fetched ahead) is part of what is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..planner.shape import Shape
from ..planner.step import StepConfig
from ..trainer.model import DTYPES

Draw = Callable[[], tuple[Tensor, Tensor]]
"""Gives the next micro-batch: (B, T) int64 tokens and targets on the device."""


class ScriptBlock(nn.Module):
    """Pre-norm block with fused causal attention."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        h, self.n_head, self.dropout = shape.n_embd, shape.n_head, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(h, bias=shape.bias), nn.LayerNorm(h, bias=shape.bias)
        self.qkv, self.attn_out = nn.Linear(h, 3 * h, bias=shape.bias), nn.Linear(h, h, bias=shape.bias)
        self.fc, self.mlp_out = nn.Linear(h, 4 * h, bias=shape.bias), nn.Linear(4 * h, h, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, h) -> (B, T, h)."""
        x = x + self._drop(self.attn_out(self._attend(self.qkv(self.ln_1(x)))))
        return x + self._drop(self.mlp_out(F.gelu(self.fc(self.ln_2(x)))))

    def _attend(self, qkv: Tensor) -> Tensor:
        B, T, width = qkv.shape
        q, k, v = (p.view(B, T, self.n_head, -1).transpose(1, 2) for p in torch.split(qkv, width // 3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return y.transpose(1, 2).reshape(B, T, width // 3)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class ScriptGPT(nn.Module):
    """Token and learned position embeddings, blocks, a final norm, a head that is tied or not."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.wte, self.wpe = nn.Embedding(shape.vocab_size, shape.n_embd), nn.Embedding(shape.block_size, shape.n_embd)
        self.blocks = nn.ModuleList(ScriptBlock(shape, dropout) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0.0, 0.02)
        if shape.tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, T) tokens -> (B, T, V) logits, and with targets the mean loss."""
        tok_emb = self.wte(tokens)
        pos_emb = self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        x = tok_emb + pos_emb
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        logits = self.head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class ScriptLoop:
    """Model, optimizer and what the script's own scope keeps from one step to the next."""

    def __init__(self, shape: Shape, step: StepConfig, device: torch.device) -> None:
        self.shape, self.step, self.device = shape, step, device
        plain, fused = step.workload == "plain", step.optimizer == "adamw-fused"
        with device, default_dtype(DTYPES[step.dtype] if plain else torch.float32):
            self.model = ScriptGPT(shape, step.dropout)
        self.optimizer = torch.optim.AdamW(self._groups(), lr=1e-3, fused=fused, foreach=not fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=step.dtype == "float16" and not plain)
        self.call: Any = torch.compile(self.model, dynamic=False) if step.compile else self.model
        self.kept: dict[str, Any] = {}

    def _groups(self) -> list[dict[str, Any]]:
        parameters = list(self.model.parameters())
        if self.step.workload != "nanogpt":
            return [{"params": parameters}]
        matrices = [p for p in parameters if p.dim() >= 2]
        return [{"params": matrices, "weight_decay": 0.1},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.step.workload == "plain" or self.step.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.step.dtype])

    def run(self, draw: Draw) -> None:
        """One optimizer step."""
        {"nanogpt": self._nanogpt, "autocast": self._handwritten, "plain": self._plain}[self.step.workload](draw)

    def _nanogpt(self, draw: Draw) -> None:
        kept = self.kept
        if "x" not in kept:
            kept["x"], kept["y"] = draw()
        for _ in range(self.step.grad_accum):
            with self._autocast():
                kept["logits"], loss = self.call(kept["x"], kept["y"])
                loss = loss / self.step.grad_accum
            kept["x"], kept["y"] = draw()  # fetched while the GPU computes
            self.scaler.scale(loss).backward()
        self._update()

    def _handwritten(self, draw: Draw) -> None:
        kept = self.kept
        for _ in range(self.step.grad_accum):
            x, y = draw()
            with self._autocast():
                kept["logits"], _ = self.call(x)
                loss = F.cross_entropy(kept["logits"].float().flatten(0, 1), y.flatten()) / self.step.grad_accum
            self.scaler.scale(loss).backward()
        self._update()

    def _plain(self, draw: Draw) -> None:
        for _ in range(self.step.grad_accum):
            x, y = draw()
            (self._loss(x, y) / self.step.grad_accum).backward()
        self._update()

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits, _ = self.call(x)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def _update(self) -> None:
        if self.step.workload == "nanogpt":
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors made within the block have ``dtype`` unless they say otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
