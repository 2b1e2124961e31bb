"""Trackers: the curves arrive, go on after a resume, and nothing a tracker does can hold up or end a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from tiny import config

from vramplan.cli import main
from vramplan.errors import ConfigError
from vramplan.planner.shape import Shape
from vramplan.runconfig import RunConfig
from vramplan.trainer import trackers as module
from vramplan.trainer.events import Finished, SpikeSeen, StepLogged, TrackingStarted, TrackingStopped
from vramplan.trainer.loop import train
from vramplan.trainer.metrics import read_metrics
from vramplan.trainer.trackers import Tracking, build_trackers


def tracked_run(shards, run_dir, trackers, *, stop_after=None, **options):
    """Train with ``trackers``; with ``stop_after`` the process "dies" at that step."""
    events = []

    def on_event(event):
        events.append(event)
        if isinstance(event, StepLogged) and event.step == stop_after:
            raise KeyboardInterrupt

    cfg = config()
    with Tracking(trackers, cfg, on_event) as tracking:
        train(cfg, shards, run_dir, device=torch.device("cpu"), on_event=tracking, **options)
    return events


def lines(run_dir, kind):
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == kind]


def of(events, kind):
    return [e for e in events if isinstance(e, kind)]


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def curves(run_dir) -> dict[str, dict[int, float]]:
    """What TensorBoard itself would show of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: {s.step: s.value for s in shown.Scalars(tag)} for tag in shown.Tags()["scalars"]}


def test_tensorboard_shows_every_line(shards, tmp_path):
    events = tracked_run(shards, tmp_path / "run", build_trackers(["tensorboard"]))
    (started,) = of(events, TrackingStarted)
    assert started.where == f"tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}"
    shown = curves(tmp_path / "run")
    steps = lines(tmp_path / "run", "step")
    for name in ("loss", "learning_rate", "grad_norm", "tokens"):
        assert shown[f"train/{name}"] == pytest.approx({x["step"]: x[name] for x in steps})
    assert list(shown["speed/tokens_per_second"]) == list(range(2, 13)), "the first step has no pace"
    assert shown["validation/loss"] == pytest.approx(
        {x["step"]: x["val_loss"] for x in lines(tmp_path / "run", "evaluation")}
    )
    assert "memory/peak_reserved_gib" not in shown, "a CPU has none"


