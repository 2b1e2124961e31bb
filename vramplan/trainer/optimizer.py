"""The optimizers the planner knows. AdamW: fused, foreach, with 8-bit states, offloaded, inside the backward, and in
pure bfloat16 with stochastic rounding; and Muon for the blocks' matrices with AdamW for the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, Problem
from ..planner.state_rows import STOCHASTIC_SLICE
from ..planner.step import StepConfig

Groups = list[dict[str, Any]]


def build_optimizer(
    model: nn.Module, step: StepConfig, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """The optimizer of ``step`` over ``model``, decaying only tensors of two or more dimensions.

    Raises ConfigError when ``adamw8bit`` is asked for and bitsandbytes is not installed.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": learning_rate, "betas": betas}
    if step.optimizer == "muon":
        inner = [p for name, p in named if name.startswith("blocks.") and p.dim() == 2]
        outer = [p for name, p in named if not name.startswith("blocks.") or p.dim() != 2]
        # scaled to AdamW's step, so that one learning rate serves both (arXiv:2502.16982)
        scaled: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        adamw = torch.optim.AdamW(_groups(outer, weight_decay), fused=True, **settings)
        return Several([*([torch.optim.Muon(inner, **scaled)] if inner else []), adamw])
    groups = _groups([p for _, p in named], weight_decay)
    if step.optimizer == "adamw8bit":
        return _eight_bit(groups, settings)
    if step.optimizer == "adamw-stochastic":
        return StochasticAdamW(groups, **settings)
    if step.optimizer == "adamw-offload":
        return OffloadedAdamW(groups, **settings)
    if step.optimizer == "adamw-in-backward":
        return InBackward(groups, **settings)
    fused = step.optimizer == "adamw-fused"
    return torch.optim.AdamW(groups, fused=fused, foreach=not fused, **settings)


