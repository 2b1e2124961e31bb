"""Where a resumed run goes on, and whether anything is left to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..runconfig import RunConfig
from .checkpoint import Checkpoint, CheckpointFolder
from .events import CheckpointSkipped, OnEvent
from .recorder import last_evaluation
from .rundir import RunDirectory, config_differences


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How :func:`~vramplan.trainer.loop.train` ended.

    ``signal_number`` is set when ``interrupted``; exit codes are 128 + that number.
    """

    run_dir: Path
    step: int
    total_steps: int
    tokens_seen: int
    last_loss: float | None
    best_val_loss: float | None
    interrupted: bool = False
    signal_number: int | None = None
    already_finished: bool = False


def newest_of_run(folder: CheckpointFolder, config: RunConfig, on_event: OnEvent) -> tuple[Path, Checkpoint] | None:
    """The newest good checkpoint of this configuration; damaged ones are set aside. Raises DataError for another's."""

    def skip(path: Path, reason: str) -> None:
        truly = reason.startswith(("is damaged", "was renamed"))  # not what another version or another day may read
        on_event(CheckpointSkipped(path=folder.set_aside(path) if truly else path, reason=reason))

    found = folder.newest(skip)
    if found is not None:
        problems = config_differences(found[1].config, config, found[1].step)
        if problems:
            raise DataError(problems, source=f"the configuration is not the one that {found[0]} was trained with")
    return found


def finished_before(config: RunConfig, run: RunDirectory, checkpoint: Checkpoint) -> TrainResult | None:
    """The result of a run that has nothing left to do: its last step is saved and evaluated."""
    evaluation = last_evaluation(run.metrics)
    if checkpoint.step < config.total_steps or not evaluation or evaluation["step"] < config.total_steps:
        return None
    return TrainResult(
        run_dir=run.path,
        step=checkpoint.step,
        total_steps=config.total_steps,
        tokens_seen=checkpoint.tokens_seen,
        last_loss=evaluation["train_loss"],
        best_val_loss=evaluation["best_val_loss"],
        already_finished=True,
    )
