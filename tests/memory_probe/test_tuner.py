"""The study: where it begins, what it never repeats, when it stops, and that nothing finished is ever lost."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vramplan.errors import ConfigError, VramplanError
from vramplan.memory_probe.arms import Space, undisturbed_rate
from vramplan.memory_probe.measurement import Measurement
from vramplan.memory_probe.study import open_study
from vramplan.memory_probe.tuner import SETTINGS, Arm, Result, Trial, key_of, tune
from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import estimate
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.report.tuning import plot, rank_correlation, ranked
from vramplan.runconfig import ModelSection, StepSection
from vramplan.units import GIB

SHAPE = Shape(n_layer=2, n_head=2, n_embd=64, vocab_size=512, block_size=64)
SPACE = Space(shapes=(SHAPE,), step=StepConfig(batch_size=8, dtype="float32", device="cpu"), gpu=None, budget_bytes=GIB)
RECORDED = Path(__file__).parent.parent / "data" / "tuner_timings.json"


def made_up(arm: Arm) -> Result:
    """A smooth landscape with an interaction; its best is not the planner's first."""
    p = arm.params
    rate = 1000.0 - 90 * abs(math.log2(p["batch_size"]) - 1)
    rate *= {"none": 1.0, "selective": 0.97, "block": 0.8}[p["checkpointing"]]
    rate *= {"adamw-fused": 1.0, "adamw-foreach": 1.05}[p["optimizer"]]
    rate *= 1.1 if p["loss"] == "full" and p["batch_size"] <= 2 else 1.0
    return Result("fits", rate)


class Counted:
    def __init__(self, measure: Any = made_up) -> None:
        self.seen: Counter[Any] = Counter()
        self._measure = measure

    def __call__(self, arm: Arm) -> Result:
        self.seen[arm.key] += 1
        return self._measure(arm)


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.sqlite'}"


def test_it_begins_with_the_planners_best_and_finds_the_best_of_all(tmp_path: Path) -> None:
    arms = SPACE.arms()
    measure = Counted()
    tuned = tune(open_study(url(tmp_path), "s"), arms, measure)
    assert tuned.trials[0].arm == arms[0]
    assert tuned.best is not None
    assert tuned.best.result.tokens_per_second == max(made_up(arm).tokens_per_second or 0 for arm in arms)
    assert set(measure.seen.values()) == {1}
    assert tuned.probes < len(arms)
    assert "no improvement" in tuned.stopped


def test_every_arm_runs_the_same_tokens_once() -> None:
    arms = SPACE.arms()
    assert len({arm.key for arm in arms}) == len(arms)
    assert {arm.step.batch_size * arm.step.grad_accum for arm in arms} == {8}
    assert {arm.step.dtype for arm in arms} == {"float32"}
    assert [arm.rank for arm in arms] == list(range(len(arms)))
    chunked = [arm for arm in arms if arm.step.loss == "chunked" and arm.step.batch_size == 1]
    assert len({arm.params["loss"] for arm in chunked}) == 1  # a micro-batch of 64 tokens is one slice of any size


def test_on_a_card_compile_and_the_allocator_vary_too() -> None:
    card = find_gpu("4070")
    step = StepConfig(batch_size=8, grad_accum=8)
    shape = Shape(n_layer=12, n_head=12, n_embd=768)
    arms = Space(shapes=(shape,), step=step, gpu=card, budget_bytes=8 * GIB, compiles=(True, False)).arms()
    for name, values in (("compile", 2), ("allocator", 2 if os.name != "nt" else 1), ("optimizer", 2)):
        assert len({arm.params[name] for arm in arms}) == values
    assert arms[0].predicted == max(arm.predicted or 0 for arm in arms[:40])
    pinned = Space(shapes=(shape,), step=replace(step, optimizer="muon"), gpu=card, budget_bytes=8 * GIB).arms()
    assert {arm.params["optimizer"] for arm in pinned} == {"muon"}


