"""The one contract: a run survives TOML, every problem is named at once, and no file is left half-written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.errors import ConfigError, Problem
from vramplan.planner.shape import Shape
from vramplan.planner.step import CHOICES, StepConfig, check_step
from vramplan.runconfig import RunConfig, suggested_training

SMALLEST = {"model": {"n_layer": 12, "n_head": 12, "n_embd": 768}, "step": {"batch_size": 16, "grad_accum": 32}}


def problems_of(data: dict[str, object]) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(data)
    problems = caught.value.problems
    assert len({p.field for p in problems}) == len(problems), "a problem is reported twice"
    return {p.field: p for p in problems}


def with_changes(**sections: dict[str, object]) -> dict[str, object]:
    return {name: {**SMALLEST.get(name, {}), **sections.get(name, {})} for name in {*SMALLEST, *sections}}


# ---------------------------------------------------------------- round trips


def test_defaults_are_filled_in_and_a_full_file_reads_back_equal(tmp_path: Path) -> None:
    config = RunConfig.parse(SMALLEST)
    assert config.model.vocab_size == 50304
    config.save(tmp_path / "run.toml")
    assert RunConfig.load(tmp_path / "run.toml") == config


def test_unset_values_are_left_out_of_the_file() -> None:
    text = RunConfig.parse(SMALLEST).to_toml()
    assert "max_steps" not in text
    assert "None" not in text


@settings(deadline=None)
@given(
    heads=st.integers(1, 32),
    head_dim=st.integers(1, 128),
    layers=st.integers(1, 100),
    accum=st.integers(1, 512),
    dtype=st.sampled_from(CHOICES["dtype"]),
    loss=st.sampled_from(CHOICES["loss"]),
    workload=st.sampled_from(CHOICES["workload"]),
    compiled=st.booleans(),
)
def test_every_legal_run_survives_toml(heads, head_dim, layers, accum, dtype, loss, workload, compiled) -> None:
    shape = Shape(n_layer=layers, n_head=heads, n_embd=heads * head_dim, bias=compiled, tied=not compiled)
    step = StepConfig(batch_size=2, grad_accum=accum, dtype=dtype, loss=loss, workload=workload, compile=compiled)
    if check_step(step):
        return
    config = RunConfig.build(shape, step, train={"max_steps": 7}, plan={"gpu": "RTX 4070", "oom_risk": 0.003})
    import tomllib

    again = RunConfig.parse(tomllib.loads(config.to_toml()))
    assert again == config
    assert (again.shape, again.step_config) == (shape, step)


def test_numpy_numbers_of_the_search_are_taken() -> None:
    shape = Shape(n_layer=np.int64(12), n_head=np.int32(12), n_embd=np.int64(768))
    config = RunConfig.build(shape, StepConfig(batch_size=np.int64(8), grad_accum=np.int64(64)))
    assert type(config.step.batch_size) is int
    assert config.tokens_per_step == 524_288
    config.to_toml()


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "notepad.toml"
    path.write_text(RunConfig.parse(SMALLEST).to_toml(), encoding="utf-8-sig")
    assert RunConfig.load(path) == RunConfig.parse(SMALLEST)


# ---------------------------------------------------------------- problems


def test_all_problems_come_at_once_across_sections() -> None:
    found = problems_of(
        {
            "model": {"n_layer": 12, "n_head": 12, "n_embd": 512, "n_lyer": 3},
            "step": {"batch_size": 4, "workload": "nanogpt", "loss": "chunked"},
            "train": {"learning_rate": 1e-5, "warmup": 10},
            "dta": {},
        }
    )
    assert set(found) == {"n_embd", "model.n_lyer", "loss", "train.min_learning_rate", "train.warmup", "dta"}


def test_well_formed_sections_report_shape_step_and_train_together() -> None:
    data = with_changes(
        model={"n_embd": 512}, step={"loss": "chunked", "workload": "autocast"}, train={"learning_rate": 1e-6}
    )
    assert set(problems_of(data)) == {"n_embd", "loss", "train.min_learning_rate"}


@pytest.mark.parametrize(
    ("section", "key", "remedy"),
    [
        ("model", "n_embed", "did you mean n_embd"),
        ("step", "batchsize", "did you mean batch_size"),
        ("train", "batch_size", "it belongs in [step]"),
        ("step", "n_layer", "it belongs in [model]"),
        ("train", "zzz", "known: learning_rate"),
    ],
)
def test_unknown_keys_are_named_with_what_was_meant(section: str, key: str, remedy: str) -> None:
    found = problems_of(with_changes(**{section: {key: 3}}))
    assert remedy in found[f"{section}.{key}"].remedy


def test_a_key_above_all_sections_is_sent_home() -> None:
    assert problems_of({**SMALLEST, "n_layer": 12})["n_layer"].remedy == "it belongs in [model]"
    assert "did you mean train" in problems_of({**SMALLEST, "trian": {}})["trian"].remedy


def test_missing_keys_and_sections_say_where_to_add_them() -> None:
    found = problems_of({"model": {"n_layer": 12, "n_head": 12}})
    assert str(found["model.n_embd"]) == "model.n_embd is required: add n_embd to [model]"
    assert str(found["step"]) == "step is required: add a section [step]"


def test_a_section_that_is_a_value_is_explained() -> None:
    assert str(problems_of({**SMALLEST, "train": 3})["train"]) == (
        "train=3 is not a section: write [train] and its keys below"
    )


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("step", "batch_size", 0),
        ("step", "batch_size", "16"),
        ("step", "batch_size", 16.0),
        ("step", "compile", "yes"),
        ("model", "n_layer", True),
        ("train", "learning_rate", 0.0),
        ("train", "learning_rate", float("nan")),
        ("train", "learning_rate", float("inf")),
        ("train", "beta2", 1.0),
        ("train", "decay_fraction", 0.0),
        ("train", "decay_fraction", 1.5),
        ("train", "max_hours", 0.0),
        ("train", "max_hours", float("inf")),
        ("train", "track", "wandb"),
        ("data", "validation_fraction", 0.5),
    ],
)
def test_values_of_the_wrong_type_or_range_are_refused(section: str, key: str, value: object) -> None:
    problem = problems_of(with_changes(**{section: {key: value}}))[f"{section}.{key}"]
    assert "should" in problem.rule


def test_a_wrong_choice_names_the_nearest() -> None:
    problem = problems_of(with_changes(step={"dtype": "bfloat"}))["step.dtype"]
    assert problem.remedy.startswith("did you mean bfloat16")
    assert problems_of(with_changes(train={"schedule": "wds"}))["train.schedule"].remedy.startswith("did you mean wsd")


@pytest.mark.parametrize(
    ("track", "words"),
    [
        (["tensorbord"], 'track="tensorbord" is not a tracker: did you mean tensorboard?'),
        (["wandb:"], "is not a project's name"),
        (["wandb:-x"], "is not a project's name"),
        (["tensorboard:x"], "names a project, and has none: write tensorboard"),
        (["trackio:a", "tensorboard", "trackio"], 'track="trackio" is the second of its kind'),
    ],
)
def test_trackers_that_cannot_be_are_named(track: list[str], words: str) -> None:
    assert words in str(problems_of(with_changes(train={"track": track}))["train.track"])


def test_schedule_hours_and_trackers_survive_toml() -> None:
    train = {"schedule": "wsd", "decay_fraction": 0.1, "max_hours": 7.5, "track": ["tensorboard", "wandb:cats_1.0"]}
    config = RunConfig.parse(with_changes(train=train))
    assert config.train.track == ("tensorboard", "wandb:cats_1.0")
    assert RunConfig.from_toml(config.to_toml()) == config
    assert hash(config.train) == hash(RunConfig.from_toml(config.to_toml()).train)


def test_a_file_from_before_there_were_schedules_is_a_cosine() -> None:
    assert RunConfig.parse(SMALLEST).train.schedule == "cosine"


def test_whole_numbers_may_stand_for_real_ones() -> None:
    config = RunConfig.parse(with_changes(train={"learning_rate": 1, "grad_clip": 1}))
    assert config.train.learning_rate == 1.0


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "does not exist"),
        (b"[model\nn_layer = 1", "is not valid TOML"),
        (b"\xff\xfe[\x00", "is not UTF-8 text"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, content: bytes | None, rule: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rule) as caught:
        RunConfig.load(path)
    assert caught.value.problems[0].value == str(path)


def test_a_folder_is_not_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        RunConfig.load(tmp_path)


def test_problems_of_a_file_begin_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\n")
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    assert str(caught.value).startswith(f"{path}: ")


# ---------------------------------------------------------------- saving


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("old")
    RunConfig.parse(SMALLEST).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]
    assert b"\r" not in path.read_bytes()


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "run.toml"
    path.write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(failing, full)
        with pytest.raises(ConfigError, match="No space left on device"):
            RunConfig.parse(SMALLEST).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]
    assert path.read_text() == "old"


def test_saving_where_nothing_can_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere" / "run.toml", tmp_path / "file" / "run.toml"):
        with pytest.raises(ConfigError, match="cannot be written"):
            RunConfig.parse(SMALLEST).save(path)


# ---------------------------------------------------------------- arithmetic


def test_tokens_per_step() -> None:
    assert RunConfig.parse(SMALLEST).tokens_per_step == 16 * 32 * 1024


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"max_steps": 6000}, 6000),
        ({"token_budget": 524_288}, 1),
        ({"token_budget": 524_289}, 2),
        ({"token_budget": 1}, 1),
        ({"token_budget": 10**12, "max_steps": 5}, 5),
        ({}, -(-20 * 124_373_760 // 524_288)),
    ],
)
def test_length_of_a_run(train: dict[str, object], steps: int) -> None:
    assert RunConfig.parse(with_changes(train=train)).total_steps == steps


@settings(deadline=None)
@given(
    st.integers(10_000, 10**10),
    st.integers(1, 10**7),
    st.integers(1, 10**12),
    st.none() | st.integers(1, 10**6),
)
def test_suggested_training_is_always_a_valid_section(parameters, per_step, token_budget, max_steps) -> None:
    train = suggested_training(parameters, per_step, token_budget, max_steps)
    config = RunConfig.parse(with_changes(train=train))
    assert config.train.warmup_steps <= 700
    assert 1e-4 < config.train.learning_rate <= 3e-3


def test_suggested_rate_of_gpt2_small_is_the_published_one() -> None:
    train = suggested_training(124_373_760, 524_288, 2_500_000_000, None)
    assert train["learning_rate"] == pytest.approx(6e-4, rel=0.01)
    assert train["token_budget"] == 2_500_000_000
