"""What is allocated before the first step is what the first step would have made, and changes no number."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.trainer.model import GPT
from vramplan.trainer.optimizer import allocate_states, build_optimizer
from vramplan.trainer.step import TrainStep

SHAPE = Shape(n_layer=2, n_head=2, n_embd=64, vocab_size=128, block_size=16)
CPU = torch.device("cpu")


def make(step: StepConfig) -> TrainStep:
    model = GPT(SHAPE, step)
    optimizer = build_optimizer(model, step, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    return TrainStep(model, optimizer, step, grad_clip=1.0, device=CPU)


def batches(step: StepConfig, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(step.grad_accum):
        tokens = torch.randint(0, 128, (step.batch_size, 17), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(value, two[name]) for name, value in one.items())
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else bool(one == two)


@pytest.mark.parametrize("optimizer", ["adamw-fused", "adamw-foreach", "adamw8bit"])
@pytest.mark.parametrize("grad_accum", [1, 3])
def test_allocating_first_changes_nothing(optimizer: Any, grad_accum: int) -> None:
    step = StepConfig(batch_size=2, grad_accum=grad_accum, dtype="float32", optimizer=optimizer, device="cpu")
    plain, allocated = make(step), make(step)
    allocated.allocate()
    for number in range(4):
        results = [train(batches(step, number), 1e-2) for train in (plain, allocated)]
        assert results[0] == results[1]
    for p, q in zip(plain.model.parameters(), allocated.model.parameters(), strict=True):
        assert torch.equal(p, q)
    first, second = (t.optimizer.state_dict()["state"] for t in (plain, allocated))
    assert first.keys() == second.keys()
    for key, state in first.items():
        assert equal(state, second[key])


def test_states_that_are_there_are_kept() -> None:
    step = StepConfig(batch_size=2, dtype="float32", device="cpu")
    train = make(step)
    train(batches(step, 0), 1e-2)
    before = {p: dict(state) for p, state in train.optimizer.state.items()}
    allocate_states(train.optimizer)
    assert all(train.optimizer.state[p][name] is value for p, s in before.items() for name, value in s.items())


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_gradients_stay_only_where_they_accumulate(grad_accum: int) -> None:
    step = replace(StepConfig(batch_size=2, dtype="float32", device="cpu"), grad_accum=grad_accum)
    train = make(step)
    train.allocate()
    addresses = [p.grad.data_ptr() if p.grad is not None else None for p in train.model.parameters()]
    train(batches(step, 0), 1e-2)
    after = [p.grad.data_ptr() if p.grad is not None else None for p in train.model.parameters()]
    assert after == addresses
    assert all((address is None) == (grad_accum == 1) for address in after)


def test_attention_is_the_kernel_that_was_planned_for() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    make(StepConfig(device="cpu", dtype="float32"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_step_whose_updates_happen_in_the_backward_is_freed() -> None:
    """A parameter's hooks that held the optimizer would keep both alive for ever."""
    step = StepConfig(batch_size=2, dtype="float32", optimizer="adamw-in-backward", device="cpu")
    train = make(step)
    train(batches(step, 0), 1e-2)
    model, optimizer = weakref.ref(train.model), weakref.ref(train.optimizer)
    del train
    gc.collect()
    assert model() is None
    assert optimizer() is None
