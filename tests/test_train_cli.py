"""The main job through the command line on a CPU: plan, apply, train, resume, sample, report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from vramplan.cli import main
from vramplan.cli.training import fit_to_free_memory
from vramplan.device import HostMemory
from vramplan.errors import DoesNotFitError
from vramplan.planner.memory import estimate
from vramplan.planner.risk import needed_bytes
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
    longer = config.read_text().replace("max_steps = 24", "max_steps = 60").replace("_interval = 8", "_interval = 30")
    config.write_text(longer)  # so that the signal comes in time on a busy machine
    run("train", config, "--data", corpus, "--out", straight)
    command = [sys.executable, "-m", "vramplan", "train", str(config), "--data", str(corpus), "--out", str(stopped)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
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
    run("train", config, "--data", corpus, "--out", out, "--max-steps", "4")
    text = run("train", config, "--data", corpus, "--out", out, "--resume", code=2).stderr
    assert "train.max_steps=24 is not the run's max_steps=4" in text
    assert "step 4 of the 4 that are done would have had another learning rate" in text


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


def test_the_check_before_step_0_keeps_the_plans_risk_limit(monkeypatch):
    """A plan that would just fit is not within its risk limit."""
    shape = Shape(n_layer=4, n_head=4, n_embd=256, block_size=256)
    step = StepConfig(batch_size=64, dtype="float32", loss="full", device="cpu")
    need = estimate(shape, step).process_bytes
    monkeypatch.setattr("vramplan.cli.training.host_memory", lambda: HostMemory(2 * need, int(1.01 * need), "test"))
    for max_risk, fits in ((0.3, True), (0.01, False)):
        config = RunConfig.build(shape, step, plan={"max_risk": max_risk})
        if fits:
            assert fit_to_free_memory(config, None, replan=False) == config
        else:
            with pytest.raises(DoesNotFitError, match="The best plan that fits"):
                fit_to_free_memory(config, None, replan=False)


def test_a_replanned_configuration_describes_itself(monkeypatch):
    shape = Shape(n_layer=4, n_head=4, n_embd=256, block_size=256)
    step = StepConfig(batch_size=64, grad_accum=2, dtype="float32", loss="full", device="cpu")
    stale = {
        "gpu": "RTX 4070", "process_bytes": 1, "peak_allocated_bytes": 1, "oom_risk": 0.5, "tokens_per_second": 9.0,
        "max_risk": 0.02, "target_parameters": 16_000_000, "budget_bytes": 5,
    }  # fmt: skip
    config = RunConfig.build(shape, step, plan=stale, train={"eval_batches": 3, "seed": 5})
    monkeypatch.setattr("vramplan.cli.training.host_memory", lambda: HostMemory(4 * 2**30, 2**30, "test"))
    new = fit_to_free_memory(config, None, replan=True)
    full = estimate(shape, new.step_config)
    assert (new.plan.process_bytes, new.plan.peak_allocated_bytes) == (full.process_bytes, full.peak_allocated_bytes)
    assert (new.plan.budget_bytes, new.plan.max_risk, new.plan.target_parameters) == (2**30, 0.02, 16_000_000)
    assert (new.plan.gpu, new.plan.tokens_per_second) == (None, None)
    assert new.plan.oom_risk <= 0.02
    assert new.train.seed == 5
    assert new.train.eval_batches * new.step.batch_size >= 3 * 64


def test_replan_also_when_resuming(corpus, config, tmp_path, monkeypatch):
    out = tmp_path / "run"
    loaded = RunConfig.load(config)
    loaded = RunConfig.build(
        loaded.shape, replace(loaded.step_config, batch_size=4, grad_accum=1, loss="full"),
        train=loaded.train.model_dump(exclude_none=True),
    )  # fmt: skip
    loaded.save(config)
    run("train", config, "--data", corpus, "--out", out)
    for path in (out / "checkpoints").iterdir():
        if "24" in path.name:
            path.unlink()
    less = replace(loaded.step_config, batch_size=1, grad_accum=4, loss="chunked", loss_chunk_tokens=512)
    free = int(needed_bytes(estimate(loaded.shape, less).process_bytes, less, 0.01)) + 1
    monkeypatch.setattr("vramplan.cli.training.host_memory", lambda: HostMemory(2 * free, free, "test"))
    assert "Take it with --replan" in run("train", "--resume", out, code=3).stderr
    text = run("train", "--resume", out, "--replan")
    assert "Replanned: batch_size=" in text.stderr
    assert "Finished 24 steps" in text.stdout
    assert sorted(losses(out)) == list(range(1, 25))
    assert RunConfig.load(out / "config.toml").step != loaded.step


def test_nothing_is_tokenised_before_everything_is_checked(corpus, config, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"kind": "stopped", "step": 3, "reason": "a test"}\n')
    small = config.read_text().replace("vocab_size = 50304", "vocab_size = 50000")
    small = small.replace("[data]\n", '[data]\ntext_column = "txt"\n').replace('text_column = "text"\n', "")
    (tmp_path / "small.toml").write_text(small)
    text = run("train", tmp_path / "small.toml", "--data", corpus, "--out", out, code=2).stderr
    assert "3 problems" in text
    for words in ("already holds a run", "vocab_size=50000", "did you mean text?"):
        assert words in text
    (tmp_path / "file").write_text("")
    text = run("train", config, "--data", tmp_path / "none.parquet", "--out", tmp_path / "file" / "run", code=2).stderr
    assert "which is a file" in text
    assert "none.parquet" in text
    assert "--data is required" in run("train", config, "--out", tmp_path / "r", code=2).stderr
    assert not (tmp_path / "shards").exists()


def test_a_run_finds_its_shards_again(corpus, config, tmp_path):
    out, short = tmp_path / "a run [1]", ("--max-steps", "2")
    assert f"Next: vramplan sample '{out}'" in run("train", config, "--data", corpus, "--out", out, *short).stdout
    (shards,) = (p for p in (tmp_path / "shards").iterdir())
    moved = tmp_path / "elsewhere"
    shards.rename(moved)
    text = run("train", "--resume", out, code=2).stderr
    assert f"tokenise again with: vramplan train --resume '{out}' --data {corpus}" in text
    assert "already finished" in run("train", "--resume", out, "--shards", moved).stdout
    assert "already finished" in run("train", "--resume", out, "--data", corpus).stdout
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"text": ["something else entirely, over and over again. " * 20] * 40}), other)
    text = run("train", "--resume", out, "--data", other, code=2).stderr
    assert "is not the data of this run" in text
    assert len(list((tmp_path / "shards").iterdir())) == 1
    copy = tmp_path / "copies" / corpus.name
    copy.parent.mkdir()
    copy.write_bytes(corpus.read_bytes())
    assert "already finished" in run("train", "--resume", out, "--data", copy).stdout


def test_a_closed_pipe_does_not_end_the_run(corpus, config, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vramplan", "train", str(config), "--data", str(corpus), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("Tokenising")
        process.stdout.close()
        stderr = process.stderr.read()
    assert (process.returncode, stderr) == (0, "")
    assert sorted(losses(out)) == list(range(1, 25))


def test_closed_or_full_output_is_no_traceback(corpus, config, tmp_path):
    out = tmp_path / "run"
    train = [sys.executable, "-m", "vramplan", "train", str(config), "--data", str(corpus), "--out", str(out),
             "--max-steps", "2"]  # fmt: skip
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *train], capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")
    assert max(losses(out)) == 2
    for command in (["sample", str(out)], ["report", str(out)]):
        words = ["sh", "-c", '"$@" >/dev/full', "sh", sys.executable, "-m", "vramplan", *command]
        full = subprocess.run(words, capture_output=True, text=True)
        assert (full.returncode, full.stderr) == (1, "Error: the output cannot be used (No space left on device)\n")


def test_text_that_the_terminal_cannot_show_is_replaced(corpus, config, tmp_path):
    data = tmp_path / "日本.parquet"
    data.write_bytes(corpus.read_bytes())
    out = tmp_path / "日"
    command = [sys.executable, "-m", "vramplan", "train", str(config), "--data", str(data), "--out", str(out)]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "1"}
    result = subprocess.run([*command, "--max-steps", "2"], capture_output=True, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"Run " in result.stdout


def test_ctrl_c_outside_training_is_exit_code_130(monkeypatch, corpus, config, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vramplan.trainer.start.check_start", interrupted)
    result = run("train", config, "--data", corpus, "--out", tmp_path / "run", code=130)
    assert result.stderr == "Stopped by SIGINT.\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "CONFIG", "--data", "CORPUS", "--out", ""], '--out="" is empty'),
        (["train", "CONFIG", "--data", "", "--out", "RUN"], 'data="" is empty'),
        (["train", "CONFIG", "--data", "x" * 300, "--out", "RUN"], "cannot be read (File name too long)"),
        (["train", "CONFIG", "--data", "CORPUS", "--out", "x" * 300], "longer than the 255 bytes"),
        (["report", "y" * 256], "longer than the 255 bytes"),
        (["train", "--resume", "CONFIG"], "name the run directory: vramplan train --resume RUN"),
        (["train", "CONFIG", "--data", "CORPUS", "--out", "DANGLING"], "is a link to nothing"),
    ],
)
def test_paths_of_no_use(corpus, config, tmp_path, words, message):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    names = {"CONFIG": config, "CORPUS": corpus, "RUN": tmp_path / "run", "DANGLING": tmp_path / "dangling"}
    assert message in run(*(names.get(word, word) for word in words), code=2).stderr
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.toml", b"\xff\xfe", "is not UTF-8 text"),
        ("config.toml", None, "cannot be read"),
        ("metrics.jsonl", None, "cannot be read"),
        ("metrics.jsonl", b'{"kind": "step", "step": 1, "loss": "low"}\n{}\n', "is damaged in line 1"),
        ("run.json", b'{"sessions": [3]}', "does not say which shards"),
    ],
)
def test_a_damaged_run_directory_is_one_clear_error(corpus, config, tmp_path, file, content, message):
    out = tmp_path / "run"
    run("train", config, "--data", corpus, "--out", out, "--max-steps", "2")
    (out / file).unlink()
    (out / file).mkdir() if content is None else (out / file).write_bytes(content)
    assert message in run("train", "--resume", out, code=2).stderr
    if file != "run.json":
        assert message in run("report", out, "--gpu", "cpu", code=2).stderr


def test_damaged_shards_are_not_trained_on(corpus, config, tmp_path):
    out = tmp_path / "run"
    run("train", config, "--data", corpus, "--out", out, "--max-steps", "2")
    (shards,) = (tmp_path / "shards").iterdir()
    content = bytearray((shards / "train-00000.bin").read_bytes())
    content[10] ^= 1
    (shards / "train-00000.bin").write_bytes(content)
    assert "its sha256 is not the one in the manifest" in run("train", "--resume", out, code=2).stderr
    assert "already finished" in run("train", "--resume", out, "--data", corpus).stdout


def test_a_project_that_was_moved_finds_its_shards(corpus, config, tmp_path):
    run("train", config, "--data", corpus, "--out", tmp_path / "here" / "run", "--max-steps", "2")
    (tmp_path / "here").rename(tmp_path / "there")
    assert "already finished" in run("train", "--resume", tmp_path / "there" / "run").stdout


def test_before_the_first_checkpoint_too_the_data_must_be_the_same(corpus, config, tmp_path):
    out = tmp_path / "run"
    run("train", config, "--data", corpus, "--out", out, "--max-steps", "2")
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    (shards,) = (tmp_path / "shards").iterdir()
    shards.rename(tmp_path / "away")
    pq.write_table(pa.table({"text": ["something else entirely, over and over again. " * 20] * 40}), corpus)
    text = run("train", "--resume", out, "--data", corpus, code=2).stderr
    assert "is not the data of this run" in text


def test_the_report_counts_steps_not_lines(corpus, config, tmp_path):
    out = tmp_path / "run"
    spaced = config.read_text().replace("log_interval = 1", "log_interval = 5")
    config.write_text(spaced)
    run("train", config, "--data", corpus, "--out", out, "--max-steps", "7")
    measured = json.loads(run("report", out, "--gpu", "cpu", "--json").stdout)["measured"]
    assert measured["steps"] == 7


def test_json_and_training_in_one_command_keep_stdout_clean(corpus, tmp_path):
    result = run(
        "plan", "--gpu", "cpu", "--vram", "2GiB", "--n-layer", "1", "--n-head", "1", "--n-embd", "64", "--json",
        "--block-size", "32", "--tokens-per-step", "128", "--token-budget", "2000", "--train", "--data", corpus,
        "--out", tmp_path / "run", "--max-steps", "2",
    )  # fmt: skip
    assert json.loads(result.stdout)["plans"]
    assert "Finished 2 steps" in result.stderr


def test_sample_with_impossible_settings_is_one_clear_error(corpus, config, tmp_path):
    import torch

    out = tmp_path / "run"
    run("train", config, "--data", corpus, "--out", out, "--max-steps", "2")
    assert "--seed" in run("sample", out, "--seed", 2**70, code=2).stderr
    assert run("sample", out, "--temperature", "1e-40", "--max-new-tokens", 2).stdout
    if not torch.cuda.is_available():
        assert '--device="cuda" is not available' in run("sample", out, "--device", "cuda", code=2).stderr


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


MODERN = 'norm = "rmsnorm"\npositions = "rotary"\nmlp = "swiglu"\nn_kv_head = 1\nqk_norm = true\nlogit_softcap = 15.0\n'


@pytest.mark.parametrize(
    ("model", "step"),
    [
        (MODERN, 'optimizer = "muon"\ncheckpointing = "selective"\n'),
        ("", 'dtype = "pure-bfloat16"\noptimizer = "adamw-stochastic"\n'),
        ("bias = true\n", 'optimizer = "adamw-in-backward"\n'),
    ],
    ids=["modern, muon, selective", "pure bfloat16", "in backward"],
)
def test_every_kind_of_run_resumes_exactly_and_samples(corpus, tmp_path, model, step):
    once = 'device = "cpu"\nbatch_size = 4\n' + ("" if "in-backward" in step else "grad_accum = 2\n")
    dtype = "" if "dtype" in step else 'dtype = "float32"\n'
    clip = "grad_clip = 0.0\n" if "in-backward" in step else ""
    config, out, again = tmp_path / "run.toml", tmp_path / "run", tmp_path / "again"
    config.write_text(
        f"[model]\nn_layer = 2\nn_head = 2\nn_embd = 32\nblock_size = 16\n{model}\n[step]\n{once}{dtype}{step}\n"
        f"[train]\nmax_steps = 8\nlog_interval = 1\neval_interval = 4\ncheckpoint_interval = 4\n{clip}"
    )
    run("train", config, "--data", corpus, "--out", out)
    shutil.copytree(out, again)
    (again / "checkpoints/step-000008.safetensors").unlink()
    assert "Resumed at step 4" in run("train", "--resume", again).stdout
    assert losses(again) == losses(out)
    assert run("sample", again, "--prompt", "the cat", "--max-new-tokens", "5").stdout.startswith("the cat")
    assert json.loads(run("report", again, "--json").stdout)["measured"]["steps"] == 8
