"""The main job through the command line on a CPU: plan, apply, train, resume, sample, report."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from vramplan.cli import main
from vramplan.cli.training import fit_to_free_memory
from vramplan.device import HostMemory
from vramplan.errors import DoesNotFitError
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig

TEXT = "the cat sat on the mat and the dog sat on the log while the sun went down behind the hill. "


def run(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args], prog_name="vramplan")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"id": [str(i) for i in range(60)], "text": [TEXT * (1 + i % 5) for i in range(60)]}), path)
    return path


@pytest.fixture
def config(tmp_path):
    """A tiny run with GPT-2's vocabulary: 24 steps of 4 x 32 tokens."""
    shape = Shape(n_layer=1, n_head=1, n_embd=16, block_size=32)
    step = StepConfig(batch_size=2, grad_accum=2, dtype="float32", loss_chunk_tokens=64, device="cpu")
    train = {"max_steps": 24, "warmup_steps": 2, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "log_interval": 1,
             "eval_interval": 8, "checkpoint_interval": 8, "eval_batches": 1}  # fmt: skip
    path = tmp_path / "run.toml"
    RunConfig.build(shape, step, train=train).save(path)
    return path


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}


def test_plan_to_trainer_in_one_command_then_sample_and_report(corpus, tmp_path):
    out = tmp_path / "run"
    text = run(
        "plan", "--gpu", "cpu", "--vram", "2GiB", "--n-layer", "1", "--n-head", "1", "--n-embd", "64",
        "--block-size", "32", "--tokens-per-step", "128", "--token-budget", "2000", "--train", "--data", corpus,
        "--out", out, "--max-steps", "3",
    ).stdout  # fmt: skip
    for words in (
        "Recommended",
        "parameters",
        "= 128 tokens",
        "unique tokens",
        "epochs",
        "MFU n/a",
        "Finished 3 steps",
    ):
        assert words in text
    assert sorted(losses(out)) == [1, 2, 3]
    assert run("sample", out, "--prompt", "the cat", "--max-new-tokens", "5").stdout.startswith("the cat")
    report = json.loads(run("report", out, "--json").stdout)
    assert report["budget_bytes"] == 2 * 2**30
    assert report["measured"]["steps"] == 3
    again = run("train", out / "config.toml", "--data", corpus, "--out", out, code=2).stderr
    assert "already holds a run" in again


def test_ctrl_c_saves_says_how_to_resume_and_the_loss_curve_continues(corpus, config, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run("train", config, "--data", corpus, "--out", straight)
    command = [sys.executable, "-m", "vramplan", "train", str(config), "--data", str(corpus), "--out", str(stopped)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not ((stopped / "metrics.jsonl").exists() and losses(stopped)):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("the run was over before the signal came; make it longer")
    assert process.returncode == 130
    assert f"Resume with: vramplan train --resume {stopped}" in output
    assert "Resumed at step" in run("train", "--resume", stopped).stdout
    assert losses(stopped) == losses(straight)
    assert "already finished" in run("train", "--resume", stopped).stdout


def test_resume_with_another_configuration_names_both_values(corpus, config, tmp_path):
    out = tmp_path / "run"
    run("train", config, "--data", corpus, "--out", out, "--max-steps", "2")
    text = run("train", config, "--data", corpus, "--out", out, "--resume", code=2).stderr
    assert "train.max_steps" in text
    assert "max_steps=2" in text


def test_a_cuda_plan_on_a_machine_without_cuda_is_an_error(corpus, config, tmp_path):
    loaded = RunConfig.load(config)
    cuda = loaded.model_copy(update={"step": loaded.step.model_copy(update={"device": "cuda"})})
    cuda.save(tmp_path / "cuda.toml")
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    text = run("train", tmp_path / "cuda.toml", "--data", corpus, "--out", tmp_path / "r", code=2).stderr
    assert "--gpu cpu" in text
    assert not (tmp_path / "r").exists()


def test_memory_taken_since_the_plan_stops_before_step_0_or_is_replanned(monkeypatch):
    shape = Shape(n_layer=4, n_head=4, n_embd=256, block_size=256)
    step = StepConfig(batch_size=64, grad_accum=1, dtype="float32", loss="full", device="cpu")
    config = RunConfig.build(shape, step)
    free = HostMemory(4 * 2**30, 2**30, "test")
    monkeypatch.setattr("vramplan.cli.training.host_memory", lambda: free)
    with pytest.raises(DoesNotFitError) as caught:
        fit_to_free_memory(config, None, replan=False)
    assert "only 1.00 GiB is free" in str(caught.value)
    assert "--replan" in str(caught.value)
    replanned = fit_to_free_memory(config, None, replan=True)
    assert replanned.tokens_per_step == config.tokens_per_step
    assert replanned.shape == config.shape
    assert replanned.plan.process_bytes < 2**30
    assert fit_to_free_memory(replanned, None, replan=False) == replanned


def test_bad_data_is_one_clear_error(config, tmp_path):
    cases = {"empty.parquet": b"", "text.parquet": b"not parquet at all"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        text = run("train", config, "--data", tmp_path / name, "--out", tmp_path / "r", code=2).stderr
        assert name in text
        assert "Traceback" not in text
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), tmp_path / "other.parquet")
    text = run("train", config, "--data", tmp_path / "other.parquet", "--out", tmp_path / "r", code=2).stderr
    assert "content" in text
    assert "url" in text
    small = RunConfig.load(config)
    small = small.model_copy(update={"model": small.model.model_copy(update={"vocab_size": 50000})})
    small.save(tmp_path / "small.toml")
    pq.write_table(pa.table({"text": ["a" * 100]}), tmp_path / "good.parquet")
    text = run(
        "train", tmp_path / "small.toml", "--data", tmp_path / "good.parquet", "--out", tmp_path / "r", code=2
    ).stderr
    assert "50257" in text
    assert not (tmp_path / "r").exists()


def test_files_of_the_same_name_do_not_share_shards(config, corpus, tmp_path):
    other = tmp_path / "elsewhere" / "text.parquet"
    other.parent.mkdir()
    pq.write_table(pa.table({"text": ["something else entirely, over and over again. " * 20] * 40}), other)
    first, second = tmp_path / "first", tmp_path / "second"
    short = ("--max-steps", "2")
    run("train", config, "--data", corpus, "--out", first, *short)
    run("train", config, "--data", other, "--out", second, *short)
    folders = sorted(p.name for p in (tmp_path / "shards").iterdir())
    assert len(folders) == 2
    assert "Using" in run("train", config, "--data", corpus, "--out", tmp_path / "third", *short).stdout
    assert "already finished" in run("train", "--resume", first).stdout


def test_another_scripts_workload_cannot_be_trained(config, corpus, tmp_path):
    text = config.read_text().replace('workload = "vramplan"', 'workload = "nanogpt"').replace("chunked", "full")
    (tmp_path / "nano.toml").write_text(text)
    assert "nanogpt" in run("train", tmp_path / "nano.toml", "--data", corpus, "--out", tmp_path / "r", code=2).stderr
