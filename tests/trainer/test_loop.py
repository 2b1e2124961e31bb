"""The training loop: what it does, in which order, and that nothing it is told to keep is lost."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from vramplan.errors import ConfigError, DataError, VramplanError
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer import loop as module
from vramplan.trainer.checkpoint import CheckpointFolder
from vramplan.trainer.events import (
    AlreadyFinished,
    CheckpointSaved,
    CheckpointSkipped,
    Evaluated,
    Finished,
    Interrupted,
    Resumed,
    RunStarted,
    StepLogged,
    StopRequested,
)
from vramplan.trainer.interrupt import ONE_STOP_SECONDS, StopSignal
from vramplan.trainer.loop import train
from vramplan.trainer.metrics import MetricsLog, read_metrics
from vramplan.trainer.rundir import RunDirectory

CPU = torch.device("cpu")


def config(*, step=None, **train_section) -> RunConfig:
    settings = {
        "max_steps": 12, "warmup_steps": 2, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "log_interval": 1,
        "eval_interval": 4, "checkpoint_interval": 4, "eval_batches": 2, "seed": 7,
    }  # fmt: skip
    shape = Shape(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16)
    how = {"batch_size": 2, "grad_accum": 2, "dtype": "float32", "optimizer": "adamw-foreach", "device": "cpu"}
    return RunConfig.build(shape, StepConfig(**how | (step or {})), train=settings | train_section)


def run(shards, run_dir, cfg=None, **options):
    events = []
    result = train(cfg or config(), shards, run_dir, device=CPU, on_event=events.append, **options)
    return result, events


def of(events, kind) -> list:
    return [e for e in events if type(e) is kind]


def losses(run_dir) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "step"}


def val_losses(run_dir) -> dict[int, float]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return {line["step"]: line["val_loss"] for line in lines if line["kind"] == "evaluation"}


# --- a run -----------------------------------------------------------------------------------------------------------


def test_it_learns(shards, tmp_path):
    result, events = run(shards, tmp_path / "run", config(max_steps=60, checkpoint_interval=60, eval_interval=30))
    logged = of(events, StepLogged)
    assert logged[0].loss == pytest.approx(math.log(64), abs=0.15)
    assert logged[-1].loss < 0.75 * logged[0].loss
    assert result.best_val_loss < 0.75 * math.log(64)
    assert (result.step, result.total_steps, result.tokens_seen) == (60, 60, 60 * 64)
    assert not result.interrupted


def test_the_start_says_everything_that_should_be_known(shards, tmp_path):
    _, events = run(shards, tmp_path / "run")
    started = of(events, RunStarted)[0]
    assert started is events[0]
    shape = config().shape
    assert started.parameters == shape.parameters
    assert (started.batch_size, started.grad_accum, started.block_size) == (2, 2, 16)
    assert started.tokens_per_step == 64
    assert (started.total_steps, started.token_budget, started.start_step) == (12, 768, 0)
    assert (started.unique_tokens, started.blocks_per_epoch) == (2000, 125)
    assert started.epochs == 768 / 2000
    assert started.val_tokens == 300
    assert started.evaluation_blocks == 4
    assert started.first_loss_expected == math.log(64)
    assert started.flops_per_token == shape.flops_per_token


def test_unusual_circumstances_are_said(make_shards, learnable_tokens, tmp_path):
    shards = make_shards(train=learnable_tokens(1000), val=learnable_tokens(5))
    cfg = config(step={"device": "cuda"}, warmup_steps=700)
    _, events = run(shards, tmp_path / "run", cfg)
    notes = " / ".join(of(events, RunStarted)[0].notes)
    assert "warmup_steps=700 is not shorter than the run of 12 steps" in notes
    assert "the end of the training text is used instead" in notes
    assert "made for cuda, this run is on cpu" in notes


def test_saving_comes_before_evaluating(shards, tmp_path):
    _, events = run(shards, tmp_path / "run")
    order = [(type(e), e.step) for e in events if isinstance(e, CheckpointSaved | Evaluated)]
    assert order == [
        (Evaluated, 0),
        (CheckpointSaved, 4), (Evaluated, 4),
        (CheckpointSaved, 8), (Evaluated, 8),
        (CheckpointSaved, 12), (Evaluated, 12),
    ]  # fmt: skip
    assert isinstance(events[-1], Finished)


def test_a_run_that_dies_in_an_evaluation_was_saved(shards, tmp_path, monkeypatch):
    cfg = config(eval_interval=8, guard=False)
    original = module.TrainStep.evaluate
    calls = []

    def second_dies(self, batches):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails follow.")
        return original(self, batches)

    monkeypatch.setattr(module.TrainStep, "evaluate", second_dies)
    words = r"memory ran out: CUDA out of memory\. Tried to allocate 2\.00 GiB\. The last checkpoint is .*step-000008.*"
    with pytest.raises(VramplanError, match=rf"{words} --resume {tmp_path / 'run'} --replan$"):
        run(shards, tmp_path / "run", cfg)
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").newest()[1].step == 8
    monkeypatch.undo()
    result, _ = run(shards, tmp_path / "run", cfg, resume=True)
    assert result.step == 12
    run(shards, tmp_path / "straight", cfg)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert val_losses(tmp_path / "run") == val_losses(tmp_path / "straight"), "the lost evaluation was made up for"


def test_lines_are_due_at_the_first_the_last_and_every_interval(shards, tmp_path):
    run(shards, tmp_path / "run", config(log_interval=5, eval_interval=100, checkpoint_interval=100))
    assert list(losses(tmp_path / "run")) == [1, 5, 10, 12]
    assert list(val_losses(tmp_path / "run")) == [0, 12]


def test_a_metrics_line_is_complete(shards, tmp_path):
    _, events = run(shards, tmp_path / "run", peak_flops=1e12)
    line = next(x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if x["kind"] == "step" and x["step"] == 5)
    event = next(e for e in of(events, StepLogged) if e.step == 5)
    assert line["tokens"] == event.tokens == 320
    assert line["epoch"] == pytest.approx(5 * 4 / 125)
    assert line["tokens_per_second"] == pytest.approx(64 / line["step_seconds"])
    flops = config().shape.flops_per_token
    assert line["mfu"] == pytest.approx(flops * line["tokens_per_second"] / 1e12)
    assert line["learning_rate"] == pytest.approx(event.learning_rate)
    assert line["grad_norm"] > 0
    assert line["peak_allocated_bytes"] is line["peak_reserved_bytes"] is line["alloc_retries"] is None


def test_the_first_step_has_no_throughput_and_an_unknown_peak_no_mfu(shards, tmp_path):
    _, events = run(shards, tmp_path / "run")
    first, *rest = of(events, StepLogged)
    assert first.tokens_per_second is None
    assert first.step_seconds > 0
    assert all(e.tokens_per_second > 0 and e.mfu is None for e in rest)


def test_throughput_leaves_out_evaluation_and_saving(shards, tmp_path, monkeypatch):
    for owner, name in ((module.TrainStep, "evaluate"), (CheckpointFolder, "save")):
        original = getattr(owner, name)

        def slow(self, *arguments, original=original, **options):
            time.sleep(0.4)
            return original(self, *arguments, **options)

        monkeypatch.setattr(owner, name, slow)
    _, events = run(shards, tmp_path / "run", config(log_interval=12, eval_interval=6, checkpoint_interval=6))
    assert of(events, Finished)[0].seconds > 2
    assert of(events, StepLogged)[-1].step_seconds < 0.1


def test_the_run_directory_holds_what_it_should(shards, tmp_path):
    cfg = config(keep_checkpoints=2)
    run(shards, tmp_path / "run", cfg)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.toml", "run.json", "metrics.jsonl", "checkpoints", ".lock",
    }  # fmt: skip
    assert RunConfig.load(tmp_path / "run" / "config.toml") == cfg
    kept = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"step-000008.safetensors", "step-000012.safetensors"}
    (session,) = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert session["torch"] == torch.__version__
    assert session["threads"] == 1
    assert session["data_fingerprint"] == shards.manifest.fingerprint
    assert session["data_manifest"] == str(shards.directory.resolve() / "manifest.json")


def test_the_split_into_micro_batches_does_not_change_the_curve(shards, tmp_path):
    run(shards, tmp_path / "a", config(step={"batch_size": 2, "grad_accum": 2}))
    run(shards, tmp_path / "b", config(step={"batch_size": 4, "grad_accum": 1}))
    assert list(losses(tmp_path / "a").values()) == pytest.approx(list(losses(tmp_path / "b").values()), rel=1e-3)


def test_the_same_seed_gives_the_same_run_and_another_does_not(shards, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        run(shards, tmp_path / name, config(seed=seed))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_float16_survives_an_overflowing_first_scale(shards, tmp_path):
    cfg = config(step={"dtype": "float16"}, max_steps=4)
    result, _ = run(shards, tmp_path / "run", cfg)
    assert result.step == 4
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").newest()[1].scaler["scale"] > 0


# --- interruption and resuming ---------------------------------------------------------------------------------------

CHILD = """
import signal, sys, time
import torch
from vramplan.errors import Stopped
from vramplan.runconfig import RunConfig
from vramplan.trainer.loop import train
from vramplan.trainer.shards import ShardSet

