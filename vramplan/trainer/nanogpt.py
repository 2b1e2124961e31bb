"""nanoGPT's ``ckpt.pt``, out and in: weights, AdamW's states, and the settings that both trainers have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, Problem
from ..planner.nanogpt_config import DEFAULTS
from ..planner.shape import GPT2_VOCAB
from ..planner.step import DeviceKind
from ..runconfig import RunConfig
from .checkpoint import Checkpoint, CheckpointFolder, all_finite
from .gpt2 import EMBEDDING, HEAD, check_gpt2_layout, gpt2_names
from .memory_errors import out_of_memory
from .model import GPT
from .nanogpt_file import NO_VALIDATION_LOSS, NanoGPTFile, is_plain, listed, read_nanogpt, refusal
from .optimizer import MASTERS, build_optimizer
from .rundir import RunDirectory

_SETTINGS: dict[str, tuple[str, str]] = {
    "batch_size": ("step", "batch_size"),
    "gradient_accumulation_steps": ("step", "grad_accum"),
    "dtype": ("step", "dtype"),
    "compile": ("step", "compile"),
    "device": ("step", "device"),
    "learning_rate": ("train", "learning_rate"),
    "min_lr": ("train", "min_learning_rate"),
    "warmup_iters": ("train", "warmup_steps"),
    "max_iters": ("train", "max_steps"),
    "weight_decay": ("train", "weight_decay"),
    "beta1": ("train", "beta1"),
    "beta2": ("train", "beta2"),
    "grad_clip": ("train", "grad_clip"),
    "eval_interval": ("train", "eval_interval"),
    "eval_iters": ("train", "eval_batches"),
    "log_interval": ("train", "log_interval"),
}
"""nanoGPT's name of a setting; our section and name."""

_MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
_THEIR_DTYPE = {"tf32": "float32", "pure-bfloat16": "bfloat16"}
"""nanoGPT's ``float32`` has products in tf32; narrow weights it does not know."""


# ------------------------------------------------------------------------ out


def nanogpt_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The content of a ``ckpt.pt`` for nanoGPT's ``sample.py`` and ``train.py``, and notes on what it lacks.

    Raises ConfigError naming everything about the model that nanoGPT's cannot be.
    """
    config = checkpoint.config
    check_gpt2_layout(config, "nanogpt", may_be_untied=False)
    weights = {theirs: checkpoint.model[ours] for ours, theirs in gpt2_names(config.shape).items()}
    weights[HEAD] = weights[EMBEDDING]
    model_args = {name: getattr(config.model, name) for name in _MODEL_ARGS} | {"dropout": 0.0}
    settings = {theirs: getattr(getattr(config, section), ours) for theirs, (section, ours) in _SETTINGS.items()}
    settings["dtype"] = _THEIR_DTYPE.get(config.step.dtype, config.step.dtype)
    settings |= {"max_iters": config.total_steps, "lr_decay_iters": config.total_steps, "decay_lr": True}
    loss = checkpoint.best_val_loss
    content = {
        "model": weights,
        "model_args": model_args,
        "iter_num": checkpoint.step,
        "best_val_loss": NO_VALIDATION_LOSS if loss is None else loss,
        "config": settings | model_args,
    }
    states = _plain_adamw(checkpoint, config)
    if states is None:
        note = f"without {config.step.optimizer}'s states, of which nanoGPT knows nothing: it can sample, not resume"
        return content, (note,)
    return {**content, "optimizer": states}, ()


def _plain_adamw(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any] | None:
    """The state of ``torch.optim.AdamW`` over nanoGPT's two groups; None when the run's optimizer is another.

    A tied GPT lists its parameters in nanoGPT's order, so the numbers of the states are the same.
    """
    saved = checkpoint.optimizer
    if config.step.optimizer in ("adamw-fused", "adamw-foreach", "adamw-offload"):
        return {name: value for name, value in saved.items() if name != MASTERS}
    if config.step.optimizer != "adamw-in-backward":
        return None
    ends = [0, *(len(group) for group in _grouped(gpt2_names(config.shape), checkpoint.model))]
    groups = [
        {**saved["parts"][start]["param_groups"][0], "params": list(range(start, start + size))}
        for start, size in pairwise(ends)
    ]
    return {"state": {i: part["state"][0] for i, part in enumerate(saved["parts"])}, "param_groups": groups}


# ------------------------------------------------------------------------- in


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The run that a ``ckpt.pt`` has become, and what of it is not as it was."""

    run_dir: Path
    config: RunConfig
    step: int
    notes: tuple[str, ...]


