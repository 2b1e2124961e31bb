"""What a person sees while a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.report import progress as module
from vramplan.report.progress import TrainingView
from vramplan.runconfig import RunConfig
from vramplan.trainer.events import AlreadyFinished, HoursUsed, SpikeSeen, StepLogged, TrackingStopped

GIB = 2**30


def config(plan=None, **train_section) -> RunConfig:
    shape = Shape(n_layer=1, n_head=2, n_embd=16, vocab_size=64, block_size=16)
    return RunConfig.build(shape, StepConfig(batch_size=2), train=train_section, plan=plan or {})


def step(number, **values) -> StepLogged:
    defaults = {
        "total_steps": 100, "tokens": 0, "loss": 3.25, "learning_rate": 1e-3, "grad_norm": 0.5, "epoch": 0.0,
        "tokens_per_second": 59_039.4, "step_seconds": 1.0, "mfu": None, "peak_allocated_bytes": None,
        "peak_reserved_bytes": None, "alloc_retries": None,
    }  # fmt: skip
    return StepLogged(step=number, **defaults | values)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 5000.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def said(capsys, view, *events) -> list[str]:
    for event in events:
        view(event)
    return capsys.readouterr().out.splitlines()


def test_a_step_shows_speed_mfu_memory_of_the_budget_and_nothing_unknown(capsys):
    plan = {"budget_bytes": 11 * GIB, "total_bytes": 12 * GIB}
    view = TrainingView(config(plan), card_bytes=13 * GIB)
    known = step(7, mfu=0.314, peak_allocated_bytes=8 * GIB, peak_reserved_bytes=9 * GIB, alloc_retries=0)
    (line,) = said(capsys, view, known)
    assert line == (
        "step      7/100  loss 3.2500  lr 1.00e-03  grad norm 0.50  59,039 tokens/s  MFU 31.4%  "
        "memory 9.00 GiB of 11.00 GiB"
    )
    (line,) = said(capsys, TrainingView(config()), step(1, tokens_per_second=None))
    assert line.endswith("warming up  MFU n/a")


@pytest.mark.parametrize(
    ("plan", "card", "words"),
    [
        ({"total_bytes": 12 * GIB}, None, "memory 9.00 GiB of 12.00 GiB"),
        (None, 13 * GIB, "memory 9.00 GiB of 13.00 GiB"),
        (None, None, "memory 9.00 GiB (2 allocator retries)"),
    ],
)
def test_memory_is_shown_of_the_best_that_is_known(capsys, plan, card, words):
    view = TrainingView(config(plan), card_bytes=card)
    (line,) = said(capsys, view, step(7, peak_reserved_bytes=9 * GIB, alloc_retries=0 if card or plan else 2))
    assert line.endswith(words)


def test_the_time_left_is_at_the_pace_of_this_session_with_evaluations(capsys, clock):
    view = TrainingView(config())
    (first,) = said(capsys, view, step(41, step_seconds=90.0))
    assert "left" not in first
    clock.now += 10 * 60.0  # ten steps and an evaluation
    (second,) = said(capsys, view, step(51, step_seconds=30.0))
    assert second.endswith("49 min left")


def test_the_time_left_is_no_longer_than_the_hours(capsys, clock):
    view = TrainingView(config(max_hours=2.0))
    said(capsys, view, step(1))
    clock.now += 600
    (line,) = said(capsys, view, step(2, run_seconds=3600.0))
    assert line.endswith("60 min left of 2 h")
    clock.now += 600
    (line,) = said(capsys, view, step(99, run_seconds=5000.0))
    assert line.endswith("12 s left")


def test_a_spike_says_what_how_much_and_how_usual(capsys):
    lines = said(
        capsys,
        TrainingView(config(), quiet=True),
        SpikeSeen(step=1234, what="loss", value=4.5, usual=3.0, times=1.5),
        SpikeSeen(step=1235, what="grad_norm", value=12.0, usual=0.4, times=30.0),
    )
    assert lines == [
        "warning: step 1,234: the loss is 4.5, 1.5 times its usual 3",
        "warning: step 1,235: the gradient norm is 12, 30 times its usual 0.4",
    ]


def test_a_tracker_that_failed_is_said_without_what_could_command_the_terminal(capsys):
    event = TrackingStopped(tracker="wandb", reason="no route\x1b[2J to host")
    (line,) = said(capsys, TrainingView(config(), quiet=True), event)
    assert line.startswith("warning: wandb is switched off: no route")
    assert "\x1b" not in line


def test_hours_that_are_over_say_how_to_go_on(capsys):
    event = HoursUsed(run_dir=Path("r"), checkpoint=Path("r/c"), step=60, total_steps=100, max_hours=1.5, val_loss=3.21)
    assert said(capsys, TrainingView(config(), quiet=True), event) == [
        "The 1.5 h of --max-hours are over after step 60 of 100, validation loss 3.2100; saved r/c.",
        "Go on with: vramplan train --resume r --max-hours 3",
    ]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("cosine", "Its learning rate has come down: a longer run is a new one, with more --max-steps."),
        ("constant", "Go on with: vramplan train --resume r --max-steps 200"),
    ],
)
def test_a_finished_run_says_whether_it_can_go_on(capsys, schedule, words):
    event = AlreadyFinished(run_dir=Path("r"), step=100, best_val_loss=3.0)
    lines = said(capsys, TrainingView(config(schedule=schedule)), event)
    assert lines == ["r is already finished: 100 steps.", words]
