"""Text from a checkpoint."""

from __future__ import annotations

import itertools

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from vramplan.cli import main
from vramplan.errors import ConfigError, DataError
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer import sample as module
from vramplan.trainer.checkpoint import Checkpoint, CheckpointFolder, plain_state_dict, rng_state
from vramplan.trainer.model import GPT
from vramplan.trainer.sample import Sampling, generate, load_model, sample, stream, until

SHAPE = Shape(n_layer=1, n_head=2, n_embd=16, vocab_size=50304, block_size=8, tied=False)


def save(run_dir, step: int, model: GPT, how: StepConfig, shape: Shape = SHAPE) -> None:
    CheckpointFolder(run_dir / "checkpoints").save(
        Checkpoint(
            step=step,
            tokens_seen=0,
            model=plain_state_dict(model),
            optimizer={},
            scaler={},
            data={},
            rng=rng_state(),
            config_toml=RunConfig.build(shape, how).to_toml(),
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
    texts = [sample(run_dir, "Once", Sampling(max_new_tokens=12, seed=s), tokenizer=tokenizer) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0]


def test_greedy_needs_no_seed_and_equals_the_narrowest_choices(run_dir, tokenizer):
    ways = [{"temperature": 0, "seed": 1}, {"temperature": 0, "seed": 2}, {"top_k": 1}, {"top_p": 1e-9}]
    texts = {sample(run_dir, "Once", Sampling(max_new_tokens=8, **way), tokenizer=tokenizer) for way in ways}
    assert len(texts) == 1


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
    for prompt in ("one two three four five six seven eight nine ten", ""):
        assert sample(run_dir, prompt, Sampling(max_new_tokens=3), tokenizer=tokenizer)
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
    how = Sampling(max_new_tokens=len(tokens), temperature=0)
    pieces = list(next(stream(run_dir, "", how, tokenizer=tokenizer)))
    assert "".join(pieces) == "a 🙂日!"
    assert "🙂" in "".join(p for p in pieces if "�" not in p)
    assert len(pieces) < len(tokens)


def test_a_character_cut_off_at_the_end_is_marked(run_dir, tokenizer, monkeypatch):
    (tokens,) = tokenizer.encode_batch(["🙂"])
    scripted(monkeypatch, tokens)
    assert sample(run_dir, "", Sampling(max_new_tokens=1, temperature=0), tokenizer=tokenizer) == "�"


def test_generation_ends_with_the_document(run_dir, tokenizer, monkeypatch):
    (tokens,) = tokenizer.encode_batch([" the end"])
    scripted(monkeypatch, [*tokens, tokenizer.eot, *tokens])
    assert sample(run_dir, "", Sampling(max_new_tokens=50, temperature=0), tokenizer=tokenizer) == " the end"


def test_a_damaged_newest_checkpoint_is_passed_over(run_dir, tokenizer):
    (run_dir / "checkpoints" / "step-000200.safetensors").write_bytes(b"damaged")
    assert load_model(run_dir, torch.device("cpu"))[2] == 100


def test_a_directory_without_a_checkpoint(tmp_path, tokenizer):
    with pytest.raises(DataError, match="holds no checkpoint: name the directory of a training run"):
        sample(tmp_path, "x", Sampling(), tokenizer=tokenizer)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_the_coldest_temperatures_take_the_likeliest(run_dir, tokenizer, temperature):
    cold = [Sampling(max_new_tokens=5, temperature=t) for t in (0, temperature)]
    greedy, found = (sample(run_dir, "the", how, tokenizer=tokenizer) for how in cold)
    assert found == greedy


def test_settings_out_of_range_are_reported_together(run_dir, tokenizer):
    how = Sampling(max_new_tokens=0, temperature=-1, top_k=0, top_p=float("nan"), stop=("x", ""), num_samples=0)
    with pytest.raises(ConfigError) as caught:
        stream(run_dir, "x", how, tokenizer=tokenizer)
    fields = ["num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "stop"]
    assert [p.field for p in caught.value.problems] == fields


@pytest.mark.parametrize("how", [{"top_p": 0.0}, {"top_p": 1.01}, {"seed": 2**63 - 2, "num_samples": 3}, {"seed": -1}])
def test_just_out_of_range(how):
    with pytest.raises(ConfigError, match="must"):
        Sampling(**how).check()
    Sampling(top_p=1.0, seed=2**63 - 3, num_samples=3).check()


# ------------------------------------------------------------------- top-p


class Table(torch.nn.Module):
    """A model whose next token always has the same probabilities."""

    def __init__(self, probabilities):
        super().__init__()
        self.wte = torch.nn.Parameter(torch.zeros(1))
        self.shape = Shape(n_layer=1, n_head=1, n_embd=1, vocab_size=len(probabilities), block_size=4)
        self.dtype = torch.float32
        self.values = torch.tensor([probabilities]).log()

    def logits(self, tokens, cache=None):
        return self.values


def drawn(probabilities, n=60, *, temperature=1.0, top_k=None, top_p=None, seed=3):
    model = Table(probabilities)
    n_vocab = len(probabilities)
    return list(generate(model, [0], n, temperature, top_k, seed, n_vocab=n_vocab, top_p=top_p))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {2}), (0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {2, 0, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_fewest_tokens_that_are_likely_enough(top_p, kept):
    assert set(drawn([0.3, 0.05, 0.5, 0.15], top_p=top_p)) == kept


def test_top_p_counts_what_temperature_and_top_k_have_left():
    probabilities = [0.3, 0.05, 0.5, 0.15]
    assert set(drawn(probabilities, temperature=0.3, top_p=0.79)) == {2}, "colder: 0.83 for the likeliest"
    assert set(drawn(probabilities, temperature=50.0, top_p=0.79)) == {0, 1, 2, 3}
    assert set(drawn(probabilities, top_k=2, top_p=0.61)) == {2}, "0.625 of the two"


def test_of_equally_likely_tokens_the_first_are_kept():
    assert set(drawn([0.25] * 4, top_p=0.5)) == {0, 1}


@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=30), st.floats(0.001, 1), st.floats(0.1, 3),
)  # fmt: skip
def test_a_nucleus_is_minimal_and_likely_enough(weights, top_p, temperature):
    probabilities = torch.softmax(torch.tensor(weights, dtype=torch.float64) / temperature, dim=0)
    nucleus = module._nucleus(probabilities, top_p)
    kept = nucleus > 0
    assert torch.equal(nucleus[kept], probabilities[kept])
    assert probabilities[kept].min() >= probabilities[~kept].max() if (~kept).any() else True
    total = float(probabilities[kept].sum())
    assert total >= top_p - 1e-12
    assert total - float(probabilities[kept].min()) < top_p + 1e-12


def test_top_p_of_one_draws_as_without_it(run_dir, tokenizer):
    texts = [sample(run_dir, "a", Sampling(max_new_tokens=9, top_p=p), tokenizer=tokenizer) for p in (None, 1.0)]
    assert texts[0] == texts[1]


# -------------------------------------------------------------------- stop


def reference(text, stop):
    """Character by character: the text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        for at in range(end):
            if text[at:end] in stop:
                return text[:at]
    return text


words = st.text("ab \n", max_size=40)


@given(words, st.lists(st.text("ab \n", min_size=1, max_size=5), max_size=3), st.data())
def test_the_end_does_not_depend_on_how_text_falls_into_pieces(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    found = list(until(iter(pieces), stop))
    assert "".join(found) == reference(text, stop)
    assert all(found)


def test_text_is_held_back_only_while_it_may_become_a_stop_string():
    pieces = iter(["ab", "EN", "d E", "N", "D", "never read"])
    assert list(until(pieces, ["END"])) == ["ab", "ENd "]
    assert next(pieces) == "never read"


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(run_dir, tokenizer, monkeypatch):
    (tokens,) = tokenizer.encode_batch(["one two\n\nUser: three"])
    scripted(monkeypatch, tokens)
    how = Sampling(max_new_tokens=50, temperature=0, stop=("nothing", "wo\n\nUs"))
    assert len(tokens) > 4
    assert sample(run_dir, "", how, tokenizer=tokenizer) == "one t"


# ------------------------------------------------------------- several texts


def test_each_of_several_texts_comes_again_by_its_own_seed(run_dir, tokenizer):
    how = Sampling(max_new_tokens=6, seed=4, num_samples=3)
    texts = ["".join(pieces) for pieces in stream(run_dir, "Once", how, tokenizer=tokenizer)]
    alone = [sample(run_dir, "Once", Sampling(max_new_tokens=6, seed=s), tokenizer=tokenizer) for s in (4, 5, 6)]
    assert texts == alone
    assert len(set(texts)) == 3


def test_a_model_of_another_vocabulary_is_not_sampled(tmp_path, tokenizer):
    shape = Shape(n_layer=1, n_head=1, n_embd=8, vocab_size=65, block_size=8)
    save(tmp_path, 1, GPT(shape, StepConfig()), StepConfig(), shape)
    with pytest.raises(DataError, match="vocab_size=65 is smaller than GPT-2's 50257 tokens"):
        sample(tmp_path, "a", Sampling(), tokenizer=tokenizer)


def test_the_command_line_prints_each_text_under_its_seed(run_dir):
    def run(*words, code=0):
        result = CliRunner().invoke(main, ["sample", str(run_dir), "--prompt", "Once", "--max-new-tokens", "4", *words])
        assert result.exit_code == code, result.output
        return result

    text = run("--num-samples", "2", "--seed", "7", "--top-p", "0.9").stdout
    first, second = text.split("--- 2 of 2, seed 8 ---\n")
    assert first.startswith("--- 1 of 2, seed 7 ---\nOnce")
    assert run("--seed", "8", "--top-p", "0.9").stdout == second
    whole = run("--seed", "8").stdout
    stop = whole[8:10]
    assert run("--seed", "8", "--stop", "never", "--stop", stop).stdout == whole[: whole.index(stop, 4)] + "\n"
    assert "top_p=2.0 must be above 0 and at most 1" in run("--top-p", "2", code=2).stderr
    assert 'stop="" is empty' in run("--stop", "", code=2).stderr
