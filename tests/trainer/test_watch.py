"""Spikes: what is one, what is none, and that a run reports its own and goes on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer import loop as module
from vramplan.trainer.events import Finished, SpikeSeen
from vramplan.trainer.loop import train
from vramplan.trainer.metrics import read_metrics
from vramplan.trainer.watch import LEAST_COUNT, LEVEL, SpikeWatch

UNJUDGED = LEVEL + LEAST_COUNT


def spikes(values, what="loss") -> list[tuple[int, float]]:
    """Position and size of each spike."""
    watch = SpikeWatch(what)
    seen = [(i, watch.see(v)) for i, v in enumerate(values)]
    return [(i, spike.times) for i, spike in seen if spike is not None]


def noise(n, spread, seed=0) -> list[float]:
    return list(3 * np.exp(spread * np.random.default_rng(seed).normal(size=n)))


def test_a_value_far_above_the_usual_is_a_spike_and_says_how_far():
    values = noise(200, 0.01)
    values[150] *= 2
    ((where, times),) = spikes(values)
    assert where == 150
    assert times == pytest.approx(2, rel=0.05)


def test_a_spike_of_many_steps_is_one_and_a_second_one_another():
    values = noise(300, 0.01)
    for i in (*range(100, 120), *range(200, 205)):
        values[i] *= 2
    assert [where for where, _ in spikes(values)] == [100, 200]


def test_a_level_that_stays_becomes_the_usual_one():
    values = noise(100, 0.01) + [2 * v for v in noise(100, 0.01, seed=1)]
    values[-1] *= 2
    assert [where for where, _ in spikes(values)] == [100, len(values) - 1]


def test_falling_curves_and_low_values_are_no_news():
    assert spikes([10 * math.exp(-i / 50) for i in range(300)]) == []
    assert spikes([*noise(100, 0.01), 0.001, *noise(100, 0.01)]) == []


def test_a_spike_shows_on_a_steep_slope():
    values = [v * math.exp(-i / 50) for i, v in enumerate(noise(120, 0.01))]
    values[110] *= 2.2  # at the height of 40 steps before
    assert [where for where, _ in spikes(values)] == [110]


def test_a_loss_that_climbs_for_long_is_seen_early():
    values = [v * 1.02 ** max(0, i - 200) for i, v in enumerate(noise(260, 0.01))]
    ((where, _),) = spikes(values)
    assert 200 < where < 215


def test_what_is_small_is_no_news_however_quiet_the_curve():
    assert spikes([2.0] * 100 + [2.09]) == []
    assert [where for where, _ in spikes([2.0] * 100 + [2.11])] == [100]
    assert spikes([0.3] * 100 + [0.44], "grad_norm") == []
    assert [where for where, _ in spikes([0.3] * 100 + [0.46], "grad_norm")] == [100]


def test_nothing_is_judged_before_there_is_something_to_compare_with():
    assert spikes([2.0] * (UNJUDGED - 1) + [50.0]) == []
    assert spikes([2.0] * UNJUDGED + [50.0]) == [(UNJUDGED, pytest.approx(25.0))]


def test_values_that_are_not_numbers_are_left_out():
    odd = [math.inf, math.nan, 0.0]
    values = [v for usual in noise(100, 0.01) for v in (usual, *odd)]
    assert spikes(values, "grad_norm") == []
    assert [where for where, _ in spikes([*values, 9.0], "grad_norm")] == [400]


@pytest.mark.parametrize(("what", "spread"), [("loss", 0.05), ("grad_norm", 0.3)])
def test_stationary_noise_raises_no_alarm(what, spread):
    assert spikes(noise(20_000, spread, seed=3), what) == []


def test_heavy_tails_raise_few():
    tails = np.exp(0.3 * np.random.default_rng(5).laplace(size=20_000) / math.sqrt(2))
    assert len(spikes(tails, "grad_norm")) <= 12  # 4 expected


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(make_shards, learnable_tokens):
    return make_shards(train=learnable_tokens(4001), val=learnable_tokens(300, seed=1))


def run(shards, run_dir, **train_section):
    settings = {
        "max_steps": 100, "warmup_steps": 4, "learning_rate": 1e-2, "min_learning_rate": 1e-2, "log_interval": 20,
        "eval_interval": 100, "checkpoint_interval": 100, "eval_batches": 1, "seed": 7,
    }  # fmt: skip
    shape = Shape(n_layer=1, n_head=2, n_embd=32, vocab_size=64, block_size=16)
    step = StepConfig(batch_size=48, grad_accum=1, dtype="float32", optimizer="adamw-foreach", device="cpu")
    events = []
    config = RunConfig.build(shape, step, train=settings | train_section)
    train(config, shards, run_dir, device=torch.device("cpu"), on_event=events.append)
    return events


def change_step(monkeypatch, number, change):
    """Give the step ``number`` (from 1) other micro-batches or another learning rate."""
    original, calls = module.TrainStep.__call__, []

    def changed(self, batches, rate):
        calls.append(1)
        return original(self, *(change(batches, rate) if len(calls) == number else (batches, rate)))

    monkeypatch.setattr(module.TrainStep, "__call__", changed)


def test_an_ordinary_run_has_none(shards, tmp_path):
    assert not [e for e in run(shards, tmp_path / "run") if isinstance(e, SpikeSeen)]


def test_a_bad_batch_between_logged_steps_is_seen_and_the_run_goes_on(shards, tmp_path, monkeypatch):
    def wrong_targets(batches, rate):
        return [(tokens, (targets + 29) % 64) for tokens, targets in batches], rate

    change_step(monkeypatch, 91, wrong_targets)
    events = run(shards, tmp_path / "run")
    seen = {e.what: e for e in events if isinstance(e, SpikeSeen)}
    assert seen["loss"].step == seen["grad_norm"].step == 91
    assert seen["loss"].value > 1.5 * seen["loss"].usual
    assert seen["loss"].times == pytest.approx(seen["loss"].value / seen["loss"].usual)
    assert isinstance(events[-1], Finished)
    lines = {x["what"]: x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if x["kind"] == "spike"}
    assert {x["step"] for x in lines.values()} == {91}
    assert lines["loss"]["value"] == seen["loss"].value
    assert lines["grad_norm"]["usual"] == seen["grad_norm"].usual


def test_a_jump_of_the_learning_rate_shows_in_the_next_steps(shards, tmp_path, monkeypatch):
    change_step(monkeypatch, 90, lambda batches, rate: (batches, 100 * rate))
    events = run(shards, tmp_path / "run")
    assert {(e.what, e.step) for e in events if isinstance(e, SpikeSeen)} >= {("loss", 91), ("grad_norm", 91)}
    assert isinstance(events[-1], Finished)
