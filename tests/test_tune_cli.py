"""``tune`` and ``plan --confirm`` as a user runs them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vramplan.runconfig import RunConfig

CONFIG = """
[model]
n_layer = 1
n_head = 2
n_embd = 32
vocab_size = 256
block_size = 32
[step]
batch_size = 2
grad_accum = 2
dtype = "float32"
loss = "full"
device = "cpu"
[train]
max_steps = 10
eval_batches = 6
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"VRAMPLAN_LEDGER": str(folder / "ledger.sqlite")}
    return subprocess.run(
        [sys.executable, "-m", "vramplan", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def test_the_winner_is_a_run_configuration_and_the_same_command_goes_on(folder: Path) -> None:
    words = ("tune", "run.toml", "-o", "tuned.toml", "--plot", "trials.svg", "--steps", "3", "--json", "--trials")
    first = run(folder, *words, "2")
    assert first.returncode == 0, first.stderr
    told: dict[str, Any] = json.loads(first.stdout)
    assert (told["probes"], told["stopped"]) == (2, "2 arms measured")
    assert told["best"]["tokens_per_second"] == max(t["tokens_per_second"] for t in told["trials"])
    assert first.stderr.count("tokens/s") == 2
    winner, before = RunConfig.load(folder / "tuned.toml"), RunConfig.load(folder / "run.toml")
    assert winner.tokens_per_step == before.tokens_per_step
    assert winner.train.eval_batches * winner.step.batch_size >= 12
    assert winner.plan.tokens_per_second == told["best"]["tokens_per_second"]
    assert winner.step.batch_size == told["best"]["params"]["batch_size"]
    assert "<svg" in (folder / "trials.svg").read_text()
    again = json.loads(run(folder, *words, "2").stdout)
    assert again["trials"] == told["trials"]
    assert run(folder, "ledger", "list").stdout.count("fits") == 2


def test_ctrl_c_keeps_what_is_finished_and_leaves_no_child(folder: Path) -> None:
    env = os.environ | {"VRAMPLAN_LEDGER": str(folder / "ledger.sqlite"), "TMPDIR": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-m", "vramplan", "tune", "run.toml", "--steps", "3"], cwd=folder, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
    assert process.stderr is not None
    assert "tokens/s" in process.stderr.readline()  # the first arm is done
    time.sleep(1.5)  # the second child is loading torch
    if sys.platform.startswith("linux"):
        assert workers(folder)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "every finished trial is kept" in said
    assert "Traceback" not in said
    told = json.loads(run(folder, "tune", "run.toml", "--steps", "3", "--trials", "1", "--json").stdout)
    assert told["probes"] == 1
    if sys.platform.startswith("linux"):
        assert not workers(folder)


def workers(folder: Path) -> list[str]:
    """Commands of the processes that were given a request within the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            found += [" ".join(words)] if any(word.startswith(str(folder)) for word in words) else []
    return found


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("tune", "run.toml", "--storage", "nonsense://"), "--storage"),
        (("tune", "none.toml"), "config"),
        (("tune", "run.toml", "--device", "cuda"), "--device"),
        (("tune", "run.toml", "--vram", "100MiB"), "--vram"),
        (("plan", "--gpu", "4070", "--params", "40M", "--workload", "nanogpt", "--confirm"), "--confirm"),
    ],
)
def test_bad_input_is_one_message(folder: Path, words: tuple[str, ...], field: str) -> None:
    found = run(folder, *words)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith(f"Error: {field}")
    assert "Traceback" not in found.stderr


def test_a_plan_is_confirmed_as_far_as_a_cpu_can(folder: Path) -> None:
    found = run(folder, "plan", "--gpu", "4070", "--params", "125M", "--confirm", "--json", "-o", "plan.json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)["confirmation"]
    assert (told["rank"], told["tried"][0]["holds"]) == (1, True)
    assert "the CUDA context" in told["unconfirmed"]
    assert run(folder, "apply", "plan.json", "-o", "best.toml").returncode == 0


def test_a_plan_for_this_cpu_is_confirmed_by_its_own_steps(folder: Path) -> None:
    small = ("--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--vocab-size", "256", "--block-size", "32")
    words = ("plan", "--gpu", "cpu", *small, "--dtype", "float32", "--tokens-per-step", "128", "--confirm")
    found = run(folder, *words)
    assert found.returncode == 0, found.stderr
    assert "plan 1 holds" in found.stdout
