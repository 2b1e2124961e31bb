"""A checkpoint as other programs read it: the real transformers library, and safetensors."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from vramplan.cli import exchange
from vramplan.errors import ConfigError, DataError, Stopped
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer import export as module
from vramplan.trainer.checkpoint import Checkpoint, CheckpointFolder, rng_state
from vramplan.trainer.export import FORMATS, export
from vramplan.trainer.model import GPT

GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 70, "block_size": 12}
MODERN = {
    "norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "n_kv_head": 1, "qk_norm": True, "logit_softcap": 15.0,
}  # fmt: skip
HOW = StepConfig(dtype="float32", device="cpu")


def perturbed(shape: Shape, seed: int = 5) -> GPT:
    """A model none of whose weights is what initialisation makes it, biases and norms included."""
    model, generator = GPT(shape, HOW), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model


def save(run_dir, model: GPT, step: int = 7, best_val_loss: float | None = None) -> None:
    checkpoint = Checkpoint(
        step=step, tokens_seen=step * 12, model=model.state_dict(), optimizer={}, scaler={}, data={}, rng=rng_state(),
        config_toml=RunConfig.build(model.shape, HOW).to_toml(), last_loss=None, best_val_loss=best_val_loss,
    )  # fmt: skip
    CheckpointFolder(run_dir / "checkpoints").save(checkpoint)


def all_logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return F.linear(model.hidden(tokens), model.head)


def load_hf(folder):
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GPT2LMHeadModel

    model, report = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("trained", [True, False], ids=["perturbed", "fresh"])
def test_transformers_computes_the_same_logits(tmp_path, tied, bias, trained):
    shape = Shape(**GPT2, tied=tied, bias=bias)
    model = perturbed(shape) if trained else GPT(shape, HOW)
    save(tmp_path / "run", model)
    export(tmp_path / "run", "hf", tmp_path / "hf")
    theirs = load_hf(tmp_path / "hf")
    tokens = torch.randint(0, 70, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(tokens).logits
    assert (logits - all_logits(model, tokens)).abs().max() < 1e-4
    assert logits.std() > 0.05, "weights that say something"
    assert theirs.config.tie_word_embeddings is tied
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {p.name for p in (tmp_path / "hf").iterdir()} == names


def test_padding_of_the_vocabulary_is_kept_said_and_never_generated(tmp_path):
    model = perturbed(Shape(n_layer=1, n_head=1, n_embd=8, block_size=8, tied=False))
    with torch.no_grad():
        model.lm_head[50257:] *= 1000  # would win every time
    save(tmp_path / "run", model)
    done = export(tmp_path / "run", "hf", tmp_path / "hf")
    assert any("the last 47 rows are padding" in note for note in done.notes)
    assert any('GPT2TokenizerFast.from_pretrained("gpt2")' in note for note in done.notes)
    theirs = load_hf(tmp_path / "hf")
    assert theirs.lm_head.weight.shape[0] == 50304
    torch.manual_seed(1)
    start = torch.tensor([[1, 2]])
    assert int(theirs(start).logits[0, -1].argmax()) >= 50257
    for sampled in (False, True):
        text = theirs.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=5, do_sample=sampled, pad_token_id=0
        )
        assert int(text.max()) < 50257


@pytest.mark.parametrize("form", ["hf", "nanogpt"])
def test_everything_that_gpt2_cannot_be_is_named_at_once(tmp_path, form):
    save(tmp_path / "run", GPT(Shape(**GPT2, **MODERN, tied=False), HOW))
    with pytest.raises(ConfigError, match="--format safetensors can") as caught:
        export(tmp_path / "run", form, tmp_path / "out")
    named = {problem.field.removeprefix("model.") for problem in caught.value.problems}
    assert named == {*MODERN} | ({"tied"} if form == "nanogpt" else set())
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_as_many_key_heads_as_heads_is_gpt2(tmp_path):
    model = perturbed(Shape(**GPT2, n_kv_head=2))
    save(tmp_path / "run", model)
    export(tmp_path / "run", "hf", tmp_path / "hf")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert (load_hf(tmp_path / "hf")(tokens).logits - all_logits(model, tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("layout", [{}, {**MODERN, "tied": False}], ids=["GPT-2", "modern"])
def test_plain_weights_of_any_layout_with_their_configuration(tmp_path, layout):
    model = perturbed(Shape(**GPT2, **layout))
    save(tmp_path / "run", model)
    done = export(tmp_path / "run", "safetensors", tmp_path / "deep" / "er" / "weights.safetensors")
    weights = load_file(done.path)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    with safe_open(done.path, framework="pt") as file:
        metadata = file.metadata()
    config = RunConfig.from_toml(metadata["config"])
    assert config.shape == model.shape
    assert (metadata["step"], metadata["tokens_seen"]) == ("7", "84")
    assert (done.step, done.parameters, done.size_bytes) == (7, model.parameter_count(), done.path.stat().st_size)
    GPT(config.shape, HOW).load_state_dict(weights)


def test_the_newest_good_checkpoint_is_taken_and_a_damaged_one_mentioned(tmp_path):
    model = perturbed(Shape(**GPT2))
    save(tmp_path / "run", GPT(Shape(**GPT2), HOW), step=3)
    save(tmp_path / "run", model, step=5)
    (tmp_path / "run" / "checkpoints" / "step-000009.safetensors").write_bytes(b"damaged")
    done = export(tmp_path / "run", "safetensors", tmp_path / "out")
    assert (done.step, done.checkpoint.name) == (5, "step-000005.safetensors")
    assert any(note.startswith("step-000009.safetensors is damaged") for note in done.notes)
    assert torch.equal(load_file(done.path)["wte"], model.wte)


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_that_exists_is_overwritten(tmp_path, form):
    save(tmp_path / "run", GPT(Shape(**GPT2), HOW))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "link"):
        with pytest.raises(ConfigError, match="already exists: name another, or remove it"):
            export(tmp_path / "run", form, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"--out=.* cannot be written"):
        export(tmp_path / "run", form, tmp_path / "file" / "out")


@pytest.mark.parametrize("form", FORMATS)
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, form):
    save(tmp_path / "run", GPT(Shape(**GPT2), HOW))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))  # the system's own refusal, as of a full disk
    try:
        with pytest.raises(ConfigError, match=r"--out=.* cannot be written"):
            export(tmp_path / "run", form, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(DataError, match="holds no checkpoint"):
        export(tmp_path, "hf", tmp_path / "out")
    model = GPT(Shape(**GPT2), HOW)
    with torch.no_grad():
        model.wpe[3, 3] = float("nan")
    save(tmp_path / "run", model)
    with pytest.raises(DataError, match="not numbers"):
        export(tmp_path / "run", "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_knows_every_format():
    assert tuple(FORMATS) == exchange.FORMATS


def test_small_vocabularies_have_no_end_of_text(tmp_path):
    save(tmp_path / "run", GPT(Shape(**GPT2), HOW))
    done = export(tmp_path / "run", "hf", tmp_path / "hf")
    assert "no tokenizer in it; with 70 tokens it is not GPT-2's" in done.notes
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "hf" / name).read_text())
        assert content["eos_token_id"] is None
        assert "suppress_tokens" not in content


@pytest.fixture
def run_dir(tmp_path):
    save(tmp_path / "run", perturbed(Shape(**GPT2)))
    return tmp_path / "run"


def test_what_a_killed_export_left_is_swept_and_a_living_one_is_not(run_dir, tmp_path):
    dead = tmp_path / ".out.safetensors.999999999.tmp"
    living = tmp_path / f".out.safetensors.{os.getppid()}.tmp"
    for path in (dead, living):
        path.write_bytes(b"x")
    export(run_dir, "safetensors", tmp_path / "out.safetensors")
    assert not dead.exists()
    assert living.exists()


def test_a_signal_ends_an_export_without_a_file(run_dir, tmp_path, monkeypatch):
    def signalled(path: Path) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(FORMATS, "safetensors", lambda checkpoint: module._Content(signalled))
    with pytest.raises(Stopped, match=r"stopped by SIGTERM: .* was not written"):
        export(run_dir, "safetensors", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_anyone_may_read_what_the_umask_allows(run_dir, tmp_path):
    before = os.umask(0o022)
    try:
        export(run_dir, "safetensors", tmp_path / "out.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "out.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_loss_of_its_own_evaluation_goes_along(run_dir, tmp_path):
    """The checkpoint was written before it."""
    line = {"kind": "evaluation", "step": 7, "val_loss": 2.5, "best_val_loss": 2.5, "train_loss": 3.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    export(run_dir, "nanogpt", tmp_path / "ckpt.pt")
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["best_val_loss"] == 2.5
