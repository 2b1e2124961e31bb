"""kill -9 at random moments, some of them while a checkpoint is being written: nothing is lost and no bit differs."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer.checkpoint import CheckpointFolder, step_of
from vramplan.trainer.metrics import read_metrics
from vramplan.trainer.shards import ShardSet

KILLS, KILLS_WHILE_SAVING = 25, 8
STEPS = 100


def train_until_killed(run_dir: Path, shards: Path, config: RunConfig) -> None:
    """One session in a process of its own. Flushing to the disk takes a while, as on a disk, so that kills meet it."""
    from vramplan.trainer import loop

    flush = os.fsync

    def slow(descriptor: int) -> None:
        flush(descriptor)
        time.sleep(0.006)

    os.fsync = slow
    started = (run_dir / "metrics.jsonl").exists()

    def tell(event: object) -> None:
        if type(event).__name__ == "Resumed":
            with (run_dir.parent / "resumed").open("a") as f:
                f.write(f"{event.step}\n")  # type: ignore[attr-defined]

    loop.train(config, ShardSet.open(shards), run_dir, device=torch.device("cpu"), on_event=tell, resume=started)


def main(folder: Path, shards: Path, seed: int) -> None:
    """Forks its sessions: torch is loaded once. Prints at which checkpoint each kill left the run."""
    torch.set_num_threads(1)
    importlib.import_module("vramplan.trainer.loop")
    torch.optim.AdamW([torch.zeros(1)]).step()  # loads half of torch, which each session would do anew
    config, draw, run_dir = RunConfig.load(folder / "run.toml"), random.Random(seed), folder / "killed"
    left: list[int] = []
    while len(left) <= KILLS:
        child = os.fork()
        if child == 0:
            train_until_killed(run_dir, shards, config)
            os._exit(0)
        if len(left) < KILLS:
            wait_for_the_moment(child, run_dir, saving=len(left) < KILLS_WHILE_SAVING, draw=draw)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        left.append(max(map(step_of, CheckpointFolder(run_dir / "checkpoints").paths()), default=0))
    if os.fork() == 0:
        train_until_killed(folder / "straight", shards, config)
        os._exit(0)
    os.wait()
    print(json.dumps(left))


def wait_for_the_moment(child: int, run_dir: Path, *, saving: bool, draw: random.Random) -> None:
    """Until a checkpoint is half written, or for a random while after the first line."""
    metrics, told = run_dir / "metrics.jsonl", run_dir.parent / "resumed"
    deadline, lines, resumed = time.monotonic() + 20, size(metrics), size(told)
    # a resumed session first drops lines, which changes the file too: it has begun when it has said so
    while time.monotonic() < deadline and (size(metrics) == lines or (lines and size(told) == resumed)):
        time.sleep(0.001)
    if not saving:
        time.sleep(draw.uniform(0, 0.08))
        return
    while time.monotonic() < deadline and not list((run_dir / "checkpoints").glob(".step-*.tmp")):
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.006))


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sessions are forked, which this system cannot do")
def test_nothing_is_lost_and_every_bit_is_the_same(make_shards, learnable_tokens, tmp_path):
    shards = make_shards(train=learnable_tokens(4001), val=learnable_tokens(300, seed=1))
    shape = Shape(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16)
    step = StepConfig(batch_size=2, grad_accum=2, dtype="float32", optimizer="adamw-fused", device="cpu")
    settings = {"max_steps": STEPS, "warmup_steps": 5, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "seed": 7,
                "log_interval": 1, "eval_interval": 10, "checkpoint_interval": 3, "eval_batches": 2}  # fmt: skip
    RunConfig.build(shape, step, train=settings).save(tmp_path / "run.toml")
    argv = [sys.executable, __file__, str(tmp_path), str(shards.directory), "11"]
    end = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert end.returncode == 0, end.stderr
    left = json.loads(end.stdout.splitlines()[-1])
    assert len(left) == KILLS, "the run came to its end too early"
    resumed = [int(line) for line in (tmp_path / "resumed").read_text().split()]
    started_anew = len(left) - len(resumed)  # sessions killed before there was a line to resume
    assert resumed == left[started_anew:], "each session goes on from the newest checkpoint that the kill left"
    killed, straight = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("killed", "straight"))
    for kind, figure in (("step", "loss"), ("step", "grad_norm"), ("evaluation", "val_loss")):
        found, expected = ([(e["step"], e[figure]) for e in of if e["kind"] == kind] for of in (killed, straight))
        assert found == expected
        assert found[-1][0] == STEPS
    ends = [CheckpointFolder(tmp_path / name / "checkpoints").newest()[1] for name in ("killed", "straight")]
    for name, tensor in ends[1].model.items():
        assert torch.equal(ends[0].model[name], tensor), name
    assert not list((tmp_path / "killed").rglob("*.tmp"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
