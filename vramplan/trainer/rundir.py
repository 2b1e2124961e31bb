"""The run directory: what a run leaves behind, who may write into it, and whether a resumed run is still the same.

RUN/config.toml             the resolved configuration
RUN/run.json                versions, device and data of each session that worked on the run
RUN/metrics.jsonl           one line per logged step and evaluation
RUN/checkpoints/            the newest checkpoints and the best: step-000250.safetensors
RUN/.lock                   held by the process that is training
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import __version__
from ..errors import ConfigError, DataError, Problem
from ..runconfig import RunConfig
from .checkpoint import CheckpointFolder, step_of
from .lock import in_use, locked
from .metrics import CONFIG, FACTS, METRICS, anything_done, read_metrics
from .schedule import first_difference
from .shards import MANIFEST, ShardSet
from .split import Split

SECTIONS = ("model", "step", "train", "data")
"""The sections that make a run what it is. ``[plan]`` only says what was expected of it."""

SPLIT = frozenset(
    {
        "step.batch_size", "step.grad_accum", "step.loss", "step.loss_chunk_tokens", "step.checkpointing",
        "train.eval_batches", "train.guard",
    }
)  # fmt: skip
"""How the same tokens per step are computed. A resumed run may change these: its memory, not what it computes."""

LENGTH = frozenset(
    {"train.schedule", "train.max_steps", "train.token_budget", "train.min_learning_rate", "train.decay_fraction"}
)
"""How far a run goes, and at which learning rates. A resumed run may change these if all it has done stays the same."""

ASIDE = frozenset({"train.max_hours", "train.track"})
"""What no step depends on."""


class RunDirectory:
    """Paths inside one run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / CONFIG
        self.facts = self.path / FACTS
        self.metrics = self.path / METRICS
        self.checkpoints = self.path / "checkpoints"

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """Raise DataError if :meth:`claimed` would; creates and changes nothing."""
        if in_use(self.path):
            self._busy()
        self._check_same(config) if resume else self._check_free(config)

    @contextlib.contextmanager
    def claimed(self, config: RunConfig, *, resume: bool) -> Iterator[None]:
        """Hold the directory for a new run, or for the run it holds, while the block lasts.

        A ``config.toml`` with the same content may already lie in the directory of a new run. A new run that ends
        before its first line or checkpoint leaves nothing behind. Raises DataError when the directory holds another
        run, none to resume or one of another configuration (naming each difference), when another process works on it,
        or when it cannot be written.
        """
        self.check(config, resume=resume)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.path, self._busy))
                self._check_same(config) if resume else self._check_free(config)  # another may have been quicker
                before = {self.config.name} if self._text(self.config) == config.to_toml() else set()
                self._sweep(config, resume=resume)
                self.checkpoints.mkdir(exist_ok=True)
                config.save(self.config)
            except OSError as error:
                rule = f"cannot be written ({error.strerror or error})"
                raise DataError(Problem("run_dir", str(self.path), rule, "name another directory")) from None
            try:
                yield
            except BaseException:
                if not resume and not self._used():
                    self._clear(keep=before)
                raise

    def _sweep(self, config: RunConfig, *, resume: bool) -> None:
        """Remove what a process that was killed left behind: half a file, or what a start that got nowhere wrote.

        A ``config.toml`` stays if it is the one that is wanted again: it may have been there before.
        """
        if not resume and not self._used() and self.sessions():
            self._clear(keep={self.config.name} if self._text(self.config) == config.to_toml() else set())
        for file in (self.config, self.facts, self.metrics):
            for temporary in self.path.glob(f".{file.name}*.tmp"):
                temporary.unlink()
        CheckpointFolder(self.checkpoints).sweep()

    def _clear(self, keep: set[str]) -> None:
        """Remove the files of a start that got nowhere."""
        with contextlib.suppress(OSError):
            for path in (self.config, self.facts, self.metrics):
                if path.name not in keep:
                    path.unlink(missing_ok=True)
            if self.checkpoints.name not in keep:
                self.checkpoints.rmdir()

    def _busy(self) -> NoReturn:
        rule = "is in use: another process is training there"
        raise DataError(Problem("run_dir", str(self.path), rule, "wait for it, or stop it"))

    def _check_free(self, config: RunConfig) -> None:
        remedy = "name another directory"
        nearest = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        if not nearest.is_dir():
            rule = "is a file" if nearest == self.path.absolute() else f"lies in {nearest}, which is a file"
            raise DataError(Problem("run_dir", str(self.path), rule, "name a directory"))
        if self.path.is_symlink() and not self.path.exists():
            raise DataError(Problem("run_dir", str(self.path), "is a link to nothing", remedy))
        if self._used() or self._holds_other_config(config):
            rule = "already holds a run"
            raise DataError(Problem("run_dir", str(self.path), rule, f"continue it with --resume, or {remedy}"))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise DataError(Problem("run_dir", str(self.path), f"cannot be written in {nearest}", remedy))

    def _holds_other_config(self, config: RunConfig) -> bool:
        """Whether there is a ``config.toml`` or ``run.json`` that somebody may want, not of a start that failed."""
        if self.sessions():
            return False
        if self.facts.exists():
            return True
        return self.config.exists() and self._text(self.config) != config.to_toml()

    @staticmethod
    def _text(path: Path) -> str | None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def _check_same(self, config: RunConfig) -> None:
        if not self.exists:
            rule = "holds no run to resume" if self.path.is_dir() else "does not exist"
            raise DataError(Problem("run_dir", str(self.path), rule, "start the run without --resume"))
        steps = max(map(step_of, CheckpointFolder(self.checkpoints).paths()), default=0)
        problems = config_differences(self.stored_config(), config, steps)
        if problems:
            raise DataError(problems, source=f"cannot resume {self.path} with another configuration")

    @property
    def exists(self) -> bool:
        """Whether there is a run here: its configuration, or a checkpoint that has it."""
        return self.config.exists() or bool(CheckpointFolder(self.checkpoints).paths())

    def stored_config(self) -> RunConfig:
        """The configuration the run was started with; its checkpoint's when ``config.toml`` is gone.

        Raises DataError when it cannot be read.
        """
        found = None if self.config.exists() else CheckpointFolder(self.checkpoints).newest()
        try:
            return found[1].config if found else RunConfig.load(self.config)
        except ConfigError as error:
            raise DataError(error.problems, source=str(self.config)) from None

    def sessions(self) -> list[dict[str, Any]]:
        """What ``run.json`` says of the sessions so far; empty before the first, or when it is damaged."""
        try:
            found = json.loads(self.facts.read_text(encoding="utf-8"))["sessions"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return []
        return found if isinstance(found, list) and all(isinstance(entry, dict) for entry in found) else []

    def add_session(self, session: dict[str, Any]) -> None:
        """Append a session to ``run.json``, atomically."""
        self._write_sessions([*self.sessions(), session])

    def amend_session(self, **values: Any) -> None:
        """Add to what is said of the present session, atomically."""
        *before, now = self.sessions() or [{}]
        self._write_sessions([*before, now | values])

    def splits(self, config: RunConfig) -> list[tuple[int, Split]]:
        """After which step memory made the run divide its steps how, in order; none if ``config`` divides them anew."""
        last = (self.sessions() or [{}])[-1]
        found = last.get("splits")
        if last.get("batch") != _batch(config) or not isinstance(found, list):
            return []
        sound = [
            entry for entry in found
            if isinstance(entry, list) and len(entry) == 3 and all(type(n) is int for n in entry)
            and min(entry[1:]) > 0 and entry[1] * entry[2] == _blocks(config)
        ]  # fmt: skip
        return [(step, Split(batch_size, grad_accum)) for step, batch_size, grad_accum in sorted(sound)]

    def best_saved(self, blocks: int | None = None) -> tuple[float, int] | None:
        """Validation loss and step of the best of the checkpoints that are there, by the metrics.

        Only evaluations of that many ``blocks`` are compared; of as many as the last one had unless it is given.
        """
        steps = {step_of(path) for path in CheckpointFolder(self.checkpoints).paths()}
        evaluations = [line for line in read_metrics(self.metrics) if line["kind"] == "evaluation"]
        if blocks is None and evaluations:
            blocks = evaluations[-1].get("blocks")
        return min(
            ((e["val_loss"], e["step"]) for e in evaluations
             if e["step"] in steps and e["val_loss"] is not None and e.get("blocks") == blocks),
            default=None,
        )  # fmt: skip

    def _write_sessions(self, sessions: list[dict[str, Any]]) -> None:
        content = {"format": 1, "sessions": sessions}
        temporary = self.facts.with_name(f".{self.facts.name}.tmp")
        with temporary.open("w", encoding="utf-8") as f:
            json.dump(content, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(self.facts)

    def _used(self) -> bool:
        """Whether anything came of the run that is here: a step, an evaluation, or a checkpoint."""
        written = self.metrics.is_dir() or (self.metrics.exists() and anything_done(self.metrics))
        return written or bool(CheckpointFolder(self.checkpoints).paths())


def describe_session(
    config: RunConfig, device: torch.device, shards: ShardSet, start_step: int, evaluation_blocks: int
) -> dict[str, Any]:
    """Versions, device and data of the session that begins now, and how it splits a step."""
    return {
        "started": time.time(),
        "start_step": start_step,
        "vramplan": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "batch": _batch(config),
        "evaluation_blocks": evaluation_blocks,
        "data_source": shards.manifest.source,
        "data_manifest": str((shards.directory / MANIFEST).resolve()),
        "data_fingerprint": shards.manifest.fingerprint,
    }


def _batch(config: RunConfig) -> str:
    return f"{config.step.batch_size} x {config.step.grad_accum}"


def _blocks(config: RunConfig) -> int:
    return config.step.batch_size * config.step.grad_accum


def device_name(device: torch.device) -> str:
    """``cuda:0 (NVIDIA GeForce RTX 4070)``, or just the type of device."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def session_notes(before: list[dict[str, Any]], now: dict[str, Any]) -> list[str]:
    """Why a resumed run may differ from one that was never interrupted."""
    if not before:
        return []
    digits = "losses may differ in the last digits"
    names = {"threads": "CPU threads", "device": "device", "torch": "torch", "batch": "batch_size x grad_accum"}
    effects = {words: (name, digits) for name, words in names.items()}
    effects["evaluation blocks"] = ("evaluation_blocks", "validation losses before and after are of different text")
    return [
        f"{words}: {before[-1][name]} before, {now[name]} now; {effect}"
        for words, (name, effect) in effects.items()
        if name in before[-1] and before[-1][name] != now[name]
    ]


def config_differences(stored: RunConfig, given: RunConfig, steps: int) -> list[Problem]:
    """Each field that defines a run of which ``steps`` are done, and differs: given value, and the run's.

    SPLIT is free at equal tokens per step, and LENGTH where those steps had the learning rates of the given one.
    """
    problems, same_tokens = [], stored.tokens_per_step == given.tokens_per_step
    why = _no_other_length(stored, given, steps)
    free = ASIDE | (SPLIT if same_tokens else set()) | (LENGTH if same_tokens and not why else set())
    for section in SECTIONS:
        before, after = getattr(stored, section).model_dump(), getattr(given, section).model_dump()
        for name, value in after.items():
            if before[name] != value and f"{section}.{name}" not in free:
                rule = f"is not the run's {name}={before[name]}"
                own = "leave it out to resume with the run's own, or start a new run"
                remedy = why if why and f"{section}.{name}" in LENGTH else own
                problems.append(Problem(f"{section}.{name}", value, rule, remedy))
    return problems


def _no_other_length(stored: RunConfig, given: RunConfig, steps: int) -> str:
    """Why a run with ``steps`` done cannot go on as the given one; empty if it can."""
    if given.total_steps < steps:
        return f"{steps} steps are done: use at least as many, or start a new run"
    differs = first_difference(stored, given, steps)
    if differs is None:
        return ""
    return (
        f"step {differs + 1} of the {steps} that are done would have had another learning rate: start a new run; with "
        'schedule="constant", or "wsd" until its decay begins, a run can take another length'
    )
