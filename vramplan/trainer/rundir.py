"""The run directory: what a run leaves behind, who may write into it, and whether a resumed run is still the same.

RUN/config.toml             the resolved configuration
RUN/run.json                versions, device and data of each session that worked on the run
RUN/metrics.jsonl           one line per logged step and evaluation
RUN/checkpoints/*.pt        the newest checkpoints
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import ConfigError, DataError, Problem
from ..runconfig import RunConfig
from .checkpoint import CheckpointFolder
from .shards import MANIFEST, ShardSet

SECTIONS = ("model", "step", "train", "data")
"""The sections that make a run what it is. ``[plan]`` only says what was expected of it."""


class RunDirectory:
    """Paths inside one run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.facts = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"

    def create(self, config: RunConfig) -> None:
        """Claim the directory for a new run. A ``config.toml`` with the same content may already lie there.

        Raises DataError when it holds another run, or cannot be a directory.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DataError(Problem("run_dir", str(self.path), "is a file", "name a directory"))
        if self._used() or (self.config.exists() and self.config.read_text(encoding="utf-8") != config.to_toml()):
            remedy = "continue it with --resume, or name another directory"
            raise DataError(Problem("run_dir", str(self.path), "already holds a run", remedy))
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            config.save(self.config)
        except OSError as error:
            rule = f"cannot be written ({error.strerror or error})"
            raise DataError(Problem("run_dir", str(self.path), rule, "name another directory")) from None

    def check_same(self, config: RunConfig) -> None:
        """Raise DataError unless the directory holds a run of exactly this configuration, naming each difference."""
        if not self.config.exists():
            rule = "holds no run to resume" if self.path.is_dir() else "does not exist"
            raise DataError(Problem("run_dir", str(self.path), rule, "start the run without --resume"))
        problems = config_differences(self.stored_config(), config)
        if problems:
            raise DataError(problems, source=f"cannot resume {self.path} with another configuration")

    def stored_config(self) -> RunConfig:
        """The configuration the run was started with. Raises DataError when it cannot be read."""
        try:
            return RunConfig.load(self.config)
        except ConfigError as error:
            raise DataError(error.problems, source=str(self.config)) from None

    def sessions(self) -> list[dict[str, Any]]:
        """What ``run.json`` says of the sessions so far; empty before the first, or when it is damaged."""
        try:
            found: list[dict[str, Any]] = json.loads(self.facts.read_text(encoding="utf-8"))["sessions"]
        except (OSError, ValueError, KeyError):
            return []
        return found

    def add_session(self, session: dict[str, Any]) -> None:
        """Append a session to ``run.json``, atomically."""
        content = {"format": 1, "sessions": [*self.sessions(), session]}
        temporary = self.facts.with_name(f".{self.facts.name}.tmp")
        with temporary.open("w", encoding="utf-8") as f:
            json.dump(content, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(self.facts)

    def _used(self) -> bool:
        return self.facts.exists() or self.metrics.exists() or bool(CheckpointFolder(self.checkpoints).paths())


def describe_session(device: torch.device, shards: ShardSet, start_step: int) -> dict[str, Any]:
    """Versions, device and data of the session that begins now."""
    return {
        "started": time.time(),
        "start_step": start_step,
        "vramplan": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "data_manifest": str((shards.directory / MANIFEST).resolve()),
        "data_fingerprint": shards.manifest.fingerprint,
    }


def device_name(device: torch.device) -> str:
    """``cuda:0 (NVIDIA GeForce RTX 4070)``, or just the type of device."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def session_notes(before: list[dict[str, Any]], now: dict[str, Any]) -> list[str]:
    """Why a resumed run may differ in its last digits from one that was never interrupted."""
    if not before:
        return []
    names = {"threads": "CPU threads", "device": "device", "torch": "torch"}
    return [
        f"{words}: {before[-1].get(name)} before, {now[name]} now; losses may differ in the last digits"
        for name, words in names.items()
        if before[-1].get(name) != now[name]
    ]


def config_differences(stored: RunConfig, given: RunConfig) -> list[Problem]:
    """Each field of the sections that define a run whose value differs: given value, and the run's."""
    problems = []
    for section in SECTIONS:
        before, after = getattr(stored, section).model_dump(), getattr(given, section).model_dump()
        for name, value in after.items():
            if before[name] != value:
                rule = f"is not the run's {name}={before[name]}"
                remedy = "resume with the run's own config.toml, or start a new run"
                problems.append(Problem(f"{section}.{name}", value, rule, remedy))
    return problems
