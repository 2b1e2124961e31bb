"""The roofline agrees with published runs, and each of its terms moves with what causes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vramplan.errors import ConfigError
from vramplan.planner.gpu import find_gpu, load_gpus
from vramplan.planner.shape import Shape
from vramplan.planner.speed import (
    EFFICIENCY,
    StepTime,
    efficiency,
    mfu,
    seconds_to_tokens,
    step_time,
    tokens_per_second,
)
from vramplan.planner.step import StepConfig

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent.parent / "data/measured/speed_public.jsonl").read_text().splitlines()
]
SHAPE_FIELDS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "bias", "tied")
STEP_FIELDS = ("batch_size", "grad_accum", "dtype", "compile", "loss", "optimizer", "workload")

USER_SHAPE = Shape(n_layer=12, n_head=12, n_embd=384)
USER_STEP = StepConfig(batch_size=16, grad_accum=32, compile=True, loss="full", workload="nanogpt")
RTX_4070 = find_gpu("4070")
OURS = StepConfig(batch_size=8, grad_accum=4)


def predicted_ms(row: dict[str, Any]) -> float:
    shape = Shape(**{field: row[field] for field in SHAPE_FIELDS})
    step = StepConfig(**{field: row[field] for field in STEP_FIELDS})
    return float(step_time(shape, step, find_gpu(row["gpu"])).step_seconds * 1000)


@pytest.mark.parametrize("row", [row for row in ROWS if row["trusted"]], ids=lambda row: row["name"])
def test_a_trustworthy_run_is_predicted_within_its_tolerance(row: dict[str, Any]) -> None:
    assert predicted_ms(row) == pytest.approx(row["step_ms"], rel=row["tolerance"])


@pytest.mark.parametrize("row", [row for row in ROWS if not row["trusted"]], ids=lambda row: row["name"])
def test_a_run_that_is_missed_is_missed_in_the_direction_its_note_explains(row: dict[str, Any]) -> None:
    assert "torch 2.0 nightly" in row["name"]
    assert row["note"]
    assert predicted_ms(row) < (1 - row["tolerance"]) * row["step_ms"]


def test_every_row_names_its_source() -> None:
    assert len(ROWS) >= 8
    assert all(row["source"].startswith("https://") and row["note"] for row in ROWS)


def test_the_users_run_is_within_ten_percent_of_its_log() -> None:
    assert step_time(USER_SHAPE, USER_STEP, RTX_4070).step_seconds == pytest.approx(3.839, rel=0.10)


def test_mfu_of_the_users_run_is_what_its_log_means_on_this_card() -> None:
    tokens_per_second_logged = 524288 / 3.839
    assert mfu(USER_SHAPE, tokens_per_second_logged, RTX_4070, "bfloat16") == pytest.approx(0.70, abs=0.01)
    a100 = find_gpu("a100")
    assert mfu(USER_SHAPE, 524288 / 3.99511, a100, "bfloat16") == pytest.approx(
        0.1262, abs=0.0005
    )  # printed by nanoGPT


def test_every_card_has_an_efficiency_with_a_source() -> None:
    for gpu in load_gpus():
        assert efficiency(gpu).source
    for reached in EFFICIENCY.values():
        assert 0 < reached.attention < 1
        assert 0 < reached.bandwidth <= 1
        assert 0 < reached.matmul < 1.15


def test_the_parts_add_up_to_the_step() -> None:
    time = step_time(USER_SHAPE, USER_STEP, RTX_4070)
    parts = (
        time.matmul_seconds + time.attention_seconds + time.memory_seconds + time.optimizer_seconds
    ) + time.overhead_seconds
    assert time.step_seconds == pytest.approx(parts)
    assert tokens_per_second(USER_SHAPE, USER_STEP, RTX_4070) == pytest.approx(524288 / parts)


def test_arrays_give_the_same_as_one_shape_at_a_time() -> None:
    widths, heads, batches = np.array([384, 512, 768, 896]), np.array([12, 8, 12, 16]), np.array([[1], [16]])
    shape = Shape(n_layer=np.array([6, 8, 12, 18]), n_head=heads, n_embd=widths)
    together = step_time(shape, replace(USER_STEP, batch_size=batches), RTX_4070).step_seconds
    assert together.shape == (2, 4)
    for i, batch in enumerate((1, 16)):
        for j in range(4):
            one = Shape(n_layer=int(shape.n_layer[j]), n_head=int(heads[j]), n_embd=int(widths[j]))
            alone = step_time(one, replace(USER_STEP, batch_size=batch), RTX_4070).step_seconds
            assert together[i, j] == pytest.approx(alone)


def parts(shape: Shape, step: StepConfig, card: str = "4070") -> StepTime:
    return step_time(shape, step, find_gpu(card))


def test_block_checkpointing_costs_a_third_of_the_blocks_products_again() -> None:
    plain, again = parts(USER_SHAPE, OURS), parts(USER_SHAPE, replace(OURS, checkpointing="block"))
    blocks = 12 * 384 * 384 * 12
    expected = (6 * USER_SHAPE.matmul_parameters + 2 * blocks) / (6 * USER_SHAPE.matmul_parameters)
    assert again.matmul_seconds / plain.matmul_seconds == pytest.approx(expected)
    assert again.attention_seconds > plain.attention_seconds
    assert again.memory_seconds > plain.memory_seconds
    assert again.optimizer_seconds == plain.optimizer_seconds


def test_the_chunked_loss_runs_no_product_twice() -> None:
    chunked, full = parts(USER_SHAPE, OURS), parts(USER_SHAPE, replace(OURS, loss="full"))
    assert chunked.matmul_seconds == full.matmul_seconds


def test_smaller_slices_of_the_loss_move_more_memory() -> None:
    assert parts(USER_SHAPE, replace(OURS, loss_chunk_tokens=128)).memory_seconds > (
        parts(USER_SHAPE, replace(OURS, loss_chunk_tokens=4096)).memory_seconds
    )


def test_compiling_saves_memory_traffic_and_nothing_else() -> None:
    eager, compiled = parts(USER_SHAPE, replace(USER_STEP, compile=False)), parts(USER_SHAPE, USER_STEP)
    assert compiled.memory_seconds < 0.7 * eager.memory_seconds
    assert compiled.matmul_seconds == eager.matmul_seconds
    assert compiled.attention_seconds == eager.attention_seconds


def test_a_half_precision_residual_stream_moves_less_than_autocast() -> None:
    ours = replace(OURS, loss="full", compile=True)
    nanogpt = replace(ours, workload="nanogpt")
    assert parts(USER_SHAPE, ours).memory_seconds < parts(USER_SHAPE, nanogpt).memory_seconds


def test_narrow_heads_make_attention_slower_and_odd_ones_run_as_the_next_wider() -> None:
    def attention(n_head: int, n_embd: int = 768) -> float:
        shape = Shape(n_layer=1, n_head=n_head, n_embd=n_embd)
        return float(parts(shape, OURS).attention_seconds)

    assert attention(24) > 1.05 * attention(12)  # head_dim 32 and 64, equal FLOPs
    assert attention(16, 896) == pytest.approx(attention(16, 1024))  # head_dim 56 runs as 64


def test_launches_cost_only_while_the_gpu_would_wait() -> None:
    tiny = Shape(n_layer=4, n_head=4, n_embd=128, vocab_size=65, block_size=64)
    waiting = parts(tiny, StepConfig(batch_size=12, loss="full", workload="nanogpt"))
    assert waiting.overhead_seconds > 0.5 * waiting.step_seconds
    assert parts(USER_SHAPE, USER_STEP).overhead_seconds == 0


def test_optimizers_differ_by_their_traffic_once_per_step() -> None:
    fused = parts(USER_SHAPE, OURS).optimizer_seconds
    assert parts(USER_SHAPE, replace(OURS, optimizer="adamw-foreach")).optimizer_seconds > 2 * fused
    assert parts(USER_SHAPE, replace(OURS, optimizer="adamw8bit")).optimizer_seconds < fused
    assert parts(USER_SHAPE, replace(OURS, grad_accum=40)).optimizer_seconds == fused


def test_float32_runs_on_tf32_only_where_the_script_allows_it() -> None:
    slow = replace(OURS, loss="full", dtype="float32")
    allowed, plain = parts(USER_SHAPE, replace(slow, workload="nanogpt")), parts(USER_SHAPE, slow)
    assert 1.3 < plain.matmul_seconds / allowed.matmul_seconds < 1.8
    assert parts(USER_SHAPE, replace(slow, workload="nanogpt"), "2080 ti").matmul_seconds == pytest.approx(
        parts(USER_SHAPE, slow, "2080 ti").matmul_seconds
    )


def test_a_card_without_bfloat16_is_refused_for_it_and_served_in_float16() -> None:
    with pytest.raises(ConfigError, match="use float16"):
        parts(USER_SHAPE, OURS, "T4")
    assert parts(USER_SHAPE, replace(OURS, dtype="float16"), "T4").step_seconds > 0


def test_faster_cards_are_predicted_faster() -> None:
    speeds = [tokens_per_second(USER_SHAPE, USER_STEP, find_gpu(name)) for name in ("3060", "4070", "4090", "5090")]
    assert speeds == sorted(speeds)


def test_time_to_a_token_budget() -> None:
    assert seconds_to_tokens(2.5e9, 50_000) == pytest.approx(50_000)