def test_what_does_not_fit_is_a_violated_constraint_and_not_a_failed_trial(tmp_path: Path) -> None:
    def measure(arm: Arm) -> Result:
        return Result("out_of_memory", violation=0.3) if arm.step.batch_size > 2 else made_up(arm)

    study = open_study(url(tmp_path), "s")
    tuned = tune(study, SPACE.arms(), measure)
    assert tuned.best is not None
    assert tuned.best.arm.step.batch_size <= 2
    out = [t for t in study.trials if t.user_attrs.get("outcome") == "out_of_memory"]
    assert out
    assert {t.state.name for t in out} == {"COMPLETE"}
    assert all(t.value == 0 and max(t.constraints.values()) == 0.3 for t in out)


def tight(share: float, space: Space = SPACE) -> Space:
    """The space with the budget that this share of the arms fits."""
    needs = sorted(estimate(arm.shape, arm.step).process_bytes for arm in space.arms())
    return replace(space, budget_bytes=needs[int(len(needs) * share)])


def test_the_estimate_rules_arms_out_before_anything_is_probed(tmp_path: Path) -> None:
    space, measure = tight(0.5), Counted()
    arms = space.arms()
    out = [space.ruled_out(arm) is not None for arm in arms]
    assert 0 < sum(out) < len(out)
    assert out == sorted(out)  # those that fit come first
    study = open_study(url(tmp_path), "s")
    tuned = tune(study, arms, measure, ruled_out=space.ruled_out, patience=10**6)
    assert sum(measure.seen.values()) == tuned.probes == out.count(False)
    ruled = [t for t in study.trials if t.user_attrs.get("outcome") == "estimate"]
    assert len(ruled) == out.count(True)
    assert all(t.state.name == "COMPLETE" and max(t.constraints.values()) > 0 for t in ruled)


def test_another_budget_is_another_question_to_the_same_study(tmp_path: Path) -> None:
    """Less memory rules out what had won; more lets in what had been ruled out; nothing is measured twice."""
    measure = Counted(lambda arm: replace(made_up(arm), needs_bytes=estimate(arm.shape, arm.step).process_bytes))
    small = replace(SPACE, step=replace(SPACE.step, batch_size=2))

    def session(share: float) -> Any:
        space = tight(share, small)
        study = open_study(url(tmp_path), "s")
        return space, tune(
            study, space.arms(), measure, ruled_out=space.ruled_out, budget_bytes=space.budget_bytes, patience=10**6
        )

    for share in (0.6, 0.3, 0.9):
        space, tuned = session(share)
        fitting = [arm for arm in space.arms() if space.ruled_out(arm) is None]
        assert tuned.best is not None
        assert tuned.best.result.tokens_per_second == max(made_up(arm).tokens_per_second or 0 for arm in fitting)
    assert set(measure.seen.values()) == {1}


def measured(arm: Arm, **changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "id": "0123456789abcdef", "when": "2026-11-21T00:00:00+00:00", "version": "0", "outcome": "fits",
        "architecture": "8.9", "process_bytes": 2**28, "allocated_bytes": 2**27, "step_seconds": (0.2, 0.1, 0.1, 0.4),
        "tokens_per_second": 512 / 0.15, **changes,
    }  # fmt: skip
    model = {n: getattr(arm.shape, n) for n in ModelSection.model_fields}
    step = {n: getattr(arm.step, n) for n in StepSection.model_fields}
    return Measurement(model=ModelSection(**model), step=StepSection(**step), **values)


@pytest.mark.parametrize(
    ("changes", "outcome", "violation"),
    [
        ({}, "fits", None),
        ({"outcome": "spilled"}, "spilled", 1.0),
        ({"outcome": "out_of_memory"}, "out_of_memory", 1.0),
        ({"outcome": "timed_out"}, "timed_out", None),
    ],
)
def test_a_measurement_becomes_a_result(changes: dict[str, Any], outcome: str, violation: float | None) -> None:
    kept: list[Measurement] = []
    arm = SPACE.arms()[0]
    result = SPACE.measured_by(lambda arm: measured(arm, **changes), kept.append)(arm)
    assert (result.outcome, result.violation, result.failed) == (outcome, violation, outcome == "timed_out")
    assert len(kept) == 1
    if outcome == "fits":
        assert result.tokens_per_second == result.value == undisturbed_rate(kept[0]) == 512 / 0.1
        assert result.needs_bytes == kept[0].process_bytes


