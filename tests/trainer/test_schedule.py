"""The learning rate over a run, how far a run goes, and which runs may be made longer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import config

from vramplan.errors import DataError
from vramplan.runconfig import RunConfig
from vramplan.trainer import recorder
from vramplan.trainer.checkpoint import CheckpointFolder
from vramplan.trainer.events import AlreadyFinished, Evaluated, Finished, HoursUsed, StepLogged
from vramplan.trainer.loop import train
from vramplan.trainer.metrics import read_metrics
from vramplan.trainer.schedule import first_difference, learning_rate, schedule_of


def rates(warmup: int, total: int, peak: float = 1.0, minimum: float = 0.1) -> list[float]:
    return [learning_rate(s, peak=peak, minimum=minimum, warmup_steps=warmup, total_steps=total) for s in range(total)]


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert rates(4, 100)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_half_way_down_the_cosine_is_the_middle():
    assert rates(10, 110)[60] == pytest.approx(0.55)


def test_it_ends_near_the_minimum_and_stays_there():
    assert rates(10, 1000)[-1] == pytest.approx(0.1, abs=1e-5)
    for step in (1000, 5000):
        assert learning_rate(step, peak=1.0, minimum=0.1, warmup_steps=10, total_steps=1000) == 0.1


def test_without_warm_up_it_begins_at_the_peak():
    assert rates(0, 10)[0] == 1.0


def test_a_warm_up_longer_than_the_run_still_reaches_the_peak():
    assert rates(700, 4) == [0.25, 0.5, 0.75, 1.0]


@given(st.integers(0, 300), st.integers(1, 200))
def test_it_rises_to_one_maximum_and_then_falls(warmup, total):
    found = rates(warmup, total)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert max(found) == 1.0
    assert all(0 < r <= 1 for r in found)


# --- the other two schedules -----------------------------------------------------------------------------------------


def shaped(schedule: str, warmup: int, total: int, decay: float = 0.2) -> list[float]:
    return [
        learning_rate(
            s, schedule=schedule, peak=1.0, minimum=0.0, warmup_steps=warmup, total_steps=total, decay_fraction=decay
        )
        for s in range(total)
    ]


def test_a_constant_rate_warms_up_and_stays_also_beyond_the_end():
    assert shaped("constant", 2, 5) == [0.5, 1.0, 1.0, 1.0, 1.0]
    beyond = {"peak": 1.0, "minimum": 0.1, "warmup_steps": 2, "total_steps": 5}
    assert learning_rate(9, schedule="constant", **beyond) == 1.0
    assert learning_rate(9, schedule="wsd", **beyond) == 0.1


def test_wsd_is_stable_and_falls_on_a_line_in_its_last_part():
    assert shaped("wsd", 2, 20) == pytest.approx([0.5, *[1.0] * 16, 0.75, 0.5, 0.25])
    assert shaped("wsd", 0, 10, decay=1.0) == pytest.approx([1 - s / 10 for s in range(10)])


@pytest.mark.parametrize(
    ("warmup", "total", "decay", "rates"),
    [
        (3, 4, 0.5, [1 / 3, 2 / 3, 1.0, 1.0]),  # the warm-up leaves the decay one of its two steps
        (9, 3, 0.5, [1 / 3, 2 / 3, 1.0]),
        (0, 3, 0.01, [1.0, 1.0, 1.0]),  # at least one step decays; it begins at the peak
        (0, 1, 0.2, [1.0]),
    ],
)
def test_a_short_wsd_run(warmup, total, decay, rates):
    assert shaped("wsd", warmup, total, decay) == pytest.approx(rates)


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(0, 90), st.integers(1, 90), st.floats(0.01, 1.0))
def test_every_schedule_rises_to_its_peak_once_and_never_again(schedule, warmup, total, decay):
    found = shaped(schedule, warmup, total, decay)
    top = found.index(max(found))
    assert max(found) == 1.0
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


# --- in a run --------------------------------------------------------------------------------------------------------


def run(shards, run_dir, cfg, **options):
    events = []
    train(cfg, shards, run_dir, device=torch.device("cpu"), on_event=events.append, **options)
    return events


def steps_of(run_dir, field):
    return {x["step"]: x[field] for x in read_metrics(run_dir / "metrics.jsonl") if x["kind"] == "step"}


def weights(run_dir):
    return CheckpointFolder(run_dir / "checkpoints").newest()[1].model


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_run_trains_at_the_rates_of_its_schedule(shards, tmp_path, schedule):
    cfg = config(schedule=schedule, decay_fraction=0.25)
    run(shards, tmp_path / "run", cfg)
    rates = steps_of(tmp_path / "run", "learning_rate")
    assert list(rates.values()) == [schedule_of(cfg)(step) for step in range(12)]
    if schedule == "wsd":
        expected = [0.005, *[0.01] * 9, 0.007, 0.004]
        assert list(rates.values()) == pytest.approx(expected)


# --- another length --------------------------------------------------------------------------------------------------


def test_runs_of_two_lengths_are_the_same_until_the_decay_begins():
    short, long = (config(schedule="wsd", max_steps=n) for n in (50, 100))
    assert first_difference(short, long, 41) is None
    assert first_difference(short, long, 50) == 41
    cosines = [config(max_steps=n) for n in (50, 100)]
    assert first_difference(*cosines, 3) is None, "so far it has only warmed up"
    assert first_difference(*cosines, 4) == 3


def test_a_finished_constant_run_goes_on_as_the_longer_run_it_would_have_been(shards, tmp_path):
    run(shards, tmp_path / "run", config(schedule="constant"))
    events = run(shards, tmp_path / "run", config(schedule="constant", max_steps=20), resume=True)
    assert type(events[-1]) is Finished
    run(shards, tmp_path / "straight", config(schedule="constant", max_steps=20))
    assert steps_of(tmp_path / "run", "loss") == steps_of(tmp_path / "straight", "loss")
    assert all(torch.equal(w, weights(tmp_path / "straight")[n]) for n, w in weights(tmp_path / "run").items())
    assert RunConfig.load(tmp_path / "run" / "config.toml").train.max_steps == 20


def test_a_constant_run_can_be_ended_by_a_decay(shards, tmp_path):
    run(shards, tmp_path / "run", config(schedule="constant"))
    ended = config(schedule="wsd", max_steps=20, decay_fraction=0.4)
    run(shards, tmp_path / "run", ended, resume=True)
    run(shards, tmp_path / "straight", ended)
    assert steps_of(tmp_path / "run", "loss") == steps_of(tmp_path / "straight", "loss")
    assert steps_of(tmp_path / "run", "learning_rate")[20] < 0.003


def test_a_wsd_run_that_is_cut_short_can_begin_its_decay_at_once():
    long, cut = (config(schedule="wsd", max_steps=n) for n in (10_000, 100))
    assert first_difference(long, cut, 80) is None
    assert schedule_of(cut)(81) < schedule_of(cut)(80) == 0.01


@pytest.mark.parametrize(
    ("schedule", "other", "why"),
    [
        ("cosine", {"max_steps": 24}, r"step 4 of the 12 that are done would have had another learning rate.*constant"),
        ("wsd", {"max_steps": 24}, r"step 12 of the 12 that are done would have had another learning rate"),
        ("constant", {"max_steps": 8}, r"12 steps are done: use at least as many, or start a new run"),
        ("cosine", {"min_learning_rate": 0.0}, r"min_learning_rate=0.001: step \d of the 12"),
    ],
)
def test_a_length_that_the_steps_done_do_not_belong_to_is_refused(shards, tmp_path, schedule, other, why):
    run(shards, tmp_path / "run", config(schedule=schedule))
    before = (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(DataError, match=why):
        run(shards, tmp_path / "run", config(schedule=schedule, **other), resume=True)
    assert (tmp_path / "run" / "config.toml").read_text() == before


# --- a budget of hours -----------------------------------------------------------------------------------------------


class Clock:
    """Hours that pass only where a test says so."""

    def __init__(self, monkeypatch):
        self.seconds = 1000.0
        monkeypatch.setattr(recorder, "clock", lambda: self.seconds)


def trained(shards, run_dir, clock, cfg, *, each_step=600.0, each_evaluation=0.0, **options):
    """A run in which a step takes ten minutes."""
    events = []

    def on_event(event):
        events.append(event)
        clock.seconds += {StepLogged: each_step, Evaluated: each_evaluation}.get(type(event), 0.0)

    train(cfg, shards, run_dir, device=torch.device("cpu"), on_event=on_event, **options)
    return events


def test_a_run_ends_with_its_hours_saved_evaluated_and_goes_on_with_more(shards, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    events = trained(shards, tmp_path / "run", clock, config(max_hours=0.9))
    ended = events[-1]
    assert isinstance(ended, HoursUsed)
    assert (ended.step, ended.total_steps, ended.max_hours) == (6, 12, 0.9)
    assert ended.checkpoint.name.startswith("step-000006.")
    assert (events[-2].step, events[-2].val_loss) == (6, ended.val_loss)
    assert not [e for e in events if isinstance(e, Finished)]

    clock.seconds += 1e6  # time between sessions does not count
    again = trained(shards, tmp_path / "run", clock, config(max_hours=0.9), resume=True)
    assert [e.step for e in again if isinstance(e, StepLogged | HoursUsed)] == [6], "nothing is left of 0.9 hours"
    more = trained(shards, tmp_path / "run", clock, config(max_hours=1.5), resume=True)
    assert [e.step for e in more if isinstance(e, StepLogged)] == [7, 8, 9]
    clock.seconds += 1e6
    last = trained(shards, tmp_path / "run", clock, config(), resume=True)
    assert type(last[-1]) is Finished

    run(shards, tmp_path / "straight", config())
    assert steps_of(tmp_path / "run", "loss") == steps_of(tmp_path / "straight", "loss")
    assert steps_of(tmp_path / "run", "learning_rate") == steps_of(tmp_path / "straight", "learning_rate")


def test_evaluations_count_as_hours(shards, tmp_path, monkeypatch):
    events = trained(
        shards, tmp_path / "run", Clock(monkeypatch), config(max_hours=1.0), each_step=60.0, each_evaluation=1800.0
    )
    assert events[-1].step == 4, "two evaluations, at step 0 and 4, are an hour"


def test_the_time_of_steps_that_a_killed_session_lost_counts(shards, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    clock, seen = Clock(monkeypatch), []

    def die(event):
        seen.append(event)
        clock.seconds += 600 if isinstance(event, StepLogged) else 0
        if isinstance(event, StepLogged) and event.step == 7:
            raise Killed

    with pytest.raises(Killed):
        train(config(), shards, tmp_path / "run", device=torch.device("cpu"), on_event=die)
    events = trained(shards, tmp_path / "run", clock, config(max_hours=1.5), resume=True)
    assert [e.step for e in events if isinstance(e, StepLogged)] == [5, 6, 7], "an hour of the first session, and half"
    assert isinstance(events[-1], HoursUsed)


def test_hours_that_are_not_used_up_change_nothing(shards, tmp_path, monkeypatch):
    events = trained(shards, tmp_path / "run", Clock(monkeypatch), config(max_hours=2.1))
    assert type(events[-1]) is Finished
    assert type(run(shards, tmp_path / "run", config(max_hours=0.1), resume=True)[-1]) is AlreadyFinished
