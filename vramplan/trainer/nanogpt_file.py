"""Reading a ``ckpt.pt`` that somebody else made: nothing in it is run, and nothing unfolds to more than it holds.

The archive is checked by its CRC-32 sums, ``weights_only`` loading builds tensors and plain values alone, and no tensor
is touched before its kind and size are known.
"""

from __future__ import annotations

import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, Problem
from .memory_errors import out_of_memory

NO_VALIDATION_LOSS = 1e9
"""What nanoGPT writes before its first evaluation."""

_MASKS = (".attn.bias", ".attn.masked_bias")
"""Buffers of a nanoGPT without fused attention; no parameters."""

_UNREADABLE = (
    OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError,
    AssertionError,
)  # fmt: skip
"""What zipfile and torch.load raise for files that are something else, depending on which byte is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoGPTFile:
    """The parts of a ``ckpt.pt``: weights are ordinary tensors, no more of them than the file has bytes.

    ``args`` are the model's, ``settings`` those of train.py, as far as they are numbers and words; ``optimizer`` is as
    it was found. ``step`` counts finished optimizer steps; ``best_val_loss`` is None before the first evaluation.
    """

    path: Path
    args: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    optimizer: Any
    settings: Mapping[str, Any]
    step: int
    best_val_loss: float | None


def refusal(path: Path, rule: str, remedy: str = "") -> DataError:
    """The error about this file."""
    return DataError(Problem("checkpoint", str(path), rule, remedy))


LARGEST_STEP = 2**40
"""Steps that no run has done."""


def read_nanogpt(path: Path) -> NanoGPTFile:
    """Read it onto the CPU. Raises DataError when it is damaged, contains code, or is something else."""
    content = _unpickled(path)
    kinds = {"model": Mapping, "model_args": Mapping, "iter_num": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise refusal(path, f"is not a nanoGPT checkpoint: it has no proper {', '.join(wrong)}")
    if type(content["iter_num"]) is not int or not 0 <= content["iter_num"] < LARGEST_STEP:
        raise refusal(path, "is not a nanoGPT checkpoint: its iter_num is impossible")
    settings = content.get("config")
    settings = settings if isinstance(settings, Mapping) else {}
    return NanoGPTFile(
        path=path,
        args=_plain_values(content["model_args"]),
        weights=_weights(path, content["model"]),
        optimizer=content.get("optimizer"),
        settings=_plain_values(settings),
        step=int(content["iter_num"]),
        best_val_loss=_loss(content.get("best_val_loss")),
    )


def _plain_values(found: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        str(name): value
        for name, value in found.items()
        if type(value) in (bool, int, float) or (type(value) is str and value.isprintable())
    }


def _weights(path: Path, model: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The weights under the names of the uncompiled model, without masks."""
    weights = {
        str(name).replace("_orig_mod.", ""): tensor for name, tensor in model.items() if not str(name).endswith(_MASKS)
    }
    others = [name for name, tensor in weights.items() if not is_plain(tensor)]
    if others:
        raise refusal(path, f"is not a nanoGPT checkpoint: {listed(others)} in it are no tensors of real numbers")
    # a view that repeats its storage could unfold to more than any machine has; a tied head is listed twice
    if sum(math.prod(t.shape) * t.element_size() for t in weights.values()) > 2 * path.stat().st_size:
        raise refusal(path, "is refused: it claims more weights than it has bytes")
    return weights


def _unpickled(path: Path) -> dict[Any, Any]:
    """The dictionary in the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise refusal(path, "is not a torch checkpoint: it is compressed")
            if bad := archive.testzip():
                raise refusal(path, f"is damaged (checksum of {bad!r} is wrong)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of an archive that is then refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise refusal(path, "does not exist") from None
    except pickle.UnpicklingError:
        rule = "is refused: it holds more than tensors and plain values, and loading it could run code"
        raise refusal(path, rule, "save it again from the program that made it, with plain values only") from None
    except zipfile.BadZipFile:
        raise refusal(path, "is cut off, or not a torch checkpoint") from None
    except _UNREADABLE as error:
        if out_of_memory(error):
            raise
        raise refusal(path, f"cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})") from None
    if not isinstance(content, dict):
        raise refusal(path, "is not a nanoGPT checkpoint: it is no dictionary")
    return content


def is_plain(tensor: Any) -> bool:
    """Whether it is an ordinary tensor of real numbers in host memory."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and not tensor.is_nested
    )


def _loss(found: Any) -> float | None:
    """A loss as nanoGPT stores it: a number, or a tensor of one."""
    if is_plain(found) and found.numel() == 1:
        found = found.item()
    return float(found) if isinstance(found, float) and found < NO_VALIDATION_LOSS else None


def listed(names: Sequence[str]) -> str:
    """The first of several names, as it can be shown, and how many more there are."""
    first = repr(names[0][:60])
    return f"{first} and {len(names) - 1} more" if names[1:] else first
