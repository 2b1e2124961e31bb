"""One optimizer step: micro-batches forward and backward, clip, update. The unit that the planner prices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from ..planner.step import StepConfig
from .loss import next_token_loss
from .model import GPT
from .optimizer import ALLOCATES_NOTHING, InBackward, allocate_states, reset_counts

MicroBatches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Mean loss over the step's micro-batches, and the global gradient norm before clipping."""

    loss: float
    grad_norm: float


def _compiled(model: GPT) -> Callable[[Tensor, Tensor], Tensor]:
    """Compile the whole model, or with the chunked loss only the transformer.

    A graph over the loss's slices would save each slice's product for the head's gradient until the backward. Never
    dynamic: a short evaluation batch would turn the training graph into one of unknown sizes; it gets a graph of its
    own instead.
    """
    if model.step.loss == "full":
        whole: Callable[[Tensor, Tensor], Tensor] = torch.compile(model, dynamic=False)
        return whole
    hidden = torch.compile(model.hidden, dynamic=False)
    cap = model.shape.logit_softcap
    return lambda tokens, targets: next_token_loss(hidden(tokens), model.head, targets, model.step, cap)


class TrainStep:
    """Runs whole optimizer steps of ``model`` with ``optimizer``, as ``step`` says.

    float16 uses dynamic loss scaling; a step whose gradients overflow is skipped by the scaler and its scale halved.
    Between steps gradients are ``None``, or with accumulation zero: they would be alive at the peak in any case, and in
    their old place they leave no holes behind.

    ``on_phase`` is told when a step goes over to its forward, backward or optimizer step.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        step: StepConfig,
        *,
        grad_clip: float,
        device: torch.device,
    ) -> None:
        self.model, self.optimizer, self.step = model, optimizer, step
        self.grad_clip, self.device = grad_clip, device
        torch.set_float32_matmul_precision("high" if step.dtype == "tf32" else "highest")
        torch.backends.cuda.enable_cudnn_sdp(False)  # torch prefers it on some cards, and it was not planned for
        self.scaler = torch.amp.GradScaler(device.type, enabled=step.dtype == "float16")
        self.applying = self._allocated = False
        self.on_phase: Callable[[str], None] = lambda phase: None
        self._forward: Callable[[Tensor, Tensor], Tensor] = _compiled(model) if step.compile else model

    def resplit(self, batch_size: int, grad_accum: int) -> None:
        """Accumulate over another number of micro-batches from the next step on."""
        self.step = replace(self.step, batch_size=batch_size, grad_accum=grad_accum)
        self._allocated = False

    def run_compiled(self) -> None:
        """Compile from the next step on."""
        self._set_compile(True)
        self._forward = _compiled(self.model)

    def run_eagerly(self) -> None:
        """Compile no more, and let go of what was compiled."""
        self._set_compile(False)
        self._forward = self.model
        torch.compiler.reset()

    def _set_compile(self, compile: bool) -> None:
        self.step = replace(self.step, compile=compile)
        self.model.step = replace(self.model.step, compile=compile)

    def forget(self) -> None:
        """Drop what a step that failed has left: its gradients, and what the scaler noted about them.

        Takes no memory: gradients that accumulate are set to zero where they are.
        """
        self.optimizer.zero_grad(set_to_none=self.step.grad_accum == 1)
        self._new_scaler(self.scaler_state())

    def _new_scaler(self, state: dict[str, Any]) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.step.dtype == "float16")
        self.load_scaler_state(state)

    def rehearse_update(self) -> None:
        """Take the memory of an update once, before the first step: with gradients of zero, at a learning rate of zero.

        Only where the update allocates anything; weights and (fresh) states are afterwards as they were.
        """
        if self.step.optimizer in ALLOCATES_NOTHING:
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.model.zero_grad(set_to_none=True)
        reset_counts(self.optimizer)
        self.allocate()

    def allocate(self) -> None:
        """Make optimizer states, and gradients that accumulate, before the first step that needs them."""
        self._allocated = True
        allocate_states(self.optimizer)
        if self.step.grad_accum > 1:
            for p in self.model.parameters():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)

    def __call__(self, micro_batches: MicroBatches, learning_rate: float) -> StepResult:
        """Run one optimizer step over exactly ``grad_accum`` micro-batches of (B, T) int64 tokens and targets."""
        if not self._allocated:
            self.allocate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.device)
        for tokens, targets in micro_batches:
            total += self.micro_step(tokens, targets)
        self.on_phase("optimizer step")
        with record_function("optimizer step"):
            norm = self.update()
        return StepResult(loss=float(total) / self.step.grad_accum, grad_norm=float(norm))

    def micro_step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of one micro-batch, (B, T) each; its loss as a scalar on the device."""
        tokens = tokens.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        self.on_phase("forward")
        with record_function("forward"):
            loss = self._forward(tokens, targets)
        self.on_phase("backward")
        with record_function("backward"):
            self.scaler.scale(loss / self.step.grad_accum).backward()
        return loss.detach()

    def update(self) -> Tensor:
        """Clip the gradients, update the weights, drop the gradients; their norm as a scalar on the device."""
        if isinstance(self.optimizer, InBackward):
            self.optimizer.step()
            return self.optimizer.take_norm(self.device)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        limit = self.grad_clip if self.grad_clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        self.applying = True
        self.scaler.step(self.optimizer)
        self.applying = False
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.step.grad_accum == 1)
        return norm

    def evaluate(self, micro_batches: MicroBatches) -> float:
        """Mean loss over all blocks of the micro-batches, without gradients."""
        losses, blocks = [], []
        with torch.no_grad(), self._eval_mode():
            for tokens, targets in micro_batches:
                losses.append(self._forward(tokens.to(self.device), targets.to(self.device)))
                blocks.append(len(tokens))
            weights = torch.tensor(blocks, dtype=torch.float32, device=self.device)
            return float((torch.stack(losses) * weights).sum() / weights.sum())

    @contextlib.contextmanager
    def _eval_mode(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def scaler_state(self) -> dict[str, Any]:
        """State of the float16 loss scaler; empty for other dtypes."""
        return dict(self.scaler.state_dict())

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`scaler_state` returned."""
        if state:
            self.scaler.load_state_dict(state)
