"""nanoGPT's ckpt.pt, out and in, against a GPT written here with nanoGPT's names."""

from __future__ import annotations

import os
import pickle
import random
import warnings
import zipfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from vramplan.cli import main
from vramplan.errors import ConfigError, DataError
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer.checkpoint import Checkpoint, CheckpointFolder, rng_state
from vramplan.trainer.export import export
from vramplan.trainer.model import GPT
from vramplan.trainer.nanogpt import import_run
from vramplan.trainer.optimizer import build_optimizer
from vramplan.trainer.sample import find_checkpoint
from vramplan.trainer.step import TrainStep

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 70, "block_size": 12}
RATES = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
SETTINGS = {
    "batch_size": 3, "gradient_accumulation_steps": 2, "dtype": "float32", "compile": False, "device": "cpu",
    "learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 4, "max_iters": 50, "lr_decay_iters": 50, "decay_lr": True,
    "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.98, "grad_clip": 0.5, "eval_interval": 9, "eval_iters": 4,
    "log_interval": 3, "dataset": "openwebtext",
}  # fmt: skip


# --------------------------------------------------------------- a nanoGPT


class Norm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-5)


class NanoBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1 = Norm(c.n_embd, c.bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(c.n_embd, 3 * c.n_embd, c.bias), "c_proj": nn.Linear(c.n_embd, c.n_embd, c.bias)}
        )
        self.ln_2 = Norm(c.n_embd, c.bias)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(c.n_embd, 4 * c.n_embd, c.bias), "c_proj": nn.Linear(4 * c.n_embd, c.n_embd, c.bias)}
        )
        self.n_head = c.n_head

    def forward(self, x):
        heads = [
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for part in self.attn.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        ]
        x = x + self.attn.c_proj(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """The smallest GPT whose modules have nanoGPT's names and order. Takes nanoGPT's model_args and no others."""

    def __init__(self, *, n_layer, n_head, n_embd, vocab_size, block_size, bias, dropout=0.0, tied=True):
        super().__init__()
        c = SimpleNamespace(n_head=n_head, n_embd=n_embd, bias=bias)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(NanoBlock(c) for _ in range(n_layer)),
                "ln_f": Norm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens):
        t = self.transformer
        x = t.wte(tokens) + t.wpe(torch.arange(tokens.shape[1]))
        for block in t.h:
            x = block(x)
        return self.lm_head(t.ln_f(x))

    def optimizer(self):
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))

    def train_on(self, optimizer, batches):
        for tokens, targets in batches:
            F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()


def batches(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 70, (3, 12), generator=generator) for _ in range(2)) for _ in range(n)]


def nano_file(path, *, bias=False, tied=True, steps=3, edit=lambda content: None):
    """A ckpt.pt of a trained nanoGPT, as its train.py writes one with torch.compile; ``edit`` may spoil it."""
    torch.manual_seed(2)
    model = NanoGPT(**SMALL, bias=bias, tied=tied)
    optimizer = model.optimizer()
    model.train_on(optimizer, batches(steps))
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {**SMALL, "bias": bias, "dropout": 0.0},
        "iter_num": steps,
        "best_val_loss": torch.tensor(3.25),
        "config": dict(SETTINGS),
    }
    edit(content)
    torch.save(content, path)
    return model, optimizer


def trained_run(run_dir, shape, how=None, steps=2):
    """A run of ours after a few real steps, and what was trained."""
    how = how or StepConfig(dtype="float32", device="cpu", batch_size=3, loss="full")
    model = GPT(shape, how)
    optimizer = build_optimizer(model, how, **RATES)
    step = TrainStep(model, optimizer, how, grad_clip=0.0, device=torch.device("cpu"))
    for batch in batches(steps, seed=1):
        step([batch], 1e-2)
    config = RunConfig.build(shape, how, train={"max_steps": 9, "grad_clip": 0.0})
    CheckpointFolder(run_dir / "checkpoints").save(
        Checkpoint(
            step=steps, tokens_seen=0, model=model.state_dict(), optimizer=optimizer.state_dict(), scaler={}, data={},
            rng=rng_state(), config_toml=config.to_toml(), last_loss=None, best_val_loss=2.5,
        )
    )  # fmt: skip
    return model, optimizer


def our_logits(model, tokens):
    with torch.no_grad():
        return F.linear(model.hidden(tokens), model.head)


def imported(run_dir):
    checkpoint = find_checkpoint(run_dir)[1]
    model = GPT(checkpoint.config.shape, StepConfig(dtype="float32", device="cpu"))
    model.load_state_dict(checkpoint.model)
    return model, checkpoint


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    return one == other


