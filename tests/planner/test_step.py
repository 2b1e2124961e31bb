"""Step settings: what excludes what, and that nothing is reported that is not wrong."""

from __future__ import annotations

from typing import Any

import pytest

from vramplan.planner.shape import Shape
from vramplan.planner.step import CHOICES, StepConfig, check_step, tokens_per_step


def fields(step: StepConfig) -> list[str]:
    return [problem.field for problem in check_step(step)]


def test_defaults_are_legal() -> None:
    assert check_step(StepConfig()) == []


@pytest.mark.parametrize("loss", CHOICES["loss"])
@pytest.mark.parametrize("checkpointing", CHOICES["checkpointing"])
@pytest.mark.parametrize("optimizer", CHOICES["optimizer"])
def test_our_own_trainer_combines_everything(loss: str, checkpointing: str, optimizer: str) -> None:
    dtype: Any = "pure-bfloat16" if optimizer == "adamw-stochastic" else "bfloat16"
    assert fields(StepConfig(loss=loss, checkpointing=checkpointing, optimizer=optimizer, dtype=dtype)) == []


def test_dropout_is_known_for_the_scripts_on_a_gpu() -> None:
    assert fields(StepConfig(workload="plain", loss="full", dropout=0.1)) == []
    for wrong in ({"dropout": 0.1}, {"dropout": 1.0}, {"dropout": -0.1},
                  {"workload": "plain", "loss": "full", "dropout": 0.1, "device": "cpu"}):  # fmt: skip
        assert fields(StepConfig(**wrong)) == ["dropout"]


def test_weights_in_float16_do_not_train() -> None:
    assert fields(StepConfig(workload="plain", loss="full", dtype="float16")) == ["dtype"]
    assert fields(StepConfig(workload="plain", loss="full", dtype="float32")) == []


@pytest.mark.parametrize("workload", ["nanogpt", "autocast", "plain"])
def test_other_peoples_scripts_lack_what_they_lack(workload: str) -> None:
    assert fields(StepConfig(workload=workload, loss="full")) == []
    assert fields(StepConfig(workload=workload, loss="chunked")) == ["loss"]
    everything = StepConfig(workload=workload, loss="chunked", checkpointing="block", optimizer="adamw8bit")
    assert fields(everything) == ["loss", "checkpointing", "optimizer"]
    for problem in check_step(everything):
        assert "does not exist in" in problem.rule
        assert problem.remedy


@pytest.mark.parametrize("field", CHOICES)
def test_unknown_choices_are_one_problem_with_a_remedy(field: str) -> None:
    known = CHOICES[field][0]
    (problem,) = check_step(StepConfig(**{field: known[:-1]}))
    assert (problem.field, problem.value) == (field, known[:-1])
    assert known in problem.remedy


@pytest.mark.parametrize("field", ["batch_size", "grad_accum", "loss_chunk_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_at_least_one(field: str, value: int) -> None:
    assert fields(StepConfig(**{field: value})) == [field]


def test_all_problems_are_found_together() -> None:
    step = StepConfig(batch_size=0, grad_accum=-1, dtype="bf16", workload="nanogpt", checkpointing="block")
    assert fields(step) == ["batch_size", "grad_accum", "dtype", "loss", "checkpointing"]


def test_tokens_per_step_of_the_usual_run() -> None:
    shape = Shape(n_layer=12, n_head=12, n_embd=576)
    assert tokens_per_step(shape, StepConfig(batch_size=16, grad_accum=32)) == 524_288
    assert tokens_per_step(shape, StepConfig(batch_size=12, grad_accum=40)) == 491_520  # 480 sequences are not 512


@pytest.mark.parametrize(("dtype", "half"), [("float32", False), ("bfloat16", True), ("float16", True)])
def test_both_half_precisions_are_two_bytes(dtype: str, half: bool) -> None:
    assert StepConfig(dtype=dtype).half is half


def test_a_wide_residual_stream_needs_wide_weights_and_our_trainer() -> None:
    wide = StepConfig(residual="float32")
    assert check_step(wide) == []
    assert wide.wide_residual
    assert not StepConfig(residual="float32", dtype="tf32").wide_residual, "it is float32 anyway"
    pure = StepConfig(residual="float32", dtype="pure-bfloat16", optimizer="adamw-stochastic")
    assert [p.field for p in check_step(pure)] == ["residual"]
    script = StepConfig(residual="float32", workload="nanogpt", loss="full")
    assert [p.field for p in check_step(script)] == ["residual"]