def test_on_a_busy_machine_arms_are_compared_by_a_reference_run_beside_them() -> None:
    quiet, busy = (
        SPACE.measured_by(lambda a, f=f: measured(a, step_seconds=(0.1 * f,), reference_ratio=2.0), lambda m: None)
        for f in (1.0, 3.0)
    )
    arm = SPACE.arms()[0]
    assert quiet(arm).tokens_per_second == pytest.approx(3 * (busy(arm).tokens_per_second or 0))
    assert quiet(arm).value == busy(arm).value == 256


def test_an_interrupted_probe_ends_the_study_and_is_no_result(tmp_path: Path) -> None:
    arms = SPACE.arms()
    stopping = Counted(lambda arm: SPACE.measured_by(lambda a: measured(a, outcome="killed"), lambda f: None)(arm))
    with pytest.raises(KeyboardInterrupt):
        tune(open_study(url(tmp_path), "s"), arms, stopping)
    assert tune(open_study(url(tmp_path), "s"), arms, made_up).trials[0].arm == arms[0]


def test_failures_that_say_nothing_about_memory_are_not_repeated(tmp_path: Path) -> None:
    measure = Counted(lambda arm: Result("not_memory", reason="no kernel"))
    study = open_study(url(tmp_path), "s")
    tuned = tune(study, SPACE.arms(), measure, patience=5)
    assert tuned.best is None
    assert set(measure.seen.values()) == {1}
    assert {t.state.name for t in study.trials if "outcome" in t.user_attrs} == {"FAIL"}


def test_it_stops_after_trials_after_time_and_when_nothing_is_left(tmp_path: Path) -> None:
    arms = SPACE.arms()
    assert tune(open_study(url(tmp_path), "a"), arms, made_up, trials=4).probes == 4
    assert "time" in tune(open_study(url(tmp_path), "b"), arms, made_up, seconds=0).stopped
    few = arms[:3]
    everything = tune(open_study(url(tmp_path), "c"), few, made_up, trials=99)
    assert (everything.probes, everything.stopped) == (3, "every arm has been tried")


def test_a_second_session_goes_on_and_measures_nothing_again(tmp_path: Path) -> None:
    arms, measure = SPACE.arms(), Counted()
    first = tune(open_study(url(tmp_path), "s"), arms, measure, trials=5)
    second = tune(open_study(url(tmp_path), "s"), arms, measure, trials=9)
    assert (first.probes, second.probes) == (5, 9)
    assert sum(measure.seen.values()) == 9
    assert [t.arm for t in second.trials[:5]] == [t.arm for t in first.trials]


def test_another_space_under_the_same_name_is_refused(tmp_path: Path) -> None:
    tune(open_study(url(tmp_path), "s"), SPACE.arms(), made_up, trials=2)
    other = replace(SPACE, step=StepConfig(batch_size=16, dtype="float32", device="cpu")).arms()
    with pytest.raises(VramplanError, match="other choices of batch_size"):
        tune(open_study(url(tmp_path), "s"), other, made_up)


@pytest.mark.parametrize("storage", ["nonsense://x", "sqlite:////no/such/folder/s.sqlite", "/no/such/folder/s.journal"])
def test_a_storage_that_cannot_be_used_is_one_message(storage: str) -> None:
    with pytest.raises(ConfigError, match="--storage"):
        open_study(storage, "s")


def test_a_journal_file_serves_as_well(tmp_path: Path) -> None:
    storage = str(tmp_path / "study.journal")
    tune(open_study(storage, "s"), SPACE.arms(), made_up, trials=3)
    assert tune(open_study(storage, "s"), SPACE.arms(), made_up, trials=4).probes == 4


