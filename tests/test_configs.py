"""The configurations that ship: each loads, has the size it claims, and keeps 524,288 tokens per step."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from vramplan.errors import ConfigError
from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import estimate
from vramplan.runconfig import RunConfig
from vramplan.units import GIB, count

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.toml"))
FAILING = ["fails-12L12H512E"]
LEFT_BY_THE_DESKTOP = 12_000_000_000 - 2_900_000_000 - 200_000_000  # "about 8.9 GB" of a 12 GB card

TABLE = {
    # name: (label, parameters as people read them)
    "gpt-12L12H576E": ("12L/12H/576E", "77.4M"),
    "gpt-12L12H720E": ("12L/12H/720E", "111.6M"),
    "gpt-12L12H480E": ("12L/12H/480E", "57.8M"),
    "gpt-12L8H512E": ("12L/8H/512E", "64.0M"),
    "gpt-12L16H512E": ("12L/16H/512E", "64.0M"),
    "gpt2-124M": ("12L/12H/768E", "124.4M"),
    "modern-123M": ("12L/12H/768E", "123.6M"),
    "note-003-41M": ("12L/12H/384E", "41.0M"),
    "note-004-oom-4070": ("12L/12H/576E", "77.4M"),
    "note-004-repair": ("12L/12H/576E", "77.4M"),
    "cpu-demo": ("2L/2H/64E", "3.3M"),
}


def load(name: str) -> RunConfig:
    return RunConfig.load(FOLDER / f"{name}.toml")


def comment_of(name: str) -> str:
    """The words above ``[model]``, on one line."""
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    return " ".join(line.lstrip("# ") for line in text.partition("[model]")[0].splitlines())


def test_every_file_is_listed_here_and_in_the_readme() -> None:
    assert sorted([*TABLE, *FAILING]) == FILES
    in_readme = re.findall(r"^\| `(.+)\.toml`", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(in_readme) == FILES


@pytest.mark.parametrize("name", TABLE)
def test_has_the_shape_and_size_it_claims(name: str) -> None:
    label, size = TABLE[name]
    shape = load(name).shape
    assert shape.label == label
    assert count(shape.parameters) == size
    comment = comment_of(name)
    assert size in comment
    for claimed in re.findall(r"head_dim (\d+)", comment):
        assert int(claimed) == shape.head_dim
    rows = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    row = next(r for r in rows if r.startswith(f"| `{name}.toml`"))
    assert [cell.strip() for cell in row.split("|")[2:5]] == [label, size, str(shape.head_dim)]


@pytest.mark.parametrize("name", [name for name in TABLE if name != "cpu-demo"])
def test_keeps_512_sequences_of_1024_tokens_per_step(name: str) -> None:
    assert load(name).tokens_per_step == 524_288


@pytest.mark.parametrize("name", TABLE)
def test_survives_being_written_again(name: str, tmp_path: Path) -> None:
    config = load(name)
    config.save(tmp_path / "again.toml")
    assert RunConfig.load(tmp_path / "again.toml") == config


def test_twelve_heads_on_512_fail_and_the_good_repairs_come_first() -> None:
    with pytest.raises(ConfigError) as caught:
        load("fails-12L12H512E")
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("n_embd", 512)
    assert "n_head=12" in problem.rule
    offered = re.findall(r"n_embd=(\d+) with n_head=(\d+)", problem.remedy)
    assert offered[:3] == [("512", "8"), ("512", "16"), ("768", "12")]


def test_real_gpt2_has_123_6_million_without_positions() -> None:
    shape = load("gpt2-124M").shape
    assert count(shape.parameters - shape.block_size * shape.n_embd) == "123.6M"


def test_failing_run_fits_the_name_on_the_box_but_not_what_its_desktop_left() -> None:
    config, card = load("note-004-oom-4070"), find_gpu("4070")
    need = estimate(config.shape, config.step_config, card).process_bytes
    assert LEFT_BY_THE_DESKTOP < need < card.usable_bytes
    eager = estimate(config.shape, replace(config.step_config, compile=False), card).process_bytes
    assert eager > card.usable_bytes


@pytest.mark.parametrize(
    ("name", "words", "compiled"),
    [
        ("note-004-oom-4070", r"process needs about ([\d.]+) GiB", True),
        ("note-004-oom-4070", r"Without compile it would need more, not less: about ([\d.]+) GiB", False),
        ("note-004-repair", r"By the planner's model about ([\d.]+) GiB", True),
    ],
)
def test_predictions_in_comments_are_the_planners(name: str, words: str, compiled: bool) -> None:
    config = load(name)
    need = estimate(config.shape, replace(config.step_config, compile=compiled), find_gpu("4070")).process_bytes
    found = re.search(words, comment_of(name))
    assert found is not None
    assert float(found[1]) == pytest.approx(need / GIB, rel=0.03)


def test_repair_changes_neither_model_nor_optimisation_and_fits() -> None:
    failing, repair = load("note-004-oom-4070"), load("note-004-repair")
    assert repair.model == failing.model
    assert repair.train == failing.train
    assert repair.step.batch_size * repair.step.grad_accum == 512
    need = estimate(repair.shape, repair.step_config, find_gpu("4070")).process_bytes
    assert need < 0.8 * LEFT_BY_THE_DESKTOP


@pytest.mark.parametrize("name", [name for name in TABLE if name not in ("note-004-oom-4070", "cpu-demo")])
def test_fits_a_12_gb_card_with_a_busy_desktop(name: str) -> None:
    config = load(name)
    assert estimate(config.shape, config.step_config, find_gpu("4070")).process_bytes < LEFT_BY_THE_DESKTOP


def test_run_of_note_003_sees_3_146_billion_tokens_and_knows_what_was_asked_for() -> None:
    config = load("note-003-41M")
    assert count(config.total_steps * config.tokens_per_step) == "3.15B"
    assert config.train.learning_rate == 5e-4
    assert config.plan.target_parameters == 125_000_000


def test_demo_runs_on_any_cpu_in_float32() -> None:
    step = load("cpu-demo").step
    assert (step.device, step.dtype, step.compile) == ("cpu", "float32", False)