def import_run(
    path: str | Path, run_dir: str | Path, *, device: DeviceKind | None = None, max_steps: int | None = None
) -> Imported:
    """Make a run directory of a nanoGPT checkpoint, to be sampled, exported, and trained on from the start of a text.

    ``device`` and ``max_steps`` take the place of the file's. Raises DataError or ConfigError, before anything is
    written, when the file is damaged, contains code, or is no nanoGPT checkpoint, or when ``run_dir`` holds a run.
    """
    file = read_nanogpt(Path(path))
    if max_steps is not None and max_steps <= file.step:
        rule = f"is not beyond the {file.step} steps that the file has done"
        raise ConfigError(Problem("--max-steps", max_steps, rule, "use more, or leave it out"))
    config, notes = _configured(file, device, max_steps)
    model, t = _model(file, config), config.train
    optimizer = build_optimizer(
        model, config.step_config, learning_rate=t.learning_rate, weight_decay=t.weight_decay, betas=(t.beta1, t.beta2)
    )
    reason = _load_states(optimizer, model, gpt2_names(config.shape), file.optimizer)
    notes.append(f"AdamW starts with fresh states: {reason}" if reason else "AdamW's states are kept")
    checkpoint = Checkpoint(
        step=file.step,
        tokens_seen=file.step * config.tokens_per_step,
        model=dict(model.state_dict()),
        optimizer=optimizer.state_dict(),
        scaler={},
        data={},  # nothing has been read of the text that it will be trained on
        rng={"cpu": torch.Generator().manual_seed(t.seed).get_state(), "cuda": []},
        config_toml=config.to_toml(),
        last_loss=None,
        best_val_loss=None,
    )
    run = RunDirectory(run_dir)
    with run.claimed(config, resume=False):
        CheckpointFolder(run.checkpoints, t.keep_checkpoints).save(checkpoint)
    return Imported(run_dir=run.path, config=config, step=file.step, notes=tuple(notes))


def _configured(file: NanoGPTFile, device: DeviceKind | None, max_steps: int | None) -> tuple[RunConfig, list[str]]:
    """The run's configuration, and what of the file's it does not have. Raises ConfigError when it is no legal run."""
    notes: list[str] = []
    given = {name: file.settings.get(name, DEFAULTS[name]) for name in _SETTINGS}
    missing = [f"{name}={given[name]}" for name in _SETTINGS if name not in file.settings]
    if missing:
        notes.append(f"not in the file, so nanoGPT's defaults: {', '.join(missing)}")
    given["device"] = device or ("cuda" if str(given["device"]).startswith("cuda") else "cpu")
    given["compile"] = given["compile"] if given["device"] == "cuda" else False
    given["max_iters"] = given["max_iters"] if max_steps is None else max_steps
    _fit_schedule(given, file.settings, notes)
    sections: dict[str, dict[str, Any]] = {"model": _model_section(file), "step": {}, "train": {}}
    for name, (section, ours) in _SETTINGS.items():
        sections[section][ours] = given[name]
    config = RunConfig.parse(sections, source=str(file.path))
    return config, [*notes, *_losses(file, config)]


def _fit_schedule(given: dict[str, Any], settings: Mapping[str, Any], notes: list[str]) -> None:
    """Express nanoGPT's learning rates in our schedule: a cosine over the whole run that does not rise."""
    peak, least, decay = given["learning_rate"], given["min_lr"], settings.get("lr_decay_iters", given["max_iters"])
    if settings.get("decay_lr") is False:
        given |= {"min_lr": peak, "warmup_iters": 0}
        return
    if isinstance(peak, float | int) and isinstance(least, float | int) and least > peak:
        notes.append(f"min_lr={least:g} is above learning_rate={peak:g}: the rate stays there")
        given["min_lr"] = peak
    if isinstance(decay, float | int) and decay != given["max_iters"]:
        notes.append(f"lr_decay_iters={decay} becomes {given['max_iters']}: the rate falls until the last step")


def _losses(file: NanoGPTFile, config: RunConfig) -> list[str]:
    """Words for what is lost, and for what cannot be done with the run."""
    notes = []
    dropout = file.args.get("dropout", file.settings.get("dropout"))
    if isinstance(dropout, float | int) and dropout > 0:
        notes.append(f"dropout={dropout} is dropped: this trainer has none")
    if file.best_val_loss is not None:
        notes.append(f"its best validation loss, {file.best_val_loss:.4f}, is of its own text and not kept")
    if config.model.vocab_size < GPT2_VOCAB:
        what = f"its {config.model.vocab_size} tokens are not GPT-2's {GPT2_VOCAB}"
        notes.append(f"{what}: it can be exported, but neither sampled nor trained on")
    elif file.step >= config.total_steps:
        notes.append(f"it has done its {config.total_steps:,} steps: to train on, import it with --max-steps")
    return notes


