"""``vramplan health`` as a user types it: files, standard input, exit codes, what is printed, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vramplan.cli import main
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig

COMMAND_LINE = (
    "train.py --n_embd=384 --batch_size=16 --gradient_accumulation_steps=32 --max_iters=6000 --lr_decay_iters=6000 "
    "--learning_rate=5e-4"
)


def run(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, ["health", *words], prog_name="vramplan", input=stdin)


def note_003(last: float = 4.17) -> str:
    table = [(0, 10.88), (1000, 4.95), (2000, 4.48), (3000, 4.32), (4000, 4.24), (5000, 4.19), (6000, last)]
    lines = []
    for step, loss in table:
        lines.append(f"step {step}: train loss {loss - 0.02:.4f}, val loss {loss:.4f}")
        lines += [
            f"iter {s}: loss {loss:.4f}, time 3839.02ms, mfu 12.70%" for s in range(step, min(step + 60, 6001), 10)
        ]
    return "\n".join(lines) + "\n"


@pytest.fixture
def log(tmp_path: Path) -> str:
    path = tmp_path / "train.log"
    path.write_text(note_003())
    return str(path)


def test_the_terminal_says_size_tokens_utilisation_and_what_is_ahead(log: str) -> None:
    result = run(log, "--config", COMMAND_LINE, "--gpu", "4070", "--params", "125M")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for words in (
        "12L/12H/384E has 41.0M parameters, not the 125M asked for.",
        "3.15B; 76.8 per parameter",
        "70% of the RTX 4070's 58.3 TFLOPS",
        "12.7% printed, of an A100's 312 TFLOPS: that is 68% of this card",
        "ln(50,304) = 10.83",
        "Forecast: E + A s^-b",
        "step 12,000",
        "(. training and o validation)",
        "remedy: vramplan plan --params 125M",
        "1 warning.",
    ):
        assert words in shown, words


def test_json_is_one_object_with_the_same_facts(log: str) -> None:
    data = json.loads(run(log, "--config", COMMAND_LINE, "--gpu", "4070", "--data-tokens", "0.7B", "--json").stdout)
    assert data["figures"]["parameters"] == 40_953_216
    assert data["figures"]["tokens_seen"] == 3_145_728_000
    assert data["figures"]["mfu"] == pytest.approx(0.70, abs=0.005)
    assert data["figures"]["epochs"] == pytest.approx(4.49, abs=0.01)
    assert data["validation"][-1] == [6000, 4.17]
    assert data["forecast"]["at"][0]["low"] < data["forecast"]["at"][0]["middle"] < data["forecast"]["at"][0]["high"]


def test_standard_input_is_read(log: str) -> None:
    piped = run("-", "--json", stdin=Path(log).read_text())
    assert json.loads(piped.stdout)["title"] == "standard input"
    assert json.loads(piped.stdout)["validation"] == json.loads(run(log, "--json").stdout)["validation"]


def test_our_toml_and_nanogpts_file_serve_as_configuration(log: str, tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    file.write_text("n_embd = 384\nbatch_size = 16\ngradient_accumulation_steps = 2 * 16\n")
    ours = tmp_path / "run.toml"
    RunConfig.build(Shape(n_layer=12, n_head=12, n_embd=384), StepConfig(batch_size=16, grad_accum=32)).save(ours)
    for config in (file, ours):
        data = json.loads(run(log, "--config", str(config), "--json").stdout)
        assert (data["figures"]["parameters"], data["figures"]["tokens_seen"]) == (40_953_216, 3_145_728_000), config


def test_steps_to_forecast_can_be_named(log: str) -> None:
    data = json.loads(run(log, "--at", "20k", "--at", "12000", "--at", "1M", "--json").stdout)
    assert [at["step"] for at in data["forecast"]["at"]] == [12_000, 20_000]
    assert "none for 1,000,000" in run(log, "--at", "1M").stdout


def test_a_problem_is_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "bad.log"
    path.write_text(note_003() + "iter 6010: loss nan, time 3839.02ms, mfu 12.70%\n")
    result = run(str(path))
    assert result.exit_code == 1
    assert "problem" in result.stdout
    assert run(str(path), "--json").exit_code == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{folder}/absent"], "does not exist"),
        (["{folder}"], "holds neither config.toml nor metrics.jsonl"),
        (["{folder}/empty"], "has no line such as"),
        (["{folder}/noise"], "has no line such as"),
        (["{log}", "--gpu", "4071"], "is not in the catalogue"),
        (["{log}", "--params", "many"], "is not a count"),
        (["{log}", "--config", "{folder}/absent.toml"], "does not exist"),
        (["{log}", "--config", "hello"], "neither a file nor a command line"),
        (["{log}", "--config", "train.py --n_embd=100 --n_head=7"], "not divisible"),
    ],
)
def test_bad_input_is_one_clear_error(log: str, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 100)
    result = run(*(word.format(folder=tmp_path, log=log) for word in words))
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_all_bad_options_are_told_at_once(log: str) -> None:
    said = run(log, "--params", "many", "--data-tokens", "lots", "--gpu", "4071").stderr
    assert "3 problems" in said


def test_a_configuration_for_a_run_that_has_its_own_is_refused(tmp_path: Path) -> None:
    RunConfig.build(Shape(n_layer=1, n_head=1, n_embd=16), StepConfig()).save(tmp_path / "config.toml")
    assert "the run has its own" in run(str(tmp_path), "--config", COMMAND_LINE).stderr
    assert run(str(tmp_path)).exit_code == 0


def test_words_in_a_log_do_not_command_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "[bold]x"
    path.write_text("Overriding: n_embd = \x1b]0;title\x07[red]\n" + note_003())
    result = run(str(path))
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    assert "[bold]x" in result.stdout


def test_torch_is_not_imported(log: str) -> None:
    call = f"main(['health', {log!r}], standalone_mode=False)"
    code = f"import sys; from vramplan.cli import main; {call}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.rstrip().endswith("False")


def test_help_states_the_exit_code() -> None:
    assert "Exit code: 1 if anything is a problem" in " ".join(run("--help").stdout.split())
