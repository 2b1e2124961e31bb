"""A checkpoint as others read it: transformers' GPT-2, nanoGPT's ``ckpt.pt``, or one file of the plain weights."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..device import process_lives
from ..errors import ConfigError, DataError, Problem, Stopped
from ..planner.shape import GPT2_VOCAB, Shape
from .checkpoint import Checkpoint, fitting
from .gpt2 import check_gpt2_layout, gpt2_names
from .interrupt import StopAtOnce, StopSignal
from .memory_errors import out_of_memory
from .metrics import read_metrics
from .nanogpt import nanogpt_checkpoint
from .rundir import RunDirectory
from .sample import find_checkpoint

END_OF_TEXT = GPT2_VOCAB - 1
_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
"""Weights that transformers keeps as (in, out)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written: the checkpoint it came from, its ``step``, and what a reader of the file should know."""

    path: Path
    checkpoint: Path
    step: int
    parameters: int
    size_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Content:
    """``write`` makes the file or directory at the path it is given."""

    write: Callable[[Path], None]
    notes: tuple[str, ...] = ()


def export(run_dir: str | Path, form: str, out: Path, *, best: bool = False) -> Exported:
    """Write the newest good checkpoint of a run, or the ``best``, to ``out``: a new file, for ``hf`` a new directory.

    ``form`` is one of FORMATS. The file appears under its name once it is complete and on the disk. Raises ConfigError
    naming everything about the model that the format cannot hold, or when ``out`` exists or cannot be written;
    DataError without a usable checkpoint.
    """
    _check_free(out)
    notes: list[str] = []
    path, checkpoint = find_checkpoint(
        run_dir, lambda damaged, why: notes.append(f"{damaged.name} {why}: passed over"), best=best
    )
    checkpoint = _with_own_evaluation(checkpoint, RunDirectory(run_dir))
    if not all(bool(t.sum(dtype=torch.float32).isfinite()) for t in checkpoint.model.values()):
        rule = "holds weights that are not numbers: the run had diverged"
        raise DataError(Problem("checkpoint", str(path), rule, "start a new run with a lower learning_rate"))
    with fitting(path):
        content = FORMATS[form](checkpoint)
    with _appearing(out) as temporary:
        content.write(temporary)
    return Exported(
        path=out,
        checkpoint=path,
        step=checkpoint.step,
        parameters=sum(t.numel() for t in checkpoint.model.values()),
        size_bytes=sum(file.stat().st_size for file in _files(out)),
        notes=(*notes, *content.notes),
    )


# ----------------------------------------------------------------------- hf


def _hf(checkpoint: Checkpoint) -> _Content:
    config = checkpoint.config
    check_gpt2_layout(config, "hf", may_be_untied=True)
    weights = _hf_weights(checkpoint, config.shape)
    documents = {
        "config.json": _hf_config(config.shape, weights["transformer.wte.weight"].dtype),
        "generation_config.json": _hf_generation_config(config.shape),
    }

    def write(folder: Path) -> None:
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name, document in documents.items():
            (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    notes = ['no tokenizer in it; it is GPT-2\'s: GPT2TokenizerFast.from_pretrained("gpt2")']
    padding = config.model.vocab_size - GPT2_VOCAB
    if padding < 0:
        notes = [f"no tokenizer in it; with {config.model.vocab_size} tokens it is not GPT-2's"]
    if padding > 0:
        notes.append(
            f"vocab_size stays {config.model.vocab_size}: the last {padding} rows are padding without text, which "
            "generation_config.json suppresses"
        )
    if not config.model.bias:
        notes.append("GPT-2 has biases and this model none: zeros")
    return _Content(write, tuple(notes))


def _hf_weights(checkpoint: Checkpoint, shape: Shape) -> dict[str, Tensor]:
    """The weights under transformers' names, as its Conv1D and LayerNorm hold them."""
    weights: dict[str, Tensor] = {}
    for ours, name in gpt2_names(shape).items():
        tensor = checkpoint.model[ours]
        if not shape.bias and name.startswith(("transformer.h.", "transformer.ln_f.")):
            weights[name.replace(".weight", ".bias")] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
        weights[name] = tensor.T.contiguous() if name.endswith(_CONV1D) else tensor
    return weights


def _hf_config(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json``. Our GELU is the exact one, which transformers calls ``gelu`` (GPT-2's own is ``gelu_new``)."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.block_size,
        "n_embd": shape.n_embd,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_inner": None,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": shape.tied,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "dtype": str(dtype).removeprefix("torch."),
        **_end_of_text(shape),
    }


def _hf_generation_config(shape: Shape) -> dict[str, Any]:
    padding = list(range(GPT2_VOCAB, shape.vocab_size))
    return _end_of_text(shape) | ({"suppress_tokens": padding} if padding else {})


def _end_of_text(shape: Shape) -> dict[str, int | None]:
    known = END_OF_TEXT if shape.vocab_size > END_OF_TEXT else None
    return {"bos_token_id": known, "eos_token_id": known}


# -------------------------------------------------------- nanogpt, safetensors


def _nanogpt(checkpoint: Checkpoint) -> _Content:
    content, notes = nanogpt_checkpoint(checkpoint)
    return _Content(lambda path: torch.save(content, path), notes)


def _safetensors(checkpoint: Checkpoint) -> _Content:
    metadata = {
        "format": "pt",
        "vramplan": __version__,
        "step": str(checkpoint.step),
        "tokens_seen": str(checkpoint.tokens_seen),
        "config": checkpoint.config_toml,
    }
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.model.items()}
    notes = ("weights under their own names; the metadata's `config` is the run's configuration (TOML)",)
    return _Content(lambda path: save_file(weights, path, metadata=metadata), notes)


FORMATS: dict[str, Callable[[Checkpoint], _Content]] = {
    "hf": _hf, "nanogpt": _nanogpt, "safetensors": _safetensors,
}  # fmt: skip


# -------------------------------------------------------------------- writing


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(Problem("--out", str(out), "already exists", "name another, or remove it"))


def _with_own_evaluation(checkpoint: Checkpoint, run: RunDirectory) -> Checkpoint:
    """A checkpoint is saved before the evaluation of its step, whose loss may be the best so far."""
    found = [e for e in read_metrics(run.metrics) if e["kind"] == "evaluation" and e["step"] <= checkpoint.step]
    return replace(checkpoint, best_val_loss=found[-1]["best_val_loss"]) if found else checkpoint


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A name beside ``out`` for a file or directory, which is renamed once it is on the disk, or else removed."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        with StopSignal() as stop:
            yield temporary
            for file in _files(temporary):
                file.chmod(0o666 & ~_umask())  # safetensors' own are for their owner only
                with file.open("rb+") as f:
                    os.fsync(f.fileno())
            if stop.number is not None:
                raise Stopped(f"stopped by {stop.name}: {out} was not written", stop.number)
            _check_free(out)  # it may have come into being meanwhile
            temporary.rename(out)
    except StopAtOnce as now:
        raise Stopped(f"stopped at once by {now}: {out} was not written", now.number) from None
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch.save's when the disk is full
        if out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "free some space if the disk is full, or name another place"
        raise ConfigError(Problem("--out", str(out), f"cannot be written ({reason})", remedy)) from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def _sweep(out: Path) -> None:
    """Remove what exports to the same place left behind that were killed."""
    for old in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        number = old.name.split(".")[-2]
        if number.isdecimal() and not process_lives(int(number)):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]