def _groups(parameters: Sequence[Tensor], weight_decay: float) -> Groups:
    """Matrices and embeddings decay, vectors do not."""
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _eight_bit(groups: Groups, settings: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[attr-defined]
    except ImportError:
        remedy = 'pip install "vramplan[8bit]", or use adamw-fused'
        raise ConfigError(Problem("optimizer", "adamw8bit", "needs bitsandbytes", remedy)) from None
    eight_bit: torch.optim.Optimizer = AdamW8bit(groups, **settings)  # type: ignore[no-untyped-call]
    return eight_bit


def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Create the states of parameters that have none, as the first update would.

    Made before step 0 they lie side by side. Made in the first update they are cut out of cached blocks, which the
    second step then misses; and a first step that fits proves less.
    """
    for part in getattr(optimizer, "parts", ()):
        allocate_states(part)
    if isinstance(optimizer, Several | OffloadedAdamW):
        return
    for number, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            if optimizer.state[p]:
                continue
            if isinstance(optimizer, torch.optim.Muon):
                optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            elif isinstance(optimizer, StochasticAdamW):
                optimizer.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            elif isinstance(optimizer, torch.optim.AdamW):
                step = torch.zeros((), device=p.device) if group["fused"] else torch.tensor(0.0)
                optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            else:
                optimizer.init_state(group, p, number, index)  # type: ignore[attr-defined]  # bitsandbytes


ALLOCATES_NOTHING: frozenset[str] = frozenset({"adamw-fused", "adamw8bit", "adamw-in-backward"})
"""Optimizers whose kernels work in place: an update takes no memory beyond gradients and states."""


def reset_counts(optimizer: torch.optim.Optimizer) -> None:
    """Set the number of updates back to none, as before the first."""
    for part in (*getattr(optimizer, "parts", ()), *filter(None, [getattr(optimizer, "inner", None)])):
        reset_counts(part)
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = 0
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].zero_()


class Several(torch.optim.Optimizer):
    """Several optimizers as one; their groups are shared, so that a learning rate set here reaches them."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Every part's update. ``closure`` is not supported."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The parts' states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class InBackward(Several):
    """Each parameter is updated as soon as its gradient is complete, and the gradient dropped: never two of them.

    So there is nothing to clip by a global norm, to unscale, or to accumulate. ``squared_norm`` adds up what the
    gradients of the latest backward were.
    """

    def __init__(self, groups: Groups, **settings: Any) -> None:
        self.squared_norm: Tensor | None = None
        parts = []
        for group in groups:
            for p in group["params"]:
                own = {"params": [p], "weight_decay": group["weight_decay"]}
                parts.append(torch.optim.AdamW([own], fused=True, **settings))
                p.register_post_accumulate_grad_hook(self._update_with(parts[-1]))
        super().__init__(parts)

    def _update_with(self, part: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        """A hook of the parameter. It refers to the optimizer weakly: what a tensor's hooks hold is never collected."""
        optimizer, updating = weakref.ref(self), weakref.ref(part)

        def update(p: Tensor) -> None:
            whole, own = optimizer(), updating()
            if p.grad is None or whole is None or own is None:
                return
            square = p.grad.norm().square()
            whole.squared_norm = square if whole.squared_norm is None else whole.squared_norm + square
            own.step()
            p.grad = None

        return update

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Everything has been updated already."""

    def take_norm(self, device: torch.device) -> Tensor:
        """Global norm of the gradients since it was last asked for."""
        square, self.squared_norm = self.squared_norm, None
        return torch.zeros((), device=device) if square is None else square.sqrt()


MASTERS = "masters"
"""Where a state dict keeps float32 weights whose copies on the device are narrower."""


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW whose states, and a copy of the weights, are in host memory; gradients go there and weights come back.

    The copy is float32 whatever the weights on the device are: of bfloat16 ones it is the master, in which no small
    update is lost, and is saved beside the states.
    """

    def __init__(self, groups: Groups, **settings: Any) -> None:
        super().__init__(groups, settings)
        self.here = [p for group in self.param_groups for p in group["params"]]
        self.host = [_on_host(p) for p in self.here]
        there = dict(zip(self.here, self.host, strict=True))
        twins = [{**group, "params": [there[p] for p in group["params"]]} for group in self.param_groups]
        self.inner = torch.optim.AdamW(twins, fused=True, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Gradients to the host, the update there, weights back."""
        for mine, twin in zip(self.param_groups, self.inner.param_groups, strict=True):
            twin["lr"] = mine["lr"]
        for p, twin_p in zip(self.here, self.host, strict=True):
            twin_p.grad = None if p.grad is None else p.grad.to("cpu").float()
        self.inner.step()
        for p, twin_p in zip(self.here, self.host, strict=True):
            p.copy_(twin_p, non_blocking=True)
            twin_p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The states on the host, with the masters of weights that are narrower."""
        wide = any(p.dtype != twin_p.dtype for p, twin_p in zip(self.here, self.host, strict=True))
        return self.inner.state_dict() | ({MASTERS: list(self.host)} if wide else {})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; without masters in it the host's weights follow the model's."""
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != MASTERS})
        for master, twin_p in zip(state_dict.get(MASTERS, self.here), self.host, strict=True):
            twin_p.copy_(master)


def _on_host(p: Tensor) -> Tensor:
    twin = p.detach().to("cpu", torch.float32, copy=True)
    return twin.pin_memory() if p.is_cuda else twin


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights and states: each new value is rounded up or down at random, and right on average.

    Rounded to the nearest, an update smaller than 1/256 of a weight would be lost. Arithmetic is float32, in slices of
    STOCHASTIC_SLICE elements. The noise follows from the number of the step alone, so a resumed run repeats it.
    """

    def __init__(self, groups: Groups, *, lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        for group in self.param_groups:
            group["step"] = 0
        self._noise: torch.Generator | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        allocate_states(self)
        for number, group in enumerate(self.param_groups):
            group["step"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    noise = self._seeded(p.device, 2 * group["step"] + number if p is group["params"][0] else None)
                    for weight, grad, mean, square in self._slices(p):
                        _stochastic_update(weight, grad, mean, square, group, noise)

    def _seeded(self, device: torch.device, seed: int | None) -> torch.Generator:
        if self._noise is None:
            self._noise = torch.Generator(device)
        return self._noise if seed is None else self._noise.manual_seed(seed)

    def _slices(self, p: Tensor) -> Iterator[tuple[Tensor, ...]]:
        state = self.state[p]
        tensors = [t for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]) if t is not None]
        return zip(*(torch.split(t.view(-1), STOCHASTIC_SLICE) for t in tensors), strict=True)


def _stochastic_update(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, group: dict[str, Any], noise: torch.Generator
) -> None:
    (beta1, beta2), count = group["betas"], group["step"]
    wide = grad.float()
    mean = exp_avg.float().lerp_(wide, 1 - beta1)
    square = exp_avg_sq.float().mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
    del wide
    _round_into(exp_avg, mean, noise)
    _round_into(exp_avg_sq, square, noise)
    square.div_(1 - beta2**count).sqrt_().add_(group["eps"])
    fresh = p.float().mul_(1 - group["lr"] * group["weight_decay"])
    fresh.addcdiv_(mean, square, value=-group["lr"] / (1 - beta1**count))
    _round_into(p, fresh, noise)


def _round_into(target: Tensor, wide: Tensor, noise: torch.Generator) -> None:
    """Write float32 ``wide`` into bfloat16 ``target``, up with the probability of what would be cut off."""
    bits = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device, generator=noise)
    bits.add_(wide.view(torch.int32)).bitwise_and_(-(1 << 16))
    target.copy_(bits.view(torch.float32))
