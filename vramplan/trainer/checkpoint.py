"""Checkpoints: ``RUN/checkpoints/step-000250.safetensors``, each complete, verified and free of code.

A checkpoint is written to a temporary file, flushed to the disk, read back, and only then given its name. Its sums
(:mod:`.tensor_file`) show damage, and then the one before it is used. It is loaded onto the CPU, so that resuming needs
no more GPU memory than training did.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, Problem, VramplanError
from ..runconfig import RunConfig
from ..units import gib
from .memory_errors import out_of_memory
from .tensor_file import damage_of, read_tree, write_tree

FORMAT = 2
SUFFIX = ".safetensors"
_NAME = re.compile(r"step-(\d{6,})\.safetensors")

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
    last_loss: float | None
    best_val_loss: float | None

    @property
    def config(self) -> RunConfig:
        """The configuration it was trained with. Raises ConfigError when it cannot be read."""
        return RunConfig.from_toml(self.config_toml, "the configuration in the checkpoint")


_ENTRIES: dict[str, tuple[type, ...]] = {
    "step": (int,), "tokens_seen": (int,), "model": (dict,), "optimizer": (dict,), "scaler": (dict,),
    "data": (dict,), "rng": (dict,), "config_toml": (str,), "last_loss": (float, type(None)),
    "best_val_loss": (float, type(None)),
}  # fmt: skip


class CheckpointFolder:
    """The checkpoints of one run, of which the newest ``keep`` are kept, and the best."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory, self.keep = directory, keep

    def paths(self) -> list[Path]:
        """All checkpoints, newest first."""
        if not self.directory.is_dir():
            return []
        return sorted((p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)), key=step_of, reverse=True)

    def save(self, checkpoint: Checkpoint, best_step: int | None = None) -> Path:
        """Write a checkpoint, verify it, then remove the older ones that are no longer kept; never the best.

        Raises VramplanError when it could not be written; the older ones are then untouched.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step-{checkpoint.step:06d}{SUFFIX}"
        temporary = self.directory / f".{path.name}.tmp"
        payload = {"format": FORMAT} | {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
        try:
            with temporary.open("wb") as f:
                write_tree(f, payload)
                f.flush()
                os.fsync(f.fileno())
            damage = damage_of(temporary)
            if damage:
                raise OSError(f"reading it back failed: {damage}")
            temporary.replace(path)
            _sync_directory(self.directory)
        except OSError as error:
            raise VramplanError(self._not_written(path, error)) from error
        finally:
            temporary.unlink(missing_ok=True)
        older = [p for p in self.paths() if step_of(p) < checkpoint.step]
        for old in older[self.keep - 1 :]:
            if step_of(old) != best_step:
                old.unlink(missing_ok=True)
        return path

    def set_aside(self, path: Path) -> Path:
        """Rename a damaged checkpoint, so that it neither counts nor is deleted. Returns its new path."""
        names = (f"{path.name}.damaged{f'-{n}' if n else ''}" for n in itertools.count())
        aside = next(p for p in map(path.with_name, names) if not p.exists())
        path.replace(aside)
        return aside

    def sweep(self) -> None:
        """Remove what a process that was killed while writing left behind. Only for who holds the run's lock."""
        for temporary in self.directory.glob(f".step-*{SUFFIX}.tmp"):
            temporary.unlink()

    def newest(self, on_skip: OnSkip = lambda path, reason: None) -> tuple[Path, Checkpoint] | None:
        """The newest good checkpoint, or None when there is no checkpoint file at all.

        ``on_skip`` hears about each damaged one, once a good one is found. Raises DataError when all are damaged.
        """
        damaged: dict[Path, Problem] = {}
        for path in self.paths():
            try:
                found = path, load(path)
            except DataError as error:
                damaged[path] = error.problems[0]
                continue
            for skipped, problem in damaged.items():
                on_skip(skipped, problem.rule)
            return found
        if damaged:
            source = "no checkpoint can be used; restore one from a backup, or start a new run"
            raise DataError(damaged.values(), source=source)
        return None

    def _not_written(self, path: Path, error: OSError) -> str:
        older = next((p for p in self.paths() if p != path), None)
        kept = f"The newest checkpoint before it is {older}." if older else "There is no older checkpoint."
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if error.errno == errno.ENOSPC:
            reason = f"{error.strerror}: {gib(shutil.disk_usage(self.directory).free)} are free"
        again = "resume the run" if older else "start again"
        return f"checkpoint {path} could not be written ({reason}). {kept} Free some disk space, then {again}."


def load(path: Path) -> Checkpoint:
    """Read one checkpoint onto the CPU. Raises DataError when it is damaged or something else."""
    payload = read_tree(path)
    if payload.get("format") != FORMAT:
        raise DataError(Problem("checkpoint", str(path), f"is not a vramplan checkpoint of format {FORMAT}"))
    for name, kinds in _ENTRIES.items():
        if name not in payload:
            raise DataError(Problem("checkpoint", str(path), f"has no entry '{name}'"))
        if type(payload[name]) not in kinds:
            raise DataError(Problem("checkpoint", str(path), f"has a wrong entry '{name}'"))
    if step_of(path) not in (-1, payload["step"]):
        raise DataError(Problem("checkpoint", str(path), f"was renamed: it is of step {payload['step']}"))
    return Checkpoint(**{name: payload[name] for name in _ENTRIES})


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """State that does not fit the model or optimizer it is loaded into is an error of the checkpoint: DataError."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(Problem("checkpoint", str(path), f"does not fit its own configuration ({reason})")) from None


def all_finite(model: nn.Module) -> bool:
    """Whether every weight is a number. Needs no memory: a sum over values that are not is not finite either."""
    return bool(torch.stack([p.detach().sum(dtype=torch.float32) for p in model.parameters()]).isfinite().all())


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


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for a file that has none."""
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
