"""Memory that runs out in mid-run: the step is done again in smaller pieces, and nothing else changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vramplan.errors import DataError, VramplanError
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer import loop as module
from vramplan.trainer.checkpoint import CheckpointFolder, step_of
from vramplan.trainer.events import CompileFellBack, CompileSwitched, MicroBatchReduced, RunStarted
from vramplan.trainer.guard import Guard
from vramplan.trainer.loop import train
from vramplan.trainer.metrics import read_metrics
from vramplan.trainer.rundir import RunDirectory
from vramplan.trainer.sample import find_checkpoint
from vramplan.trainer.split import Split
from vramplan.trainer.step import TrainStep

CPU = torch.device("cpu")
SHAPE = Shape(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16)
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails follow."


def config(*, step=None, shape=SHAPE, **train_section) -> RunConfig:
    settings = {
        "max_steps": 8, "warmup_steps": 2, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "log_interval": 1,
        "eval_interval": 4, "checkpoint_interval": 4, "eval_batches": 2, "seed": 7,
    }  # fmt: skip
    how = {"batch_size": 6, "grad_accum": 2, "dtype": "float32", "optimizer": "adamw-fused", "device": "cpu"}
    return RunConfig.build(shape, StepConfig(**how | (step or {})), train=settings | train_section)


@pytest.fixture
def shards(make_shards, learnable_tokens):
    return make_shards(train=learnable_tokens(4001), val=learnable_tokens(400, seed=1))


def run(shards, run_dir, cfg, **options):
    events = []
    result = train(cfg, shards, run_dir, device=CPU, on_event=events.append, **options)
    return result, events


def of(events, kind):
    return [e for e in events if type(e) is kind]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return CheckpointFolder(run_dir / "checkpoints").newest()[1].model


def failing_above(monkeypatch, limit: int, *, from_call: int = 0, after: str = "backward") -> None:
    """Micro-batches larger than ``limit`` run out of memory, after their backward: gradients are half there by then."""
    original, calls = TrainStep.micro_step, []

    def micro_step(self, tokens, targets):
        calls.append(1)
        loss = original(self, tokens, targets) if after == "backward" else None
        if len(tokens) > limit and len(calls) > from_call:
            raise torch.OutOfMemoryError(OOM)
        return original(self, tokens, targets) if loss is None else loss

    monkeypatch.setattr(TrainStep, "micro_step", micro_step)


def test_divisors_come_largest_first_and_keep_the_blocks():
    assert Split(12, 5).below(12) == [Split(6, 10), Split(4, 15), Split(3, 20), Split(2, 30), Split(1, 60)]
    assert Split(12, 5).below(3) == [Split(2, 30), Split(1, 60)]
    assert Split(7, 1).below(7) == [Split(1, 7)]
    assert Split(1, 9).below(1) == []


def test_the_step_is_done_again_and_the_run_ends_as_if_it_had_begun_with_the_smaller_split(
    shards, tmp_path, monkeypatch
):
    failing_above(monkeypatch, 3)
    result, events = run(shards, tmp_path / "failed", config())
    monkeypatch.undo()
    run(shards, tmp_path / "small", config(step={"batch_size": 3, "grad_accum": 4}))
    assert result.step == 8
    (event,) = of(events, MicroBatchReduced)
    assert (event.step, event.batch_size_before, event.batch_size, event.grad_accum) == (0, 6, 3, 4)
    assert event.reason == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert event.estimated_bytes < event.estimated_bytes_before
    for name, tensor in weights(tmp_path / "small").items():
        assert torch.equal(weights(tmp_path / "failed")[name], tensor), name


def test_a_failure_in_the_middle_counts_no_gradient_twice_and_skips_no_data(shards, tmp_path, monkeypatch):
    """It fails in the second micro-batch of the fourth step, whose first has left its gradients."""
    failing_above(monkeypatch, 2, from_call=7)
    _, events = run(shards, tmp_path / "failed", config())
    monkeypatch.undo()
    run(shards, tmp_path / "straight", config())
    assert [(e.step, e.batch_size) for e in of(events, MicroBatchReduced)] == [(3, 3), (3, 2)]
    found, expected = (
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["kind"] == "step"]
        for name in ("failed", "straight")
    )
    assert found[:3] == expected[:3]
    assert found == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights(tmp_path / "straight").items():
        torch.testing.assert_close(weights(tmp_path / "failed")[name], tensor, rtol=1e-4, atol=1e-5)


def test_float16_starts_the_step_with_the_scale_it_had(shards, tmp_path, monkeypatch):
    half = {"dtype": "float16", "batch_size": 4, "grad_accum": 1}
    failing_above(monkeypatch, 2, from_call=5)
    run(shards, tmp_path / "failed", config(step=half))
    monkeypatch.undo()
    run(shards, tmp_path / "straight", config(step=half))
    scales = [CheckpointFolder(tmp_path / n / "checkpoints").newest()[1].scaler for n in ("failed", "straight")]
    assert scales[0] == scales[1]
    for name, tensor in weights(tmp_path / "straight").items():
        torch.testing.assert_close(weights(tmp_path / "failed")[name], tensor, rtol=2e-2, atol=2e-3)


def test_an_evaluation_is_done_again_over_the_same_text(shards, tmp_path, monkeypatch):
    original = TrainStep.evaluate

    def evaluate(self, batches):
        batches = list(batches)
        if max(len(tokens) for tokens, _ in batches) > 2:
            raise MemoryError
        return original(self, batches)

    monkeypatch.setattr(TrainStep, "evaluate", evaluate)
    _, events = run(shards, tmp_path / "failed", config(max_steps=4))
    monkeypatch.undo()
    run(shards, tmp_path / "straight", config(max_steps=4))
    assert [(e.doing, e.step, e.batch_size) for e in of(events, MicroBatchReduced)] == [
        ("evaluation", 0, 3),
        ("evaluation", 0, 2),
    ]
    found, expected = (
        [e["val_loss"] for e in read_metrics(tmp_path / name / "metrics.jsonl") if e["kind"] == "evaluation"]
        for name in ("failed", "straight")
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_when_one_block_is_too_much_the_run_ends_and_says_how_to_go_on(shards, tmp_path, monkeypatch):
    failing_above(monkeypatch, 0, from_call=10)
    with pytest.raises(VramplanError, match=r"memory ran out: CUDA out of memory.*step-000005.* --replan"):
        run(shards, tmp_path / "run", config())
    _, found = CheckpointFolder(tmp_path / "run" / "checkpoints").newest()
    assert (found.step, found.data["position"]) == (5, 5 * 12), "saved as it was before the step that failed"
    guarded = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "guard"]
    assert [(line["batch_size"], line["grad_accum"]) for line in guarded] == [(3, 4), (2, 6), (1, 12)]


def test_other_errors_are_not_taken_for_memory(shards, tmp_path, monkeypatch):
    def broken(self, tokens, targets):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(TrainStep, "micro_step", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run(shards, tmp_path / "run", config())


def test_a_failure_inside_the_update_is_not_repeated(shards, tmp_path, monkeypatch):
    """Some weights may have been updated: only the last checkpoint is certain."""
    steps = []

    def half_applied(self, closure=None):
        steps.append(1)
        if len(steps) == 6:
            raise torch.OutOfMemoryError(OOM)
        return original(self, closure)

    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", half_applied)
    with pytest.raises(VramplanError, match=r"while the weights were being updated.*step-000004\.safetensors"):
        run(shards, tmp_path / "run", config())


def test_gradients_used_up_in_the_backward_cannot_be_formed_again(shards, tmp_path, monkeypatch):
    failing_above(monkeypatch, 1, from_call=5)
    cfg = config(step={"optimizer": "adamw-in-backward", "grad_accum": 1}, grad_clip=0.0)
    with pytest.raises(VramplanError, match=r"memory ran out.*step-000004"):
        run(shards, tmp_path / "run", cfg)


def test_it_can_be_turned_off(shards, tmp_path, monkeypatch):
    failing_above(monkeypatch, 3, from_call=10)
    with pytest.raises(VramplanError, match="memory ran out"):
        run(shards, tmp_path / "run", config(guard=False))


def test_a_resumed_run_keeps_the_smaller_split_until_it_is_asked_to_grow(shards, tmp_path, monkeypatch):
    cfg = config(max_steps=8)
    failing_above(monkeypatch, 3, from_call=11)  # in step 6, after the checkpoint of step 4
    monkeypatch.setattr(module._Trainer, "_save", stopping_after(6))
    with pytest.raises(KeyboardInterrupt):
        run(shards, tmp_path / "run", config(max_steps=8, checkpoint_interval=2))
    monkeypatch.undo()
    assert RunDirectory(tmp_path / "run").splits(cfg) == [(5, Split(3, 4))]
    cfg = config(max_steps=8, checkpoint_interval=2)
    used = record_splits(monkeypatch)
    monkeypatch.setattr(module._Trainer, "_save", stopping_after(6))
    with pytest.raises(KeyboardInterrupt):
        run(shards, tmp_path / "run", cfg, resume=True)
    assert used == {4: 6, 5: 3}, "divided where the first session was"
    monkeypatch.undo()
    used = record_splits(monkeypatch)
    run(shards, tmp_path / "run", cfg, resume=True)
    assert used == {4: 6, 5: 3, 6: 3, 7: 3}, "also after a second interruption"


def record_splits(monkeypatch) -> dict[int, int]:
    """The batch_size of each step of the runs from here on."""
    used: dict[int, int] = {}
    original = module._Trainer._one_step

    def one_step(self):
        used[self.step] = self.guard.split.batch_size
        original(self)

    monkeypatch.setattr(module._Trainer, "_one_step", one_step)
    return used


def test_an_interrupted_run_that_was_divided_ends_like_the_one_that_was_not_interrupted(shards, tmp_path, monkeypatch):
    """Ten micro-steps in, every larger micro-batch fails; one run is stopped after that, before its next checkpoint."""
    cfg = config(max_steps=8, checkpoint_interval=3)
    failing_above(monkeypatch, 3, from_call=9)
    run(shards, tmp_path / "straight", cfg)
    monkeypatch.undo()
    failing_above(monkeypatch, 3, from_call=9)
    monkeypatch.setattr(module._Trainer, "_evaluate_if_due", raising_at(5, module._Trainer._evaluate_if_due))
    with pytest.raises(KeyboardInterrupt):
        run(shards, tmp_path / "stopped", cfg)
    monkeypatch.undo()
    run(shards, tmp_path / "stopped", cfg, resume=True)
    for name, tensor in weights(tmp_path / "straight").items():
        assert torch.equal(weights(tmp_path / "stopped")[name], tensor), name


def raising_at(step: int, original):
    def evaluate_if_due(self):
        if self.step == step:
            raise KeyboardInterrupt
        original(self)

    return evaluate_if_due


def stopping_after(step: int):
    original = module._Trainer._save

    def save(self):
        if self.step == step:
            raise KeyboardInterrupt
        return original(self)

    return save


def test_grow_goes_back_to_the_configured_split(shards, tmp_path):
    cfg = config(max_steps=8, checkpoint_interval=2)
    run(shards, tmp_path / "run", config(max_steps=8, checkpoint_interval=2))
    directory = RunDirectory(tmp_path / "run")
    for path in list(CheckpointFolder(directory.checkpoints).paths())[:1]:
        path.unlink()
    directory.amend_session(splits=[[0, 2, 6]])
    _, events = run(shards, tmp_path / "run", cfg, resume=True, grow=True)
    (started,) = of(events, RunStarted)
    assert (started.batch_size, started.grad_accum) == (6, 2)


@pytest.mark.parametrize("split", [[1, 5, 2], [3, 4], "3 x 4", [1, 3, 4.0], [1, 0, 12], None])
def test_a_split_that_does_not_fit_the_run_is_not_believed(shards, tmp_path, split):
    run(shards, tmp_path / "run", config(max_steps=1))
    directory = RunDirectory(tmp_path / "run")
    directory.amend_session(splits=[split, [2, 3, 4]])
    assert directory.splits(config()) == [(2, Split(3, 4))]
    directory.amend_session(splits=split)
    assert directory.splits(config()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_the_staged_start_compiles_after_so_many_steps(shards, tmp_path):
    small = {"shape": replace(SHAPE, n_layer=1), "max_steps": 5, "eval_interval": 100}
    _, events = run(shards, tmp_path / "staged", config(compile_after=3, **small))
    run(shards, tmp_path / "eager", config(**small))
    assert [e.step for e in of(events, CompileSwitched)] == [3]
    found, expected = (
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["kind"] == "step"]
        for name in ("staged", "eager")
    )
    assert found[:3] == expected[:3]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(OOM), RuntimeError("no C++ compiler"), ImportError("triton")])
def test_what_does_not_compile_goes_on_eager(shards, tmp_path, monkeypatch, error):
    def compiled(model):
        def forward(tokens, targets):
            raise error

        if isinstance(error, ImportError):
            raise error
        return forward

    monkeypatch.setattr("vramplan.trainer.step._compiled", compiled)
    _, events = run(shards, tmp_path / "staged", config(max_steps=5, compile_after=3))
    monkeypatch.undo()
    run(shards, tmp_path / "eager", config(max_steps=5))
    (event,) = of(events, CompileFellBack)
    assert (event.step, event.reason) == (3, str(error).splitlines()[0])
    for name, tensor in weights(tmp_path / "eager").items():
        assert torch.equal(weights(tmp_path / "staged")[name], tensor), name


def test_an_evaluation_that_does_not_compile_goes_on_eager_too(shards, tmp_path, monkeypatch):
    """Without gradients it is a graph of its own: the first compiled step says nothing about it."""

    def compiled(model):
        def forward(tokens, targets):
            if not torch.is_grad_enabled():
                raise RuntimeError("no kernel for this")
            return model(tokens, targets)

        return forward

    monkeypatch.setattr("vramplan.trainer.step._compiled", compiled)
    _, events = run(shards, tmp_path / "run", config(max_steps=5, compile_after=2, eval_interval=4))
    assert [e.step for e in of(events, CompileSwitched)] == [2]
    assert [(e.step, e.reason) for e in of(events, CompileFellBack)] == [(4, "no kernel for this")]
    assert not of(events, MicroBatchReduced)


def test_a_signal_in_the_first_compiled_evaluation_is_no_failure_to_compile(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("vramplan.trainer.step._compiled", lambda model: model)
    events = []

    def on_event(event):
        events.append(event)
        if type(event).__name__ == "StepLogged" and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    cfg = config(max_steps=8, compile_after=2, eval_interval=4)
    result = train(cfg, shards, tmp_path / "run", device=CPU, on_event=on_event)
    assert result.interrupted
    assert not of(events, CompileFellBack)


def test_gradients_that_accumulate_stay_where_they_are():
    """Before step 0, after the rehearsal, and after a failed step: nothing is allocated anew."""
    step = StepConfig(batch_size=2, grad_accum=2, dtype="float32", device="cpu", optimizer="muon")
    model = module.GPT(SHAPE, step)
    optimizer = module.build_optimizer(model, step, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    trainer = TrainStep(model, optimizer, step, grad_clip=1.0, device=CPU)
    trainer.allocate()
    trainer.rehearse_update()
    before = [p.grad.data_ptr() for p in model.parameters()]
    tokens = torch.randint(0, 64, (2, 16))
    trainer.micro_step(tokens, tokens)
    trainer.forget()
    assert [p.grad.data_ptr() for p in model.parameters()] == before
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw-foreach", "muon", "adamw-fused"])
def test_the_rehearsal_of_the_update_leaves_no_trace(optimizer):
    step = StepConfig(batch_size=2, dtype="float32", device="cpu", optimizer=optimizer)
    found = []
    for rehearsed in (False, True):
        torch.manual_seed(0)
        model = module.GPT(SHAPE, step, seed=3)
        optimizer_ = module.build_optimizer(model, step, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
        trainer = TrainStep(model, optimizer_, step, grad_clip=1.0, device=CPU)
        trainer.allocate()
        if rehearsed:
            trainer.rehearse_update()
        tokens = torch.randint(0, 64, (2, 16))
        for _ in range(3):
            trainer([(tokens, tokens)], 1e-2)
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_the_rehearsal_of_stochastic_rounding_leaves_no_trace():
    step = StepConfig(batch_size=2, dtype="pure-bfloat16", device="cpu", optimizer="adamw-stochastic")
    model = module.GPT(SHAPE, step, seed=3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = module.build_optimizer(model, step, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    trainer = TrainStep(model, optimizer, step, grad_clip=1.0, device=CPU)
    trainer.allocate()
    trainer.rehearse_update()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]
    assert not any(t.any() for state in optimizer.state.values() for t in state.values())


def test_a_disk_without_room_for_a_checkpoint_is_noticed_before_the_first_step(shards, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("vramplan.trainer.rehearsal.shutil.disk_usage", lambda path: usage)
    with pytest.raises(VramplanError, match=r"a checkpoint of this run takes .*has .* free"):
        run(shards, tmp_path / "run", config())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


LIMITED = """
import json, resource, sys
import numpy as np
import torch
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer import loop
from vramplan.trainer.shards import ShardSet

