"""``vramplan trace``: what a compiled layer keeps under the installed torch, for estimates that would not know it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from vramplan.cli import main
from vramplan.errors import ConfigError
from vramplan.memory_probe.traced import keep_traced, read_traced, traced_folder
from vramplan.planner.evidence import Evidence
from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import estimate, kept_in_a_layer, peak_allocated
from vramplan.planner.partitions import Partition, family, product, short
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.units import MIB

GPT2 = Shape(n_layer=12, n_head=12, n_embd=768)
STEP = StepConfig(batch_size=8, compile=True, torch="2.14")
CONFIG = """
[model]
n_layer = 4
n_head = 4
n_embd = 256
vocab_size = 512
block_size = 128
[step]
batch_size = 2
compile = true
[train]
max_steps = 5
"""


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VRAMPLAN_LEDGER", str(tmp_path / "ledger.sqlite"))
    return tmp_path


def run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(map(str, words)), prog_name="vramplan")
    assert result.exit_code == code, result.output
    return result


def traced(extra: int = 0) -> Partition:
    """What GPT-2's layer keeps, as far as bytes go, and ``extra`` tensors of the stream's width."""
    rest = int(kept_in_a_layer(GPT2, STEP)) // 2
    return Partition(
        ((1, str(rest), 2, "all of it"), *([(extra, "N h", 2, "block.mlp new_operator")] if extra else [])), ()
    )


def card_that_knows(partition: Partition) -> Any:
    known = Evidence(traced={("2.14", family(GPT2, STEP)): partition})
    return replace(find_gpu("4070"), evidence=known)


def test_the_installed_torch_is_traced_and_kept(own_place: Path) -> None:
    config = own_place / "run.toml"
    config.write_text(CONFIG)
    done = run("trace", config)
    assert "block.mlp.fc mm" in done.output
    assert "the same" in done.output
    (((release, kind), found),) = read_traced().items()
    assert release == short(torch.__version__)
    assert "mlp=gelu" in kind
    answer = json.loads(run("trace", config, "--no-keep", "--json").output)
    assert answer["kept"] is None
    assert [tuple(row) for row in answer["layer"]] == list(found.layer)
    assert answer["layer_bytes"] == answer["listed_layer_bytes"]
    assert sorted(path.name for path in own_place.iterdir()) == ["run.toml", "traced"]


def test_a_release_that_was_traced_here_is_not_outside() -> None:
    plain = find_gpu("4070")
    assert "vramplan trace" in estimate(GPT2, STEP, plain).caveats[0]
    known = estimate(GPT2, STEP, card_that_knows(traced()))
    assert not known.caveats
    assert known.peak_allocated_bytes == estimate(GPT2, STEP, plain).peak_allocated_bytes
    other = replace(STEP, checkpointing="block")
    assert estimate(GPT2, other, card_that_knows(traced())).caveats, "another family"
    assert estimate(GPT2, replace(STEP, torch="2.16"), card_that_knows(traced())).caveats, "another release"


@pytest.mark.parametrize("loss", ["chunked", "full"])
def test_what_a_release_keeps_beyond_the_table_is_priced(loss: Any) -> None:
    step = replace(STEP, loss=loss)
    known = Evidence(traced={("2.14", family(GPT2, step)): traced(extra=2)})
    card = replace(find_gpu("4070"), evidence=known)
    more, less = (estimate(GPT2, step, gpu) for gpu in (card, find_gpu("4070")))
    extra = 12 * 2 * 8 * 1024 * 768 * 2
    assert more.peak_table_bytes - less.peak_table_bytes == extra
    assert ("kept by this torch, not in the table", extra) in [(row.name, row.n_bytes) for row in more.alive_at_peak]
    assert peak_allocated(GPT2, step, card) == more.peak_table_bytes
    assert not more.caveats
    little = Partition(((1, "N h", 2, "x"),), ())
    fewer = replace(find_gpu("4070"), evidence=Evidence(traced={("2.14", family(GPT2, step)): little}))
    assert estimate(GPT2, step, fewer).peak_table_bytes == less.peak_table_bytes, "never less than the table"


def test_traces_reach_the_command_line(own_place: Path) -> None:
    shape = ["--n-layer", 12, "--n-head", 12, "--n-embd", 768, "--batch-size", 8, "--compile"]
    ask = [*shape_command(shape), "--json"]
    before = json.loads(run(*ask).output)
    keep_traced("2.14", family(GPT2, STEP), traced(extra=1))
    after = json.loads(run(*ask).output)
    assert before["caveats"]
    assert not after["caveats"]
    assert after["peak_allocated_bytes"] - before["peak_allocated_bytes"] == pytest.approx(144 * MIB, rel=0.01)


def test_several_are_kept_side_by_side() -> None:
    for release in ("2.16", "2.14"):
        for batch in (1, 2):
            keep_traced(release, "some family", Partition(((batch, "N h", 2, "x"),), ()))
    assert list(read_traced()) == [("2.14", "some family"), ("2.16", "some family")]
    assert read_traced()["2.14", "some family"].layer == ((2, "N h", 2, "x"),)


ROWS = '"outside": [], "layer": [%s]'
HEAD = '{"format": 1, "torch": "2.14", "family": "f", '


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "[" * 200_000, '{"format": 2}', HEAD + '"outside": []}', HEAD + ROWS % "" + "}",
        HEAD + ROWS % '[1, "N h", 3, "x"]' + "}", HEAD + ROWS % '[1, "N evil", 2, "x"]' + "}",
        HEAD + ROWS % '["1", "N", 2, "x"]' + "}", HEAD + ROWS % '[-5, "N h", 2, "x"]' + "}",
        HEAD + ROWS % f'[1, "N {"9" * 26}", 2, "x"]' + "}", HEAD + ROWS % f'[1, "{"9" * 5000}", 2, "x"]' + "}",
        HEAD + '"outside": 5, "layer": [[1, "N h", 2, "x"]]}', HEAD + ROWS % '[1, "N h h h h h", 2, "x"]' + "}",
        HEAD + ROWS % '[1, "N h", true, "x"]' + "}", HEAD + ROWS % '[1, "0", 2, "x"]' + "}",
        HEAD + ROWS % '[1, "\u0663", 2, "x"]' + "}", HEAD.replace("2.14", "banana") + ROWS % '[1, "N", 2, "x"]' + "}",
        HEAD.replace("1", "true", 1) + ROWS % '[1, "N", 2, "x"]' + "}",
        HEAD + ROWS % '[1, "N h", 2, "x"]' + "}",  # right, but a copy under another name
    ],
)  # fmt: skip
def test_a_damaged_file_is_said_left_out_and_left_alone(text: str) -> None:
    keep_traced("2.16", "another", Partition(((1, "N h", 2, "x"),), ()))
    damaged = traced_folder() / "2.14-damaged.json"
    damaged.write_text(text)
    notes: list[str] = []
    assert list(read_traced(on_note=notes.append)) == [("2.16", "another")]
    assert len(notes) == 1
    assert "2.14-damaged.json" in notes[0]
    keep_traced("2.14", "f", Partition(((1, "N h", 2, "x"),), ()))
    assert damaged.read_text() == text


def test_several_write_at_once() -> None:
    program = (
        "import sys; from vramplan.memory_probe.traced import keep_traced\n"
        "from vramplan.planner.partitions import Partition\n"
        "[keep_traced('2.14', f'{sys.argv[1]} {n}', Partition(((1, 'N h', 2, 'x'),), ())) for n in range(20)]"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(n)]) for n in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert len(read_traced()) == 60


def test_a_place_that_cannot_be_written_is_an_error_of_the_place(own_place: Path) -> None:
    (own_place / "traced").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be made"):
        keep_traced("2.14", "f", Partition(((1, "N h", 2, "x"),), ()))
    assert read_traced() == {}


def test_a_ledger_that_cannot_be_opened_does_not_cost_the_traces(own_place: Path) -> None:
    keep_traced("2.14", family(GPT2, STEP), traced())
    (own_place / "ledger.sqlite").mkdir()
    shape = ["--n-layer", 12, "--n-head", 12, "--n-embd", 768, "--batch-size", 8, "--compile"]
    done = CliRunner().invoke(main, [*map(str, shape_command(shape))], prog_name="vramplan")
    assert done.exit_code == 0, done.output
    assert "planned without it" in done.stderr
    assert "Outside the model" not in done.stdout


def shape_command(shape: list[object]) -> list[object]:
    return ["estimate", *shape, "--gpu", "4070", "--torch", "2.14"]


def test_names_of_dimensions() -> None:
    assert product("N h", GPT2, STEP) == 8 * 1024 * 768
    assert product("B n_head T32", GPT2, STEP) == 8 * 12 * 1024
    assert product("2", GPT2, STEP) == 2
    with pytest.raises(ValueError, match="no dimension"):
        product("N q", GPT2, STEP)


def test_families_tell_apart_what_keeps_other_tensors() -> None:
    same = family(GPT2, STEP)
    assert same == family(replace(GPT2, n_layer=2, n_head=4), replace(STEP, batch_size=1, dtype="float16"))
    for shape in ({"bias": True}, {"n_kv_head": 4}, {"mlp": "swiglu"}, {"logit_softcap": 30.0}):
        assert family(replace(GPT2, **shape), STEP) != same  # type: ignore[arg-type]
    for step in ({"loss": "full"}, {"dtype": "float32"}, {"checkpointing": "block"}, {"workload": "plain"}):
        assert family(GPT2, replace(STEP, **step)) != same  # type: ignore[arg-type]
    assert family(GPT2, replace(STEP, dtype="tf32")) == family(GPT2, replace(STEP, dtype="float32"))
