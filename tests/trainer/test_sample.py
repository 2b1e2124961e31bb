"""Text from a checkpoint."""

from __future__ import annotations

import pytest
import torch

from vramplan.errors import ConfigError, DataError
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer import sample as module
from vramplan.trainer.checkpoint import Checkpoint, CheckpointFolder, plain_state_dict, rng_state
from vramplan.trainer.model import GPT
from vramplan.trainer.sample import generate, load_model, sample, stream

SHAPE = Shape(n_layer=1, n_head=2, n_embd=16, vocab_size=50304, block_size=8, tied=False)


def save(run_dir, step: int, model: GPT, how: StepConfig) -> None:
    CheckpointFolder(run_dir / "checkpoints").save(
        Checkpoint(
            step=step,
            tokens_seen=0,
            model=plain_state_dict(model),
            optimizer={},
            scaler={},
            data={},
            rng=rng_state(),
            config_toml=RunConfig.build(SHAPE, how).to_toml(),
            last_loss=None,
            best_val_loss=None,
        )
    )


@pytest.fixture
def run_dir(tmp_path):
    """A run trained in bfloat16 with compile and checkpointing, so that sampling has to undo all three."""
    how = StepConfig(dtype="bfloat16", compile=True, checkpointing="block", device="cuda")
    model = GPT(SHAPE, how, seed=3)
    with torch.no_grad():
        model.lm_head[:50257] *= 50  # far from uniform
        model.lm_head[50257:] *= 1000  # the padding would win every draw
    save(tmp_path, 100, model, how)
    return tmp_path


def test_the_same_seed_gives_the_same_text(run_dir, tokenizer):
    texts = [sample(run_dir, "Once", 12, seed=s, tokenizer=tokenizer) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0]


def test_greedy_needs_no_seed_and_equals_top_k_one(run_dir, tokenizer):
    greedy = [sample(run_dir, "Once", 8, temperature=0, seed=s, tokenizer=tokenizer) for s in (1, 2)]
    assert greedy[0] == greedy[1] == sample(run_dir, "Once", 8, top_k=1, seed=5, tokenizer=tokenizer)


def test_padded_ids_are_never_drawn(run_dir, tokenizer):
    model, config, step = load_model(run_dir, torch.device("cpu"))
    assert step == 100
    assert config.model.vocab_size == 50304
    with torch.no_grad():
        assert int(model.logits(torch.tensor([[50256]])).argmax()) >= tokenizer.n_vocab
    for temperature in (0, 1.0, 5.0):
        drawn = generate(model, [50256], 30, temperature, None, 1, n_vocab=tokenizer.n_vocab)
        assert max(drawn) < tokenizer.n_vocab


def test_top_k_draws_only_from_the_k_most_likely(run_dir, tokenizer):
    model, _, _ = load_model(run_dir, torch.device("cpu"))
    with torch.no_grad():
        best = set(model.logits(torch.tensor([[50256]]))[0, :50257].topk(3).indices.tolist())
    drawn = {next(generate(model, [50256], 1, 10.0, 3, seed, n_vocab=50257)) for seed in range(60)}
    assert drawn == best


def test_a_prompt_longer_than_a_block_is_cropped(run_dir, tokenizer, monkeypatch):
    widths = []
    original = GPT.logits

    def spy(self, tokens, cache=None):
        widths.append((cache.length if cache else 0) + tokens.shape[1])
        return original(self, tokens, cache)

    monkeypatch.setattr(GPT, "logits", spy)
    assert sample(run_dir, "one two three four five six seven eight nine ten", 3, tokenizer=tokenizer)
    sample(run_dir, "", 3, tokenizer=tokenizer)
    assert widths == [8, 8, 8, 1, 2, 3], "an empty prompt begins with the end-of-text token alone"


def scripted(monkeypatch, tokens: list[int]) -> None:
    """Make every model produce exactly these tokens, over and over."""
    seen = []

    def logits(self, window, cache=None):
        seen.append(1)
        out = torch.zeros(1, 50304)
        out[0, tokens[(len(seen) - 1) % len(tokens)]] = 100.0
        return out

    monkeypatch.setattr(module.GPT, "logits", logits)


def test_characters_split_over_tokens_come_out_whole(run_dir, tokenizer, monkeypatch):
    (tokens,) = tokenizer.encode_batch(["a 🙂日!"])
    scripted(monkeypatch, tokens)
    pieces = list(stream(run_dir, "", len(tokens), temperature=0, tokenizer=tokenizer))
    assert "".join(pieces) == "a 🙂日!"
    assert "🙂" in "".join(p for p in pieces if "�" not in p)
    assert len(pieces) < len(tokens)


def test_a_character_cut_off_at_the_end_is_marked(run_dir, tokenizer, monkeypatch):
    (tokens,) = tokenizer.encode_batch(["🙂"])
    scripted(monkeypatch, tokens)
    assert sample(run_dir, "", 1, temperature=0, tokenizer=tokenizer) == "�"


def test_generation_ends_with_the_document(run_dir, tokenizer, monkeypatch):
    (tokens,) = tokenizer.encode_batch([" the end"])
    scripted(monkeypatch, [*tokens, tokenizer.eot, *tokens])
    assert sample(run_dir, "", 50, temperature=0, tokenizer=tokenizer) == " the end"


def test_a_damaged_newest_checkpoint_is_passed_over(run_dir, tokenizer):
    (run_dir / "checkpoints" / "step-000200.safetensors").write_bytes(b"damaged")
    assert load_model(run_dir, torch.device("cpu"))[2] == 100


def test_a_directory_without_a_checkpoint(tmp_path, tokenizer):
    with pytest.raises(DataError, match="holds no checkpoint: name the directory of a training run"):
        sample(tmp_path, "x", tokenizer=tokenizer)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_the_coldest_temperatures_take_the_likeliest(run_dir, tokenizer, temperature):
    greedy = sample(run_dir, "the", 5, temperature=0, tokenizer=tokenizer)
    assert sample(run_dir, "the", 5, temperature=temperature, tokenizer=tokenizer) == greedy


def test_settings_out_of_range_are_reported_together(run_dir, tokenizer):
    with pytest.raises(ConfigError) as caught:
        stream(run_dir, "x", 0, temperature=-1, top_k=0, tokenizer=tokenizer)
    assert [p.field for p in caught.value.problems] == ["max_new_tokens", "temperature", "top_k"]