def test_a_resumed_run_continues_its_curves_and_hides_what_was_lost(shards, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tracked_run(shards, tmp_path / "run", build_trackers(["tensorboard"]), stop_after=7)
    assert list(curves(tmp_path / "run")["train/loss"])[-1] >= 6
    tracked_run(shards, tmp_path / "run", build_trackers(["tensorboard"]), resume=True)
    tracked_run(shards, tmp_path / "straight", build_trackers(["tensorboard"]))
    for tag in ("train/loss", "validation/loss"):
        assert curves(tmp_path / "run")[tag] == curves(tmp_path / "straight")[tag]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2, "both sessions were written"


# --- what a tracker cannot do ----------------------------------------------------------------------------------------


class Recording:
    """A tracker that keeps what it is given, and fails where it is told to."""

    name = "recording"

    def __init__(self, fail_in="", wait_in="", release=None):
        self.fail_in, self.wait_in, self.release = fail_in, wait_in, release
        self.calls = []

    def _do(self, what, *values):
        self.calls.append((what, *values))
        if self.wait_in == what:
            self.release.wait()
        if self.fail_in == what:
            raise OSError(28, "No space left on device")

    def start(self, config, run_dir, resume_step):
        self._do("start", run_dir, resume_step)
        return "nowhere"

    def log(self, step, values):
        self._do("log", step, values)

    def finish(self):
        self._do("finish")


def test_a_tracker_is_started_fed_in_order_and_finished(shards, tmp_path):
    tracker = Recording()
    tracked_run(shards, tmp_path / "run", [tracker])
    assert tracker.calls[0] == ("start", tmp_path / "run", 0)
    assert [(step, "train/loss" in values) for _, step, values in tracker.calls[1:-1]] == [
        (0, False), (1, True), (2, True), (3, True), (4, True), (4, False), (5, True), (6, True), (7, True), (8, True),
        (8, False), (9, True), (10, True), (11, True), (12, True), (12, False),
    ]  # fmt: skip
    assert tracker.calls[-1] == ("finish",)


def test_a_spike_is_tracked_and_what_is_not_a_number_is_not():
    tracker = Recording()
    with Tracking([tracker], config(), lambda event: None) as tracking:
        tracking(SpikeSeen(step=9, what="grad_norm", value=8.0, usual=2.0, times=4.0))
        tracking(SpikeSeen(step=10, what="loss", value=float("inf"), usual=2.0, times=float("inf")))
    assert [call[1:] for call in tracker.calls if call[0] == "log"] == [(9, {"spike/grad_norm": 8.0})]


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_failing_tracker_is_switched_off_with_one_message(shards, tmp_path, where):
    failing, sound = Recording(fail_in=where), Recording()
    events = tracked_run(shards, tmp_path / "run", [failing, sound])
    (stopped,) = of(events, TrackingStopped)
    assert (stopped.tracker, stopped.reason) == ("recording", "[Errno 28] No space left on device")
    assert len(of(events, Finished)) == 1
    assert len(lines(tmp_path / "run", "step")) == 12
    assert sound.calls[-1] == ("finish",), "the other one goes on"
    if where != "finish":
        assert [call[0] for call in failing.calls if call[0] == where] == [where], "it is not asked again"


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_hangs_neither_delays_the_run_nor_its_end(shards, tmp_path, monkeypatch, where):
    monkeypatch.setattr(module, "FINISH_SECONDS", 0.2)
    release = threading.Event()
    events = tracked_run(shards, tmp_path / "run", [Recording(wait_in=where, release=release)])
    release.set()
    assert len(of(events, Finished)) == 1
    (stopped,) = of(events, TrackingStopped)
    assert stopped.reason == "it was still busy when the run was over; its last lines may be missing"


def test_a_tracker_that_falls_too_far_behind_is_given_up(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUEUED", 3)
    release = threading.Event()
    events = tracked_run(shards, tmp_path / "run", [Recording(wait_in="log", release=release)])
    release.set()
    (stopped,) = of(events, TrackingStopped)
    assert stopped.reason == "it is 3 lines behind"
    assert events.index(stopped) < events.index(of(events, Finished)[0]), "it is said at once, and nobody waits for it"


def test_a_run_that_writes_nothing_starts_no_tracker(shards, tmp_path):
    tracked_run(shards, tmp_path / "run", [])
    tracker = Recording()
    tracked_run(shards, tmp_path / "run", [tracker], resume=True)  # finished already
    assert tracker.calls == []


# --- packages --------------------------------------------------------------------------------------------------------


def test_no_package_is_imported_unasked():
    program = "import sys, vramplan.trainer.trackers; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "tensorboard", "wandb", "trackio"}.isdisjoint(loaded)


@pytest.fixture
def without_packages(monkeypatch):
    """An environment where none of the trackers is installed."""
    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)


def test_every_missing_package_is_named_with_its_extra(without_packages):
    with pytest.raises(ConfigError) as caught:
        build_trackers(["tensorboard", "wandb:mine", "trackio"])
    assert [problem.value for problem in caught.value.problems] == ["tensorboard", "wandb:mine", "trackio"]
    for problem, extra in zip(caught.value.problems, ("tensorboard", "wandb", "trackio"), strict=True):
        assert problem.remedy == f'pip install "vramplan[{extra}]", or go without it'


def command_line(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args], prog_name="vramplan")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def corpus(tmp_path):
    pq.write_table(
        pa.table({"text": ["the cat sat on the mat and the dog on the log. " * 9] * 60}), tmp_path / "t.parquet"
    )
    return tmp_path / "t.parquet"


@pytest.fixture
def config_file(tmp_path):
    given = config(max_steps=4)
    shape = Shape(n_layer=1, n_head=1, n_embd=16, block_size=32)
    settings = given.train.model_dump(exclude_none=True)
    RunConfig.build(shape, given.step_config, train=settings).save(tmp_path / "run.toml")
    return tmp_path / "run.toml"


def test_nothing_starts_without_the_package(without_packages, corpus, config_file, tmp_path):
    out = tmp_path / "run"
    said = command_line(
        "train", config_file, "--data", tmp_path / "no.parquet", "--out", out, "--track", "trackio", code=2
    ).stderr
    assert 'pip install "vramplan[trackio]"' in said
    assert "no.parquet" in said, "with every other problem"
    assert not out.exists()


