"""Checkpoints: ``RUN/checkpoints/step-000250.pt``, each complete, verified and free of code.

A checkpoint is written to a temporary file, flushed to the disk, read back, and only then given its name. It is a
``torch.save`` archive, whose records carry CRC-32 sums; a damaged one is recognised by them and the one before it is
used. It is loaded with ``weights_only=True``, which can build tensors and plain containers but run nothing, and onto
the CPU, so that resuming needs no more GPU memory than training did.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, Problem, VramplanError

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})\.pt")
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError,
    OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError,
)  # fmt: skip
"""What zipfile and torch.load raise for a damaged archive, depending on which byte is wrong."""

OnSkip = Callable[[Path, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that continues a run exactly. ``step`` and ``tokens_seen`` count what is finished."""

    step: int
    tokens_seen: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    data: dict[str, Any]
    rng: dict[str, Any]
    config_toml: str
    best_val_loss: float | None


class CheckpointFolder:
    """The checkpoints of one run, of which the newest ``keep`` are kept."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory, self.keep = directory, keep

    def paths(self) -> list[Path]:
        """All checkpoints, newest first."""
        if not self.directory.is_dir():
            return []
        return sorted((p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)), key=_step_of, reverse=True)

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, verify it, then remove those that are no longer kept.

        Raises VramplanError when it could not be written; the older ones are then untouched.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step-{checkpoint.step:06d}.pt"
        temporary = self.directory / f".{path.name}.tmp"
        payload = {"format": FORMAT} | {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
        try:
            with temporary.open("wb") as f:
                torch.save(payload, f)
                f.flush()
                os.fsync(f.fileno())
            damage = archive_damage(temporary)
            if damage:
                raise OSError(f"reading it back failed: {damage}")
            temporary.replace(path)
            _sync_directory(self.directory)
        except (OSError, RuntimeError) as error:
            raise VramplanError(self._not_written(path, error)) from error
        finally:
            temporary.unlink(missing_ok=True)
        for old in self.paths()[self.keep :]:
            old.unlink()
        return path

    def newest(self, on_skip: OnSkip = lambda path, reason: None) -> tuple[Path, Checkpoint] | None:
        """The newest good checkpoint, or None when there is no checkpoint file at all.

        ``on_skip`` hears about each damaged one that was passed over. Raises DataError when all are damaged.
        """
        problems: list[Problem] = []
        for path in self.paths():
            try:
                return path, load(path)
            except DataError as error:
                problems += error.problems
                on_skip(path, error.problems[0].rule)
        if problems:
            raise DataError(problems, source="no checkpoint can be used")
        return None

    def _not_written(self, path: Path, error: Exception) -> str:
        older = next((p for p in self.paths() if p != path), None)
        kept = f"The newest good checkpoint is {older}." if older else "There is no older checkpoint."
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"checkpoint {path} could not be written ({reason}). {kept} Free some disk space, then resume the run."


def load(path: Path) -> Checkpoint:
    """Read one checkpoint onto the CPU. Raises DataError when it is damaged, contains code, or is something else."""
    try:
        damage = archive_damage(path)
        if damage:
            raise DataError(Problem("checkpoint", str(path), f"is damaged ({damage})"))
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        rule = "is refused: it holds more than tensors and plain values, and loading it could run code"
        raise DataError(Problem("checkpoint", str(path), rule)) from None
    except _UNREADABLE as error:
        raise DataError(Problem("checkpoint", str(path), f"cannot be read ({type(error).__name__})")) from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise DataError(Problem("checkpoint", str(path), f"is not a vramplan checkpoint of format {FORMAT}"))
    try:
        return Checkpoint(**{f.name: payload[f.name] for f in fields(Checkpoint)})
    except KeyError as missing:
        raise DataError(Problem("checkpoint", str(path), f"has no entry {missing}")) from None


def archive_damage(path: Path) -> str:
    """What is wrong with a ``torch.save`` archive by its own CRC-32 sums; empty when nothing is. Runs no code."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except _UNREADABLE as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return f"checksum of {bad} is wrong" if bad else ""


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names of the uncompiled model: ``torch.compile`` inserts ``_orig_mod.`` into them."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}


def rng_state() -> dict[str, Any]:
    """The state of torch's random generators, on the CPU and on every CUDA device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore :func:`rng_state`; CUDA's only when this machine has as many devices as the saved one."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable. Only POSIX can open a directory for this."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
