"""Every optimizer updates as it should, and continues from its saved state as if nothing had happened."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vramplan.planner.shape import Shape
from vramplan.planner.step import CONFLICTS, Optimizer, StepConfig, check_step
from vramplan.runconfig import RunConfig
from vramplan.trainer.model import GPT
from vramplan.trainer.optimizer import OffloadedAdamW, StochasticAdamW, allocate_states, build_optimizer
from vramplan.trainer.step import StepResult, TrainStep
from vramplan.trainer.tensor_file import read_tree, write_tree

SHAPE = Shape(n_layer=2, n_head=2, n_embd=32, vocab_size=97, block_size=16, bias=True)
STEP = StepConfig(batch_size=4, dtype="float32", device="cpu", loss="full")
EVERY: tuple[tuple[Optimizer, Any], ...] = (
    ("adamw-fused", "float32"), ("adamw-foreach", "float32"), ("adamw8bit", "float32"), ("muon", "float32"),
    ("adamw-in-backward", "float32"), ("adamw-offload", "float32"), ("adamw-stochastic", "pure-bfloat16"),
    ("adamw-offload", "pure-bfloat16"),
)  # fmt: skip


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 97, (4, 17), generator=generator)
    return [(tokens[:, :-1], tokens[:, 1:])]


class Run:
    """Ten identical micro-batches make the loss fall quickly."""

    def __init__(self, optimizer: Optimizer, dtype: Any = "float32", *, grad_clip: float = 0.0) -> None:
        step = replace(STEP, optimizer=optimizer, dtype=dtype)
        self.model = GPT(SHAPE, step)
        self.optimizer = build_optimizer(self.model, step, learning_rate=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
        self.train = TrainStep(self.model, self.optimizer, step, grad_clip=grad_clip, device=torch.device("cpu"))
        self.train.allocate()

    def steps(self, n: int) -> list[StepResult]:
        return [self.train(batches(), 3e-3) for _ in range(n)]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


@pytest.mark.parametrize(("optimizer", "dtype"), EVERY)
def test_the_loss_falls(optimizer: Optimizer, dtype: Any) -> None:
    results = Run(optimizer, dtype).steps(40)
    assert results[-1].loss < 0.6 * results[0].loss
    assert all(result.grad_norm > 0 for result in results)


@pytest.mark.parametrize(("optimizer", "dtype"), EVERY)
def test_a_restored_optimizer_goes_on_exactly(optimizer: Optimizer, dtype: Any) -> None:
    whole, first, second = (Run(optimizer, dtype) for _ in range(3))
    whole.steps(6)
    first.steps(3)
    second.model.load_state_dict(first.weights())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.steps(3)
    for name, weight in whole.weights().items():
        assert torch.equal(weight, second.weights()[name]), name


@pytest.mark.parametrize("optimizer", ["adamw-in-backward", "adamw-offload"])
def test_where_and_when_adamw_runs_does_not_matter(optimizer: Optimizer) -> None:
    usual, other = Run("adamw-fused"), Run(optimizer)
    norms = [[result.grad_norm for result in run.steps(5)] for run in (usual, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for name, weight in usual.weights().items():
        torch.testing.assert_close(weight, other.weights()[name], msg=name)


def test_masters_on_the_host_keep_what_bfloat16_weights_cannot_hold() -> None:
    """At a rate of 1e-5 an update is far below a bfloat16 weight's last bit; the masters still move as float32 does."""
    run = Run("adamw-offload", "pure-bfloat16")
    optimizer = run.optimizer
    assert isinstance(optimizer, OffloadedAdamW)
    before = [p.detach().float() for p in optimizer.here]
    for _ in range(20):
        run.train(batches(), 1e-5)
    moved = [float((master - b).abs().max()) for master, b in zip(optimizer.host, before, strict=True)]
    assert all(m.dtype == torch.float32 for m in optimizer.host)
    assert max(moved) == pytest.approx(20e-5, rel=0.2)
    for p, master in zip(optimizer.here, optimizer.host, strict=True):
        assert torch.equal(p.detach(), master.bfloat16())


def test_masters_survive_a_checkpoint(tmp_path: Path) -> None:
    straight, resumed = (Run("adamw-offload", "pure-bfloat16") for _ in range(2))
    straight.steps(3)
    with (tmp_path / "file").open("wb") as f:
        write_tree(f, {"model": straight.model.state_dict(), "optimizer": straight.optimizer.state_dict()})
    saved = read_tree(tmp_path / "file")
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    for run in (straight, resumed):
        run.steps(3)
    for name, weight in straight.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name