def _model_section(file: NanoGPTFile) -> dict[str, Any]:
    """``[model]`` of the file. Raises DataError for settings that nanoGPT's model does not have."""
    args = {name: value for name, value in file.args.items() if name != "dropout"}
    unknown = [name for name in args if name not in _MODEL_ARGS]
    if unknown:
        raise refusal(file.path, f"is of a changed nanoGPT: its model_args have {listed(unknown)}")
    missing = [name for name in _MODEL_ARGS if name not in args and name != "bias"]
    if missing:
        raise refusal(file.path, f"is not a nanoGPT checkpoint: its model_args have no proper {', '.join(missing)}")
    embedding, head = file.weights.get(EMBEDDING), file.weights.get(HEAD)
    tied = embedding is None or head is None or (head.dtype == embedding.dtype and torch.equal(head, embedding))
    return {"bias": "transformer.ln_f.bias" in file.weights, **args, "tied": tied}


def _model(file: NanoGPTFile, config: RunConfig) -> GPT:
    """The GPT with the file's weights, in float32. Raises DataError when they are not those of its ``model_args``."""
    names = gpt2_names(config.shape)
    given = {name: t for name, t in file.weights.items() if not (name == HEAD and config.model.tied)}
    expected = set(names.values())
    wrong = {
        "lacks {}": [name for name in names.values() if name not in given],
        "has {} too many": [name for name in given if name not in expected],
    }
    if not any(wrong.values()):
        with torch.device("meta"):
            sizes = {names[ours]: p.shape for ours, p in GPT(config.shape, config.step_config).named_parameters()}
        wrong["has {} of another size"] = [name for name in given if given[name].shape != sizes[name]]
    faults = [words.format(listed(found)) for words, found in wrong.items() if found]
    if faults:
        raise refusal(file.path, f"does not hold the weights that its model_args tell of: it {', '.join(faults)}")
    model = GPT(config.shape, config.step_config)
    model.load_state_dict({ours: given[theirs] for ours, theirs in names.items()})
    if not all_finite(model):
        raise refusal(file.path, "holds weights that are not numbers: the run had diverged")
    return model


# ----------------------------------------------------------------- the states


def _load_states(optimizer: torch.optim.Optimizer, model: GPT, names: Iterable[str], saved: Any) -> str:
    """Give ``optimizer`` the states of nanoGPT's AdamW; ``names`` are our parameters in its order.

    Both have matrices in one group and vectors in another, and number the states through the groups. Returns why the
    states are of no use, or nothing.
    """
    if saved is None:
        return "the file has none"
    parameters = dict(model.named_parameters())
    theirs, ours = _grouped(names, parameters), _grouped(parameters, parameters)
    try:
        numbers = [list(group["params"]) for group in saved["param_groups"]]
        if [len(group) for group in numbers] != [len(group) for group in theirs]:
            return "the file's are not of nanoGPT's parameter groups"
        found = [saved["state"][number] for number in chain(*numbers)]
        states = {n: _state(s, parameters[n]) for n, s in zip(chain(*theirs), found, strict=True)}
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        return "the file's are not AdamW's"
    unsound = [name for name, state in states.items() if state is None]
    if unsound:
        return f"the file's for {listed(unsound)} are not of its size, or no numbers"
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: states[n] for i, n in enumerate(chain(*ours))}, "param_groups": groups})
    return ""


def _grouped(names: Iterable[str], parameters: Mapping[str, Tensor]) -> list[list[str]]:
    """Matrices and embeddings, which decay, and vectors, which do not."""
    names = list(names)
    return [[n for n in names if parameters[n].dim() >= 2], [n for n in names if parameters[n].dim() < 2]]


def _state(found: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor] | None:
    """One parameter's state in float32, or None when it cannot be AdamW's."""
    count, mean, square = float(found["step"]), found["exp_avg"], found["exp_avg_sq"]
    if not (is_plain(mean) and is_plain(square) and mean.shape == square.shape == parameter.shape):
        return None
    mean, square = mean.float(), square.float()
    if not (0 <= count < math.inf and bool(mean.isfinite().all() and square.isfinite().all() and (square >= 0).all())):
        return None
    return {"step": torch.tensor(count), "exp_avg": mean, "exp_avg_sq": square}
