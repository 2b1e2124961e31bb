"""``vramplan explain``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from vramplan.cli import main

REPOSITORY = Path(__file__).parents[1]
NOTE = str(REPOSITORY / "configs" / "note-004-oom-4070.toml")
TEXT = """step 0: train loss 10.8755, val loss 10.8761
Traceback (most recent call last):
  File "/w/nanoGPT/train.py", line 304, in <module>
    scaler.scale(loss).backward()
  File "/tmp/torchinductor_me/q7/cq7.py", line 512, in call
    buf1 = empty_strided_cuda((16, 1024, 50304), (51511296, 50304, 1), torch.bfloat16)
torch.OutOfMemoryError: CUDA out of memory.{}
"""
WORDS = "train.py --n_embd=576 --batch_size=16 --gradient_accumulation_steps=32"


def run(*words: str | Path, text: str | None = None) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, words)], input=text)


def answer(*words: str | Path, text: str | None = None) -> dict[str, Any]:
    result = run(*words, "--json", text=text)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def crash(tmp_path: Path) -> Path:
    path = tmp_path / "crash.txt"
    path.write_text(TEXT.format(""), encoding="utf-8")
    return path


def test_the_seeds_failure_is_explained(crash: Path) -> None:
    result = run(crash, "--config", NOTE, "--gpu", "4070")
    assert result.exit_code == 0
    for words in ("gradient of the logits", "1.535 GiB", "16 x 1024 x 50304 x 2", "logits", "unexplained"):
        assert words in result.output
    found = answer(crash, "--config", NOTE, "--gpu", "4070")
    assert found["tensor"]["name"] == "gradient of the logits"
    assert found["tensor"]["also_alive"][0] == {"name": "logits", "bytes": found["tensor"]["bytes"]}
    assert found["predicted"]["unexplained_bytes"] > 2**30


def test_the_given_memory_decides_what_fits(crash: Path) -> None:
    found = answer(crash, "--config", NOTE, "--gpu", "4070", "--vram", "8.9GB")
    assert found["budget_bytes"] == 8_900_000_000
    repair = found["repair"]
    assert repair["process_bytes_after"] < 8_900_000_000 < repair["process_bytes_before"]
    assert repair["config"]["batch_size"] * repair["config"]["grad_accum"] == 512
    assert repair["tokens_per_step"] == 512 * 1024


def test_the_repaired_configuration_is_written_as_toml(crash: Path, tmp_path: Path) -> None:
    out = tmp_path / "fixed.toml"
    assert run(crash, "--config", NOTE, "--vram", "8.9GB", "-o", out).exit_code == 0
    data = tomllib.loads(out.read_text(encoding="utf-8"))
    assert data["step"]["batch_size"] * data["step"]["grad_accum"] == 512
    assert data["model"]["n_embd"] == 576
    result = CliRunner().invoke(main, ["estimate", str(out), "--vram", "8.9GB", "--json"])
    assert json.loads(result.stdout)["fits"] is True


def test_nanogpts_own_words_are_a_configuration(crash: Path, tmp_path: Path) -> None:
    out = tmp_path / "fixed.py"
    result = run(crash, "--config", WORDS, "--vram", "8.9GB", "-o", out)
    assert result.exit_code == 0, result.output
    assert "--batch_size=8 --gradient_accumulation_steps=64" in result.output
    values: dict[str, Any] = {}
    exec(out.read_text(encoding="utf-8"), values)
    assert (values["batch_size"], values["gradient_accumulation_steps"], values["n_embd"]) == (8, 64, 576)


def test_nanogpts_accumulation_counts_all_processes(crash: Path) -> None:
    words = "torchrun --nproc_per_node=4 " + WORDS
    result = run(crash, "--config", words.replace("steps=32", "steps=128"), "--vram", "8.9GB")
    assert "--batch_size=8 --gradient_accumulation_steps=256" in result.output


def test_nanogpts_config_file_is_a_configuration(crash: Path, tmp_path: Path) -> None:
    config = tmp_path / "train_small.py"
    config.write_text("n_embd = 576\nbatch_size = 16\ngradient_accumulation_steps = 32\n", encoding="utf-8")
    assert answer(crash, "--config", config)["tensor"]["name"] == "gradient of the logits"
    named = answer(crash, "--config", "train.py train_small.py --batch_size=16")
    assert named["tensor"]["name"] == "gradient of the logits"
    missing = answer(crash, "--config", "train.py config/no_such.py --batch_size=16 --n_embd=576")
    assert any("no_such" in note for note in missing["notes"])


def test_a_log_of_nanogpt_says_its_own_configuration(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    told = "Overriding: n_embd = 576\nOverriding: batch_size = 16\nOverriding: gradient_accumulation_steps = 32\n"
    log.write_text(told + TEXT.format(""), encoding="utf-8")
    found = answer(log)
    assert found["tensor"]["name"] == "gradient of the logits"
    assert any("nanoGPT's log" in note for note in found["notes"])


def test_without_a_configuration_it_says_what_it_can_and_asks(crash: Path) -> None:
    result = run(crash)
    assert result.exit_code == 0
    assert "--config" in result.output
    found = answer(crash)
    assert (found["kind"], found["shape"], found["dtype"]) == ("cuda_oom", [16, 1024, 50304], "bfloat16")
    assert (found["tensor"], found["repair"], found["requested_bytes"]) == (None, None, None)


def test_without_a_size_it_asks_for_one(crash: Path) -> None:
    assert "--vram" in run(crash, "--config", NOTE).output


def test_the_texts_figures_are_the_budget(tmp_path: Path) -> None:
    figures = (
        " Tried to allocate 1.54 GiB. GPU 0 has a total capacity of 11.71 GiB of which 0.50 GiB is free. Including "
        "non-PyTorch memory, this process has 8.00 GiB memory in use. Of the allocated memory 7.50 GiB is allocated by "
        "PyTorch, and 200.00 MiB is reserved by PyTorch but unallocated."
    )
    found = answer("-", "--config", NOTE, text=TEXT.format(figures))
    assert found["cause"] == "other_process"
    assert found["budget_bytes"] == pytest.approx(8.5 * 2**30, rel=0.001)
    assert found["repair"]["process_bytes_after"] < found["budget_bytes"]


def test_what_is_no_memory_failure_is_said(tmp_path: Path) -> None:
    result = run("-", "--config", NOTE, text="ValueError: the loss is nan\n")
    assert result.exit_code == 0
    assert "Not a memory failure" in result.output
    found = answer("-", text="ValueError: the loss is nan\n")
    assert found["kind"] == "not_memory"
    assert all(found[name] is None for name in ("requested_bytes", "tensor", "repair", "predicted", "gpu_index"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "latin-1"])
def test_texts_in_other_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "crash.txt"
    path.write_bytes(TEXT.format("").encode(encoding))
    assert answer(path)["kind"] == "cuda_oom"


def test_binary_garbage_gets_an_honest_answer(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(os.urandom(200_000))
    assert answer(path)["kind"] == "not_memory"


def test_a_text_that_commands_the_terminal_is_shown_without(tmp_path: Path) -> None:
    path = tmp_path / "crash.txt"
    path.write_text("\x1b]0;title\x07 RuntimeError: CUDA error: out of memory [bold]\x07\n", encoding="utf-8")
    result = run(path)
    assert result.exit_code == 0
    assert "\x07" not in result.output
    assert "[bold]" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.txt"], "does not exist"),
        (["."], "is a directory"),
        (["{crash}", "--config", "missing.toml"], "does not exist"),
        (["{crash}", "--config", "train.py --n_embd=512"], "n_head"),
        (["{crash}", "--config", "two\nlines"], "neither"),
        (["{crash}", "-o", "x.toml"], "add --config"),
        (["{crash}", "--reserve", "1GiB"], "--gpu or --vram"),
        (["{crash}", "--config", NOTE, "--gpu", "cpu"], "cuda"),
        (["{crash}", "--config", NOTE, "--vram", "8"], "no unit"),
        (["{crash}", "--gpu", "no such card"], "catalogue"),
    ],
)
def test_bad_input_is_one_error(crash: Path, words: list[str], said: str) -> None:
    result = run(*[word.replace("{crash}", str(crash)) for word in words])
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


def test_an_empty_text_is_refused() -> None:
    assert run("-", text=" \n").exit_code == 2


def test_the_text_itself_is_never_written_over(crash: Path) -> None:
    before = crash.read_bytes()
    result = run(crash, "--config", NOTE, "--vram", "8.9GB", "-o", crash)
    assert result.exit_code == 2
    assert "is what it is made from" in result.output
    assert crash.read_bytes() == before


def test_nothing_is_written_where_there_is_no_repair(crash: Path, tmp_path: Path) -> None:
    out = tmp_path / "fixed.toml"
    result = run(crash, "--config", NOTE, "--vram", "0.6GiB", "-o", out)
    assert result.exit_code == 0
    assert "not written" in result.output
    assert not out.exists()


def test_a_script_with_a_file_of_settings_is_a_command_line(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text("batch_size = 8\nn_embd = 576\n", encoding="utf-8")
    crash = tmp_path / "crash.txt"
    crash.write_text(TEXT.format(" Tried to allocate 1.54 GiB."), encoding="utf-8")
    found = answer(crash, "--config", "train.py small.py")
    assert found["repair"]["config"]["batch_size"] <= 8
    missing = answer(crash, "--config", "train.py nowhere.py")
    assert any("nowhere.py" in note for note in missing["notes"])