def test_muon_leaves_embeddings_and_vectors_to_adamw() -> None:
    run = Run("muon")
    muon, adamw = run.optimizer.parts  # type: ignore[attr-defined]
    assert isinstance(muon, torch.optim.Muon)
    by_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    for name, p in run.model.named_parameters():
        assert (id(p) in by_muon) == (name.startswith("blocks.") and p.dim() == 2), name
    assert sum(len(group["params"]) for group in adamw.param_groups) + len(by_muon) == len(run.weights())


def test_the_learning_rate_reaches_every_part() -> None:
    for optimizer, dtype in EVERY:
        run = Run(optimizer, dtype)
        before = run.weights()
        run.train(batches(), 0.0)
        for name, weight in run.weights().items():
            assert torch.equal(weight, before[name]), (optimizer, name)


def test_states_that_were_made_before_are_those_that_the_first_update_would_make() -> None:
    for optimizer, dtype in EVERY:
        made, lazy = Run(optimizer, dtype), Run(optimizer, dtype)
        lazy.optimizer = build_optimizer(
            lazy.model, lazy.train.step, learning_rate=3e-3, weight_decay=0.1, betas=(0.9, 0.95)
        )
        if optimizer == "adamw-in-backward":  # its hooks are on the parameters already
            continue
        lazy.train.optimizer = lazy.optimizer
        made.steps(3)
        lazy.steps(3)
        for name, weight in made.weights().items():
            torch.testing.assert_close(weight, lazy.weights()[name], msg=f"{optimizer} {name}")


# ------------------------------------------------------------------- stochastic rounding


def stochastic(p: torch.Tensor, **settings: Any) -> StochasticAdamW:
    return StochasticAdamW([{"params": [p], "weight_decay": 0.0}], **{"lr": 1e-3, "betas": (0.9, 0.95)} | settings)


def test_updates_below_the_resolution_of_bfloat16_arrive_on_average() -> None:
    """A step of 1/1000 next to 1.0 is an eighth of bfloat16's spacing: rounded to nearest it would be lost."""
    p = torch.ones(20_000, dtype=torch.bfloat16)
    optimizer = stochastic(p)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert float(p.float().mean()) == pytest.approx(1 - 20 * 1e-3, abs=2e-4)
    assert len(p.unique()) > 2


def test_stochastic_adamw_follows_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(4000)
    exact, rounded = start.clone(), start.to(torch.bfloat16)
    theirs, ours = (
        torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
        stochastic(rounded, lr=1e-2),
    )
    for _ in range(50):
        gradient = torch.randn(4000)
        exact.grad, rounded.grad = gradient, gradient.to(torch.bfloat16)
        theirs.step()
        ours.step()
    moved = exact - start
    error = rounded.float() - exact
    assert float(error.mean()) == pytest.approx(0, abs=5e-4), "no drift"
    assert float(error.std()) < 0.25 * float(moved.std())


def test_a_tensor_larger_than_a_slice_is_updated_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vramplan.trainer.optimizer.STOCHASTIC_SLICE", 100)
    p = torch.zeros(3, 117, dtype=torch.bfloat16)
    optimizer = stochastic(p, lr=0.25)
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(p.float(), torch.full((3, 117), -0.25), rtol=0.01, atol=0)


def test_no_states_no_update() -> None:
    p = torch.ones(4, dtype=torch.bfloat16)
    optimizer = stochastic(p)
    allocate_states(optimizer)
    optimizer.step()
    assert p.eq(1).all()


# ------------------------------------------------------------------- what cannot be combined


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"optimizer": "adamw-in-backward", "grad_accum": 2}, "grad_accum"),
        ({"optimizer": "adamw-in-backward", "dtype": "float16"}, "dtype"),
        ({"optimizer": "adamw-in-backward", "compile": True, "device": "cuda"}, "compile"),
        ({"optimizer": "adamw-fused", "dtype": "pure-bfloat16"}, "optimizer"),
        ({"optimizer": "adamw-stochastic", "dtype": "bfloat16"}, "optimizer"),
        ({"optimizer": "adamw-offload"}, "optimizer"),
        ({"dtype": "pure-bfloat16", "optimizer": "adamw-stochastic", "residual": "float32"}, "residual"),
        ({"optimizer": "muon", "workload": "nanogpt"}, "optimizer"),
        ({"dtype": "tf32", "workload": "autocast"}, "dtype"),
    ],
)
def test_what_cannot_be_combined_is_said(change: dict[str, Any], field: str) -> None:
    problems = check_step(replace(STEP, **change))
    assert [p.field for p in problems] == [field]
    assert problems[0].remedy


def test_every_conflict_is_tested() -> None:
    assert len(CONFLICTS) == 7


def test_clipping_needs_all_gradients_at_once() -> None:
    step = replace(STEP, optimizer="adamw-in-backward")
    assert RunConfig.build(SHAPE, step, train={"grad_clip": 0.0}).train.grad_clip == 0
    with pytest.raises(Exception, match="grad_clip"):
        RunConfig.build(SHAPE, step)