def test_a_run_remembers_its_trackers_and_none_ends_them(corpus, config_file, tmp_path):
    out = tmp_path / "run"
    first = command_line(
        "train", config_file, "--data", corpus, "--out", out, "--track", "tensorboard", "--max-hours", "1e-9"
    ).stdout
    assert f"Curves in tensorboard: tensorboard --logdir {out / 'tensorboard'}" in first
    assert "The 1e-09 h of --max-hours are over after step 0 of 4" in first
    assert f"Go on with: vramplan train --resume {out} --max-hours 2e-09" in first
    command_line("train", "--resume", out, "--max-hours", "1")
    assert list(curves(out)["train/loss"]) == [1, 2, 3, 4]
    assert RunConfig.load(out / "config.toml").train.track == ("tensorboard",)
    command_line("train", "--resume", out, "--track", "none")
    assert RunConfig.load(out / "config.toml").train.track == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--track", "tensorbord"], "did you mean tensorboard"),
        (["--track", "tensorboard:mine"], "names a project, and has none: write tensorboard"),
        (["--track", "wandb:a b"], "is not a project's name"),
        (["--track", "wandb:a", "--track", "wandb:b"], "is the second of its kind"),
        (["--max-hours", "nan"], "should be a finite number"),
    ],
)
def test_what_cannot_be_meant_is_refused(corpus, config_file, tmp_path, given, message):
    words = command_line("train", config_file, "--data", corpus, "--out", tmp_path / "run", *given, code=2)
    assert message in words.stderr
    assert not (tmp_path / "run").exists()


# --- the services, as far as they work without a network -------------------------------------------------------------

SERVICE = """
import json, sys
from pathlib import Path
from vramplan.errors import ConfigError
from vramplan.runconfig import RunConfig
from vramplan.trainer.trackers import build_trackers

name, run_dir = sys.argv[1], Path(sys.argv[2])
try:
    (tracker,) = build_trackers([name])
except ConfigError as error:
    sys.exit(str(error))
for start in (0, 2):  # two sessions
    tracker.start(RunConfig.load(run_dir / "config.toml"), run_dir, start)
    for step in (start + 1, start + 2):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.finish()
if name.startswith("trackio"):
    from trackio.sqlite_storage import SQLiteStorage
    (run,) = SQLiteStorage.get_runs("cats")
    logs = SQLiteStorage.get_logs("cats", run)
    print("found", json.dumps([run, [[line["step"], line["train/loss"]] for line in logs]]))
"""


def service(name, tmp_path, **environment):
    (tmp_path / "run").mkdir()
    config().save(tmp_path / "run" / "config.toml")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRACKIO"))}
    settings = clean | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")} | environment
    words = [sys.executable, "-c", SERVICE, name, str(tmp_path / "run")]
    return subprocess.run(words, capture_output=True, text=True, env=settings, timeout=120)


def test_wandb_offline_keeps_both_sessions_under_one_id(tmp_path):
    pytest.importorskip("wandb")
    result = service("wandb:cats", tmp_path, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    kept = (tmp_path / "run" / "wandb-id").read_text().strip()
    files = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{kept}*/run-{kept}*.wandb"))
    assert files
    assert b"train/loss" in b"".join(f.read_bytes() for f in files)
    assert result.stdout == ""


def test_wandb_without_a_key_is_said_before_anything_starts(tmp_path):
    pytest.importorskip("wandb")
    result = service("wandb", tmp_path)
    assert result.returncode == 1
    assert "finds no API key: run `wandb login`, or set WANDB_MODE=offline" in result.stderr
    assert not (tmp_path / "run" / "wandb").exists()


def test_trackio_goes_on_with_the_same_run(tmp_path):
    pytest.importorskip("trackio")
    result = service("trackio:cats", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert result.returncode == 0, result.stderr
    name, logged = json.loads(next(x for x in result.stdout.splitlines() if x.startswith("found"))[6:])
    assert name == "run-" + (tmp_path / "run" / "trackio-id").read_text().strip()
    assert logged == [[1, 1.0], [2, 0.5], [3, pytest.approx(1 / 3)], [4, 0.25]]