KILLED = """
import json, os, sys, time
sys.path.insert(0, os.path.dirname(sys.argv[1]))
from test_tuner import SPACE, made_up
from vramplan.memory_probe.study import open_study, session_lock
from vramplan.memory_probe.tuner import tune
def measure(arm):
    time.sleep(0.05)
    return made_up(arm)
def done(trial, best):
    with open(sys.argv[3], "a") as f:
        f.write(json.dumps(list(trial.arm.key)) + "\\n")
storage, arms = sys.argv[2], SPACE.arms()[:int(sys.argv[4])]
tune(open_study(storage, "s"), arms, measure, patience=10**6, on_trial=done, lock=session_lock(storage))
"""


def test_killed_ten_times_it_loses_no_finished_trial(tmp_path: Path) -> None:
    """SIGKILL at any moment; what had been reported as done is still there, and nothing is measured twice."""
    log, arms = tmp_path / "done.jsonl", SPACE.arms()
    log.touch()
    for number in range(10):
        process = subprocess.Popen([sys.executable, "-c", KILLED, __file__, url(tmp_path), str(log), "99"])
        seen, deadline = log.read_text().count("\n"), time.monotonic() + 60
        while process.poll() is None and log.read_text().count("\n") == seen and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.013 * number)
        process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        process.wait()
    finished = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
    assert len(finished) >= 10
    assert len(set(finished)) == len(finished)
    tuned = tune(open_study(url(tmp_path), "s"), arms, made_up, seconds=0)
    assert set(finished) <= {t.arm.key for t in tuned.trials}
    assert all(t.result == made_up(t.arm) for t in tuned.trials)


def test_several_sessions_share_one_study(tmp_path: Path) -> None:
    log = tmp_path / "done.jsonl"
    log.touch()
    open_study(url(tmp_path), "s")
    processes = [
        subprocess.Popen([sys.executable, "-c", KILLED, __file__, url(tmp_path), str(log), "16"]) for _ in range(2)
    ]  # fmt: skip
    assert [p.wait(120) for p in processes] == [0, 0]
    finished = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
    assert {arm.key for arm in SPACE.arms()[:16]} == set(finished)
    assert len(finished) == len(set(finished))


def test_recorded_timings_replayed_the_winner_is_within_three_percent_in_a_third_of_the_probes(tmp_path: Path) -> None:
    rows = json.loads(RECORDED.read_text(encoding="utf-8"))
    rates = {key_of(row["params"]): row["score"] for row in rows}
    shape = Shape(n_layer=3, n_head=4, n_embd=128, vocab_size=4096, block_size=128)
    arms = replace(SPACE, shapes=(shape,), budget_bytes=2**34).arms()
    assert {arm.key for arm in arms} == set(rates)
    for seed in range(5):
        study = open_study(url(tmp_path), f"seed {seed}", seed)
        tuned = tune(study, arms, lambda arm: Result("fits", rates[arm.key]), trials=len(arms) // 3)
        assert tuned.best is not None
        assert tuned.best.result.tokens_per_second is not None
        assert tuned.best.result.tokens_per_second >= 0.97 * max(rates.values())


def test_ranks_are_compared_and_the_picture_drawn(tmp_path: Path) -> None:
    tuned = tune(open_study(url(tmp_path), "s"), SPACE.arms(), made_up, trials=6)
    running = ranked(tuned)
    assert [t.result.tokens_per_second for t in running] == sorted(
        (t.result.tokens_per_second or 0 for t in tuned.trials), reverse=True
    )
    by_rank = sorted(tuned.trials, key=lambda t: t.arm.rank)
    assert rank_correlation(by_rank) == 1
    assert rank_correlation(by_rank[::-1]) == -1
    assert rank_correlation(by_rank[:2]) is None
    missed = Trial(99, running[0].arm, Result("out_of_memory", violation=1.0))
    picture = plot(replace(tuned, trials=(*tuned.trials, missed)))
    assert picture.count("<circle") == 6
    assert picture.count('class="miss"') == 1


def test_settings_name_what_an_arm_may_differ_in() -> None:
    assert tuple(SPACE.arms()[0].params) == SETTINGS