# --------------------------------------------------------------------- out


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_nanogpt_loads_what_is_exported_and_goes_on_as_we_do(tmp_path, bias):
    ours, our_optimizer = trained_run(tmp_path / "run", Shape(**SMALL, bias=bias))
    done = export(tmp_path / "run", "nanogpt", tmp_path / "ckpt.pt")
    assert not done.notes
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)  # as sample.py does
    theirs = NanoGPT(**content["model_args"])
    theirs.load_state_dict(content["model"])
    tokens = batches(1)[0][0]
    torch.testing.assert_close(theirs(tokens), our_logits(ours, tokens), rtol=0, atol=1e-5)
    assert (content["iter_num"], content["best_val_loss"], content["config"]["max_iters"]) == (2, 2.5, 9)
    assert content["model"]["lm_head.weight"].data_ptr() == content["model"]["transformer.wte.weight"].data_ptr()
    optimizer = theirs.optimizer()
    optimizer.load_state_dict(content["optimizer"])
    theirs.train_on(optimizer, batches(2, seed=8))
    for tokens, targets in batches(2, seed=8):
        ours(tokens, targets).backward()
        our_optimizer.step()
        our_optimizer.zero_grad()
    torch.testing.assert_close(theirs(tokens), our_logits(ours, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw-fused", "adamw-foreach", "adamw-in-backward"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_out_and_in_again_is_the_same_to_the_bit(tmp_path, optimizer, bias):
    how = StepConfig(dtype="float32", device="cpu", batch_size=3, loss="full", optimizer=optimizer)
    trained_run(tmp_path / "run", Shape(**SMALL, bias=bias), how)
    export(tmp_path / "run", "nanogpt", tmp_path / "ckpt.pt")
    done = import_run(tmp_path / "ckpt.pt", tmp_path / "again")
    assert "AdamW's states are kept" in done.notes
    before, after = (find_checkpoint(tmp_path / name)[1] for name in ("run", "again"))
    assert equal(before.model, after.model)
    assert after.step == before.step == 2
    states = before.optimizer.get("state")
    if states is None:
        states = {i: part["state"][0] for i, part in enumerate(before.optimizer["parts"])}
    assert len(states) == (28 if bias else 15)
    assert equal(states, after.optimizer["state"])
    assert after.config.model == before.config.model
    assert after.config.train.learning_rate == before.config.train.learning_rate


def test_states_of_another_optimizer_are_left_out_and_said(tmp_path):
    how = StepConfig(dtype="float32", device="cpu", batch_size=3, loss="full", optimizer="muon")
    trained_run(tmp_path / "run", Shape(**SMALL), how)
    done = export(tmp_path / "run", "nanogpt", tmp_path / "ckpt.pt")
    assert "without muon's states" in done.notes[0]
    assert "optimizer" not in torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert "AdamW starts with fresh states: the file has none" in import_run(tmp_path / "ckpt.pt", tmp_path / "b").notes


# ---------------------------------------------------------------------- in


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_an_imported_run_computes_the_same_and_goes_on_as_nanogpt_does(tmp_path, bias, tied):
    theirs, optimizer = nano_file(tmp_path / "ckpt.pt", bias=bias, tied=tied)
    done = import_run(tmp_path / "ckpt.pt", tmp_path / "run")
    ours, checkpoint = imported(tmp_path / "run")
    assert done.config == checkpoint.config == RunConfig.load(tmp_path / "run" / "config.toml")
    assert done.config.model.tied is tied
    tokens = batches(1, seed=5)[0][0]
    torch.testing.assert_close(our_logits(ours, tokens), theirs(tokens), rtol=0, atol=1e-5)
    our_optimizer = build_optimizer(ours, StepConfig(device="cpu"), **RATES)
    our_optimizer.load_state_dict(checkpoint.optimizer)
    our_optimizer.param_groups[0]["weight_decay"] = 0.1  # the file's settings say another
    for group in our_optimizer.param_groups:
        group["betas"] = (0.9, 0.95)
    theirs.train_on(optimizer, batches(2, seed=6))
    for tokens, targets in batches(2, seed=6):
        F.cross_entropy(F.linear(ours.hidden(tokens), ours.head).flatten(0, 1), targets.flatten()).backward()
        our_optimizer.step()
        our_optimizer.zero_grad()
    torch.testing.assert_close(our_logits(ours, tokens), theirs(tokens), rtol=0, atol=1e-4)


def test_the_settings_come_along(tmp_path):
    nano_file(tmp_path / "ckpt.pt")
    done = import_run(tmp_path / "ckpt.pt", tmp_path / "run")
    step, train = done.config.step, done.config.train
    assert (step.batch_size, step.grad_accum, step.dtype, step.compile, step.device) == (3, 2, "float32", False, "cpu")
    assert (train.learning_rate, train.min_learning_rate, train.warmup_steps, train.max_steps) == (1e-2, 1e-3, 4, 50)
    assert (train.weight_decay, train.beta1, train.beta2, train.grad_clip) == (0.2, 0.8, 0.98, 0.5)
    assert (train.eval_interval, train.eval_batches, train.log_interval) == (9, 4, 3)
    checkpoint = find_checkpoint(tmp_path / "run")[1]
    assert (checkpoint.step, checkpoint.tokens_seen, checkpoint.best_val_loss) == (3, 3 * 3 * 2 * 12, None)
    assert any("its best validation loss, 3.2500," in note for note in done.notes)
    assert len(done.notes) == 3, "the vocabulary, and that the states are kept"


def settings(**given):
    return lambda content: content["config"].update(given)


@pytest.mark.parametrize(
    ("edit", "options", "note", "found"),
    [
        (lambda c: (c["model_args"].pop("dropout"), c["config"].update(dropout=0.2)), {}, "dropout=0.2 is dropped", {}),
        (lambda c: c["model_args"].update(dropout=0.1), {}, "dropout=0.1 is dropped", {"dropout": 0.0}),
        (settings(decay_lr=False), {}, "", {"min_learning_rate": 1e-2, "warmup_steps": 0}),
        (settings(min_lr=1.0), {}, "min_lr=1 is above learning_rate=0.01", {"min_learning_rate": 1e-2}),
        (settings(lr_decay_iters=40), {}, "lr_decay_iters=40 becomes 50", {"max_steps": 50}),
        (settings(), {"max_steps": 80}, "lr_decay_iters=50 becomes 80", {"max_steps": 80}),
        (settings(device="cuda:3", compile=True), {}, "", {"device": "cuda", "compile": True}),
        (settings(device="cuda", compile=True), {"device": "cpu"}, "", {"device": "cpu", "compile": False}),
        (settings(device="mps"), {}, "", {"device": "cpu"}),
        (lambda c: c.pop("config"), {}, "so nanoGPT's defaults: batch_size=12, ", {"batch_size": 12, "grad_accum": 40}),
        (lambda c: c.update(best_val_loss=1e9), {}, "", {}),
        (lambda c: c["model_args"].pop("bias"), {}, "", {}),
    ],
)  # fmt: skip
def test_what_is_expressed_in_another_way_is_said(tmp_path, edit, options, note, found):
    nano_file(tmp_path / "ckpt.pt", edit=edit)
    done = import_run(tmp_path / "ckpt.pt", tmp_path / "run", **options)
    assert any(note in line for line in done.notes)
    values = done.config.train.model_dump() | done.config.step.model_dump()
    assert {name: values[name] for name in found} == found


def without_states(content):
    del content["optimizer"]


def spoilt_state(name, value):
    return lambda content: content["optimizer"]["state"][1].update({name: value})


@pytest.mark.parametrize(
    "edit",
    [
        without_states,
        lambda c: c["optimizer"].update(state={}),
        lambda c: c["optimizer"]["param_groups"].reverse(),
        lambda c: c["optimizer"]["param_groups"][0].pop("params"),
        lambda c: c.update(optimizer=[1, 2]),
        lambda c: c["optimizer"]["state"][1].pop("exp_avg_sq"),
        spoilt_state("exp_avg", torch.zeros(16, 12)),
        spoilt_state("exp_avg", torch.full((12, 16), float("nan"))),
        spoilt_state("exp_avg", torch.zeros(12, 16, dtype=torch.int32)),
        spoilt_state("exp_avg_sq", torch.full((12, 16), -1.0)),
        spoilt_state("step", torch.tensor(float("inf"))),
        spoilt_state("step", torch.ones(2)),
        spoilt_state("exp_avg", "zeros"),
    ],
)
def test_states_that_are_not_sane_start_fresh(tmp_path, edit):
    theirs, _ = nano_file(tmp_path / "ckpt.pt", edit=edit)
    (note,) = [n for n in import_run(tmp_path / "ckpt.pt", tmp_path / "run").notes if "AdamW" in n]
    assert note.startswith("AdamW starts with fresh states: the file")
    ours, checkpoint = imported(tmp_path / "run")
    assert checkpoint.optimizer["state"] == {}
    build_optimizer(ours, StepConfig(device="cpu"), **RATES).load_state_dict(checkpoint.optimizer)
    assert torch.equal(ours.wte, theirs.lm_head.weight)


def test_masks_and_half_precision_of_other_nanogpts(tmp_path):
    def old(content):
        weights = content["model"]
        for name in list(weights):
            weights[name.removeprefix("_orig_mod.")] = weights.pop(name).bfloat16()
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.bool)

    theirs, _ = nano_file(tmp_path / "ckpt.pt", edit=old)
    import_run(tmp_path / "ckpt.pt", tmp_path / "run")
    ours, _ = imported(tmp_path / "run")
    assert ours.wpe.dtype == torch.float32
    assert torch.equal(ours.wpe, theirs.transformer.wpe.weight.bfloat16().float())


# ---------------------------------------------------------- files of no use


class Code:
    """What an attacker would put into a pickle."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def refused(tmp_path, match):
    """The import of ckpt.pt fails with this one message, and writes nothing."""
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=match) as caught:
        import_run(tmp_path / "ckpt.pt", tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    return caught.value


def test_code_in_a_file_is_never_run(tmp_path):
    nano_file(tmp_path / "ckpt.pt", edit=lambda content: content["config"].update(payload=Code(tmp_path / "ran")))
    assert "loading it could run code" in str(refused(tmp_path, "is refused"))
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    refused(tmp_path, "is cut off, or not a torch checkpoint")
    assert not (tmp_path / "ran").exists()


def change(name, value):
    return lambda content: content["model"].update({f"_orig_mod.{name}": value})


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda c: c.pop("model"), "is not a nanoGPT checkpoint: it has no proper model"),
        (lambda c: (c.pop("iter_num"), c.update(model_args=3)), "no proper model_args, iter_num"),
        (lambda c: c.update(iter_num=-1), "its iter_num is impossible"),
        (lambda c: c.update(iter_num=10**400), "its iter_num is impossible"),
        (lambda c: c["model_args"].update(n_layer=10**9), "n_layer"),
        (
            lambda c: c["model_args"].update(n_layer=1000, n_embd=65536),
            "lacks 'transformer.h.2.ln_1.weight' and 5987 more",
        ),
        (lambda c: c["model_args"].update(n_layer=3), r"lacks 'transformer.h.2.ln_1.weight' and 5 more"),
        (lambda c: c["model_args"].update(n_layer=1), r"has 'transformer.h.1.ln_1.weight' and 5 more too many"),
        (lambda c: c["model_args"].update(n_embd=32), "of another size"),
        (lambda c: c["model_args"].update(n_head=3), "n_embd=16 is not divisible by n_head=3"),
        (lambda c: c["model_args"].update(use_rope=True), "of a changed nanoGPT: its model_args have 'use_rope'"),
        (lambda c: c["model_args"].update(vocab_size=None), "its model_args have no proper vocab_size"),
        (lambda c: c["config"].update(learning_rate="fast", batch_size=0), r"2 problems(.|\n)*train.learning_rate"),
        (change("transformer.wpe.weight", torch.full((12, 16), float("nan"))), "weights that are not numbers"),
        (change("transformer.wpe.weight", torch.zeros(12, 16, dtype=torch.int64)), "no tensors of real numbers"),
        (change("transformer.wpe.weight", [1.0]), "'transformer.wpe.weight' in it are no tensors"),
        (change("transformer.wpe.weight", torch.zeros(2, 2).to_sparse()), "no tensors of real numbers"),
        (change("transformer.wpe.weight", torch.zeros(1).expand(10**7, 10**7)), "more weights than it has bytes"),
        (change("lm_head.weight", torch.zeros(3, 3)), "'lm_head.weight' of another size"),
    ],
)
def test_alien_and_hostile_files(tmp_path, edit, match):
    nano_file(tmp_path / "ckpt.pt", edit=edit)
    refused(tmp_path, match)


def test_things_that_are_no_checkpoint_at_all(tmp_path):
    path = tmp_path / "ckpt.pt"
    refused(tmp_path, "does not exist")
    path.mkdir()
    refused(tmp_path, r"cannot be read \(Is a directory\)")
    path.rmdir()
    for content in (b"", b"PK\x05\x06" + b"\0" * 18, b"text " * 1000):
        path.write_bytes(content)
        refused(tmp_path, "is cut off, or not a torch checkpoint|cannot be read")
    torch.save([1, 2, 3], path)
    refused(tmp_path, "it is no dictionary")
    torch.save({"state_dict": {}, "epoch": 3}, path)
    refused(tmp_path, "it has no proper model, model_args, iter_num")
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    refused(tmp_path, "checkpoint=")
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)
    refused(tmp_path, "is cut off, or not a torch checkpoint")


def test_a_compressed_archive_could_unfold_without_end(tmp_path):
    nano_file(tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    refused(tmp_path, "it is compressed")


def test_damage_anywhere_is_noticed_or_harmless(tmp_path):
    nano_file(tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    import_run(tmp_path / "good.pt", tmp_path / "good")
    good = find_checkpoint(tmp_path / "good")[1]
    chance = random.Random(4)
    for _ in range(10):
        (tmp_path / "ckpt.pt").write_bytes(whole[: chance.randrange(len(whole))])
        refused(tmp_path, "is cut off|cannot be read|is damaged")
    noticed = 0
    for number in range(40):
        at = chance.randrange(len(whole))
        (tmp_path / "ckpt.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        try:
            import_run(tmp_path / "ckpt.pt", tmp_path / f"run-{number}")
        except DataError:
            noticed += 1
        else:  # a byte of padding between the tensors
            assert equal(find_checkpoint(tmp_path / f"run-{number}")[1].model, good.model)
    assert noticed > 20


def test_a_run_that_is_there_stays(tmp_path):
    nano_file(tmp_path / "ckpt.pt")
    import_run(tmp_path / "ckpt.pt", tmp_path / "run")
    before = (tmp_path / "run" / "checkpoints" / "step-000003.safetensors").read_bytes()
    with pytest.raises(DataError, match="already holds a run"):
        import_run(tmp_path / "ckpt.pt", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-000003.safetensors").read_bytes() == before


# ---------------------------------------------------------- command line


def run(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args], prog_name="vramplan")
    assert result.exit_code == code, result.output
    return result


def test_import_sample_train_on_and_export_again(tmp_path):
    def widen(content):
        for name in ("transformer.wte.weight", "lm_head.weight"):
            content["model"][f"_orig_mod.{name}"] = torch.randn(50304, 16)
        content["model"]["_orig_mod.lm_head.weight"] = content["model"]["_orig_mod.transformer.wte.weight"]
        content["model_args"]["vocab_size"] = 50304
        content["config"]["max_iters"] = 3

    nano_file(tmp_path / "ckpt.pt", edit=widen)
    text = run("import", tmp_path / "ckpt.pt", "--out", tmp_path / "done").stdout
    assert "after 3 of 3 steps" in text
    assert "it has done its 3 steps: to train on, import it with --max-steps" in text
    out, data = tmp_path / "run", tmp_path / "text.parquet"
    text = run("import", tmp_path / "ckpt.pt", "--out", out, "--max-steps", "5").stdout
    assert "2L/2H/16E" in text
    assert f"train on: vramplan train --resume {out} --data FILE.parquet" in text
    assert run("sample", out, "--prompt", "the", "--max-new-tokens", "3").stdout.startswith("the")
    pq.write_table(pa.table({"text": ["the cat sat on the mat and the dog sat on the log. " * 20] * 30}), data)
    assert "tokenise again with" in run("train", "--resume", out, code=2).stderr
    text = run("train", "--resume", out, "--data", data).stdout
    assert "Resumed at step 3" in text
    assert "Finished" in text
    assert "already finished" in run("train", "--resume", out).stdout
    assert "step 5," in run("export", out, "--format", "nanogpt", "--out", tmp_path / "again.pt").stdout
    assert torch.load(tmp_path / "again.pt", weights_only=True)["iter_num"] == 5
    assert "from_pretrained" in run("export", out, "--format", "hf", "--out", tmp_path / "hf").stdout


def test_a_vocabulary_of_characters_can_only_be_exported(tmp_path):
    nano_file(tmp_path / "ckpt.pt")
    out = tmp_path / "run"
    text = run("import", tmp_path / "ckpt.pt", "--out", out).stdout
    assert "its 70 tokens are not GPT-2's 50257: it can be exported, but neither sampled nor trained on" in text
    assert "this model has another tokenizer's" in run("sample", out, code=2).stderr
    run("export", out, "--format", "hf", "--out", tmp_path / "hf")


def test_bad_words_are_one_error(tmp_path):
    assert "is empty" in run("import", "", "--out", tmp_path / "run", code=2).stderr
    assert "--format" in run("export", tmp_path, "--out", tmp_path / "x", code=2).stderr
    text = run("export", tmp_path / "none", "--format", "hf", "--out", tmp_path / "x", code=2).stderr
    assert "holds no checkpoint" in text
    assert list(tmp_path.iterdir()) == []