run_dir, shards, headroom, at_step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
config = RunConfig.load(sys.argv[5])
original = loop._Trainer._one_step

def limited(self):
    if headroom and self.step == at_step:
        with open("/proc/self/status") as f:
            now = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (now + headroom, now + headroom))
    original(self)

loop._Trainer._one_step = limited
events = []
loop.train(config, ShardSet.open(shards), run_dir, device=torch.device("cpu"), on_event=events.append)
reduced = [e for e in events if type(e).__name__ == "MicroBatchReduced"]
print(json.dumps([[e.step, e.batch_size, e.grad_accum, e.reason] for e in reduced]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits of real memory are set through Linux")
def test_a_real_lack_of_memory_in_mid_run(make_shards, learnable_tokens, tmp_path):
    """From its third step on the process may take 60 MiB more than it has, and the full logits of a step take 200."""
    shards = make_shards(train=learnable_tokens(8001), val=learnable_tokens(400, seed=1))
    shape = Shape(n_layer=1, n_head=2, n_embd=16, vocab_size=20_000, block_size=64)
    step = StepConfig(batch_size=8, dtype="float32", loss="full", optimizer="adamw-fused", device="cpu")
    settings = {"max_steps": 6, "warmup_steps": 2, "eval_interval": 100, "checkpoint_interval": 6, "eval_batches": 1,
                "log_interval": 1, "learning_rate": 1e-3, "min_learning_rate": 1e-4}  # fmt: skip
    path = tmp_path / "run.toml"
    RunConfig.build(shape, step, train=settings).save(path)
    # freed memory goes back to the system at once, or the heap would keep what earlier steps have had
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    reduced = {}
    for name, headroom in (("limited", 60 * 2**20), ("free", 0)):
        argv = [str(tmp_path / name), str(shards.directory), str(headroom), "2", str(path)]
        program = textwrap.dedent(LIMITED)
        end = subprocess.run(
            [sys.executable, "-c", program, *argv], capture_output=True, text=True, env=env, timeout=120
        )
        assert end.returncode == 0, end.stderr
        reduced[name] = json.loads(end.stdout.splitlines()[-1])
    assert reduced["free"] == []
    assert reduced["limited"], "it should have run out of memory"
    assert all(at == 2 and batch * accum == 8 for at, batch, accum, _ in reduced["limited"])
    assert "allocate memory" in reduced["limited"][0][3]
    for name, tensor in weights(tmp_path / "free").items():
        torch.testing.assert_close(weights(tmp_path / "limited")[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_best_checkpoint_is_kept_and_found(shards, tmp_path, monkeypatch):
    """The validation losses are made up: the second is the lowest."""
    made_up = iter([5.0, 4.0, 2.0, 3.0, 3.5])
    monkeypatch.setattr(TrainStep, "evaluate", lambda self, batches: next(made_up))
    cfg = config(eval_interval=2, checkpoint_interval=2, keep_checkpoints=1)
    run(shards, tmp_path / "run", cfg)
    directory = RunDirectory(tmp_path / "run")
    assert directory.best_saved() == (2.0, 4)
    assert [step_of(path) for path in CheckpointFolder(directory.checkpoints).paths()] == [8, 4]
    assert find_checkpoint(tmp_path / "run", best=True)[1].step == 4
    assert find_checkpoint(tmp_path / "run")[1].step == 8


def test_without_an_evaluation_no_checkpoint_is_called_the_best(shards, tmp_path):
    run(shards, tmp_path / "run", config(max_steps=2))
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="none is known to be the best"):
        find_checkpoint(tmp_path / "run", best=True)


def test_spilled_memory_divides_later_steps_but_not_while_a_session_warms_up(monkeypatch):
    step = StepConfig(batch_size=4, dtype="float32", device="cpu")
    model = module.GPT(SHAPE, step)
    optimizer = module.build_optimizer(model, step, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    trainer = TrainStep(model, optimizer, step, grad_clip=1.0, device=CPU)
    asked, events = [], []

    def spilled(*, reserved_bytes, tokens_per_second):
        asked.append((reserved_bytes, tokens_per_second))
        return "the card is full" if len(asked) == 2 else ""

    guard = Guard(SHAPE, trainer, CPU, events.append, spilled=spilled)
    guard.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for number in range(1, 8):
        guard.after_step(number, 1000, 0.5)
    (event,) = events
    assert (event.step, event.outcome, event.batch_size, event.grad_accum) == (4, "spilled", 2, 2)
    assert asked == [(7, 2000.0)] * 3, "steps 3 and 4, and 7 after two of the new size"
    assert (trainer.step.batch_size, trainer.step.grad_accum) == (2, 2)
