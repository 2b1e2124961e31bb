"""The optimizers the planner knows: AdamW fused, foreach, and with 8-bit states."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigError, Problem
from ..planner.step import StepConfig


def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Create the states of parameters that have none, as the first update would.

    Made before step 0 they lie side by side. Made in the first update they are cut out of cached blocks, which the
    second step then misses; and a first step that fits proves less.
    """
    for number, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            if optimizer.state[p]:
                continue
            if not isinstance(optimizer, torch.optim.AdamW):
                optimizer.init_state(group, p, number, index)  # type: ignore[attr-defined]  # bitsandbytes
                continue
            step = torch.zeros((), device=p.device) if group["fused"] else torch.tensor(0.0)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def build_optimizer(
    model: nn.Module, step: StepConfig, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW over ``model``, decaying only tensors of two or more dimensions (matrices and embeddings).

    Raises ConfigError when ``adamw8bit`` is asked for and bitsandbytes is not installed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if step.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit  # type: ignore[attr-defined]
        except ImportError:
            remedy = 'pip install "vramplan[8bit]", or use adamw-fused'
            raise ConfigError(Problem("optimizer", "adamw8bit", "needs bitsandbytes", remedy)) from None
        eight_bit: torch.optim.Optimizer = AdamW8bit(groups, lr=learning_rate, betas=betas)  # type: ignore[no-untyped-call]
        return eight_bit
    fused = step.optimizer == "adamw-fused"
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused, foreach=not fused)
