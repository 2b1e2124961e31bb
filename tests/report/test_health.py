"""Run health: every figure and verdict from run directories and logs whose truth is known."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from vramplan.errors import ConfigError
from vramplan.planner.gpu import find_gpu
from vramplan.planner.nanogpt_config import NanoGPTConfig
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.report.health import MOST_SHOWN, RunHealth, build_health, health_of_run
from vramplan.report.health_figures import STRETCH, drops
from vramplan.report.health_text import loss_chart
from vramplan.report.nanogpt_log import read_log
from vramplan.report.run_directory import read_run
from vramplan.report.run_log import record_of_log
from vramplan.report.run_record import Rates, Record
from vramplan.runconfig import RunConfig

GPU = find_gpu("4070")
SHAPE = Shape(n_layer=12, n_head=12, n_embd=384)
STEP = StepConfig(batch_size=16, grad_accum=32, compile=True)
STEPS = 2000


def loss_at(step: int) -> float:
    return 10.83 if step <= 1 else 3.0 + 7.83 * (1 + step / 20) ** -0.7


def metrics(steps: int = STEPS, every: int = 10, evaluate: int = 200, **changes: Any) -> list[dict[str, Any]]:
    """The lines of a sound run of 524,288 tokens a step and 7 s, with ``changes`` to every step line."""
    first = {"val_loss": 10.83, "best_val_loss": 10.83, "train_loss": None}
    lines: list[dict[str, Any]] = [{"kind": "evaluation", "step": 0, **first, "run_seconds": 0.0, "time": 0.0}]
    for step in range(1, steps + 1):
        if step == 1 or step % every == 0:
            line = {
                "kind": "step", "step": step, "tokens": step * 524_288, "loss": loss_at(step), "learning_rate": 1e-4,
                "grad_norm": 1.0, "tokens_per_second": None if step == 1 else 136_000.0,
                "step_seconds": 524_288 / 136_000, "mfu": None, "epoch": step / 1000, "peak_allocated_bytes": 5 * 2**30,
                "peak_reserved_bytes": 6 * 2**30, "alloc_retries": 0, "run_seconds": 7.0 * step, "time": 0.0,
            }  # fmt: skip
            lines.append(line | {name: value(step) if callable(value) else value for name, value in changes.items()})
        if step % evaluate == 0:
            evaluated = {"val_loss": loss_at(step) + 0.02, "best_val_loss": 1.0, "train_loss": loss_at(step)}
            lines.append({"kind": "evaluation", "step": step, **evaluated, "run_seconds": 7.0 * step, "time": 0.0})
    return lines


@pytest.fixture
def run_of(tmp_path: Path):
    def make(lines: list[dict[str, Any]] | None = None, *, device: str = "cuda:0 (NVIDIA GeForce RTX 4070)",
             train: dict[str, Any] | None = None, **plan: Any) -> Path:  # fmt: skip
        step = StepConfig(batch_size=16, grad_accum=32, device="cpu" if device == "cpu" else "cuda")
        settings = {"max_steps": STEPS, "warmup_steps": 40, "learning_rate": 1e-3, "min_learning_rate": 1e-4}
        RunConfig.build(SHAPE, step, train=settings | (train or {}), plan=plan).save(tmp_path / "config.toml")
        content = "".join(json.dumps(line) + "\n" for line in (metrics() if lines is None else lines))
        (tmp_path / "metrics.jsonl").write_text(content)
        (tmp_path / "run.json").write_text(json.dumps({"format": 1, "sessions": [{"device": device}]}))
        return tmp_path

    return make


def told(health: RunHealth, topic: str) -> list[str]:
    return [piece.verdict for piece in health.advice if piece.topic == topic]


def of_log(text: str, stated: dict[str, Any] | None = None, **kwargs: Any) -> RunHealth:
    config = NanoGPTConfig(stated) if stated is not None else None
    return build_health(record_of_log(read_log(io.BytesIO(text.encode()), "log"), "log", config), **kwargs)


# -------------------------------------------------------------------- our runs


def test_a_sound_run_has_no_warning_and_every_figure(run_of) -> None:
    health = health_of_run(run_of(target_parameters=41_000_000, peak_allocated_bytes=5 * 2**30), None)
    figures = health.figures
    assert health.verdict == "note"
    assert figures.parameters == 40_953_216
    assert figures.parameters_without_positions == 40_560_000
    assert figures.tokens_seen == STEPS * 524_288
    assert figures.tokens_per_parameter == pytest.approx(25.6, abs=0.1)
    assert figures.unique_tokens == 1000 * 524_288
    assert figures.epochs == pytest.approx(2.0)
    assert figures.first_loss_expected == pytest.approx(math.log(50304))
    assert figures.gpu == "RTX 4070"
    assert figures.mfu == pytest.approx(SHAPE.flops_per_token * 136_000 / GPU.peak_flops("bfloat16"))
    assert figures.mfu == pytest.approx(0.70, abs=0.01)
    assert figures.learning_rate == pytest.approx(1e-4, rel=0.01)
    assert figures.gap == pytest.approx(0.0, abs=0.04)
    assert health.forecast is not None
    assert health.forecast_steps == (2 * STEPS, 3 * STEPS)
    for topic in ("size", "first loss", "spikes", "course", "gap", "learning rate", "memory"):
        assert told(health, topic) == ["ok"], topic
    assert told(health, "data") == ["note"]


def test_the_report_is_plain_data(run_of) -> None:
    data = json.loads(json.dumps(health_of_run(run_of()).as_dict(), allow_nan=False))
    assert data["verdict"] == "note"
    assert data["figures"]["steps_done"] == STEPS
    assert data["forecast"]["at"][0]["step"] == 2 * STEPS
    assert data["train"][0] == [1, 10.83]
    assert {"verdict", "topic", "text", "evidence", "remedy"} == set(data["advice"][0])
    assert {"topic", "value", "note"} == set(data["facts"][0])


def test_a_size_that_was_not_asked_for_is_a_warning(run_of) -> None:
    path = run_of(target_parameters=125_000_000)
    assert told(health_of_run(path), "size") == ["warning"]
    near = build_health(read_run(path), asked=42_000_000)
    assert told(near, "size") == ["ok"]


def test_on_a_cpu_there_is_no_mfu_whatever_card_is_named(run_of) -> None:
    health = health_of_run(run_of(device="cpu"), GPU)
    assert health.figures.mfu is None
    assert health.figures.mfu_unknown == "the run is on a CPU"


def test_an_unknown_card_gives_no_mfu(run_of) -> None:
    health = health_of_run(run_of(device="cuda:0 (Voodoo 2)"))
    assert health.figures.mfu is None
    assert "--gpu" in health.figures.mfu_unknown


@pytest.mark.parametrize(
    ("first", "verdict"), [(10.83, "ok"), (11.1, "ok"), (11.95, "problem"), (9.7, "problem"), (0.34, "problem")]
)
def test_a_first_loss_far_from_that_of_chance_is_a_problem(run_of, first: float, verdict: str) -> None:
    lines = metrics()
    lines[0]["val_loss"] = first
    health = health_of_run(run_of(lines))
    assert told(health, "first loss") == [verdict]
    assert (health.verdict == "problem") == (verdict == "problem")


def test_spikes_that_the_trainer_saw_are_told(run_of) -> None:
    def spike(step: int) -> dict[str, Any]:
        return {"kind": "spike", "step": step, "what": "grad_norm", "value": 9.0, "usual": 1.0, "times": 9.0}

    assert told(health_of_run(run_of([*metrics(), spike(900)])), "spikes") == ["note"]
    many = health_of_run(run_of([*metrics(), *map(spike, (900, 950, 1000, 1100))]))
    assert told(many, "spikes") == ["warning"]
    assert "grad norm 9 where 1 was usual" in next(a.evidence for a in many.advice if a.topic == "spikes")


def test_a_run_that_stopped_itself_is_a_problem(run_of) -> None:
    stopped = {"kind": "stopped", "step": STEPS, "reason": "the loss is nan at step 2000"}
    health = health_of_run(run_of([*metrics(), stopped]))
    assert told(health, "end") == ["problem"]
    assert next(a for a in health.advice if a.topic == "next").text == "First of all: end."


@pytest.mark.parametrize(("broken", "verdict"), [(range(1000, 1100), "warning"), (range(1000, 2001), "problem")])
def test_losses_that_are_null_are_told(run_of, broken: range, verdict: str) -> None:
    lines = metrics(loss=lambda step: None if step in broken else loss_at(step))
    health = health_of_run(run_of(lines))
    assert told(health, "losses") == [verdict]
    assert (1000, None) in health.train


def test_a_loss_that_climbs_is_a_problem(run_of) -> None:
    health = health_of_run(run_of(metrics(loss=lambda step: loss_at(step) + max(0, step - 1000) / 500)))
    assert "problem" in told(health, "course")


def test_a_validation_loss_that_rises_alone_is_overfitting(run_of) -> None:
    lines = metrics()
    for line in lines:
        if line["kind"] == "evaluation":
            line["val_loss"] = loss_at(line["step"]) + max(0, line["step"] - 1000) / 4000
    health = health_of_run(run_of(lines))
    assert told(health, "course") == ["warning"]
    assert told(health, "gap") == ["warning"]
    assert health.forecast is None
    assert "has risen" in health.forecast_refused


@pytest.mark.parametrize(
    ("steps", "train", "verdict", "words"),
    [
        (2000, {}, "ok", "has come down"),
        (20, {}, "note", "warming up"),
        (600, {}, "note", "still high"),
        (1500, {}, "note", "coming down"),
        (2000, {"schedule": "constant"}, "note", "never comes down"),
        (1000, {"schedule": "wsd"}, "note", "still high"),
    ],
)
def test_the_learning_rate_is_read_from_the_schedule(run_of, steps, train, verdict, words) -> None:
    health = health_of_run(run_of(metrics(steps), train=train))
    piece = next(a for a in health.advice if a.topic == "learning rate")
    assert (piece.verdict, words in piece.text) == (verdict, True), piece


def test_a_forecast_says_what_the_schedule_will_do(run_of) -> None:
    assert "down at step 2,000" in health_of_run(run_of()).forecast_caveat
    assert "still ahead" in health_of_run(run_of(metrics(800))).forecast_caveat
    assert health_of_run(run_of(train={"schedule": "constant"})).forecast_caveat == ""


def test_an_unfinished_run_says_how_to_go_on_and_forecasts_its_end(run_of) -> None:
    path = run_of(metrics(800))
    health = health_of_run(path)
    assert next(a.remedy for a in health.advice if a.topic == "length") == f"vramplan train --resume {path}"
    assert STEPS in health.forecast_steps


def test_memory_is_set_against_the_plan(run_of) -> None:
    assert told(health_of_run(run_of(peak_allocated_bytes=5 * 2**30)), "memory") == ["ok"]
    assert told(health_of_run(run_of(peak_allocated_bytes=4 * 2**30)), "memory") == ["warning"]
    retried = metrics(alloc_retries=lambda step: step // 1000)
    assert told(health_of_run(run_of(retried)), "memory") == ["warning"]
    guard = {"kind": "guard", "step": 7, "reason": "memory ran out", "batch_size": 8, "grad_accum": 64}
    assert told(health_of_run(run_of([*metrics(), guard])), "guard") == ["warning"]


def test_throughput_that_drops_and_stays_down_is_a_warning(run_of) -> None:
    def seconds(slow: range):
        return lambda step: 7.0 if step in slow else 524_288 / 136_000

    health = health_of_run(run_of(metrics(step_seconds=seconds(range(1500, 2001)))))
    assert told(health, "throughput") == ["warning"]
    assert health.figures.drops[0].first_step == 1500
    assert told(health_of_run(run_of(metrics(step_seconds=seconds(range(500, 900))))), "throughput") == ["note"]
    assert told(health_of_run(run_of()), "throughput") == []


def test_single_slow_intervals_are_no_drop() -> None:
    rates = [(step, 50.0 if step % 7 == 0 else 100.0) for step in range(1, 200)]
    assert drops(rates) == ()
    assert drops(rates[:STRETCH]) == ()


def test_a_slow_run_is_set_against_what_the_card_should_do(run_of) -> None:
    slow = metrics(step_seconds=30.0)
    health = health_of_run(run_of(slow, tokens_per_second=136_000.0, gpu="RTX 4070"))
    assert told(health, "speed") == ["warning"]
    fast = health_of_run(run_of(metrics(step_seconds=1.0)))
    assert "More than this card can do" in next(a.text for a in fast.advice if a.topic == "speed")


def test_a_run_before_its_first_line_is_reported_as_that(run_of) -> None:
    health = health_of_run(run_of([]))
    assert health.figures.steps_done == 0
    assert health.figures.validation_loss is None
    assert health.forecast is None
    assert health.verdict in ("ok", "note")


def test_a_run_without_its_configuration_still_has_its_losses(run_of) -> None:
    path = run_of()
    (path / "config.toml").unlink()
    health = health_of_run(path)
    assert health.figures.parameters is None
    assert health.figures.steps_done == STEPS
    assert health.forecast is not None
    assert "--config" in health.missing[0]


@pytest.mark.parametrize("damage", [b"\xff\xfe{", b"not json\n{}\n", b'{"kind": 3}\n{"kind": "step"}\n'])
def test_damaged_metrics_are_one_clear_error(run_of, damage: bytes) -> None:
    path = run_of()
    (path / "metrics.jsonl").write_bytes(damage + b"\n" + damage)
    with pytest.raises(ConfigError, match="metrics"):
        health_of_run(path)


@pytest.mark.parametrize("value", [1e308, -1e308, 1e-300, 0, -1, None])
@pytest.mark.parametrize("name", ["loss", "epoch", "tokens", "step_seconds", "tokens_per_second", "alloc_retries"])
def test_numbers_that_cannot_be_are_left_out(run_of, name: str, value: float | None) -> None:
    spike = {"kind": "spike", "step": 5, "what": "loss", "value": 3.0, "usual": value, "times": 1.0}
    health = health_of_run(run_of([*metrics(400, evaluate=50, **{name: value}), spike]))
    assert json.dumps(health.as_dict(), allow_nan=False)
    assert health.figures.steps_done == 400


def test_damaged_facts_of_the_sessions_cost_only_the_device(run_of) -> None:
    path = run_of()
    (path / "run.json").write_text('{"sessions": [[]]}')
    assert health_of_run(path).figures.gpu is None


# -------------------------------------------------------------------- nanoGPT's logs

TABLE = ((0, 10.88, 10.88), (500, 5.86, 5.86), (1000, 4.93, 4.95), (2000, 4.46, 4.48), (3000, 4.30, 4.32),
         (4000, 4.22, 4.24), (5000, 4.16, 4.19), (6000, 4.14, 4.17))  # fmt: skip
STATED = {
    "n_embd": 384, "batch_size": 16, "gradient_accumulation_steps": 32, "max_iters": 6000, "lr_decay_iters": 6000,
    "learning_rate": 5e-4,
}  # fmt: skip


def table_log() -> str:
    lines = []
    for step, train, val in TABLE:
        lines.append(f"step {step}: train loss {train:.4f}, val loss {val:.4f}")
        lines.append(f"iter {step}: loss {train:.4f}, time {40_000 if step else 90_000:.2f}ms, mfu 12.70%")
        lines += [f"iter {s}: loss {train:.4f}, time 3839.02ms, mfu 12.70%" for s in range(step + 10, step + 100, 10)]
    return "\n".join(lines[:-9]) + "\n"


def test_the_run_of_note_003_is_a_41_million_model_that_used_70_percent_of_its_card() -> None:
    health = of_log(table_log(), STATED, gpu=GPU, asked=125_000_000)
    f = health.figures
    assert f.parameters == 40_953_216
    assert f.tokens_seen == 6000 * 524_288
    assert f.tokens_per_parameter == pytest.approx(76.8, abs=0.1)
    assert f.mfu == pytest.approx(0.70, abs=0.005)
    assert f.mfu_printed == pytest.approx(0.127)
    assert f.mfu_printed_here == pytest.approx(0.68, abs=0.005)
    assert f.tokens_per_second == pytest.approx(136_568, abs=1)
    assert f.gap == pytest.approx(0.03)
    assert f.epochs is None
    size = next(a for a in health.advice if a.topic == "size")
    assert size.verdict == "warning"
    assert "41.0M" in size.text
    assert "125M" in size.text
    assert told(health, "first loss") == told(health, "gap") == told(health, "speed") == ["ok"]
    assert told(health, "course") == ["ok"]
    assert health.verdict == "warning"


def test_the_table_alone_still_gives_losses_and_a_forecast() -> None:
    text = "".join(f"step {step}: train loss {train}, val loss {val}\n" for step, train, val in TABLE)
    health = of_log(text)
    assert health.figures.tokens_seen is None
    assert health.figures.mfu is None
    assert health.forecast is not None
    assert [fact.value for fact in health.facts if fact.topic == "parameters"] == ["n/a"]
    assert health.missing


def test_epochs_need_the_tokens_of_the_data() -> None:
    health = of_log(table_log(), STATED, unique_tokens=700_000_000)
    assert health.figures.epochs == pytest.approx(4.5, abs=0.01)
    assert told(health, "data") == ["warning"]


def test_a_decay_that_outlasts_the_run_is_a_warning() -> None:
    health = of_log(table_log(), {**STATED, "lr_decay_iters": 600_000})
    piece = next(a for a in health.advice if a.topic == "learning rate")
    assert piece.verdict == "warning"
    assert "lr_decay_iters=6000" in piece.remedy


def test_weights_that_were_not_new_have_no_first_loss_to_judge() -> None:
    text = "Initializing from OpenAI GPT-2 weights: gpt2\n" + table_log().replace("10.8800", "3.1000")
    assert told(of_log(text, {**STATED, "init_from": "gpt2"}), "first loss") == []
    assert told(of_log(text.partition("\n")[2], STATED), "first loss") == ["problem"]


def test_bfloat16_on_a_card_without_it_has_no_peak() -> None:
    health = of_log(table_log(), STATED, gpu=find_gpu("T4"))
    assert health.figures.mfu is None
    assert "compute capability" in health.figures.mfu_unknown


def test_a_configuration_of_another_model_is_noticed() -> None:
    health = of_log("number of parameters: 29.94M\n" + table_log(), STATED)
    assert told(health, "size") == ["warning"]
    assert health.figures.parameters_without_positions == 29_940_000


def test_spikes_in_a_log_are_found_by_the_trainers_rule() -> None:
    lines = [
        f"iter {s}: loss {4 + 0.01 * ((s * 7) % 5) + (3 if s == 3000 else 0):.4f}, time 5ms" for s in range(0, 5000, 10)
    ]
    health = of_log("\n".join(lines) + "\n")
    assert told(health, "spikes") == ["note"]
    assert "seen every 10 steps" in next(a.evidence for a in health.advice if a.topic == "spikes")


def test_long_curves_are_thinned_for_showing() -> None:
    record = Record(title="x", program="nanogpt", losses=tuple((s, 4.0) for s in range(50_000)), steps_done=50_000)
    health = build_health(record)
    assert len(health.train) <= MOST_SHOWN
    assert health.train[-1] == (49_999, 4.0)


# -------------------------------------------------------------------- small parts


def test_rates_are_those_of_the_trainer() -> None:
    rates = Rates(schedule="cosine", peak=1e-3, minimum=1e-4, warmup_steps=10, total_steps=100)
    assert rates.at(9) == pytest.approx(1e-3)
    assert rates.at(100) == pytest.approx(1e-4)


def test_the_chart_has_both_curves_and_its_scale() -> None:
    chart = loss_chart(((0, 10.0), (50, 5.0), (100, 2.0)), ((0, 10.0), (100, 2.5)))
    body = "\n".join(chart)
    assert "10.00 |" in body
    assert "2.00 |" in body
    assert "100" in chart[-1]
    assert body.count("o") >= 2
    assert loss_chart(((0, 10.0),), ()) == []
    assert loss_chart(((0, None), (5, None)), ()) == []
    assert loss_chart(((0, 3.0), (5, 3.0)), ())