signal.signal(signal.SIGINT, signal.default_int_handler)  # even when the test suite was started with it ignored
torch.set_num_threads(1)

def show(event):
    name = type(event).__name__
    print(name, getattr(event, "step", ""), flush=True)
    if name == "StepLogged":
        time.sleep(0.03)
    if name == "StopRequested" and sys.argv[4] == "stuck":
        print("stuck", flush=True)
        time.sleep(60)

config = RunConfig.load(sys.argv[1])
try:
    result = train(config, ShardSet.open(sys.argv[2]), sys.argv[3], device=torch.device("cpu"), on_event=show)
except Stopped as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
print("result", result.interrupted, result.step, flush=True)
sys.exit(128 + result.signal_number if result.interrupted else 0)
"""


def start_child(tmp_path, shards, cfg, mode="normal") -> subprocess.Popen:
    cfg.save(tmp_path / "config.toml")
    arguments = [str(tmp_path / "config.toml"), str(shards.directory), str(tmp_path / "run"), mode]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)


def wait_for(child, words) -> list[str]:
    seen = []
    for line in child.stdout:
        seen.append(line.strip())
        if seen[-1] == words:
            return seen
    raise AssertionError(f"the child ended without {words!r}: {seen}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_resumes_to_the_same_curve(shards, tmp_path, number):
    cfg = config(max_steps=40, eval_interval=10, checkpoint_interval=15)
    with start_child(tmp_path, shards, cfg) as child:
        wait_for(child, "StepLogged 6")
        child.send_signal(number)
        rest = child.stdout.read().split("\n")
        assert child.wait(30) == 128 + number
    stopped = int(next(line for line in rest if line.startswith("Interrupted")).split()[1])
    assert 6 <= stopped < 40
    assert f"CheckpointSaved {stopped}" in rest
    result, events = run(shards, tmp_path / "run", cfg, resume=True)
    assert of(events, Resumed)[0].step == stopped
    assert result.step == 40
    run(shards, tmp_path / "straight", cfg)
    assert list(losses(tmp_path / "run")) == list(range(1, 41))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert val_losses(tmp_path / "run") == val_losses(tmp_path / "straight")


def test_a_killed_run_resumes_from_its_last_checkpoint(shards, tmp_path):
    cfg = config(max_steps=40, eval_interval=10, checkpoint_interval=5)
    with start_child(tmp_path, shards, cfg) as child:
        wait_for(child, "StepLogged 13")
        child.kill()
        child.stdout.read()
    _, events = run(shards, tmp_path / "run", cfg, resume=True)
    resumed = of(events, Resumed)[0]
    assert resumed.step % 5 == 0
    assert resumed.step >= 10
    assert resumed.dropped_lines >= 1
    run(shards, tmp_path / "straight", cfg)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once_and_says_what_is_saved(shards, tmp_path, number):
    with start_child(tmp_path, shards, config(max_steps=400), mode="stuck") as child:
        wait_for(child, "CheckpointSaved 4")
        child.send_signal(number)
        wait_for(child, "stuck")
        child.send_signal(signal.SIGHUP)  # of the closing terminal: not impatience
        time.sleep(ONE_STOP_SECONDS + 0.1)
        child.send_signal(signal.SIGHUP)
        time.sleep(0.2)  # Python may not see a signal that comes while it handles another
        start = time.monotonic()
        child.send_signal(number)
        last_words = child.stdout.read().splitlines()[-1]
        assert child.wait(20) == 128 + number
        assert time.monotonic() - start < 10
    assert last_words.startswith(f"stopped at once by {number.name}. The last checkpoint is ")
    assert last_words.endswith(f"Resume with: vramplan train --resume {tmp_path / 'run'}")


def stop_at(step, events):
    def on_event(event):
        events.append(event)
        if isinstance(event, StepLogged) and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_event


def test_interruption_at_half_time_in_this_process(shards, tmp_path):
    events = []
    before = signal.getsignal(signal.SIGTERM)
    result = train(config(), shards, tmp_path / "run", device=CPU, on_event=stop_at(6, events))
    assert signal.getsignal(signal.SIGTERM) is before
    assert (result.interrupted, result.signal_number, result.step) == (True, signal.SIGTERM, 6)
    assert [e.signal_name for e in of(events, StopRequested)] == ["SIGTERM"]
    interrupted = events[-1]
    assert isinstance(interrupted, Interrupted)
    assert interrupted.checkpoint.name == "step-000006.safetensors"
    assert interrupted.resume_command == ("vramplan", "train", "--resume", str(tmp_path / "run"))
    run(shards, tmp_path / "run", resume=True)
    run(shards, tmp_path / "straight")
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    final = [CheckpointFolder(tmp_path / name / "checkpoints").newest()[1] for name in ("run", "straight")]
    for name, tensor in final[0].model.items():
        assert torch.equal(tensor, final[1].model[name]), name
    assert final[0].data == final[1].data


def test_resuming_under_float16_and_chunked_loss_is_exact_too(shards, tmp_path):
    cfg = config(step={"dtype": "float16", "loss": "chunked", "checkpointing": "block"}, max_steps=6)
    train(cfg, shards, tmp_path / "run", device=CPU, on_event=stop_at(3, []))
    run(shards, tmp_path / "run", cfg, resume=True)
    run(shards, tmp_path / "straight", cfg)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_a_signal_during_an_evaluation_drops_its_half_result(shards, tmp_path):
    events = []

    def on_event(event):
        events.append(event)
        if isinstance(event, CheckpointSaved) and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(config(), shards, tmp_path / "run", device=CPU, on_event=on_event)
    assert result.step == 4
    assert list(val_losses(tmp_path / "run")) == [0]
    assert [e.step for e in of(events, CheckpointSaved)] == [4], "it was saved already"
    run(shards, tmp_path / "run", resume=True)
    assert list(val_losses(tmp_path / "run")) == [0, 4, 8, 12]


def test_it_works_outside_the_main_thread(shards, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(shards, tmp_path / "run")[0]))
    thread.start()
    thread.join(60)
    assert results[0].step == 12


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_close_together_are_one(shards, tmp_path):
    def on_event(event):
        if isinstance(event, StepLogged) and event.step == 5:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                os.kill(os.getpid(), number)

    result = train(config(), shards, tmp_path / "run", device=CPU, on_event=on_event)
    assert (result.interrupted, result.signal_number, result.step) == (True, signal.SIGHUP, 5)
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").newest()[1].step == 5


def test_a_damaged_newest_checkpoint_costs_only_its_steps(shards, tmp_path):
    train(config(), shards, tmp_path / "run", device=CPU, on_event=stop_at(10, []))
    newest = CheckpointFolder(tmp_path / "run" / "checkpoints").paths()[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    _, events = run(shards, tmp_path / "run", resume=True)
    (skipped,) = of(events, CheckpointSkipped)
    assert (skipped.path.name, newest.exists()) == (f"{newest.name}.damaged", False)
    assert of(events, Resumed)[0].step == 8
    run(shards, tmp_path / "straight")
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_a_run_that_never_reached_a_checkpoint_begins_anew(shards, tmp_path):
    run(shards, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(DataError, match=r"holds no checkpoint, but step-000012\.safetensors was saved: bring it back"):
        run(shards, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    first = [line for line in before.splitlines() if '"checkpoint"' not in line][:4]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(first) + "\n")
    result, events = run(shards, tmp_path / "run", resume=True)
    assert of(events, Resumed)[0].checkpoint is None
    assert result.step == 12
    assert list(losses(tmp_path / "run")) == list(range(1, 13))


def test_a_renamed_checkpoint_does_not_count(shards, tmp_path):
    train(config(), shards, tmp_path / "run", device=CPU, on_event=stop_at(6, []))
    newest = CheckpointFolder(tmp_path / "run" / "checkpoints").paths()[0]
    newest.rename(newest.with_name("step-000300.safetensors"))
    _, events = run(shards, tmp_path / "run", resume=True)
    assert "it is of step 6" in of(events, CheckpointSkipped)[0].reason
    assert (of(events, Resumed)[0].step, of(events, Finished)[0].step) == (4, 12)


def test_a_lost_configuration_is_the_checkpoints(shards, tmp_path):
    train(config(), shards, tmp_path / "run", device=CPU, on_event=stop_at(6, []))
    (tmp_path / "run" / "config.toml").unlink()
    assert RunDirectory(tmp_path / "run").stored_config() == config()
    assert run(shards, tmp_path / "run", resume=True)[0].step == 12
    assert RunConfig.load(tmp_path / "run" / "config.toml") == config()


def test_an_evaluation_after_a_resume_knows_the_loss_of_its_step(shards, tmp_path):
    cfg = config(log_interval=10)

    def on_event(event):
        if isinstance(event, CheckpointSaved) and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)  # before the evaluation of that step, which no line has logged

    train(cfg, shards, tmp_path / "run", device=CPU, on_event=on_event)
    run(shards, tmp_path / "run", cfg, resume=True)
    run(shards, tmp_path / "straight", cfg)

    def evaluations(name):
        lines = [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["kind"] == "evaluation"]
        return [(line["step"], line["val_loss"], line["train_loss"]) for line in lines]

    assert evaluations("run") == evaluations("straight")


def test_a_finished_run_says_so(shards, tmp_path):
    first, _ = run(shards, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result, events = run(shards, tmp_path / "run", resume=True)
    assert [type(e) for e in events] == [AlreadyFinished]
    assert result.already_finished
    assert result.best_val_loss == first.best_val_loss
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_other_threads_on_resume_are_noted(shards, tmp_path):
    cfg = config(max_steps=4, eval_batches=1)
    train(cfg, shards, tmp_path / "run", device=CPU, on_event=stop_at(3, []))
    torch.set_num_threads(2)
    _, events = run(shards, tmp_path / "run", cfg, resume=True)
    assert "CPU threads: 1 before, 2 now; losses may differ in the last digits" in of(events, RunStarted)[0].notes


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_directory_with_a_run_is_refused(shards, tmp_path):
    run(shards, tmp_path / "run")
    with pytest.raises(DataError, match="already holds a run: continue it with --resume"):
        run(shards, tmp_path / "run")


def test_a_directory_with_only_this_configuration_is_taken(shards, tmp_path):
    (tmp_path / "run").mkdir()
    config().save(tmp_path / "run" / "config.toml")
    assert run(shards, tmp_path / "run")[0].step == 12


def test_a_directory_of_another_program_is_left_alone(shards, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name, text in (("config.toml", "lr = 3"), ("run.json", '{"mine": 1}'), (".notes.tmp", "keep")):
        (out / name).write_text(text)
    with pytest.raises(DataError, match="already holds a run"):
        run(shards, out)
    (out / "config.toml").unlink()
    with pytest.raises(DataError, match="already holds a run"):
        run(shards, out)
    (out / "run.json").unlink()
    assert run(shards, out)[0].step == 12
    assert (out / ".notes.tmp").read_text() == "keep"


def test_a_directory_with_another_configuration_is_refused(shards, tmp_path):
    (tmp_path / "run").mkdir()
    config(seed=1).save(tmp_path / "run" / "config.toml")
    with pytest.raises(DataError, match="already holds a run"):
        run(shards, tmp_path / "run")


def test_a_file_is_no_run_directory(shards, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(DataError, match="is a file: name a directory"):
        run(shards, tmp_path / "run")


@pytest.mark.parametrize(("exists", "rule"), [(False, "does not exist"), (True, "holds no run to resume")])
def test_nothing_to_resume(shards, tmp_path, exists, rule):
    if exists:
        (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match=rule):
        run(shards, tmp_path / "run", resume=True)


def test_resuming_with_another_configuration_names_every_field_and_both_values(shards, tmp_path):
    train(config(), shards, tmp_path / "run", device=CPU, on_event=stop_at(6, []))
    other = config(learning_rate=0.02, step={"batch_size": 4, "grad_accum": 3})
    with pytest.raises(DataError) as caught:
        run(shards, tmp_path / "run", other, resume=True)
    message = str(caught.value)
    assert "train.learning_rate=0.02 is not the run's learning_rate=0.01" in message
    assert "step.batch_size=4 is not the run's batch_size=2" in message
    assert "step.grad_accum=3 is not the run's grad_accum=2" in message
    assert len(caught.value.problems) == 3


def test_resuming_may_split_a_step_differently(shards, tmp_path):
    train(config(), shards, tmp_path / "run", device=CPU, on_event=stop_at(6, []))
    other = config(step={"batch_size": 1, "grad_accum": 4, "checkpointing": "block"}, eval_batches=4)
    _, events = run(shards, tmp_path / "run", other, resume=True)
    note = "batch_size x grad_accum: 2 x 2 before, 1 x 4 now; losses may differ in the last digits"
    assert note in of(events, RunStarted)[0].notes
    run(shards, tmp_path / "straight")
    for read in (losses, val_losses):
        assert read(tmp_path / "run") == pytest.approx(read(tmp_path / "straight"), rel=1e-4)
    assert RunConfig.load(tmp_path / "run" / "config.toml") == other, "the next resume needs no less memory"


def test_the_best_validation_loss_is_of_the_blocks_evaluated_now(shards, tmp_path):
    train(config(), shards, tmp_path / "run", device=CPU, on_event=stop_at(6, []))
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "evaluation":
            line["val_loss"] = line["best_val_loss"] = 0.5
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, events = run(shards, tmp_path / "run", config(eval_batches=1), resume=True)
    evaluated = of(events, Evaluated)
    assert [e.best_val_loss for e in evaluated] == [min(e.val_loss for e in evaluated[: i + 1]) for i in range(2)]
    assert of(events, Finished)[0].best_val_loss > 0.5


def test_the_checkpoint_decides_what_the_run_is_not_an_edited_file(shards, tmp_path):
    train(config(), shards, tmp_path / "run", device=CPU, on_event=stop_at(6, []))
    edited = config(learning_rate=0.02)
    edited.save(tmp_path / "run" / "config.toml")
    with pytest.raises(
        DataError, match=r"step-000006\.safetensors was trained with: train\.learning_rate=0\.02 is not"
    ):
        run(shards, tmp_path / "run", edited, resume=True)
    config().save(tmp_path / "run" / "config.toml")
    assert run(shards, tmp_path / "run", resume=True)[0].step == 12


def test_evaluating_other_blocks_on_resume_is_noted(shards, tmp_path):
    train(config(), shards, tmp_path / "run", device=CPU, on_event=stop_at(6, []))
    _, events = run(shards, tmp_path / "run", config(eval_batches=1), resume=True)
    assert any(note.startswith("evaluation blocks: 4 before, 2 now") for note in of(events, RunStarted)[0].notes)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_in_progress_is_not_disturbed(shards, tmp_path, resume):
    with start_child(tmp_path, shards, config(max_steps=400)) as child:
        wait_for(child, "StepLogged 2")
        before = (tmp_path / "run" / "config.toml").read_bytes()
        with pytest.raises(DataError, match="is in use: another process is training there"):
            run(shards, tmp_path / "run", config(max_steps=400), resume=resume)
        wait_for(child, "StepLogged 8")
        child.terminate()
        child.stdout.read()
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    assert list(losses(tmp_path / "run")) == list(range(1, max(losses(tmp_path / "run")) + 1))


@pytest.mark.parametrize("existing", ["nothing", "the configuration", "other files"])
def test_a_start_that_fails_before_its_first_line_leaves_the_directory_as_it_was(
    shards, tmp_path, monkeypatch, existing
):
    def exhausted(self, batches):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")

    run_dir = tmp_path / "run"
    if existing != "nothing":
        run_dir.mkdir()
        config().save(run_dir / "config.toml") if existing == "the configuration" else (run_dir / "a").write_text("b")
    before = [p.name for p in run_dir.iterdir()] if run_dir.exists() else []
    monkeypatch.setattr(module.TrainStep, "evaluate", exhausted)
    with pytest.raises(VramplanError, match=r"memory ran out: .*No checkpoint was saved before.*--vram.*--replan"):
        run(shards, run_dir)
    assert [p.name for p in run_dir.iterdir() if p.name != ".lock"] == before
    monkeypatch.undo()
    if existing != "the configuration":
        assert run(shards, run_dir, config(seed=8))[0].step == 12


def test_a_configuration_that_was_there_survives_a_killed_and_a_failed_start(shards, tmp_path, monkeypatch):
    def exhausted(self, batches):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config().save(run_dir / "config.toml")
    (run_dir / "run.json").write_text(json.dumps({"format": 1, "sessions": [{"start_step": 0}]}))  # as a kill leaves it
    (run_dir / "metrics.jsonl").write_text("")
    monkeypatch.setattr(module.TrainStep, "evaluate", exhausted)
    with pytest.raises(VramplanError, match="memory ran out"):
        run(shards, run_dir)
    assert RunConfig.load(run_dir / "config.toml") == config()
    assert not (run_dir / "run.json").exists()


def test_a_killed_start_is_no_run(shards, tmp_path):
    with start_child(tmp_path, shards, config(max_steps=400)) as child:
        wait_for(child, "RunStarted")
        child.kill()
        child.stdout.read()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "run" / ".config.toml.1.tmp").write_text("half")
    assert run(shards, tmp_path / "run")[0].step == 12
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]) == 1
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_full_disk_says_what_is_saved(shards, tmp_path, monkeypatch):
    def full(self, kind, values):
        if values["step"] == 6:
            raise OSError(28, "No space left on device")
        append(self, kind, values)

    append = MetricsLog.append
    monkeypatch.setattr(MetricsLog, "append", full)
    with pytest.raises(
        VramplanError, match=r"No space left on device.*step-000004\.safetensors\. Resume with: vramplan train"
    ):
        run(shards, tmp_path / "run")
    monkeypatch.undo()
    run(shards, tmp_path / "run", resume=True)
    run(shards, tmp_path / "straight")
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_resuming_with_other_data_is_refused(shards, make_shards, learnable_tokens, tmp_path):
    train(config(), shards, tmp_path / "run", device=CPU, on_event=stop_at(6, []))
    tokens = learnable_tokens(2001, seed=5)
    other = make_shards(train=tokens, val=tokens[:300], directory=tmp_path / "other")
    with pytest.raises(DataError, match=r"data\.fingerprint"):
        run(other, tmp_path / "run", resume=True)


def test_a_vocabulary_smaller_than_the_datas(make_shards, learnable_tokens, tmp_path):
    shards = make_shards(train=learnable_tokens(500), val=learnable_tokens(100), n_vocab=65)
    with pytest.raises(ConfigError, match=r"vocab_size=64 is smaller than the data's: use at least 65"):
        run(shards, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(shards, tmp_path, monkeypatch):
    original = module.TrainStep.__call__
    steps = []

    def poison(self, batches, rate):
        steps.append(1)
        if len(steps) == 7:
            with torch.no_grad():
                self.model.wte.fill_(float("nan"))
        return original(self, batches, rate)

    monkeypatch.setattr(module.TrainStep, "__call__", poison)
    with pytest.raises(
        VramplanError, match=r"the loss is nan at step 7 .*last checkpoint is .*step-000004\.safetensors"
    ):
        run(shards, tmp_path / "run")
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (last["kind"], last["step"]) == ("stopped", 7)
    assert "nan" in last["reason"]


def test_weights_that_are_not_numbers_are_never_saved(shards, tmp_path, monkeypatch):
    original = module.TrainStep.__call__

    def poison(self, batches, rate):
        result = original(self, batches, rate)
        if poisoned:
            with torch.no_grad():
                self.model.wte[0, 0] = float("nan")  # its loss and gradients were still numbers
        return result

    poisoned: list[bool] = []
    monkeypatch.setattr(module.TrainStep, "__call__", poison)

    def on_event(event):
        if isinstance(event, StepLogged) and event.step == 7:
            poisoned.append(True)

    with pytest.raises(
        VramplanError, match=r"no longer numbers after step 8.*last checkpoint is .*step-000004\.safetensors"
    ):
        train(config(), shards, tmp_path / "run", device=CPU, on_event=on_event)
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").newest()[1].step == 4


def test_a_learning_rate_that_explodes_is_noticed(shards, tmp_path):
    with pytest.raises(VramplanError, match=r"(loss|gradient norm) is (nan|inf) at step \d+ \(learning rate"):
        run(shards, tmp_path / "run", config(learning_rate=1e30, weight_decay=0.0, eval_interval=100))
